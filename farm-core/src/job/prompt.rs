//! A prompt file, one JSON object a line, becomes [`RenderRequest`]s, or errors with line, column and reason.
//!
//! [`PromptParser`] takes the file in pieces of any size and holds one line at a time, never more than
//! [`MAX_LINE_BYTES`] of it. Blank lines, `\r\n` and a byte order mark at the start are accepted.

mod line;

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use super::spec::RenderRequest;
use crate::api::LineError;

/// Longest line, without its line ending.
pub const MAX_LINE_BYTES: usize = 64 << 10;
/// Errors kept; the rest is only counted.
pub const MAX_LINE_ERRORS: usize = 20;
/// Most prompts in one file: what a parsed file holds in memory is bounded by this.
pub const MAX_PROMPTS: usize = 1_000_000;

const BOM: &[u8] = b"\xEF\xBB\xBF";

/// What a whole prompt file holds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PromptFile {
    /// The good lines in file order, each with its line number from 1.
    pub requests: Vec<(u64, RenderRequest)>,
    /// The first [`MAX_LINE_ERRORS`] bad lines in file order, one error each.
    pub errors: Vec<LineError>,
    /// How many lines are bad in all.
    pub bad_lines: u64,
}

/// Reads a prompt file as it arrives; how it is cut into pieces makes no difference.
#[derive(Debug, Default)]
pub struct PromptParser {
    /// The line so far, without its newline, cut at `RAW_LIMIT`.
    line: Vec<u8>,
    /// Lines ended so far.
    lines: u64,
    /// Names used so far and the line that used each first.
    ids: HashMap<String, u64>,
    file: PromptFile,
}

/// The line, a byte order mark, a carriage return, and one byte more to see that it is too long.
const RAW_LIMIT: usize = MAX_LINE_BYTES + BOM.len() + 2;

impl PromptParser {
    pub fn new() -> Self {
        Self::default()
    }

    /// The next bytes of the file.
    pub fn push(&mut self, mut bytes: &[u8]) {
        while let Some(newline) = bytes.iter().position(|b| *b == b'\n') {
            self.extend(&bytes[..newline]);
            self.end_line();
            bytes = &bytes[newline + 1..];
        }
        self.extend(bytes);
    }

    /// The end of the file. A last line without a newline counts.
    pub fn finish(mut self) -> PromptFile {
        if !self.line.is_empty() {
            self.end_line();
        }
        if self.file.requests.is_empty() && self.file.bad_lines == 0 {
            self.refuse(LineError { line: 1, column: 1, reason: "no prompts".into() });
        }
        self.file
    }

    fn extend(&mut self, part: &[u8]) {
        let room = RAW_LIMIT - self.line.len();
        self.line.extend_from_slice(&part[..part.len().min(room)]);
    }

    fn end_line(&mut self) {
        self.lines += 1;
        let raw = std::mem::take(&mut self.line);
        self.read_line(&raw);
        // Keep the allocation for the next line.
        self.line = raw;
        self.line.clear();
    }

    fn read_line(&mut self, raw: &[u8]) {
        let number = self.lines;
        let mut bytes = raw;
        if number == 1 {
            bytes = bytes.strip_prefix(BOM).unwrap_or(bytes);
        }
        bytes = bytes.strip_suffix(b"\r").unwrap_or(bytes);
        if bytes.iter().all(u8::is_ascii_whitespace) && bytes.len() <= MAX_LINE_BYTES {
            return;
        }
        let parsed = line::parse(bytes);
        // A bad line uses up its name too: otherwise mending that line would bring up the next error.
        let duplicate = parsed.id.and_then(|id| match self.ids.entry(id.value) {
            Entry::Occupied(first) => Some(line::duplicate_id(first.key(), *first.get(), id.column)),
            Entry::Vacant(free) => {
                free.insert(number);
                None
            }
        });
        let outcome = match (parsed.request, duplicate) {
            (Err(error), _) | (Ok(_), Some(error)) => Err(error),
            (Ok(_), None) if self.file.requests.len() >= MAX_PROMPTS => {
                Err(line::Bad { column: 1, reason: format!("more than {MAX_PROMPTS} prompts in one file, split it") })
            }
            (Ok(request), None) => Ok(request),
        };
        match outcome {
            Ok(request) => self.file.requests.push((number, request)),
            Err(bad) => self.refuse(LineError { line: number, column: bad.column, reason: bad.reason }),
        }
    }

    fn refuse(&mut self, error: LineError) {
        self.file.bad_lines += 1;
        if self.file.errors.len() < MAX_LINE_ERRORS {
            self.file.errors.push(error);
        }
    }
}

#[cfg(test)]
mod tests;
