use super::*;

#[derive(serde::Deserialize)]
struct Case {
    text: String,
    ids: Vec<u32>,
}

fn golden(name: &str) -> Vec<u8> {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens/tokenizer").join(name);
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn varint(mut value: u64) -> Vec<u8> {
    let mut out = Vec::new();
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
    out
}

fn number(field: u64, value: u64) -> Vec<u8> {
    [varint(field << 3), varint(value)].concat()
}

fn bytes(field: u64, value: &[u8]) -> Vec<u8> {
    [varint(field << 3 | 2), varint(value.len() as u64), value.to_vec()].concat()
}

fn piece(text: &str, score: f32, kind: u64) -> Vec<u8> {
    let score = [varint(2 << 3 | 5), score.to_le_bytes().to_vec()].concat();
    bytes(1, &[bytes(1, text.as_bytes()), score, number(3, kind)].concat())
}

/// A model of a few pieces, some more, and specs given as encoded fields.
fn tiny(more: &[Vec<u8>], trainer: &[Vec<u8>], normalizer: &[Vec<u8>]) -> Vec<u8> {
    let mut model = [piece("<pad>", 0.0, 3), piece("</s>", 0.0, 3), piece("<unk>", 0.0, 2)].concat();
    let normal =
        [("▁", -2.0), ("a", -3.0), ("b", -3.5), ("ab", -4.0), ("▁ab", -5.0), ("aa", -6.0), ("é", -4.5), ("c", -7.0)];
    model.extend(normal.iter().flat_map(|(text, score)| piece(text, *score, 1)));
    model.extend(more.concat());
    model.extend(bytes(2, &trainer.concat()));
    model.extend(bytes(3, &normalizer.concat()));
    model
}

#[track_caller]
fn check(model: &[u8], cases: &[(&str, &[u32])]) {
    let model = SpieceModel::parse(model).unwrap();
    for (text, ids) in cases {
        assert_eq!(model.encode(text).unwrap(), *ids, "{text:?}");
    }
}

#[test]
fn ids_are_those_of_the_sentencepiece_library() {
    let model = SpieceModel::parse(&golden("spiece.model")).unwrap();
    let cases = String::from_utf8(golden("cases.jsonl")).unwrap();
    let mut count = 0;
    for case in cases.lines().map(|line| serde_json::from_str::<Case>(line).unwrap()) {
        assert_eq!(model.encode(&case.text).unwrap(), case.ids, "{:?}", case.text);
        count += 1;
    }
    assert_eq!((count, model.eos()), (500, 1));
}

// Expected ids of the tests below are the library's for the same models.

#[test]
fn unknown_runs_are_one_id_and_special_pieces_are_text() {
    check(
        &tiny(&[], &[], &[]),
        &[
            ("", &[]),
            (" ", &[]),
            ("  ab  a ", &[7, 3, 4]),
            ("xyz", &[3, 2]),
            ("axxb", &[3, 4, 2, 5]),
            ("abx aaé", &[7, 2, 3, 8, 9]),
            ("<unk></s>", &[3, 2]),
            ("a\0b", &[3, 4, 2, 5]),
            ("▁ab", &[3, 7]),
            ("ca", &[3, 10, 4]),
        ],
    );
}

#[test]
fn byte_fallback_spells_unknown_characters_out() {
    let byte_pieces: Vec<_> = (0..256).map(|byte| piece(&format!("<0x{byte:02X}>"), 0.0, 6)).collect();
    let model = tiny(&byte_pieces, &[number(35, 1)], &[]);
    check(
        &model,
        &[
            ("xyz", &[3, 131, 132, 133]),
            ("axxb", &[3, 4, 131, 131, 5]),
            ("a\0b", &[3, 4, 11, 5]),
            ("[A]b", &[3, 102, 76, 104, 5]),
        ],
    );
    let message = SpieceModel::parse(&tiny(&byte_pieces[1..], &[number(35, 1)], &[])).err().unwrap().to_string();
    assert!(message.contains("without the piece <0x00>"), "{message}");
}

#[test]
fn user_defined_pieces_are_never_split_and_unused_ones_never_made() {
    let model = tiny(&[piece("[A]", 0.0, 4), piece("aab", -1.0, 5)], &[], &[]);
    check(&model, &[("[A]b a[A", &[3, 11, 5, 3, 4, 2]), ("aab", &[3, 4, 6])]);
}

#[test]
fn whitespace_rules_of_the_file_are_kept() {
    check(
        &tiny(&[], &[number(24, 1)], &[]),
        &[("ab", &[6, 3]), ("  ab  a ", &[6, 3, 4, 3]), (" ", &[]), ("▁ab", &[7, 3])],
    );
    check(&tiny(&[], &[], &[number(4, 0)]), &[("  ab  a ", &[3, 3, 7, 3, 3, 4, 3]), (" ", &[3, 3])]);
    let raw = [number(3, 0), number(4, 0), number(5, 0)];
    check(&tiny(&[], &[], &raw), &[("  ab  a ", &[2, 6, 2, 4, 2]), (" ", &[2]), ("▁ab", &[7])]);
}

#[test]
fn other_models_and_contradictory_pieces_are_refused() {
    let refusals = [
        (tiny(&[], &[number(3, 2)], &[]), "a bpe model"),
        (tiny(&[], &[number(3, 77)], &[]), "a strange model"),
        (tiny(&[piece("a", 0.0, 1)], &[], &[]), "piece a is defined twice"),
        (tiny(&[piece("", 0.0, 1)], &[], &[]), "piece 11 is empty"),
        (tiny(&[piece("q\0", 0.0, 1)], &[], &[]), "zero byte"),
        (tiny(&[piece("q", f32::NAN, 1)], &[], &[]), "has score NaN"),
        (tiny(&[piece("q", 0.0, 2)], &[], &[]), "unknown piece is defined twice"),
        (tiny(&[piece("q", 0.0, 9)], &[], &[]), "unknown type 9"),
        (tiny(&[piece("<0x00>", 0.0, 6)], &[], &[]), "without byte fallback"),
        (tiny(&[], &[bytes(47, b"<end>")], &[]), "no control piece <end>"),
        (piece("a", 0.0, 1), "no unknown piece"),
        (tiny(&[], &[], &[bytes(2, &[8, 0, 0, 0, 1])]), "character map's trie"),
        (tiny(&[], &[], &[bytes(2, &[4, 0, 0, 0, 1, 1, 1, 1, 65])]), "last replacement has no end"),
        (b"{}".to_vec(), "no SentencePiece model"),
    ];
    for (model, expected) in refusals {
        let message = SpieceModel::parse(&model).err().map(|error| error.to_string()).unwrap_or_default();
        assert!(message.contains(expected), "{message:?} instead of {expected:?}");
    }
}

#[test]
fn a_damaged_file_never_panics() {
    let model = golden("spiece.model");
    // A cut at every place in the head, where messages are short, and some in the rest.
    for end in (0..200).chain((200..model.len()).step_by(4999)) {
        let _ = SpieceModel::parse(&model[..end]).map(|model| model.encode("a ｆｕｌｌ width"));
    }
    let mut state = 1u64;
    for _ in 0..100 {
        let mut damaged = model.clone();
        for _ in 0..20 {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let place = (state >> 33) as usize % damaged.len();
            damaged[place] = state as u8;
        }
        let _ = SpieceModel::parse(&damaged).map(|model| model.encode("the ﬁne ｆｕｌｌ width ½ é\u{301} 赤い"));
    }
}
