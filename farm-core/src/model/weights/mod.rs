//! Checkpoints: two layouts, one vocabulary. The model asks for tensors by their names in the original layout (T5: its
//! only layout); a [`WeightSource`] finds them in whatever the folder holds.

pub mod checkpoint;
pub mod file;
mod folder;
mod names;
pub mod report;
mod sizes;
pub mod spiece;
#[cfg(test)]
mod tests;

use crate::engine::{Engine, Over, RawTensor};
use crate::model::ModelError;

/// A tensor as the checkpoint stores it: pieces to be concatenated along dimension 0. A layout that splits q, k, v or
/// swaps halves is put right here by the order of pieces, without a copy.
#[derive(Clone, Debug)]
pub struct StoredTensor<'a> {
    /// Shape of the whole.
    pub shape: Vec<usize>,
    pub pieces: Vec<RawTensor<'a>>,
}

impl StoredTensor<'_> {
    /// Row `row` of a matrix, as a piece of `shape`, which is `[1, width]`. None if there is no such row.
    fn row<'a>(&'a self, row: u32, shape: &'a [usize; 2]) -> Option<RawTensor<'a>> {
        let mut row = row as usize;
        for &RawTensor { dtype, shape: piece, bytes } in &self.pieces {
            let rows = *piece.first()?;
            if row < rows {
                let len = shape[1] * dtype.bytes();
                return Some(RawTensor { dtype, shape, bytes: bytes.get(row * len..)?.get(..len)? });
            }
            row -= rows;
        }
        None
    }
}

/// Finds a tensor by its original-layout name, for example `blocks.0.attn.qkv_x.weight`.
pub trait WeightSource: Send + Sync {
    fn get(&self, name: &str) -> Result<StoredTensor<'_>, WeightError>;

    /// Says that an engine has its own copy of what it needs of the tensor, so that a source may give the memory of its
    /// bytes back. [`get`](Self::get) still finds it, with the same values.
    fn release(&self, _name: &str) {}
}

#[derive(Debug, thiserror::Error)]
pub enum WeightError {
    #[error("tensor {name} is missing from the checkpoint")]
    Missing { name: String },
    #[error("tensor {name} has shape {got:?}, expected {expected:?}")]
    Shape { name: String, expected: Vec<usize>, got: Vec<usize> },
    #[error("tensor {name} has no row {row}, only {rows}")]
    Row { name: String, row: u32, rows: usize },
}

/// Where a network gets its tensors from, by name and with their shapes checked.
pub trait Tensors<E: Engine> {
    fn engine(&self) -> &E;
    /// The tensor `name`, which has to have `shape`.
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<E::Tensor, ModelError>;
    /// The tensor `name`, which has to have `shape`, as the weight of a linear layer; dimensions behind the first count as
    /// one.
    fn matrix(&self, name: &str, shape: &[usize], over: Over) -> Result<E::Matrix, ModelError> {
        let weight = self.tensor(name, shape)?;
        let (out, input) = (shape.first().copied().unwrap_or(0), shape.iter().skip(1).product());
        Ok(self.engine().matrix(&self.engine().reshape(&weight, &[out, input])?, over)?)
    }
}

/// Loads tensors of a checkpoint onto an engine.
pub struct Loader<'a, E> {
    pub engine: &'a E,
    pub source: &'a dyn WeightSource,
}

impl<E: Engine> Tensors<E> for Loader<'_, E> {
    fn engine(&self) -> &E {
        self.engine
    }

    fn tensor(&self, name: &str, shape: &[usize]) -> Result<E::Tensor, ModelError> {
        self.take(name, shape, |stored| Ok(self.engine.weight(&stored.pieces)?))
    }

    fn matrix(&self, name: &str, shape: &[usize], over: Over) -> Result<E::Matrix, ModelError> {
        self.take(name, shape, |stored| Ok(self.engine.stored_matrix(&stored.pieces, over)?))
    }
}

impl<E: Engine> Loader<'_, E> {
    /// `{prefix}.weight` `[out, in, 3, 3, 3]` and `{prefix}.bias` `[out]`, packed.
    pub fn conv3d(&self, prefix: &str, out: usize, input: usize) -> Result<E::ConvWeight, ModelError> {
        self.take(&format!("{prefix}.weight"), &[out, input, 3, 3, 3], |weight| {
            self.take(&format!("{prefix}.bias"), &[out], |bias| {
                // No layout splits a convolution.
                Ok(self.engine.conv_weight(weight.pieces[0], bias.pieces[0])?)
            })
        })
    }

    /// These rows of the matrix `name` `[rows, width]`, at least one, as a tensor. Nothing else of it is read.
    pub fn rows(&self, name: &str, shape: [usize; 2], rows: &[u32]) -> Result<E::Tensor, ModelError> {
        let row_shape = [1, shape[1]];
        // One by one, each released before the next: the system maps far more around a row than the row.
        let copied = rows.iter().map(|&row| {
            self.take(name, &shape, |stored| {
                let missing = || WeightError::Row { name: name.into(), row, rows: shape[0] };
                let stored = stored.row(row, &row_shape).ok_or_else(missing)?;
                Ok((stored.dtype, stored.bytes.to_vec()))
            })
        });
        let copied = copied.collect::<Result<Vec<_>, _>>()?;
        let pieces = copied.iter().map(|(dtype, bytes)| RawTensor { dtype: *dtype, shape: &row_shape, bytes });
        Ok(self.engine.weight(&pieces.collect::<Vec<_>>())?)
    }

    /// Hands the tensor `name` of this `shape` to `take`, which makes an engine's own of it, and releases it.
    fn take<T>(
        &self,
        name: &str,
        shape: &[usize],
        take: impl FnOnce(&StoredTensor<'_>) -> Result<T, ModelError>,
    ) -> Result<T, ModelError> {
        let stored = self.source.get(name)?;
        if stored.shape != shape {
            return Err(WeightError::Shape { name: name.into(), expected: shape.to_vec(), got: stored.shape }.into());
        }
        let taken = take(&stored);
        self.source.release(name);
        taken
    }
}
