//! What the headers of a folder say, sound or not: for `model inspect`, and for the list with which a folder is refused.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use super::file::TensorInfo;
use crate::engine::RawDtype;

/// How the transformer and the decoder are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    Diffusers,
    Original,
}

/// Names for a message: the first 20 and how many there are.
#[derive(Debug)]
pub struct NameList(pub Vec<String>);

impl fmt::Display for NameList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 20;
        f.write_str(&self.0[..self.0.len().min(SHOWN)].join(", "))?;
        if self.0.len() > SHOWN { write!(f, ", … ({} in all)", self.0.len()) } else { Ok(()) }
    }
}

/// What became of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum TensorStatus {
    Used,
    /// Known and not needed: the VAE's encoder, an alias.
    Unused,
    Missing,
    Unexpected,
    WrongShape,
    WrongDtype,
}

/// A tensor by its stored name. Shape and dtype are the expected shape and nothing if it is missing.
#[derive(Clone, Debug, Serialize)]
pub struct TensorReport {
    pub name: String,
    pub status: TensorStatus,
    pub dtype: Option<String>,
    pub shape: Vec<usize>,
    /// The shape it should have, if it has another.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expected_shape: Option<Vec<usize>>,
}

/// What the headers of one part say.
#[derive(Clone, Debug, Serialize)]
pub struct PartReport {
    /// `transformer`, `vae` or `text_encoder`.
    pub name: &'static str,
    /// Relative to the checkpoint.
    pub files: Vec<String>,
    /// Values of all used tensors.
    pub parameters: u64,
    /// Bytes of the used tensors by dtype.
    pub bytes_by_dtype: BTreeMap<String, u64>,
    /// Values of tensors that are known and not used.
    pub unused_parameters: u64,
    /// What contradicts what, and sizes that cannot be told.
    pub problems: Vec<String>,
    pub tensors: Vec<TensorReport>,
}

impl PartReport {
    /// Records a tensor that is there; its dtype if it can be used.
    pub(super) fn found(&mut self, name: &str, info: &TensorInfo, expected: &[usize]) -> Option<RawDtype> {
        let dtype_name = format!("{:?}", info.dtype);
        let dtype = info.raw_dtype();
        let wrong_shape = info.shape != expected;
        let status = match dtype {
            _ if wrong_shape => TensorStatus::WrongShape,
            None => TensorStatus::WrongDtype,
            Some(_) => TensorStatus::Used,
        };
        if status == TensorStatus::Used {
            self.parameters += info.elements() as u64;
            *self.bytes_by_dtype.entry(dtype_name.clone()).or_default() += info.byte_len() as u64;
        }
        self.tensors.push(TensorReport {
            name: name.into(),
            status,
            dtype: Some(dtype_name),
            shape: info.shape.clone(),
            expected_shape: wrong_shape.then(|| expected.to_vec()),
        });
        dtype.filter(|_| status == TensorStatus::Used)
    }

    /// Stored names with `status`.
    pub fn with_status(&self, status: TensorStatus) -> Vec<String> {
        self.tensors.iter().filter(|tensor| tensor.status == status).map(|tensor| tensor.name.clone()).collect()
    }

    /// One line for everything that stands against running this part.
    pub fn findings(&self) -> Vec<String> {
        let mut findings: Vec<String> =
            self.problems.iter().map(|problem| format!("{}: {problem}", self.name)).collect();
        for (status, what) in [(TensorStatus::Missing, "missing"), (TensorStatus::Unexpected, "unexpected")] {
            let names = self.with_status(status);
            if !names.is_empty() {
                findings.push(format!("{}: {} {what} tensors: {}", self.name, names.len(), NameList(names)));
            }
        }
        let wrong = |status| self.tensors.iter().filter(move |tensor| tensor.status == status);
        let shapes: Vec<String> = wrong(TensorStatus::WrongShape)
            .map(|t| {
                format!("{} {:?} instead of {:?}", t.name, t.shape, t.expected_shape.as_deref().unwrap_or_default())
            })
            .collect();
        if !shapes.is_empty() {
            findings.push(format!("{}: {} tensors of another shape: {}", self.name, shapes.len(), NameList(shapes)));
        }
        let dtypes: Vec<String> = wrong(TensorStatus::WrongDtype)
            .map(|t| format!("{} is {}", t.name, t.dtype.as_deref().unwrap_or_default()))
            .collect();
        if !dtypes.is_empty() {
            let count = dtypes.len();
            findings.push(format!("{}: {count} tensors not of F32, F16 or BF16: {}", self.name, NameList(dtypes)));
        }
        findings
    }
}

/// What the headers and configurations of a folder say, sound or not.
#[derive(Clone, Debug, Serialize)]
pub struct Inspection {
    pub layout: Layout,
    /// Choices made on the way: which of two layouts or precisions is read, defaults that stand in.
    pub notes: Vec<String>,
    pub parts: Vec<PartReport>,
    /// Contradictions between parts.
    pub problems: Vec<String>,
}

impl Inspection {
    /// Everything that keeps the folder from being run. Empty if it can be.
    pub fn findings(&self) -> Vec<String> {
        self.parts.iter().flat_map(PartReport::findings).chain(self.problems.iter().cloned()).collect()
    }
}
