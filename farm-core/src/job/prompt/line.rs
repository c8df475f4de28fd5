//! One line of a prompt file. Keys and values keep their place in the line, so that every error can point at one.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::RangeInclusive;

use serde::Deserialize;
use serde::de::{DeserializeOwned, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::MAX_LINE_BYTES;
use crate::job::spec::{
    self, GuidanceScale, MAX_AFTER, MAX_FRAMES, MAX_GUIDANCE, MAX_LABEL_BYTES, MAX_LABELS, MAX_PRIORITY, MAX_SIZE,
    MAX_STEPS, RenderRequest, SIZE_STEP,
};

const KEYS: [&str; 14] = [
    "prompt",
    "negative_prompt",
    "width",
    "height",
    "num_frames",
    "num_inference_steps",
    "guidance_scale",
    "seed",
    "id",
    "priority",
    "model",
    "labels",
    "after",
    "require",
];

/// Characters of the user's text that an error repeats.
const QUOTE_CHARS: usize = 40;

/// Why a line is refused.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Bad {
    /// In characters, from 1.
    pub column: u64,
    pub reason: String,
}

pub(super) struct Parsed {
    pub request: Result<RenderRequest, Bad>,
    /// The line's own name, also if the line is bad elsewhere.
    pub id: Option<LineId>,
}

pub(super) struct LineId {
    pub value: String,
    /// Where the value stands, in characters from 1.
    pub column: u64,
}

pub(super) fn duplicate_id(id: &str, first_line: u64, column: u64) -> Bad {
    Bad { column, reason: format!("duplicate id {}, first used on line {first_line}", quote(id)) }
}

/// Reads one line without its line ending. Of several errors the leftmost is reported.
pub(super) fn parse(bytes: &[u8]) -> Parsed {
    if bytes.len() > MAX_LINE_BYTES {
        // Continuation bytes are not characters. The line may be cut inside one, so it cannot be read as a string.
        let kept = bytes[..MAX_LINE_BYTES].iter().filter(|b| **b & 0xC0 != 0x80).count();
        let reason = format!("line is longer than {} KiB", MAX_LINE_BYTES >> 10);
        return Parsed { request: Err(Bad { column: kept as u64 + 1, reason }), id: None };
    }
    let text = match std::str::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) => {
            let valid = String::from_utf8_lossy(&bytes[..error.valid_up_to()]);
            let column = valid.chars().count() as u64 + 1;
            return Parsed { request: Err(Bad { column, reason: "invalid utf-8".into() }), id: None };
        }
    };
    Line { text }.parse()
}

/// The text of a line, which turns places in it into columns.
#[derive(Clone, Copy)]
struct Line<'a> {
    text: &'a str,
}

impl<'a> Line<'a> {
    fn parse(self) -> Parsed {
        let mut errors = Vec::new();
        let mut id = None;
        let mut fields = Fields::default();
        match self.object(self.text) {
            Ok(entries) => {
                for entry in &entries.list {
                    match self.field(&mut fields, entry) {
                        Ok(()) if entry.key == "id" => {
                            id = fields.id.clone().map(|value| LineId { value, column: self.column(entry.value) })
                        }
                        Ok(()) => {}
                        Err(error) => errors.push(error),
                    }
                }
                errors.extend(entries.duplicate);
                if !entries.list.iter().any(|entry| entry.key == "prompt") {
                    errors.push(Bad { column: 1, reason: "\"prompt\" is missing".into() });
                }
                if let (Some(scale), Some(steps)) = (&fields.guidance_scale, fields.num_inference_steps)
                    && let Err(error) = spec::check_guidance(scale, Some(steps))
                    && let Some(entry) = entries.list.iter().find(|entry| entry.key == "guidance_scale")
                {
                    errors.push(self.bad(entry.value, error));
                }
            }
            Err(error) => errors.push(error),
        }
        let request = match (errors.into_iter().min_by_key(|error| error.column), fields.prompt) {
            (Some(error), _) => Err(error),
            (None, None) => Err(Bad { column: 1, reason: "\"prompt\" is missing".into() }),
            (None, Some(prompt)) => Ok(RenderRequest {
                prompt,
                negative_prompt: fields.negative_prompt,
                width: fields.width,
                height: fields.height,
                num_frames: fields.num_frames,
                num_inference_steps: fields.num_inference_steps,
                guidance_scale: fields.guidance_scale,
                seed: fields.seed,
                id: fields.id,
                priority: fields.priority,
                model: fields.model,
                labels: fields.labels,
                after: fields.after,
                require: fields.require,
            }),
        };
        Parsed { request, id }
    }

    fn field(self, fields: &mut Fields, entry: &RawEntry<'a>) -> Result<(), Bad> {
        let key = entry.key.as_ref();
        match key {
            "prompt" => fields.prompt = Some(self.string(entry)?),
            "negative_prompt" => fields.negative_prompt = Some(self.string(entry)?),
            "width" => fields.width = Some(self.size(entry, "width")?),
            "height" => fields.height = Some(self.size(entry, "height")?),
            "num_frames" => {
                let frames = self.integer(entry, 1..=MAX_FRAMES)?;
                spec::check_frames(frames).map_err(|error| self.bad(entry.value, error))?;
                fields.num_frames = Some(frames);
            }
            "num_inference_steps" => {
                let steps = self.integer(entry, 1..=MAX_STEPS)?;
                spec::check_steps(steps).map_err(|error| self.bad(entry.value, error))?;
                fields.num_inference_steps = Some(steps);
            }
            "guidance_scale" => fields.guidance_scale = Some(self.guidance(entry)?),
            "seed" => fields.seed = Some(self.integer(entry, 0..=u64::MAX)?),
            "id" => fields.id = Some(self.name(entry)?),
            "priority" => {
                let priority = self.integer(entry, 0..=MAX_PRIORITY)?;
                if !(0..=MAX_PRIORITY).contains(&priority) {
                    return Err(self.bad(entry.value, format!("priority {priority} is not in 0..={MAX_PRIORITY}")));
                }
                fields.priority = Some(priority);
            }
            "model" => fields.model = Some(self.name(entry)?),
            "labels" => fields.labels = self.labels(entry)?,
            "after" => fields.after = self.after(entry)?,
            "require" => fields.require = self.labels(entry)?,
            _ => {
                let hint = match nearest_key(key) {
                    Some(near) => format!(", did you mean \"{near}\"?"),
                    None => format!(", known are {}", KEYS.join(", ")),
                };
                return Err(self.bad(entry.raw_key, format!("unknown key {}{hint}", quote(key))));
            }
        }
        Ok(())
    }

    fn string(self, entry: &RawEntry<'a>) -> Result<String, Bad> {
        match kind(entry.value) {
            Kind::String => self.typed(entry.value),
            found => Err(self.wrong_type(entry, "a string", found)),
        }
    }

    /// A string that people and file names use: not empty, short, without control characters.
    fn name(self, entry: &RawEntry<'a>) -> Result<String, Bad> {
        let name = self.string(entry)?;
        let key = &entry.key;
        let reason = if name.is_empty() {
            format!("\"{key}\" is empty")
        } else if name.len() > MAX_LABEL_BYTES {
            format!("\"{key}\" has {} bytes, at most {MAX_LABEL_BYTES} are allowed", name.len())
        } else if name.chars().any(char::is_control) {
            format!("\"{key}\" has a control character")
        } else {
            return Ok(name);
        };
        Err(self.bad(entry.value, reason))
    }

    /// Names of lines or ids of jobs and batches: one, or a list.
    fn after(self, entry: &RawEntry<'a>) -> Result<Vec<String>, Bad> {
        let list: Vec<&RawValue> = match kind(entry.value) {
            Kind::String => return Ok(vec![self.name(entry)?]),
            Kind::List => self.typed(entry.value)?,
            found => return Err(self.wrong_type(entry, "a string or a list of strings", found)),
        };
        if list.len() > MAX_AFTER {
            let reason = format!("\"after\" has {} entries, at most {MAX_AFTER} are allowed", list.len());
            return Err(self.bad(entry.value, reason));
        }
        list.into_iter()
            .map(|value| self.name(&RawEntry { key: Cow::Borrowed("after"), raw_key: entry.raw_key, value }))
            .collect()
    }

    /// A whole number that `T` holds. The range is for the words only: callers check it with a better reason.
    fn integer<T: DeserializeOwned + fmt::Display>(
        self,
        entry: &RawEntry<'a>,
        range: RangeInclusive<T>,
    ) -> Result<T, Bad> {
        let wanted = format!("a whole number from {} to {}", range.start(), range.end());
        match kind(entry.value) {
            Kind::Number => serde_json::from_str(entry.value.get()).map_err(|_| {
                let reason = format!("\"{}\" must be {wanted}, found {}", entry.key, shorten(entry.value.get()));
                self.bad(entry.value, reason)
            }),
            found => Err(self.wrong_type(entry, &wanted, found)),
        }
    }

    fn size(self, entry: &RawEntry<'a>, name: &'static str) -> Result<u32, Bad> {
        let pixels = self.integer(entry, SIZE_STEP..=MAX_SIZE)?;
        spec::check_size(name, pixels).map_err(|error| self.bad(entry.value, error))?;
        Ok(pixels)
    }

    fn guidance(self, entry: &RawEntry<'a>) -> Result<GuidanceScale, Bad> {
        match kind(entry.value) {
            Kind::Number => Ok(GuidanceScale::Constant(self.scale(entry.value)?)),
            Kind::List => {
                let list: Vec<&RawValue> = self.typed(entry.value)?;
                if list.is_empty() {
                    return Err(self.bad(entry.value, "guidance_scale is an empty list"));
                }
                if list.len() > MAX_STEPS as usize {
                    let reason = format!("guidance_scale has {} values, more than {MAX_STEPS} steps", list.len());
                    return Err(self.bad(entry.value, reason));
                }
                let scales = list.into_iter().map(|value| match kind(value) {
                    Kind::Number => self.scale(value),
                    found => Err(self.bad(value, format!("guidance_scale must list numbers, found {found}"))),
                });
                Ok(GuidanceScale::PerStep(scales.collect::<Result<_, _>>()?))
            }
            found => Err(self.wrong_type(entry, "a number or a list of numbers", found)),
        }
    }

    fn scale(self, value: &'a RawValue) -> Result<f64, Bad> {
        // A number too large for f64 is out of range like any other.
        let scale: f64 = serde_json::from_str(value.get()).unwrap_or(f64::INFINITY);
        if spec::check_guidance(&GuidanceScale::Constant(scale), None).is_err() {
            let reason = format!("guidance_scale {} is not in 0..={MAX_GUIDANCE}", shorten(value.get()));
            return Err(self.bad(value, reason));
        }
        Ok(scale)
    }

    fn labels(self, entry: &RawEntry<'a>) -> Result<BTreeMap<String, String>, Bad> {
        let found = kind(entry.value);
        if found != Kind::Object {
            return Err(self.wrong_type(entry, "an object of strings", found));
        }
        let entries = self.object(entry.value.get())?;
        if let Some(duplicate) = entries.duplicate {
            return Err(duplicate);
        }
        if entries.list.len() > MAX_LABELS {
            let reason = format!("{} labels, at most {MAX_LABELS} are allowed", entries.list.len());
            return Err(self.bad(entry.value, reason));
        }
        let too_long =
            |what: &str, bytes: usize| format!("label {what} has {bytes} bytes, at most {MAX_LABEL_BYTES} are allowed");
        let mut labels = BTreeMap::new();
        for label in entries.list {
            let found = kind(label.value);
            if found != Kind::String {
                let reason = format!("label {} must be a string, found {found}", quote(&label.key));
                return Err(self.bad(label.value, reason));
            }
            if label.key.len() > MAX_LABEL_BYTES {
                return Err(self.bad(label.raw_key, too_long("name", label.key.len())));
            }
            let value: String = self.typed(label.value)?;
            if value.len() > MAX_LABEL_BYTES {
                return Err(self.bad(label.value, too_long(&quote(&label.key), value.len())));
            }
            labels.insert(label.key.into_owned(), value);
        }
        Ok(labels)
    }

    /// The entries of a JSON object that stands in this line.
    fn object(self, text: &'a str) -> Result<Entries<'a>, Bad> {
        let start = self.offset(text);
        let first = text.trim_start_matches([' ', '\t', '\r']);
        if !first.starts_with('{')
            && let Some(found) = kind_of(first)
        {
            return Err(self.bad_at(self.offset(first), format!("expected a json object, found {found}")));
        }
        let raw: RawEntries = serde_json::from_str(text).map_err(|error| self.syntax(start, error))?;
        let mut list: Vec<RawEntry> = Vec::with_capacity(raw.0.len());
        let mut seen = std::collections::HashSet::with_capacity(raw.0.len());
        let mut duplicate = None;
        for (raw_key, value) in raw.0 {
            let key: Cow<str> = match raw_key.get().strip_prefix('"').and_then(|key| key.strip_suffix('"')) {
                Some(plain) if !plain.contains('\\') => Cow::Borrowed(plain),
                _ => Cow::Owned(self.typed(raw_key)?),
            };
            if seen.insert(key.clone()) {
                list.push(RawEntry { key, raw_key, value });
            } else if duplicate.is_none() {
                duplicate = Some(self.bad(raw_key, format!("duplicate key {}", quote(&key))));
            }
        }
        Ok(Entries { list, duplicate })
    }

    /// Reads a value whose kind is known; what can still be wrong is inside a string, such as half a surrogate pair.
    fn typed<T: Deserialize<'a>>(self, value: &'a RawValue) -> Result<T, Bad> {
        serde_json::from_str(value.get()).map_err(|error| self.syntax(self.offset(value.get()), error))
    }

    fn wrong_type(self, entry: &RawEntry<'a>, wanted: &str, found: Kind) -> Bad {
        let hint = if found == Kind::Null { ", leave the key out for the default" } else { "" };
        self.bad(entry.value, format!("\"{}\" must be {wanted}, found {found}{hint}", entry.key))
    }

    /// An error of the JSON reader, which counts bytes from `start`.
    fn syntax(self, start: usize, error: serde_json::Error) -> Bad {
        let whole = error.to_string();
        let reason = match whole.rfind(" at line ") {
            Some(end) => &whole[..end],
            None => &whole,
        };
        let offset = match error.is_eof() {
            true => self.text.len(),
            false => start + error.column().saturating_sub(1),
        };
        let rest = self.text.get(offset..).unwrap_or_default();
        let not_json = ["NaN", "nan", "Infinity", "inf"].iter().find(|word| {
            // The reader stops at the minus sign or behind it.
            rest.strip_prefix('-').unwrap_or(rest).starts_with(**word)
        });
        let reason = match not_json {
            Some(word) => format!("{word} is not a finite number"),
            None => reason.replace("EOF while", "line ends while").replace('`', "").to_lowercase(),
        };
        self.bad_at(offset, reason)
    }

    fn bad(self, at: &'a RawValue, reason: impl fmt::Display) -> Bad {
        self.bad_at(self.offset(at.get()), reason)
    }

    fn bad_at(self, offset: usize, reason: impl fmt::Display) -> Bad {
        let offset = self.text.floor_char_boundary(offset);
        Bad { column: self.text[..offset].chars().count() as u64 + 1, reason: reason.to_string() }
    }

    fn column(self, value: &RawValue) -> u64 {
        self.bad_at(self.offset(value.get()), "").column
    }

    /// Where a part of this line begins. Raw values borrow from the line, so their address tells.
    fn offset(self, part: &str) -> usize {
        (part.as_ptr() as usize).saturating_sub(self.text.as_ptr() as usize)
    }
}

/// The values read so far, each `None` until its key came with a good value.
#[derive(Default)]
struct Fields {
    prompt: Option<String>,
    negative_prompt: Option<String>,
    width: Option<u32>,
    height: Option<u32>,
    num_frames: Option<u32>,
    num_inference_steps: Option<u32>,
    guidance_scale: Option<GuidanceScale>,
    seed: Option<u64>,
    id: Option<String>,
    priority: Option<i32>,
    model: Option<String>,
    labels: BTreeMap<String, String>,
    after: Vec<String>,
    require: BTreeMap<String, String>,
}

struct Entries<'a> {
    /// The first entry of each key, in the order of the text.
    list: Vec<RawEntry<'a>>,
    duplicate: Option<Bad>,
}

struct RawEntry<'a> {
    key: Cow<'a, str>,
    raw_key: &'a RawValue,
    value: &'a RawValue,
}

/// Keys and values of an object as they stand in the text: a map type would keep neither place nor duplicates.
struct RawEntries<'a>(Vec<(&'a RawValue, &'a RawValue)>);

impl<'de: 'a, 'a> Deserialize<'de> for RawEntries<'a> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect;
        impl<'de> Visitor<'de> for Collect {
            type Value = Vec<(&'de RawValue, &'de RawValue)>;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a json object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(entries)
            }
        }
        deserializer.deserialize_map(Collect).map(Self)
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    String,
    Number,
    Object,
    List,
    Bool,
    Null,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Kind::String => "a string",
            Kind::Number => "a number",
            Kind::Object => "an object",
            Kind::List => "a list",
            Kind::Bool => "true or false",
            Kind::Null => "null",
        })
    }
}

/// The kind of a value that was read as JSON, which its first byte tells.
fn kind(value: &RawValue) -> Kind {
    kind_of(value.get()).unwrap_or(Kind::Null)
}

fn kind_of(text: &str) -> Option<Kind> {
    Some(match text.as_bytes().first()? {
        b'"' => Kind::String,
        b'-' | b'0'..=b'9' => Kind::Number,
        b'{' => Kind::Object,
        b'[' => Kind::List,
        b't' | b'f' => Kind::Bool,
        b'n' => Kind::Null,
        _ => return None,
    })
}

/// The user's text in quotes, escaped and cut: it may go to a terminal.
fn quote(text: &str) -> String {
    format!("{:?}", shorten(text))
}

fn shorten(text: &str) -> Cow<'_, str> {
    match text.char_indices().nth(QUOTE_CHARS) {
        Some((end, _)) => Cow::Owned(format!("{}…", &text[..end])),
        None => Cow::Borrowed(text),
    }
}

/// The known key that `key` is a slip of: at most two letters added, dropped, changed or swapped.
fn nearest_key(key: &str) -> Option<&'static str> {
    let key = key.to_lowercase();
    // Two slips in a word of three letters leave nothing of it.
    let slips = |known: &str| if known.len() < 5 { 1 } else { 2 };
    KEYS.into_iter()
        .filter(|known| known.len().abs_diff(key.len()) <= slips(known))
        .map(|known| (distance(known.as_bytes(), key.as_bytes()), known))
        .filter(|(distance, known)| *distance <= slips(known))
        .min()
        .map(|(_, known)| known)
}

/// Edit distance, a swap of two neighbours counting as one edit.
fn distance(a: &[u8], b: &[u8]) -> usize {
    let mut rows = vec![vec![0; b.len() + 1]; a.len() + 1];
    for i in 0..=a.len() {
        for j in 0..=b.len() {
            rows[i][j] = if i == 0 || j == 0 {
                i + j
            } else {
                let change = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
                let mut least = change.min(rows[i - 1][j] + 1).min(rows[i][j - 1] + 1);
                if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                    least = least.min(rows[i - 2][j - 2] + 1);
                }
                least
            };
        }
    }
    rows[a.len()][b.len()]
}
