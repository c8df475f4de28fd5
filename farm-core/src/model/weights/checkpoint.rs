//! A checkpoint folder: which layout, which files, which tensors, and whether they make up a whole network.
//!
//! Read are
//! - the **diffusers** layout: `transformer/`, `vae/`, `text_encoder/` and `tokenizer/`, each optional;
//! - the **original** layout: `dit.safetensors` and `decoder.safetensors`, each optional, with the text encoder in
//!   `text_encoder/` or `t5/` and the tokenizer in `tokenizer/` or beside the text encoder's weights.
//!
//! A folder with both is read as diffusers. `model_index.json` and the scheduler's configuration are not read: there is
//! one pipeline, one schedule, and an unconditional branch that has zero text tokens whatever a file asks for.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use sha2::{Digest, Sha256};

use super::file::{TensorFile, TensorInfo};
use super::folder::{self, PartFiles};
use super::names::{self, Entry, Naming, Rows};
use super::report::{Inspection, Layout, NameList, PartReport, TensorReport, TensorStatus};
use super::sizes::{self, ConfigFile, Problem, StoredShapes};
use super::{StoredTensor, Values, WeightError, WeightSource};
use crate::engine::{RawDtype, RawTensor};
use crate::job::spec::{GenerationDefaults, RenderRequest, RenderSpec};
use crate::model::config::{DitConfig, T5Config, VaeConfig};

const ORIGINAL_DIT: &str = "dit.safetensors";
const ORIGINAL_DECODER: &str = "decoder.safetensors";
/// Before every name in single files repackaged for other programs.
const REPACKAGED_PREFIX: &str = "model.diffusion_model.";
const GENERATION_CONFIG: &str = "generation_config.json";

/// Why a folder is not a checkpoint that can be run.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error("{}: {source}", .path.display())]
    Io { path: PathBuf, source: io::Error },
    /// A file that is there says something it must not.
    #[error("{}: {message}", .path.display())]
    File { path: PathBuf, message: String },
    #[error(
        "{} holds no checkpoint: expected transformer/, vae/ or text_encoder/ with safetensors files, \
         or dit.safetensors or decoder.safetensors", .dir.display()
    )]
    Empty { dir: PathBuf },
    #[error("{} lists files that are not there: {absent}", .index.display())]
    AbsentShards { index: PathBuf, absent: NameList },
    /// The files can be read but are not a network. One line for each finding.
    #[error("{} is not a complete checkpoint: {}", .dir.display(), .findings.join("; "))]
    Refused { dir: PathBuf, findings: Vec<String> },
}

impl CheckpointError {
    pub(super) fn file(path: &Path, message: impl Into<String>) -> Self {
        Self::File { path: path.to_path_buf(), message: message.into() }
    }
}

/// The weights of one network, found by original-layout names.
pub struct Part<C> {
    config: C,
    files: Vec<TensorFile>,
    tensors: HashMap<String, Located>,
}

struct Located {
    shape: Vec<usize>,
    pieces: Vec<Piece>,
}

/// Some rows of a stored tensor.
struct Piece {
    file: usize,
    dtype: RawDtype,
    shape: Vec<usize>,
    /// Where in the file.
    bytes: Range<usize>,
}

impl<C> Part<C> {
    /// Sizes of the network.
    pub fn config(&self) -> &C {
        &self.config
    }
}

impl<C> fmt::Debug for Part<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Part({:?})", self.files)
    }
}

impl<C: Send + Sync> WeightSource for Part<C> {
    fn get(&self, name: &str) -> Result<StoredTensor<'_>, WeightError> {
        let located = self.tensors.get(name).ok_or_else(|| WeightError::Missing { name: name.into() })?;
        let pieces = located.pieces.iter().map(|piece| RawTensor {
            dtype: piece.dtype,
            shape: &piece.shape,
            bytes: &self.files[piece.file].all_bytes()[piece.bytes.clone()],
        });
        Ok(StoredTensor { shape: located.shape.clone(), values: Values::Pieces(pieces.collect()) })
    }

    fn release(&self, name: &str) {
        for piece in self.tensors.get(name).iter().flat_map(|located| &located.pieces) {
            self.files[piece.file].release(piece.bytes.clone());
        }
    }
}

/// An open checkpoint: memory-mapped, checked to be complete, nothing of it read yet but headers.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    inspection: Inspection,
    dit: Option<Part<DitConfig>>,
    vae: Option<Part<VaeConfig>>,
    t5: Option<Arc<Part<T5Config>>>,
    tokenizer: Option<PathBuf>,
    generation: GenerationDefaults,
    /// Configurations as read, by name relative to the folder; part of the content hash.
    configs: BTreeMap<String, Vec<u8>>,
    hash: OnceLock<String>,
}

impl Checkpoint {
    /// Opens `dir` and refuses it, with a list, if a tensor is missing, unknown or of another shape. A folder may lack
    /// whole parts; see [`Checkpoint::dit`] and its sisters.
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        let checkpoint = Self::survey(dir)?;
        let findings = checkpoint.inspection.findings();
        if findings.is_empty() {
            Ok(checkpoint)
        } else {
            Err(CheckpointError::Refused { dir: dir.to_path_buf(), findings })
        }
    }

    /// What the headers say, without refusing what is incomplete.
    pub fn inspect(dir: &Path) -> Result<Inspection, CheckpointError> {
        Ok(Self::survey(dir)?.inspection)
    }

    /// The folder that was opened.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn inspection(&self) -> &Inspection {
        &self.inspection
    }

    pub fn layout(&self) -> Layout {
        self.inspection.layout
    }

    /// Choices made on opening, for the log: which of two layouts or precisions is read, defaults that stand in.
    pub fn notes(&self) -> &[String] {
        &self.inspection.notes
    }

    /// The transformer, if the folder has one.
    pub fn dit(&self) -> Option<&Part<DitConfig>> {
        self.dit.as_ref()
    }

    /// The VAE decoder, if the folder has one.
    pub fn vae(&self) -> Option<&Part<VaeConfig>> {
        self.vae.as_ref()
    }

    /// The text encoder, if the folder has one; shared, because who encodes goes on reading from it.
    pub fn t5(&self) -> Option<&Arc<Part<T5Config>>> {
        self.t5.as_ref()
    }

    /// The folder for [`Tokenizer::open`](crate::model::tokenizer::Tokenizer::open), if there is one.
    pub fn tokenizer_dir(&self) -> Option<&Path> {
        self.tokenizer.as_deref()
    }

    /// `generation_config.json`, or the published model's values.
    pub fn generation_defaults(&self) -> &GenerationDefaults {
        &self.generation
    }

    /// Hex sha256 over all files that decide what is rendered: weights that are read, configurations, the tokenizer,
    /// each with its name, in name order. Reads every weight byte on the first call, and keeps none in memory.
    pub fn content_hash(&self) -> Result<&str, CheckpointError> {
        if let Some(hash) = self.hash.get() {
            return Ok(hash);
        }
        let mut contents: BTreeMap<String, Content<'_>> = BTreeMap::new();
        for (name, bytes) in &self.configs {
            contents.insert(name.clone(), Content::Small(bytes));
        }
        let files = self.dit.iter().flat_map(|part| &part.files);
        let files = files.chain(self.vae.iter().flat_map(|part| &part.files));
        for file in files.chain(self.t5.iter().flat_map(|part| &part.files)) {
            contents.insert(relative(&self.dir, file.path()), Content::Weights(file));
        }
        let tokenizer = match &self.tokenizer {
            Some(dir) => crate::model::tokenizer::model_file(dir),
            None => None,
        };
        let tokenizer_bytes;
        if let Some(path) = tokenizer {
            tokenizer_bytes = folder::read_small(&path)?;
            contents.insert(relative(&self.dir, &path), Content::Small(&tokenizer_bytes));
        }
        let mut hasher = Sha256::new();
        for (name, content) in contents {
            let len = match content {
                Content::Small(bytes) => bytes.len(),
                Content::Weights(file) => file.all_bytes().len(),
            };
            // Lengths first, so that no two sets of files give the same stream.
            hasher.update((name.len() as u64).to_le_bytes());
            hasher.update(name.as_bytes());
            hasher.update((len as u64).to_le_bytes());
            match content {
                Content::Small(bytes) => hasher.update(bytes),
                Content::Weights(file) => file.pass(|part| hasher.update(part)),
            }
        }
        let hash = hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(self.hash.get_or_init(|| hash))
    }

    fn survey(dir: &Path) -> Result<Self, CheckpointError> {
        let mut survey = Survey { dir, notes: Vec::new(), configs: BTreeMap::new() };
        let (dit_file, decoder_file) = (dir.join(ORIGINAL_DIT), dir.join(ORIGINAL_DECODER));
        let original: Vec<&str> = [(&dit_file, ORIGINAL_DIT), (&decoder_file, ORIGINAL_DECODER)]
            .into_iter()
            .filter_map(|(path, name)| path.is_file().then_some(name))
            .collect();

        let mut dit_files = survey.folder_part("transformer", "diffusion_pytorch_model")?;
        let mut vae_files = survey.folder_part("vae", "diffusion_pytorch_model")?;
        let layout = if dit_files.is_none() && vae_files.is_none() && !original.is_empty() {
            Layout::Original
        } else {
            Layout::Diffusers
        };
        if layout == Layout::Original {
            let single = |path: &Path| -> Result<Option<PartFiles>, CheckpointError> {
                let file = path.is_file().then(|| TensorFile::open(path)).transpose()?;
                Ok(file.map(|file| PartFiles { files: vec![file], index: None }))
            };
            dit_files = single(&dit_file)?;
            vae_files = single(&decoder_file)?;
        } else if !original.is_empty() {
            survey.notes.push(format!(
                "{} holds both layouts: the diffusers folders are read, {} not",
                dir.display(),
                original.join(" and ")
            ));
        }
        let mut t5_dir = "text_encoder";
        let mut t5_files = survey.folder_part(t5_dir, "model")?;
        if t5_files.is_none() && layout == Layout::Original {
            t5_dir = "t5";
            t5_files = survey.folder_part(t5_dir, "model")?;
        }
        if dit_files.is_none() && vae_files.is_none() && t5_files.is_none() {
            return Err(CheckpointError::Empty { dir: dir.to_path_buf() });
        }

        let dit_naming = match layout {
            Layout::Diffusers => Naming::Diffusers,
            Layout::Original => Naming::Original { prefix: repackaged_prefix(dit_files.as_ref()) },
        };
        let vae_naming = match layout {
            Layout::Diffusers => Naming::Diffusers,
            Layout::Original => Naming::Original { prefix: String::new() },
        };
        // The original layout keeps no configuration beside its files.
        let mut config_of = |part: &str| match layout {
            Layout::Diffusers => survey.config(part),
            Layout::Original => Ok(None),
        };
        let dit_config = config_of("transformer")?;
        let vae_config = config_of("vae")?;
        let t5_config = survey.config(t5_dir)?;
        if vae_files.is_some() && vae_config.is_none() {
            let note = "the vae's latent statistics and expansions are the published ones: no vae/config.json is read";
            survey.notes.push(note.into());
        }

        let mut parts = Vec::new();
        let mut problems = Vec::new();
        let dit = dit_files.map(|files| {
            survey.part("transformer", files, &[], &mut parts, |stored, problems| {
                let config = sizes::dit(stored, &dit_naming, dit_config.as_ref(), problems)?;
                let entries = names::dit(&config, &dit_naming);
                Ok((config, entries))
            })
        });
        let vae = vae_files.map(|files| {
            survey.part("vae", files, &["encoder."], &mut parts, |stored, problems| {
                let config = sizes::vae(stored, &vae_naming, vae_config.as_ref(), problems)?;
                let entries = names::vae(&config, &vae_naming);
                Ok((config, entries))
            })
        });
        let t5 = t5_files.map(|files| {
            survey.part("text_encoder", files, &names::T5_EMBEDDING, &mut parts, |stored, problems| {
                let stored_as = names::T5_EMBEDDING.into_iter().find(|name| stored.contains_key(name));
                let embedding = stored_as.unwrap_or(names::T5_EMBEDDING[0]);
                let config = sizes::t5(stored, embedding, t5_config.as_ref(), problems)?;
                let entries = names::t5(&config, embedding);
                Ok((config, entries))
            })
        });
        let (dit, vae, t5) = (dit.flatten(), vae.flatten(), t5.flatten());
        if let (Some(dit), Some(t5)) = (&dit, &t5)
            && dit.config.text_dim != t5.config.d_model
        {
            let (takes, gives) = (dit.config.text_dim, t5.config.d_model);
            problems.push(format!("the transformer takes text of width {takes}, the text encoder gives {gives}"));
        }
        if let (Some(dit), Some(vae)) = (&dit, &vae)
            && dit.config.in_channels != vae.config.latent_channels
        {
            let (makes, takes) = (dit.config.in_channels, vae.config.latent_channels);
            problems.push(format!("the transformer makes latents of {makes} channels, the vae takes {takes}"));
        }

        let generation = survey.generation()?;
        let tokenizer = ["tokenizer", t5_dir]
            .into_iter()
            .map(|name| dir.join(name))
            .find(|dir| crate::model::tokenizer::model_file(dir).is_some());
        let Survey { notes, configs, .. } = survey;
        Ok(Self {
            dir: dir.to_path_buf(),
            inspection: Inspection { layout, notes, parts, problems },
            dit,
            vae,
            t5: t5.map(Arc::new),
            tokenizer,
            generation,
            configs,
            hash: OnceLock::new(),
        })
    }
}

/// What is hashed of a file.
#[derive(Clone, Copy)]
enum Content<'a> {
    Small(&'a [u8]),
    Weights(&'a TensorFile),
}

/// State of reading one folder.
struct Survey<'a> {
    dir: &'a Path,
    notes: Vec<String>,
    configs: BTreeMap<String, Vec<u8>>,
}

impl Survey<'_> {
    fn folder_part(&mut self, name: &str, stem: &str) -> Result<Option<PartFiles>, CheckpointError> {
        let dir = self.dir.join(name);
        if dir.is_dir() { folder::open_part(&dir, stem, &mut self.notes) } else { Ok(None) }
    }

    /// `{part}/config.json`, if it is there.
    fn config(&mut self, part: &str) -> Result<Option<ConfigFile>, CheckpointError> {
        let name = format!("{part}/config.json");
        let path = self.dir.join(&name);
        if !path.is_file() {
            return Ok(None);
        }
        let bytes = folder::read_small(&path)?;
        let config = ConfigFile::parse(name.clone(), &path, &bytes)?;
        self.configs.insert(name, bytes);
        Ok(Some(config))
    }

    fn generation(&mut self) -> Result<GenerationDefaults, CheckpointError> {
        let path = self.dir.join(GENERATION_CONFIG);
        if !path.is_file() {
            return Ok(GenerationDefaults::default());
        }
        let bytes = folder::read_small(&path)?;
        let defaults: GenerationDefaults =
            serde_json::from_slice(&bytes).map_err(|error| CheckpointError::file(&path, error.to_string()))?;
        // A prompt line that leaves everything out has to be legal.
        let request = RenderRequest {
            prompt: String::new(),
            negative_prompt: None,
            width: None,
            height: None,
            num_frames: None,
            num_inference_steps: None,
            guidance_scale: None,
            seed: None,
            id: None,
            priority: None,
            model: None,
            labels: BTreeMap::new(),
            after: Vec::new(),
            require: BTreeMap::new(),
        };
        RenderSpec::resolve(&request, &defaults, 0).map_err(|error| CheckpointError::file(&path, error.to_string()))?;
        self.configs.insert(GENERATION_CONFIG.into(), bytes);
        Ok(defaults)
    }

    /// Holds the tensors of `files` against the table that `derive` makes from them. Reports always; gives a part if
    /// its sizes could be told. `unused` are prefixes of known tensors that are not needed.
    fn part<C>(
        &self,
        name: &'static str,
        files: PartFiles,
        unused: &[&str],
        parts: &mut Vec<PartReport>,
        derive: impl FnOnce(&StoredShapes<'_>, &mut Vec<Problem>) -> Result<(C, Vec<Entry>), Problem>,
    ) -> Option<Part<C>> {
        let PartFiles { files, index } = files;
        let mut problems = Vec::new();
        let mut stored: BTreeMap<&str, (usize, &TensorInfo)> = BTreeMap::new();
        for (number, file) in files.iter().enumerate() {
            for (tensor, info) in file.tensors() {
                if let Some((other, _)) = stored.insert(tensor, (number, info)) {
                    let (a, b) = (relative(self.dir, files[other].path()), relative(self.dir, file.path()));
                    problems.push(format!("tensor {tensor} is in both {a} and {b}"));
                }
            }
        }
        for (tensor, file) in index.iter().flatten() {
            let there = stored.get(tensor.as_str());
            if there
                .is_none_or(|(number, _)| files[*number].path().file_name().is_none_or(|name| name != file.as_str()))
            {
                problems.push(format!("the index says that tensor {tensor} is in {file}, but it is not"));
            }
        }

        let shapes: StoredShapes<'_> = stored.iter().map(|(name, (_, info))| (*name, info.shape.as_slice())).collect();
        let derived = derive(&shapes, &mut problems).map_err(|problem| problems.push(problem)).ok();
        let (config, entries) = derived.unzip();
        let mut report = PartReport {
            name,
            files: files.iter().map(|file| relative(self.dir, file.path())).collect(),
            parameters: 0,
            bytes_by_dtype: BTreeMap::new(),
            unused_parameters: 0,
            problems,
            tensors: Vec::new(),
        };

        let mut used = HashSet::new();
        let mut tensors = HashMap::new();
        for entry in entries.iter().flatten() {
            let mut pieces = Vec::new();
            for name in &entry.stored {
                used.insert(name.clone());
                let mut expected = entry.shape.clone();
                expected[0] /= entry.stored.len();
                let found = stored.get(name.as_str()).copied();
                if let Some((file, info)) = found
                    && let Some(dtype) = report.found(name, info, &expected)
                {
                    pieces.extend(pieces_of(entry.rows, file, dtype, info));
                } else if found.is_none() {
                    report.tensors.push(TensorReport {
                        name: name.clone(),
                        status: TensorStatus::Missing,
                        dtype: None,
                        shape: expected,
                        expected_shape: None,
                    });
                }
            }
            tensors.insert(entry.name.clone(), Located { shape: entry.shape.clone(), pieces });
        }
        for (name, (_, info)) in stored.iter().filter(|(name, _)| !used.contains(**name)) {
            let status = if unused.iter().any(|prefix| name.starts_with(prefix)) {
                report.unused_parameters += info.elements() as u64;
                TensorStatus::Unused
            } else {
                TensorStatus::Unexpected
            };
            report.tensors.push(TensorReport {
                name: name.to_string(),
                status,
                dtype: Some(format!("{:?}", info.dtype)),
                shape: info.shape.clone(),
                expected_shape: None,
            });
        }
        // Without sizes there is no table, and nothing can be called unexpected.
        if config.is_none() {
            report.tensors.retain(|tensor| tensor.status != TensorStatus::Unexpected);
        }
        parts.push(report);
        config.map(|config| Part { config, files, tensors })
    }
}

/// A stored tensor as pieces of the original one. Shape and dtype were checked.
fn pieces_of(rows: Rows, file: usize, dtype: RawDtype, info: &TensorInfo) -> Vec<Piece> {
    let Range { start, end } = info.range;
    let piece = |shape: Vec<usize>, bytes: Range<usize>| Piece { file, dtype, shape, bytes };
    match rows {
        Rows::Whole | Rows::Concatenated => vec![piece(info.shape.clone(), start..end)],
        Rows::HalvesSwapped => {
            let mut half = info.shape.clone();
            half[0] /= 2;
            let middle = start + (end - start) / 2;
            vec![piece(half.clone(), middle..end), piece(half, start..middle)]
        }
    }
}

/// The prefix, if every name has it.
fn repackaged_prefix(files: Option<&PartFiles>) -> String {
    let names = || files.into_iter().flat_map(|part| &part.files).flat_map(|file| file.tensors().keys());
    let prefixed = names().next().is_some() && names().all(|name| name.starts_with(REPACKAGED_PREFIX));
    if prefixed { REPACKAGED_PREFIX.into() } else { String::new() }
}

/// `path` below `dir`, with `/` on every system.
fn relative(dir: &Path, path: &Path) -> String {
    let path = path.strip_prefix(dir).unwrap_or(path);
    path.components().map(|part| part.as_os_str().to_string_lossy()).collect::<Vec<_>>().join("/")
}
