//! `spiece.model`: a SentencePiece unigram model, read and applied as the sentencepiece library does.
//!
//! Own code rather than the tokenizers crate's unigram model, because that differs in places that prompts reach: its
//! normaliser maps whole grapheme clusters or single characters where sentencepiece takes the longest match at each
//! byte, and whitespace is trimmed at another moment. Scores are added in the same types and order, so ties fall alike.

use std::collections::HashMap;
use std::ops::Range;

/// U+2581, which stands for a space inside pieces.
const SPACE_SYMBOL: &str = "\u{2581}";
/// Below the lowest score by this much lies the score of an unknown character.
const UNKNOWN_PENALTY: f32 = 10.0;
/// Bound on the text after normalisation. A prompt has at most 64 KiB, and no published map makes 16 bytes of one.
const MAX_NORMALIZED_BYTES: usize = 1 << 20;
const MAX_PIECES: usize = 1 << 20;
const MAX_PIECE_BYTES: usize = 8000;

#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct SpieceError(String);

fn error<T>(message: impl Into<String>) -> Result<T, SpieceError> {
    Err(SpieceError(message.into()))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PieceKind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

/// A parsed and checked model.
pub struct SpieceModel {
    pieces: Trie,
    kinds: Vec<PieceKind>,
    scores: Vec<f32>,
    unknown: u32,
    eos: u32,
    /// Piece of every byte value, if unknown characters are spelled out in bytes.
    bytes: Option<Box<[u32; 256]>>,
    min_score: f32,
    max_score: f32,
    normalizer: Normalizer,
}

struct Normalizer {
    charsmap: Option<CharsMap>,
    /// Never normalised.
    user_defined: Trie,
    dummy_prefix: bool,
    remove_extra_spaces: bool,
    escape_spaces: bool,
    space_as_suffix: bool,
}

impl SpieceModel {
    /// Parses the bytes of a `spiece.model`.
    pub fn parse(bytes: &[u8]) -> Result<Self, SpieceError> {
        let mut pieces: Vec<RawPiece> = Vec::new();
        let mut trainer = TrainerSpec::default();
        let mut normalizer = NormalizerSpec::default();
        for field in Fields::new(bytes) {
            match field? {
                (1, Value::Bytes(piece)) => pieces.push(RawPiece::parse(piece)?),
                (2, Value::Bytes(spec)) => trainer.merge(spec)?,
                (3, Value::Bytes(spec)) => normalizer.merge(spec)?,
                _ => {}
            }
            if pieces.len() > MAX_PIECES {
                return error(format!("more than {MAX_PIECES} pieces"));
            }
        }
        if trainer.model_type != 1 {
            let kind = ["", "unigram", "bpe", "word", "char"].get(trainer.model_type as usize).unwrap_or(&"unknown");
            return error(format!("a {kind} model, only unigram models are supported"));
        }
        Self::build(pieces, &trainer, normalizer)
    }

    fn build(pieces: Vec<RawPiece>, trainer: &TrainerSpec, normalizer: NormalizerSpec) -> Result<Self, SpieceError> {
        let mut trie = Trie::default();
        let mut user_defined = Trie::default();
        let mut reserved: HashMap<&[u8], u32> = HashMap::new();
        let mut unknown = None;
        // The limits that the library starts from, kept by a model without a normal piece.
        let (mut min_score, mut max_score) = (f32::MAX, f32::MIN_POSITIVE);
        for (id, piece) in pieces.iter().enumerate() {
            let id = id as u32;
            let name = String::from_utf8_lossy(&piece.text);
            if piece.text.is_empty() || piece.text.len() >= MAX_PIECE_BYTES || piece.text.contains(&0) {
                return error(format!("piece {id} is empty, longer than {MAX_PIECE_BYTES} bytes or has a zero byte"));
            }
            if !piece.score.is_finite() {
                return error(format!("piece {id} ({name}) has score {}", piece.score));
            }
            let added = match piece.kind {
                PieceKind::Normal | PieceKind::UserDefined | PieceKind::Unused => trie.insert(&piece.text, id),
                _ => reserved.insert(&piece.text, id).is_none(),
            };
            if !added {
                return error(format!("piece {name} is defined twice"));
            }
            match piece.kind {
                PieceKind::Normal => {
                    min_score = min_score.min(piece.score);
                    max_score = max_score.max(piece.score);
                }
                PieceKind::UserDefined => {
                    user_defined.insert(&piece.text, id);
                }
                PieceKind::Unknown => {
                    if unknown.replace(id).is_some() {
                        return error("the unknown piece is defined twice");
                    }
                }
                PieceKind::Byte if !trainer.byte_fallback => {
                    return error(format!("byte piece {name} in a model without byte fallback"));
                }
                PieceKind::Byte | PieceKind::Control | PieceKind::Unused => {}
            }
        }
        let Some(unknown) = unknown else { return error("no unknown piece") };
        let eos = match reserved.get(trainer.eos_piece.as_slice()) {
            Some(&id) if pieces[id as usize].kind == PieceKind::Control => id,
            _ => {
                return error(format!("no control piece {}", String::from_utf8_lossy(&trainer.eos_piece)));
            }
        };
        let bytes = if trainer.byte_fallback {
            let mut bytes = Box::new([0; 256]);
            for (value, id) in bytes.iter_mut().enumerate() {
                let name = format!("<0x{value:02X}>");
                match reserved.get(name.as_bytes()) {
                    Some(&piece) if pieces[piece as usize].kind == PieceKind::Byte => *id = piece,
                    _ => return error(format!("byte fallback without the piece {name}")),
                }
            }
            Some(bytes)
        } else {
            None
        };
        Ok(Self {
            pieces: trie,
            kinds: pieces.iter().map(|piece| piece.kind).collect(),
            scores: pieces.iter().map(|piece| piece.score).collect(),
            unknown,
            eos,
            bytes,
            min_score,
            max_score,
            normalizer: Normalizer {
                charsmap: normalizer.charsmap.as_deref().map(CharsMap::parse).transpose()?,
                user_defined,
                dummy_prefix: normalizer.add_dummy_prefix,
                remove_extra_spaces: normalizer.remove_extra_whitespaces,
                escape_spaces: normalizer.escape_whitespaces,
                space_as_suffix: trainer.treat_whitespace_as_suffix,
            },
        })
    }

    /// Id of the end-of-sentence piece, which [`SpieceModel::encode`] does not add.
    pub fn eos(&self) -> u32 {
        self.eos
    }

    /// Number of pieces.
    pub fn len(&self) -> usize {
        self.kinds.len()
    }

    /// Whether there are no pieces. Never, since a model without an unknown piece is refused.
    pub fn is_empty(&self) -> bool {
        self.kinds.is_empty()
    }

    /// Ids of `text`, as the library's `encode` gives them. Special pieces written out in the text are plain text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, SpieceError> {
        let normalized = self.normalizer.normalize(text)?;
        let mut ids = Vec::new();
        let mut after_unknown = false;
        for (id, range) in self.best_path(&normalized) {
            let is_unknown = id == self.unknown;
            match &self.bytes {
                Some(bytes) if is_unknown => ids.extend(normalized[range].iter().map(|&byte| bytes[byte as usize])),
                // A run of unknown characters is one unknown piece.
                _ if is_unknown && after_unknown => {}
                _ => ids.push(id),
            }
            after_unknown = is_unknown;
        }
        Ok(ids)
    }

    /// The pieces with the highest sum of scores (Viterbi), with the bytes they cover.
    fn best_path(&self, text: &[u8]) -> Vec<(u32, Range<usize>)> {
        #[derive(Clone, Copy)]
        struct Best {
            id: u32,
            score: f32,
            start: usize,
        }
        // The best path that ends at each byte.
        let mut ends: Vec<Option<Best>> = vec![None; text.len() + 1];
        let unknown_score = self.min_score - UNKNOWN_PENALTY;
        let mut start = 0;
        while start < text.len() {
            let till_here = ends[start].map_or(0.0, |best| best.score);
            let char_len = utf8_len(text[start]).min(text.len() - start);
            let mut has_single = false;
            // The candidate is compared in f64 and stored in f32, as in the library.
            let mut offer = |end: usize, id: u32, candidate: f64| {
                if ends[end].is_none_or(|best| candidate > f64::from(best.score)) {
                    ends[end] = Some(Best { id, score: candidate as f32, start });
                }
            };
            for (length, id) in self.pieces.prefixes(&text[start..]) {
                let candidate = match self.kinds[id as usize] {
                    PieceKind::Unused => continue,
                    // A bonus, so that it wins over being split.
                    PieceKind::UserDefined => f64::from(length as f32 * self.max_score) - 0.1 + f64::from(till_here),
                    _ => f64::from(self.scores[id as usize]) + f64::from(till_here),
                };
                offer(start + length, id, candidate);
                has_single |= length == char_len;
            }
            if !has_single {
                offer(start + char_len, self.unknown, f64::from(unknown_score + till_here));
            }
            start += char_len;
        }
        let mut path = Vec::new();
        let mut end = text.len();
        // Every character boundary was reached, by a piece or as unknown.
        while let Some(best) = ends[end].filter(|best| best.start < end) {
            path.push((best.id, best.start..end));
            end = best.start;
        }
        path.reverse();
        path
    }
}

impl Normalizer {
    /// Maps characters, then spaces: the library's order, in bytes.
    fn normalize(&self, text: &str) -> Result<Vec<u8>, SpieceError> {
        let mut input = text.as_bytes();
        if self.remove_extra_spaces {
            while let Some((b" ", used)) = self.next(input)? {
                input = &input[used..];
            }
        }
        let mut out = Vec::with_capacity(input.len() + 3);
        if input.is_empty() {
            return Ok(out);
        }
        let space = if self.escape_spaces { SPACE_SYMBOL.as_bytes() } else { b" " };
        if self.dummy_prefix && !self.space_as_suffix {
            out.extend(space);
        }
        let mut after_space = self.remove_extra_spaces;
        while let Some((mut mapped, used)) = self.next(input)? {
            input = &input[used..];
            while after_space && let Some(rest) = mapped.strip_prefix(b" ") {
                mapped = rest;
            }
            for &byte in mapped {
                if byte == b' ' { out.extend(space) } else { out.push(byte) }
            }
            if !mapped.is_empty() {
                after_space = self.remove_extra_spaces && mapped.ends_with(b" ");
            }
            if out.len() > MAX_NORMALIZED_BYTES {
                return error(format!("the text is over {MAX_NORMALIZED_BYTES} bytes after normalisation"));
            }
        }
        if self.remove_extra_spaces {
            while out.ends_with(space) {
                out.truncate(out.len() - space.len());
            }
        }
        if self.dummy_prefix && self.space_as_suffix {
            out.extend(space);
        }
        Ok(out)
    }

    /// What the longest rule at the start of `input` makes of it, and how many bytes that uses. None at the end.
    fn next<'a>(&'a self, input: &'a [u8]) -> Result<Option<(&'a [u8], usize)>, SpieceError> {
        let Some(&first) = input.first() else { return Ok(None) };
        if let Some((length, _)) = self.user_defined.prefixes(input).last() {
            return Ok(Some((&input[..length], length)));
        }
        if let Some(charsmap) = &self.charsmap
            && let Some((length, replacement)) = charsmap.longest(input)?
        {
            return Ok(Some((replacement, length)));
        }
        let length = utf8_len(first).min(input.len());
        Ok(Some((&input[..length], length)))
    }
}

/// Bytes of the character that starts with `first`. A byte that starts none counts as one.
fn utf8_len(first: u8) -> usize {
    match first {
        0xC0..=0xDF => 2,
        0xE0..=0xEF => 3,
        0xF0..=0xFF => 4,
        _ => 1,
    }
}

/// The compiled normalisation rules: a double-array trie (Darts) of byte strings and the text that replaces each.
struct CharsMap {
    units: Vec<u32>,
    /// Replacements, each ended by a zero byte.
    replacements: Vec<u8>,
}

impl CharsMap {
    /// `length (u32) ‖ trie ‖ replacements`.
    fn parse(blob: &[u8]) -> Result<Self, SpieceError> {
        let Some((length, rest)) = blob.split_first_chunk::<4>() else {
            return error("the character map is cut short");
        };
        let length = u32::from_le_bytes(*length) as usize;
        if length % 4 != 0 || length == 0 || length >= rest.len() {
            return error(format!("the character map's trie has {length} of {} bytes", rest.len()));
        }
        let (trie, replacements) = rest.split_at(length);
        if replacements.last() != Some(&0) {
            return error("the character map's last replacement has no end");
        }
        let (units, _) = trie.as_chunks::<4>();
        Ok(Self {
            units: units.iter().map(|&unit| u32::from_le_bytes(unit)).collect(),
            replacements: replacements.to_vec(),
        })
    }

    /// Length and replacement of the longest rule that `input` starts with.
    fn longest(&self, input: &[u8]) -> Result<Option<(usize, &[u8])>, SpieceError> {
        let unit = |position: usize| match self.units.get(position) {
            Some(&unit) => Ok(unit),
            None => error("the character map's trie points past its end"),
        };
        let mut found = None;
        let mut position = 0;
        let mut node = unit(position)?;
        position ^= darts_offset(node);
        for (index, &byte) in input.iter().enumerate() {
            position ^= byte as usize;
            node = unit(position)?;
            if darts_label(node) != u32::from(byte) {
                break;
            }
            position ^= darts_offset(node);
            if darts_has_leaf(node) {
                found = Some((index + 1, darts_value(unit(position)?)));
            }
        }
        let Some((length, start)) = found else { return Ok(None) };
        let Some(tail) = self.replacements.get(start..) else {
            return error("the character map points past its replacements");
        };
        // The last byte of all replacements is zero.
        let end = tail.iter().position(|&byte| byte == 0).unwrap_or(tail.len());
        Ok(Some((length, &tail[..end])))
    }
}

// The bits of a unit of a Darts double array.
fn darts_has_leaf(unit: u32) -> bool {
    unit >> 8 & 1 == 1
}
fn darts_value(unit: u32) -> usize {
    (unit & 0x7FFF_FFFF) as usize
}
fn darts_label(unit: u32) -> u32 {
    // The top bit marks a value, which no byte equals.
    unit & 0x8000_00FF
}
fn darts_offset(unit: u32) -> usize {
    ((unit >> 10) << ((unit & 1 << 9) >> 6)) as usize
}

/// Byte strings with ids; finds all that a text starts with.
#[derive(Default)]
struct Trie {
    /// (node, byte) → node; the root is node 0.
    children: HashMap<(u32, u8), u32>,
    /// Id of the string that ends at each node but the root.
    ids: Vec<Option<u32>>,
}

impl Trie {
    /// False if the string is there already.
    fn insert(&mut self, text: &[u8], id: u32) -> bool {
        let mut node = 0;
        for &byte in text {
            let next = self.ids.len() as u32 + 1;
            node = *self.children.entry((node, byte)).or_insert_with(|| {
                self.ids.push(None);
                next
            });
        }
        let slot = &mut self.ids[node as usize - 1];
        let new = slot.is_none();
        slot.get_or_insert(id);
        new
    }

    /// (length, id) of every string that `text` starts with, shortest first.
    fn prefixes<'a>(&'a self, text: &'a [u8]) -> impl Iterator<Item = (usize, u32)> + 'a {
        let mut node = 0;
        let nodes = text.iter().map_while(move |&byte| {
            node = *self.children.get(&(node, byte))?;
            Some(node)
        });
        nodes.enumerate().filter_map(|(index, node)| Some((index + 1, self.ids[node as usize - 1]?)))
    }
}

struct RawPiece {
    text: Vec<u8>,
    score: f32,
    kind: PieceKind,
}

impl RawPiece {
    fn parse(bytes: &[u8]) -> Result<Self, SpieceError> {
        let mut piece = Self { text: Vec::new(), score: 0.0, kind: PieceKind::Normal };
        for field in Fields::new(bytes) {
            match field? {
                (1, Value::Bytes(text)) => piece.text = text.to_vec(),
                (2, Value::Fixed32(bits)) => piece.score = f32::from_bits(bits),
                (3, Value::Varint(kind)) => {
                    piece.kind = match kind {
                        1 => PieceKind::Normal,
                        2 => PieceKind::Unknown,
                        3 => PieceKind::Control,
                        4 => PieceKind::UserDefined,
                        5 => PieceKind::Unused,
                        6 => PieceKind::Byte,
                        _ => return error(format!("a piece of unknown type {kind}")),
                    }
                }
                _ => {}
            }
        }
        Ok(piece)
    }
}

struct TrainerSpec {
    model_type: u64,
    treat_whitespace_as_suffix: bool,
    byte_fallback: bool,
    eos_piece: Vec<u8>,
}

impl Default for TrainerSpec {
    fn default() -> Self {
        Self { model_type: 1, treat_whitespace_as_suffix: false, byte_fallback: false, eos_piece: b"</s>".to_vec() }
    }
}

impl TrainerSpec {
    fn merge(&mut self, bytes: &[u8]) -> Result<(), SpieceError> {
        for field in Fields::new(bytes) {
            match field? {
                (3, Value::Varint(value)) => self.model_type = value,
                (24, Value::Varint(value)) => self.treat_whitespace_as_suffix = value != 0,
                (35, Value::Varint(value)) => self.byte_fallback = value != 0,
                (47, Value::Bytes(value)) if !value.is_empty() => self.eos_piece = value.to_vec(),
                _ => {}
            }
        }
        Ok(())
    }
}

struct NormalizerSpec {
    charsmap: Option<Vec<u8>>,
    add_dummy_prefix: bool,
    remove_extra_whitespaces: bool,
    escape_whitespaces: bool,
}

impl Default for NormalizerSpec {
    fn default() -> Self {
        Self { charsmap: None, add_dummy_prefix: true, remove_extra_whitespaces: true, escape_whitespaces: true }
    }
}

impl NormalizerSpec {
    fn merge(&mut self, bytes: &[u8]) -> Result<(), SpieceError> {
        for field in Fields::new(bytes) {
            match field? {
                (2, Value::Bytes(value)) => self.charsmap = (!value.is_empty()).then(|| value.to_vec()),
                (3, Value::Varint(value)) => self.add_dummy_prefix = value != 0,
                (4, Value::Varint(value)) => self.remove_extra_whitespaces = value != 0,
                (5, Value::Varint(value)) => self.escape_whitespaces = value != 0,
                _ => {}
            }
        }
        Ok(())
    }
}

/// A field's value in protobuf's wire format.
enum Value<'a> {
    Varint(u64),
    Fixed32(u32),
    Fixed64,
    Bytes(&'a [u8]),
}

/// The fields of a protobuf message, in file order. Ends after the first error.
struct Fields<'a> {
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    fn varint(&mut self) -> Result<u64, SpieceError> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let Some((&byte, rest)) = self.rest.split_first() else { break };
            self.rest = rest;
            value |= u64::from(byte & 0x7F) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        error("cut short or no SentencePiece model: a number has no end")
    }

    fn take(&mut self, length: u64) -> Result<&'a [u8], SpieceError> {
        let split = usize::try_from(length).ok().and_then(|length| self.rest.split_at_checked(length));
        let Some((taken, rest)) = split else {
            return error(format!(
                "cut short or no SentencePiece model: {length} bytes wanted, {} left",
                self.rest.len()
            ));
        };
        self.rest = rest;
        Ok(taken)
    }

    fn field(&mut self) -> Result<(u64, Value<'a>), SpieceError> {
        let tag = self.varint()?;
        let value = match tag & 7 {
            0 => Value::Varint(self.varint()?),
            1 => self.take(8).map(|_| Value::Fixed64)?,
            2 => {
                let length = self.varint()?;
                Value::Bytes(self.take(length)?)
            }
            5 => {
                let (bits, _) = self.take(4)?.as_chunks::<4>();
                Value::Fixed32(u32::from_le_bytes(bits[0]))
            }
            kind => return error(format!("no SentencePiece model: wire type {kind}")),
        };
        Ok((tag >> 3, value))
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u64, Value<'a>), SpieceError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_err() {
            self.rest = &[];
        }
        Some(field)
    }
}
