//! Normalisation before the text is cut into pieces: the compiled character map, then whitespace.

use super::wire::{Fields, Value};
use super::{SpieceError, Trie, error, utf8_len};

/// U+2581, which stands for a space inside pieces.
const SPACE_SYMBOL: &str = "\u{2581}";
/// Bound on the text after normalisation. A prompt has at most 64 KiB, and no published map makes 16 bytes of one.
const MAX_NORMALIZED_BYTES: usize = 1 << 20;

/// Text → the bytes that are cut into pieces.
pub(super) struct Normalizer {
    charsmap: Option<CharsMap>,
    /// Never normalised.
    user_defined: Trie,
    dummy_prefix: bool,
    remove_extra_spaces: bool,
    escape_spaces: bool,
    space_as_suffix: bool,
}

impl Normalizer {
    pub fn new(spec: NormalizerSpec, user_defined: Trie, space_as_suffix: bool) -> Result<Self, SpieceError> {
        Ok(Self {
            charsmap: spec.charsmap.as_deref().map(CharsMap::parse).transpose()?,
            user_defined,
            dummy_prefix: spec.add_dummy_prefix,
            remove_extra_spaces: spec.remove_extra_whitespaces,
            escape_spaces: spec.escape_whitespaces,
            space_as_suffix,
        })
    }

    /// Maps characters, then spaces: the library's order, in bytes.
    pub fn normalize(&self, text: &str) -> Result<Vec<u8>, SpieceError> {
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

/// The model file's message of the same name.
pub(super) struct NormalizerSpec {
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
    pub fn merge(&mut self, bytes: &[u8]) -> Result<(), SpieceError> {
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
