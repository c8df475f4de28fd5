//! Which files of a folder hold a part's weights: one file or shards behind an index, in one or more precisions.
//!
//! Names as the hub has them: `{stem}.safetensors`, `{stem}.bf16.safetensors`, `{stem}.safetensors.index.json`,
//! `{stem}.safetensors.index.bf16.json` with shards such as `{stem}.bf16-00001-of-00003.safetensors`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::checkpoint::CheckpointError;
use super::file::TensorFile;
use super::report::NameList;

/// The published text encoder's index is 20 KB.
const MAX_JSON_BYTES: u64 = 16 << 20;
const MAX_SHARDS: usize = 10_000;

/// The open files of one part.
pub(super) struct PartFiles {
    pub files: Vec<TensorFile>,
    /// Tensor → file name, if the part has an index.
    pub index: Option<BTreeMap<String, String>>,
}

/// One way to read the part: a single file, or an index and its shards.
struct Candidate {
    /// The file or the index, for messages.
    name: String,
    variant: String,
    files: Vec<PathBuf>,
    index: Option<BTreeMap<String, String>>,
}

impl Candidate {
    fn absent(&self) -> Vec<String> {
        let absent = self.files.iter().filter(|path| !path.is_file());
        absent.map(|path| path.file_name().unwrap_or_default().to_string_lossy().into_owned()).collect()
    }
}

/// Opens the weights of `dir`, the widest precision if it holds several. None if it holds no weights. What was chosen
/// and what was passed over goes to `notes`.
pub(super) fn open_part(dir: &Path, stem: &str, notes: &mut Vec<String>) -> Result<Option<PartFiles>, CheckpointError> {
    let (complete, incomplete): (Vec<_>, Vec<_>) =
        candidates(dir, stem)?.into_iter().partition(|candidate| candidate.absent().is_empty());
    if complete.is_empty() {
        return match incomplete.first() {
            Some(candidate) => Err(CheckpointError::AbsentShards {
                index: dir.join(&candidate.name),
                absent: NameList(candidate.absent()),
            }),
            None => Ok(None),
        };
    }
    let shown = |name: &str| dir.join(name).display().to_string();
    for candidate in &incomplete {
        let (absent, all) = (candidate.absent().len(), candidate.files.len());
        notes.push(format!("{} passed over: {absent} of its {all} files are not there", shown(&candidate.name)));
    }

    let mut opened = Vec::with_capacity(complete.len());
    for candidate in complete {
        let files = candidate.files.iter().map(|path| TensorFile::open(path)).collect::<Result<Vec<_>, _>>()?;
        opened.push((width(&files), candidate, files));
    }
    // Widest first; between equals the one without a variant, which is the repository's own default.
    opened.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| a.1.variant.cmp(&b.1.variant)));
    let mut opened = opened.into_iter();
    let Some((bytes, chosen, files)) = opened.next() else { return Ok(None) };
    for (other_bytes, other, _) in opened {
        notes.push(format!(
            "{} is read ({bytes} bytes a value), {} is not ({other_bytes})",
            shown(&chosen.name),
            shown(&other.name)
        ));
    }
    Ok(Some(PartFiles { files, index: chosen.index }))
}

/// Mean bytes per value.
fn width(files: &[TensorFile]) -> f64 {
    let infos = || files.iter().flat_map(|file| file.tensors().values());
    let bytes: usize = infos().map(|info| info.byte_len()).sum();
    let values: usize = infos().map(|info| info.elements()).sum();
    bytes as f64 / values.max(1) as f64
}

fn candidates(dir: &Path, stem: &str) -> Result<Vec<Candidate>, CheckpointError> {
    let io = |source| CheckpointError::Io { path: dir.to_path_buf(), source };
    let mut found = Vec::new();
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(dir).map_err(io)? {
        // A name that is not UTF-8 is none of ours.
        if let Ok(name) = entry.map_err(io)?.file_name().into_string() {
            names.insert(name);
        }
    }
    for name in names {
        let Some(rest) = name.strip_prefix(stem) else { continue };
        if let Some(variant) = rest.strip_suffix(".safetensors").and_then(variant) {
            let files = vec![dir.join(&name)];
            found.push(Candidate { variant, files, index: None, name });
        } else if let Some((before, after)) = rest.split_once(".safetensors.index")
            && let Some(after) = after.strip_suffix(".json")
            && let (Some(before), Some(after)) = (variant(before), variant(after))
        {
            let index = read_index(&dir.join(&name))?;
            let shards: BTreeSet<&String> = index.values().collect();
            let files = shards.into_iter().map(|shard| dir.join(shard)).collect();
            found.push(Candidate { variant: before + &after, files, index: Some(index), name });
        }
    }
    Ok(found)
}

/// `""` or `".bf16"` → the variant's name. Shards (`-00001-of-00003`) and other files give none.
fn variant(part: &str) -> Option<String> {
    let name = match part.strip_prefix('.') {
        None if part.is_empty() => "",
        Some(name) if !name.is_empty() => name,
        _ => return None,
    };
    name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_').then(|| name.to_string())
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

fn read_index(path: &Path) -> Result<BTreeMap<String, String>, CheckpointError> {
    let index: Index =
        serde_json::from_slice(&read_small(path)?).map_err(|error| CheckpointError::file(path, error.to_string()))?;
    for (tensor, file) in &index.weight_map {
        // A shard lies beside its index; a path would let an index read any file of the machine.
        if file.is_empty() || file.starts_with('.') || file.contains(['/', '\\', '\0']) {
            return Err(CheckpointError::file(
                path,
                format!("tensor {tensor} lies in {file:?}, which is no file name"),
            ));
        }
    }
    let shards = index.weight_map.values().collect::<BTreeSet<_>>().len();
    if shards == 0 || shards > MAX_SHARDS {
        return Err(CheckpointError::file(path, format!("names {shards} files")));
    }
    Ok(index.weight_map)
}

/// A small text file, whole. Refuses to read one that is not small.
pub(super) fn read_small(path: &Path) -> Result<Vec<u8>, CheckpointError> {
    let io = |source| CheckpointError::Io { path: path.to_path_buf(), source };
    let mut bytes = Vec::new();
    fs::File::open(path).map_err(io)?.take(MAX_JSON_BYTES + 1).read_to_end(&mut bytes).map_err(io)?;
    if bytes.len() as u64 > MAX_JSON_BYTES {
        return Err(CheckpointError::file(path, format!("over {MAX_JSON_BYTES} bytes")));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_published_file_name_is_understood() {
        for (part, expected) in
            [("", Some("")), (".bf16", Some("bf16")), ("-00001-of-00003", None), (".bf16-00001-of-00003", None)]
        {
            assert_eq!(variant(part).as_deref(), expected, "{part}");
        }
    }

    #[test]
    fn an_index_cannot_point_out_of_its_folder() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors.index.json");
        for file in ["../secret.safetensors", "/etc/passwd", "", "a/b"] {
            fs::write(&path, format!(r#"{{"weight_map":{{"w":{file:?}}}}}"#)).unwrap();
            let error = read_index(&path).unwrap_err().to_string();
            assert!(error.contains("no file name"), "{error}");
        }
        fs::write(&path, r#"{"weight_map":{}}"#).unwrap();
        assert!(read_index(&path).unwrap_err().to_string().contains("names 0 files"));
    }
}
