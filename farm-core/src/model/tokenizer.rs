//! Prompt → token ids, from `spiece.model` or `tokenizer.json`.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::model::weights::spiece::{SpieceError, SpieceModel};

/// Ids the model takes at most, the end of the sentence included.
pub const MAX_IDS: usize = 256;

const SPIECE: &str = "spiece.model";
const JSON: &str = "tokenizer.json";
/// The published spiece.model has 0.8 MB, its tokenizer.json would have 2.4 MB.
const MAX_FILE_BYTES: u64 = 64 << 20;

#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    #[error("{} has neither {SPIECE} nor {JSON}", .dir.display())]
    Absent { dir: PathBuf },
    #[error("{}: {source}", .path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("{}: {source}", .path.display())]
    Spiece { path: PathBuf, source: SpieceError },
    #[error("{}: {message}", .path.display())]
    Json { path: PathBuf, message: String },
}

/// Token ids of one text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoding {
    /// At most [`MAX_IDS`], the last one is the end of the sentence. No padding.
    pub ids: Vec<u32>,
    /// If the text was cut: how many tokens it has, of which 255 were kept. The end of the sentence does not count.
    pub truncated: Option<usize>,
}

/// A T5 tokenizer.
pub struct Tokenizer {
    path: PathBuf,
    kind: Kind,
}

enum Kind {
    Spiece(Box<SpieceModel>),
    Json { tokenizer: Box<tokenizers::Tokenizer>, eos: u32 },
}

/// The file that [`Tokenizer::open`] reads. `spiece.model` goes first: it is what the reference reads, and a
/// `tokenizer.json` beside it is a conversion of it.
pub fn model_file(dir: &Path) -> Option<PathBuf> {
    [SPIECE, JSON].into_iter().map(|name| dir.join(name)).find(|path| path.is_file())
}

impl Tokenizer {
    /// Reads the tokenizer of a folder; see [`model_file`].
    pub fn open(dir: &Path) -> Result<Self, TokenizerError> {
        let path = model_file(dir).ok_or_else(|| TokenizerError::Absent { dir: dir.to_path_buf() })?;
        let io = |source| TokenizerError::Io { path: path.clone(), source };
        let mut bytes = Vec::new();
        File::open(&path).map_err(io)?.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(io)?;
        if bytes.len() as u64 > MAX_FILE_BYTES {
            return Err(io(io::Error::other(format!("over {MAX_FILE_BYTES} bytes"))));
        }
        let kind = if path.ends_with(SPIECE) {
            let model =
                SpieceModel::parse(&bytes).map_err(|source| TokenizerError::Spiece { path: path.clone(), source })?;
            Kind::Spiece(Box::new(model))
        } else {
            let json = |message: String| TokenizerError::Json { path: path.clone(), message };
            let mut tokenizer = tokenizers::Tokenizer::from_bytes(&bytes).map_err(|error| json(error.to_string()))?;
            // The cut is made here, where the full length is known.
            tokenizer.with_truncation(None).map_err(|error| json(error.to_string()))?;
            tokenizer.with_padding(None);
            let eos = tokenizer.token_to_id("</s>").ok_or_else(|| json("no token </s>".into()))?;
            Kind::Json { tokenizer: Box::new(tokenizer), eos }
        };
        Ok(Self { path, kind })
    }

    /// The file that was read.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Ids of `text`: its tokens and the end of the sentence, nothing stripped or lower-cased beyond what the file says.
    /// An empty text gives the end of the sentence alone.
    pub fn encode(&self, text: &str) -> Result<Encoding, TokenizerError> {
        let (mut ids, eos) = match &self.kind {
            Kind::Spiece(model) => {
                let source = |source| TokenizerError::Spiece { path: self.path.clone(), source };
                (model.encode(text).map_err(source)?, model.eos())
            }
            Kind::Json { tokenizer, eos } => {
                let encoding = tokenizer.encode_fast(text, false);
                let json = |message| TokenizerError::Json { path: self.path.clone(), message };
                (encoding.map_err(|error| json(error.to_string()))?.get_ids().to_vec(), *eos)
            }
        };
        let truncated = (ids.len() > MAX_IDS - 1).then_some(ids.len());
        ids.truncate(MAX_IDS - 1);
        ids.push(eos);
        Ok(Encoding { ids, truncated })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::weights::file::TensorFile;

    fn folder(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(name)
    }

    #[test]
    fn the_bundled_tokenizer_gives_the_ids_of_the_reference() {
        let tokenizer = Tokenizer::open(&folder("assets/mochi-tiny/tokenizer")).unwrap();
        let golden = TensorFile::open(&folder("tests/goldens/mochi-tiny/goldens.safetensors")).unwrap();
        let tensor = |name: &str| golden.bytes(&golden.tensors()[name]);
        // i64 [2, 256] and u8 [2, 256]; prompts as in goldens.json.
        let ids = tensor("t5.ids").as_chunks::<8>().0.iter().map(|&id| i64::from_le_bytes(id) as u32);
        let ids: Vec<u32> = ids.collect();
        let mask = tensor("t5.mask");
        let prompts =
            ["a red ball moving left on a black background", "A blue triangle, rising: over a navy background!"];
        for (row, prompt) in prompts.into_iter().enumerate() {
            let valid = mask[row * 256..][..256].iter().filter(|&&valid| valid == 1).count();
            let encoding = tokenizer.encode(prompt).unwrap();
            assert_eq!(encoding, Encoding { ids: ids[row * 256..][..valid].to_vec(), truncated: None });
        }
        assert_eq!(tokenizer.encode("").unwrap().ids, [1]);
    }

    #[test]
    fn a_text_of_255_tokens_is_whole_and_a_longer_one_is_cut_to_255_and_the_end() {
        for dir in ["assets/mochi-tiny/tokenizer", "tests/goldens/tokenizer"] {
            let tokenizer = Tokenizer::open(&folder(dir)).unwrap();
            let one = tokenizer.encode("a").unwrap().ids.len() - 1;
            let text = |tokens: usize| vec!["a"; tokens / one].join(" ");
            let whole = tokenizer.encode(&text(255)).unwrap();
            assert_eq!((whole.ids.len(), whole.truncated), (256, None), "{dir}");
            let cut = tokenizer.encode(&text(300)).unwrap();
            assert_eq!((cut.ids.len(), cut.truncated, cut.ids.last()), (256, Some(300), Some(&1)), "{dir}");
            assert_eq!(cut.ids, whole.ids);
        }
    }

    #[test]
    fn spiece_model_goes_before_its_conversion() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(Tokenizer::open(dir.path()), Err(TokenizerError::Absent { .. })));
        std::fs::write(dir.path().join(JSON), "{").unwrap();
        assert!(matches!(Tokenizer::open(dir.path()), Err(TokenizerError::Json { .. })));
        std::fs::copy(folder("tests/goldens/tokenizer").join(SPIECE), dir.path().join(SPIECE)).unwrap();
        assert!(Tokenizer::open(dir.path()).unwrap().path().ends_with(SPIECE));
    }
}
