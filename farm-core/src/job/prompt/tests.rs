use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::job::spec::{GuidanceScale, MAX_PRIORITY};

fn read(file: impl AsRef<[u8]>) -> PromptFile {
    let mut parser = PromptParser::new();
    parser.push(file.as_ref());
    parser.finish()
}

/// The only error of a file whose first line is bad.
#[track_caller]
fn error_of(line: &str) -> (u64, String) {
    let file = read(line);
    assert_eq!((file.requests.len(), file.bad_lines, file.errors.len()), (0, 1, 1), "{file:?}");
    assert_eq!(file.errors[0].line, 1);
    (file.errors[0].column, file.errors[0].reason.clone())
}

#[track_caller]
fn refused(line: &str, column: u64, reason: &str) {
    assert_eq!(error_of(line), (column, reason.to_owned()), "{line}");
}

#[test]
fn every_key_is_read() {
    let line = r#"{"prompt":"a","negative_prompt":"b","width":96,"height":64,"num_frames":13,"num_inference_steps":2,
        "guidance_scale":[1,2.5],"seed":18446744073709551615,"id":"c","priority":3,"model":"m","labels":{"k":"v"}}"#;
    let file = read(line.replace('\n', ""));
    let expected = RenderRequest {
        prompt: "a".into(),
        negative_prompt: Some("b".into()),
        width: Some(96),
        height: Some(64),
        num_frames: Some(13),
        num_inference_steps: Some(2),
        guidance_scale: Some(GuidanceScale::PerStep(vec![1.0, 2.5])),
        seed: Some(u64::MAX),
        id: Some("c".into()),
        priority: Some(3),
        model: Some("m".into()),
        labels: BTreeMap::from([("k".to_owned(), "v".to_owned())]),
        after: Vec::new(),
        require: BTreeMap::new(),
    };
    assert_eq!(file, PromptFile { requests: vec![(1, expected)], errors: vec![], bad_lines: 0 });
}

#[test]
fn blank_lines_crlf_bom_and_a_missing_last_newline_are_accepted() {
    let file = read("\u{feff}{\"prompt\":\"a\"}\r\n\r\n \t \n{\"prompt\":\"b\"}");
    let lines: Vec<_> = file.requests.iter().map(|(line, request)| (*line, request.prompt.as_str())).collect();
    assert_eq!((lines, file.bad_lines), (vec![(1, "a"), (4, "b")], 0));
}

#[test]
fn an_empty_prompt_is_legal() {
    assert_eq!(read(r#"{"prompt":""}"#).requests.len(), 1);
}

#[test]
fn a_file_without_prompts_is_refused() {
    for empty in ["", "\n", "\u{feff}", "\u{feff}\r\n", " \n\t\r\n\n"] {
        refused(empty, 1, "no prompts");
    }
}

#[test]
fn errors_point_at_the_key_or_value() {
    refused(r#"{"prompt":"a","sede":1}"#, 15, r#"unknown key "sede", did you mean "seed"?"#);
    refused(r#"{"prompt":"a","Width":64}"#, 15, r#"unknown key "Width", did you mean "width"?"#);
    assert!(error_of(r#"{"prompt":"a","fps":1}"#).1.starts_with(r#"unknown key "fps", known are prompt, "#));
    refused(r#"{"prompt":1}"#, 11, r#""prompt" must be a string, found a number"#);
    refused(r#"{"prompt":null}"#, 11, r#""prompt" must be a string, found null, leave the key out for the default"#);
    refused(r#"{"seed":1}"#, 1, r#""prompt" is missing"#);
    refused(r#"{"prompt":"a","width":65}"#, 23, "width 65 is not a multiple of 16 in 16..=4096");
    refused(r#"{"prompt":"a","width":0}"#, 23, "width 0 is not a multiple of 16 in 16..=4096");
    refused(r#"{"prompt":"a","height":64.0}"#, 24, r#""height" must be a whole number from 16 to 4096, found 64.0"#);
    refused(r#"{"prompt":"a","num_frames":24}"#, 28, "num_frames 24 is not 6k+1 in 1..=6001 (1, 7, 13, 19, …)");
    refused(r#"{"prompt":"a","num_inference_steps":0}"#, 37, "num_inference_steps 0 is not in 1..=1000");
    refused(
        r#"{"prompt":"a","seed":-1}"#,
        22,
        r#""seed" must be a whole number from 0 to 18446744073709551615, found -1"#,
    );
    refused(r#"{"prompt":"a","id":""}"#, 20, r#""id" is empty"#);
    refused(r#"{"prompt":"a","id":"a\u0007"}"#, 20, r#""id" has a control character"#);
    refused(r#"{"prompt":"a","labels":[]}"#, 24, r#""labels" must be an object of strings, found a list"#);
    refused(r#"{"prompt":"a","labels":{"k":1}}"#, 29, r#"label "k" must be a string, found a number"#);
    refused(r#"{"prompt":"a","labels":{"k":"","k":""}}"#, 32, r#"duplicate key "k""#);
}

#[test]
fn guidance_is_a_finite_number_or_one_for_each_step() {
    let guidance =
        |steps: &str, value: &str| error_of(&format!(r#"{{"prompt":"a"{steps},"guidance_scale":{value}}}"#)).1;
    assert_eq!(guidance("", "-0.5"), "guidance_scale -0.5 is not in 0..=100");
    assert_eq!(guidance("", "1e999"), "guidance_scale 1e999 is not in 0..=100");
    assert_eq!(guidance("", "[]"), "guidance_scale is an empty list");
    assert_eq!(guidance("", "[1,true]"), "guidance_scale must list numbers, found true or false");
    assert_eq!(guidance("", "\"6\""), "\"guidance_scale\" must be a number or a list of numbers, found a string");
    assert_eq!(guidance("", "NaN"), "NaN is not a finite number");
    assert_eq!(guidance("", "-Infinity"), "Infinity is not a finite number");
    refused(
        r#"{"guidance_scale":[1,2],"prompt":"a","num_inference_steps":3}"#,
        19,
        "guidance_scale has 2 values for 3 steps",
    );
    refused(r#"{"prompt":"a","guidance_scale":[1, 101]}"#, 36, "guidance_scale 101 is not in 0..=100");
}

#[test]
fn broken_json_is_said_in_plain_words() {
    refused(r#"{"prompt":"a""#, 14, "line ends while parsing an object");
    refused(r#"{"prompt":"a"} x"#, 16, "trailing characters");
    refused(r#"{"prompt" "a"}"#, 11, "expected :");
    refused(r#"["prompt"]"#, 1, "expected a json object, found a list");
    refused(r#"  "prompt""#, 3, "expected a json object, found a string");
    refused("prompt", 1, "expected value");
    refused(r#"{"prompt":"\ud800"}"#, 18, "unexpected end of hex escape");
    let (_, reason) = error_of("{\"prompt\":\"a\tb\"}");
    assert_eq!(reason, "control character (\\u0000-\\u001f) found while parsing a string");
}

#[test]
fn duplicate_keys_are_refused_even_when_escaped() {
    refused(r#"{"prompt":"a","prompt":"b"}"#, 15, r#"duplicate key "prompt""#);
    refused(r#"{"prompt":"a","\u0070rompt":"b"}"#, 15, r#"duplicate key "prompt""#);
}

#[test]
fn columns_count_characters() {
    refused(r#"{"prompt":"äöü€🦀","width":1}"#, 27, "width 1 is not a multiple of 16 in 16..=4096");
    let file = read(b"{\"prompt\":\"\xC3\xA4\xFF\"}");
    assert_eq!((file.errors[0].column, file.errors[0].reason.as_str()), (13, "invalid utf-8"));
    assert_eq!(read("\u{feff}{\"prompt\":1}").errors[0].column, 11);
}

#[test]
fn an_id_names_one_line_only() {
    let file = read(concat!(
        r#"{"prompt":"a","id":"x"}"#,
        "\n",
        r#"{"prompt":"b","id":"y","width":1}"#,
        "\n",
        r#"{"prompt":"c","id":"x"}"#,
        "\n",
        r#"{"prompt":"d","id":"y"}"#,
    ));
    let errors: Vec<_> = file.errors.iter().map(|e| (e.line, e.column, e.reason.as_str())).collect();
    assert_eq!(
        errors,
        [
            (2, 32, "width 1 is not a multiple of 16 in 16..=4096"),
            (3, 20, r#"duplicate id "x", first used on line 1"#),
            (4, 20, r#"duplicate id "y", first used on line 2"#),
        ]
    );
    assert_eq!(file.requests.len(), 1);
}

#[test]
fn a_line_over_64_kib_is_skipped_without_storing_it() {
    let line = |length: usize| {
        let empty = r#"{"prompt":""}"#;
        empty.replace("\"\"", &format!("\"{}\"", "a".repeat(length - empty.len())))
    };
    let file = read(format!("\u{feff}{}\r\n{}\n{{\"prompt\":\"b\"}}\n", line(MAX_LINE_BYTES), line(MAX_LINE_BYTES)));
    assert_eq!((file.requests.len(), file.bad_lines), (3, 0));

    let mut parser = PromptParser::new();
    for _ in 0..100 {
        parser.push(&[b'a'; 10_000]);
        assert!(parser.line.capacity() <= 2 * RAW_LIMIT);
    }
    parser.push(b"\n{\"prompt\":\"b\"}\n");
    let file = parser.finish();
    assert_eq!((file.requests[0].0, file.bad_lines), (2, 1));
    assert_eq!(file.errors[0].column, MAX_LINE_BYTES as u64 + 1);
    assert_eq!(file.errors[0].reason, "line is longer than 64 KiB");
}

#[test]
fn only_the_first_errors_are_kept_but_all_are_counted() {
    let file = read("{}\n".repeat(MAX_LINE_ERRORS + 5));
    assert_eq!((file.errors.len(), file.bad_lines), (MAX_LINE_ERRORS, MAX_LINE_ERRORS as u64 + 5));
}

#[test]
fn hostile_text_is_escaped_and_cut_in_errors() {
    let (_, reason) = error_of(&format!(r#"{{"prompt":"a","\u001b[31m{}":1}}"#, "x".repeat(500)));
    assert!(reason.starts_with(r#"unknown key "\u{1b}[31mxxx"#) && reason.len() < 400, "{reason}");
}

#[test]
fn deep_nesting_is_an_error_not_a_crash() {
    let deep = "[".repeat(30_000) + &"]".repeat(30_000);
    refused(&format!(r#"{{"prompt":{deep}}}"#), 11, r#""prompt" must be a string, found a list"#);
}

/// Lines near the format: most random bytes die at the first character.
fn lines() -> impl Strategy<Value = String> {
    let key = prop_oneof![proptest::sample::select(vec!["prompt", "width", "num_frames", "id", "labels", "sede", "ä"])];
    let value = proptest::sample::select(vec![
        "\"a\"",
        "64",
        "25",
        "-1",
        "1e999",
        "{}",
        "[1,2]",
        "null",
        "\"\\ud800\"",
        "{\"k\":\"v\"}",
        "\"€\"",
        "tru",
        "",
    ]);
    let object = proptest::collection::vec((key, value), 0..5).prop_map(|entries| {
        let entries: Vec<_> = entries.iter().map(|(key, value)| format!("\"{key}\":{value}")).collect();
        format!("{{{}}}", entries.join(","))
    });
    proptest::collection::vec(prop_oneof![object, Just(String::new()), "\\PC{0,20}"], 0..8)
        .prop_map(|lines| lines.join("\n"))
}

fn requests() -> impl Strategy<Value = RenderRequest> {
    let scales = 0.0..=100.0f64;
    let guidance = prop_oneof![
        scales.clone().prop_map(GuidanceScale::Constant),
        proptest::collection::vec(scales, 1..9).prop_map(GuidanceScale::PerStep)
    ];
    let size = || proptest::option::of((1..=256u32).prop_map(|n| n * 16));
    let strings = (any::<String>(), any::<Option<String>>(), proptest::option::of("\\PC{1,60}"));
    let numbers = (size(), size(), proptest::option::of((0..=1000u32).prop_map(|k| 6 * k + 1)), any::<Option<u64>>());
    let labels = proptest::collection::btree_map(any::<String>(), any::<String>(), 0..4);
    let priority = proptest::option::of(0..=MAX_PRIORITY);
    let after = proptest::collection::vec("[a-z]{1,9}", 0..4);
    (strings, numbers, proptest::option::of(guidance), priority, labels, after).prop_map(
        |(
            (prompt, negative_prompt, id),
            (width, height, num_frames, seed),
            guidance_scale,
            priority,
            labels,
            after,
        )| {
            let num_inference_steps = match &guidance_scale {
                Some(GuidanceScale::PerStep(list)) => Some(list.len() as u32),
                _ => None,
            };
            RenderRequest {
                prompt,
                negative_prompt,
                width,
                height,
                num_frames,
                num_inference_steps,
                guidance_scale,
                seed,
                model: id.clone(),
                id,
                priority,
                require: labels.clone(),
                labels,
                after,
            }
        },
    )
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400), near in lines()) {
        for file in [read(&bytes), read(&near)] {
            prop_assert!(file.bad_lines > 0 || !file.requests.is_empty());
            prop_assert!(file.errors.iter().all(|e| e.line > 0 && e.column > 0 && !e.reason.is_empty()));
        }
    }

    #[test]
    fn the_cut_into_pieces_makes_no_difference(file in lines(), bom in any::<bool>(), step in 1..20usize) {
        let file = if bom { format!("\u{feff}{file}") } else { file };
        let mut parser = PromptParser::new();
        for piece in file.as_bytes().chunks(step) {
            parser.push(piece);
        }
        prop_assert_eq!(parser.finish(), read(&file));
    }

    #[test]
    fn a_valid_request_comes_back_as_it_was(request in requests()) {
        let line = serde_json::to_string(&request).unwrap();
        prop_assert_eq!(read(line).requests, [(1, request)]);
    }
}
