//! One safetensors file: memory-mapped, its header checked before anything is believed.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use memmap2::Mmap;
#[cfg(unix)]
use memmap2::UncheckedAdvice;
use safetensors::Dtype;
use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};

use super::checkpoint::CheckpointError;
use crate::engine::RawDtype;

/// The published transformer's header is 130 KB. The bound keeps a hostile length from becoming an allocation.
const MAX_HEADER_BYTES: u64 = 16 << 20;
const MAX_RANK: usize = 8;
/// A fault maps the cached pages around it too, in aligned windows of this size (Linux's default).
#[cfg(unix)]
const FAULT_WINDOW: usize = 64 << 10;
/// Bytes that a pass over a whole file has in memory at a time.
const PASS_BYTES: usize = 4 << 20;

/// A tensor as the header describes it.
#[derive(Clone, Debug)]
pub struct TensorInfo {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Of its bytes in the file.
    pub(super) range: Range<usize>,
}

impl TensorInfo {
    /// Number of values.
    pub fn elements(&self) -> usize {
        // Checked against the byte range when the header was read.
        self.shape.iter().product()
    }

    pub fn byte_len(&self) -> usize {
        self.range.len()
    }

    /// The dtype as an engine takes it, or none if weights cannot have it.
    pub fn raw_dtype(&self) -> Option<RawDtype> {
        match self.dtype {
            Dtype::F32 => Some(RawDtype::F32),
            Dtype::F16 => Some(RawDtype::F16),
            Dtype::BF16 => Some(RawDtype::Bf16),
            _ => None,
        }
    }
}

/// A mapped safetensors file. Opening it reads the header and nothing else.
pub struct TensorFile {
    path: PathBuf,
    map: Mmap,
    tensors: BTreeMap<String, TensorInfo>,
}

impl TensorFile {
    /// Maps `path` and checks its header: every tensor lies inside the file, has the bytes its shape needs, and the
    /// tensors fill the file without overlap or gap (as the format demands).
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let io = |source| CheckpointError::Io { path: path.to_path_buf(), source };
        let file = File::open(path).map_err(io)?;
        let meta = file.metadata().map_err(io)?;
        if !meta.is_file() {
            return Err(CheckpointError::file(path, "not a regular file"));
        }
        if meta.len() < 8 {
            return Err(CheckpointError::file(path, "shorter than a safetensors header"));
        }
        // SAFETY: the mapping is read-only and private to this value. What is left is the contract of all mapped weights:
        // nobody shortens or rewrites a checkpoint's files while a program has them open.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        let tensors = parse_header(&map).map_err(|message| CheckpointError::file(path, message))?;
        Ok(Self { path: path.to_path_buf(), map, tensors })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Tensors by name, in name order.
    pub fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    /// The little-endian bytes of one of this file's tensors.
    pub fn bytes(&self, info: &TensorInfo) -> &[u8] {
        &self.map[info.range.clone()]
    }

    /// Tensor `name`, of a floating-point type, widened to f32.
    pub fn floats(&self, name: &str) -> Result<Vec<f32>, CheckpointError> {
        let info = self.info(name)?;
        let bytes = self.bytes(info);
        match info.raw_dtype() {
            Some(RawDtype::F32) => Ok(bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect()),
            Some(RawDtype::F16) => {
                Ok(bytes.as_chunks::<2>().0.iter().map(|&b| f16::from_le_bytes(b).to_f32()).collect())
            }
            Some(RawDtype::Bf16) => {
                Ok(bytes.as_chunks::<2>().0.iter().map(|&b| bf16::from_le_bytes(b).to_f32()).collect())
            }
            None => {
                Err(CheckpointError::file(&self.path, format!("tensor {name} is {:?}, expected a float", info.dtype)))
            }
        }
    }

    /// Tensor `name` of whole numbers that fit u32: ids, a mask.
    pub fn numbers(&self, name: &str) -> Result<Vec<u32>, CheckpointError> {
        let info = self.info(name)?;
        let bytes = self.bytes(info);
        let numbers: Option<Vec<u32>> = match info.dtype {
            Dtype::I64 => bytes.as_chunks::<8>().0.iter().map(|&b| i64::from_le_bytes(b).try_into().ok()).collect(),
            Dtype::I32 => bytes.as_chunks::<4>().0.iter().map(|&b| i32::from_le_bytes(b).try_into().ok()).collect(),
            Dtype::U8 | Dtype::BOOL => Some(bytes.iter().map(|&b| u32::from(b)).collect()),
            _ => None,
        };
        let what = || format!("tensor {name} ({:?}) has no whole numbers in 0..=4294967295", info.dtype);
        numbers.ok_or_else(|| CheckpointError::file(&self.path, what()))
    }

    fn info(&self, name: &str) -> Result<&TensorInfo, CheckpointError> {
        self.tensors.get(name).ok_or_else(|| CheckpointError::file(&self.path, format!("has no tensor {name}")))
    }

    /// The whole file.
    pub(super) fn all_bytes(&self) -> &[u8] {
        &self.map
    }

    /// Shows the whole file to `see`, part by part, without keeping it in memory.
    pub(super) fn pass(&self, mut see: impl FnMut(&[u8])) {
        for start in (0..self.map.len()).step_by(PASS_BYTES) {
            let range = start..self.map.len().min(start + PASS_BYTES);
            see(&self.map[range.clone()]);
            self.release(range);
        }
    }

    /// Takes the pages of these bytes out of this process's memory. They are read again, from the system's cache or
    /// the file, if anybody asks; so nothing is lost where a neighbour's bytes share a page.
    pub(super) fn release(&self, range: Range<usize>) {
        #[cfg(unix)]
        {
            let start = range.start.min(self.map.len()) / FAULT_WINDOW * FAULT_WINDOW;
            let end = range.end.next_multiple_of(FAULT_WINDOW).min(self.map.len());
            // SAFETY: in a read-only mapping of a file, pages that are dropped come back with the same bytes: what anybody
            // still borrows of them keeps its address and its values.
            let advised = unsafe { self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, start, end - start) };
            // Advice that is not taken costs memory and nothing else.
            drop(advised);
        }
        #[cfg(not(unix))]
        drop(range);
    }
}

impl fmt::Debug for TensorFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TensorFile({}, {} tensors)", self.path.display(), self.tensors.len())
    }
}

/// The safetensors crate could parse this, but it adds offsets unchecked, so a hostile header panics or wraps there;
/// and it does not say which tensor is wrong.
fn parse_header(file: &[u8]) -> Result<BTreeMap<String, TensorInfo>, String> {
    let (length, rest) = file.split_first_chunk::<8>().ok_or("shorter than a safetensors header")?;
    let header_len = u64::from_le_bytes(*length);
    if header_len > MAX_HEADER_BYTES {
        return Err(format!("header of {header_len} bytes is over the limit of {MAX_HEADER_BYTES}"));
    }
    let header_len = header_len as usize;
    let Some(header) = rest.get(..header_len) else {
        return Err(format!("header of {header_len} bytes reaches past the end of the file"));
    };
    let data_start = 8 + header_len;
    let data_len = file.len() - data_start;
    let Header(entries) = serde_json::from_slice(header).map_err(|error| format!("bad header: {error}"))?;

    let mut tensors = BTreeMap::new();
    let mut extents = Vec::with_capacity(entries.len());
    for (name, entry) in entries {
        let (start, end) = entry.data_offsets;
        if start > end || end > data_len as u64 {
            return Err(format!("tensor {name} lies at {start}..{end} of {data_len} bytes of data (file cut short?)"));
        }
        if entry.shape.len() > MAX_RANK {
            return Err(format!("tensor {name} has {} dimensions", entry.shape.len()));
        }
        let wanted = entry
            .shape
            .iter()
            .try_fold(1u64, |product, &size| product.checked_mul(size))
            .and_then(|elements| elements.checked_mul(entry.dtype.bitsize() as u64))
            .filter(|bits| bits % 8 == 0)
            .map(|bits| bits / 8);
        if wanted != Some(end - start) {
            let bytes = end - start;
            return Err(format!("tensor {name} has {bytes} bytes, not those of {:?} {:?}", entry.dtype, entry.shape));
        }
        extents.push((start, end, name.clone()));
        let range = data_start + start as usize..data_start + end as usize;
        let shape = entry.shape.iter().map(|&size| size as usize).collect();
        if tensors.insert(name.clone(), TensorInfo { dtype: entry.dtype, shape, range }).is_some() {
            return Err(format!("tensor {name} is listed twice"));
        }
    }
    extents.sort();
    let mut filled = 0;
    for (start, end, name) in extents {
        if start != filled {
            let what = if start < filled { "overlaps the tensor before it" } else { "leaves a gap before it" };
            return Err(format!("tensor {name} {what} (starts at {start}, expected {filled})"));
        }
        filled = end;
    }
    if filled != data_len as u64 {
        return Err(format!("the header accounts for {filled} of {data_len} bytes of data"));
    }
    Ok(tensors)
}

#[derive(Deserialize)]
struct Entry {
    dtype: Dtype,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// The header's tensors in file order, repeated names kept so that they can be refused.
struct Header(Vec<(String, Entry)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                    } else {
                        entries.push((name, map.next_value()?));
                    }
                }
                Ok(Header(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_header(header: &str, data: usize) -> Vec<u8> {
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.as_bytes());
        file.resize(file.len() + data, 0);
        file
    }

    fn refusal(header: &str, data: usize) -> String {
        parse_header(&with_header(header, data)).unwrap_err()
    }

    #[test]
    fn a_sound_header_is_read() {
        let header = r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"BF16","shape":[2],"data_offsets":[8,12]},
            "a":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}}"#;
        let tensors = parse_header(&with_header(header, 12)).unwrap();
        assert_eq!(tensors["a"].shape, [1, 2]);
        assert_eq!((tensors["b"].raw_dtype(), tensors["b"].byte_len()), (Some(RawDtype::Bf16), 4));
    }

    #[test]
    fn hostile_headers_are_refused_with_the_reason() {
        let cases: &[(&str, usize, &str)] = &[
            (r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 4, "tensor a lies at 0..8 of 4 bytes"),
            (r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#, 8, "tensor a lies at 8..0"),
            (
                r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}"#,
                8,
                "tensor a has 8 bytes, not those of F32 [3]",
            ),
            (
                r#"{"a":{"dtype":"F16","shape":[2],"data_offsets":[0,8]}}"#,
                8,
                "tensor a has 8 bytes, not those of F16 [2]",
            ),
            (
                r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}"#,
                0,
                "tensor a has 0 bytes",
            ),
            (
                r#"{"a":{"dtype":"F32","shape":[0,1,1,1,1,1,1,1,1],"data_offsets":[0,0]}}"#,
                0,
                "tensor a has 9 dimensions",
            ),
            (
                r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}"#,
                6,
                "tensor b overlaps",
            ),
            (r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}"#, 6, "tensor a leaves a gap"),
            (r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#, 9, "accounts for 4 of 9 bytes"),
            (
                r#"{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#,
                0,
                "tensor a is listed twice",
            ),
            (r#"{"a":{"dtype":"Q9","shape":[],"data_offsets":[0,0]}}"#, 0, "bad header"),
            (r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,0]}}"#, 0, "bad header"),
            (
                r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[18446744073709551612,18446744073709551616]}}"#,
                4,
                "bad header",
            ),
            (r#"{"a":1}"#, 0, "bad header"),
            ("[]", 0, "bad header"),
            ("{", 0, "bad header"),
        ];
        for (header, data, expected) in cases {
            let message = refusal(header, *data);
            assert!(message.contains(expected), "{header}: {message}");
        }
    }

    #[test]
    fn a_hostile_header_length_allocates_nothing() {
        for length in [u64::MAX, 1 << 40, MAX_HEADER_BYTES + 1] {
            let message = parse_header(&length.to_le_bytes()).unwrap_err();
            assert!(message.contains("over the limit"), "{message}");
        }
        let message = parse_header(&100u64.to_le_bytes()).unwrap_err();
        assert!(message.contains("past the end"), "{message}");
        assert!(parse_header(&[1, 2, 3]).is_err());
    }

    #[test]
    fn offsets_near_the_top_of_the_address_space_do_not_wrap() {
        let one = "2305843009213693951"; // 2^61 - 1 values of 8 bytes
        let header = format!(
            r#"{{"a":{{"dtype":"F64","shape":[{one}],"data_offsets":[0,18446744073709551608]}},"b":{{"dtype":"F64","shape":[1],"data_offsets":[18446744073709551608,0]}}}}"#
        );
        assert!(refusal(&header, 8).contains("lies at"));
    }
}
