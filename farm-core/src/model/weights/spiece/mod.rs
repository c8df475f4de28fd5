//! `spiece.model`: a SentencePiece unigram model, read and applied as the sentencepiece library does.
//!
//! Own code rather than the tokenizers crate's unigram model, because that differs in places that prompts reach: its
//! normaliser maps whole grapheme clusters or single characters where sentencepiece takes the longest match at each
//! byte, and whitespace is trimmed at another moment. Scores are added in the same types and order, so ties fall alike.

mod normalize;
#[cfg(test)]
mod tests;
mod wire;

use std::collections::HashMap;
use std::ops::Range;

use normalize::{Normalizer, NormalizerSpec};
use wire::{Fields, Value};

/// Below the lowest score by this much lies the score of an unknown character.
const UNKNOWN_PENALTY: f32 = 10.0;
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
            let kind =
                ["strange", "unigram", "bpe", "word", "char"].get(trainer.model_type as usize).unwrap_or(&"strange");
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
            normalizer: Normalizer::new(normalizer, user_defined, trainer.treat_whitespace_as_suffix)?,
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
            // All in f32, compared after rounding: which of two equal paths wins depends on it.
            let mut offer = |end: usize, id: u32, score: f32| {
                let score = till_here + score;
                if ends[end].is_none_or(|best| score > best.score) {
                    ends[end] = Some(Best { id, score, start });
                }
            };
            for (length, id) in self.pieces.prefixes(&text[start..]) {
                let score = match self.kinds[id as usize] {
                    PieceKind::Unused => continue,
                    // A bonus, so that it wins over being split.
                    PieceKind::UserDefined => (f64::from(length as f32 * self.max_score) - 0.1) as f32,
                    _ => self.scores[id as usize],
                };
                offer(start + length, id, score);
                has_single |= length == char_len;
            }
            if !has_single {
                offer(start + char_len, self.unknown, unknown_score);
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

/// Bytes of the character that starts with `first`. A byte that starts none counts as one.
fn utf8_len(first: u8) -> usize {
    match first {
        0xC0..=0xDF => 2,
        0xE0..=0xEF => 3,
        0xF0..=0xFF => 4,
        _ => 1,
    }
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
