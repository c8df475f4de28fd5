//! Checkpoints: two layouts, one vocabulary. The model asks for tensors by their names in the original layout (T5: its
//! only layout); a [`WeightSource`] finds them in whatever the folder holds.

pub mod checkpoint;
pub mod drawn;
pub mod file;
mod folder;
mod names;
pub mod report;
mod sizes;
pub mod spiece;
#[cfg(test)]
mod tests;

use crate::engine::{Draw, Engine, Over, RawDtype, RawTensor};
use crate::model::ModelError;

/// A tensor as a source has it.
#[derive(Clone, Debug)]
pub struct StoredTensor<'a> {
    /// Shape of the whole.
    pub shape: Vec<usize>,
    pub values: Values<'a>,
}

#[derive(Clone, Debug)]
pub enum Values<'a> {
    /// Pieces to be concatenated along dimension 0. A layout that splits q, k, v or swaps halves is put right here by the
    /// order of pieces, without a copy.
    Pieces(Vec<RawTensor<'a>>),
    /// Stored nowhere: engines draw them.
    Drawn(Draw),
}

/// Row `row` of a matrix, as a piece of `shape`, which is `[1, width]`. None if there is no such row.
fn row_of<'a>(pieces: &'a [RawTensor<'a>], row: u32, shape: &'a [usize; 2]) -> Option<RawTensor<'a>> {
    let mut row = row as usize;
    for &RawTensor { dtype, shape: piece, bytes } in pieces {
        let rows = *piece.first()?;
        if row < rows {
            let len = shape[1] * dtype.bytes();
            return Some(RawTensor { dtype, shape, bytes: bytes.get(row * len..)?.get(..len)? });
        }
        row -= rows;
    }
    None
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
        self.take(name, shape, |stored| {
            Ok(match &stored.values {
                Values::Pieces(pieces) => self.engine.weight(pieces)?,
                Values::Drawn(draw) => self.engine.draw(*draw, shape)?,
            })
        })
    }

    fn matrix(&self, name: &str, shape: &[usize], over: Over) -> Result<E::Matrix, ModelError> {
        self.take(name, shape, |stored| {
            Ok(match &stored.values {
                Values::Pieces(pieces) => self.engine.stored_matrix(pieces, over)?,
                Values::Drawn(draw) => {
                    let (out, input) = (shape.first().copied().unwrap_or(0), shape.iter().skip(1).product());
                    self.engine.matrix(&self.engine.draw(*draw, &[out, input])?, over)?
                }
            })
        })
    }
}

impl<E: Engine> Loader<'_, E> {
    /// `{prefix}.weight` `[out, in, 3, 3, 3]` and `{prefix}.bias` `[out]`, packed.
    pub fn conv3d(&self, prefix: &str, out: usize, input: usize) -> Result<E::ConvWeight, ModelError> {
        self.take(&format!("{prefix}.weight"), &[out, input, 3, 3, 3], |weight| {
            self.take(&format!("{prefix}.bias"), &[out], |bias| {
                let [mut weight_room, mut bias_room] = [Vec::new(), Vec::new()];
                let (weight, bias) = (self.whole(weight, &mut weight_room)?, self.whole(bias, &mut bias_room)?);
                Ok(self.engine.conv_weight(weight, bias)?)
            })
        })
    }

    /// All values of a tensor that no layout splits; drawn ones are fetched to `room`, as engines take no others.
    fn whole<'b>(&self, stored: &'b StoredTensor<'_>, room: &'b mut Vec<u8>) -> Result<RawTensor<'b>, ModelError> {
        match &stored.values {
            Values::Pieces(pieces) => Ok(pieces[0]),
            Values::Drawn(draw) => {
                let values = self.engine.download(&self.engine.draw(*draw, &stored.shape)?)?;
                room.extend(values.into_iter().flat_map(f32::to_le_bytes));
                Ok(RawTensor { dtype: RawDtype::F32, shape: &stored.shape, bytes: room })
            }
        }
    }

    /// These rows of the matrix `name` `[rows, width]`, at least one, as a tensor. Nothing else of it is read.
    pub fn rows(&self, name: &str, shape: [usize; 2], rows: &[u32]) -> Result<E::Tensor, ModelError> {
        let row_shape = [1, shape[1]];
        let missing = |row| WeightError::Row { name: name.into(), row, rows: shape[0] };
        let drawn = self.take(name, &shape, |stored| match stored.values {
            Values::Pieces(_) => Ok(None),
            Values::Drawn(draw) => Ok(Some(draw)),
        })?;
        if let Some(draw) = drawn {
            let drawn = rows.iter().map(|&row| {
                let first = draw.first + (row as usize * shape[1]) as u64;
                if row as usize >= shape[0] {
                    return Err(missing(row).into());
                }
                Ok(self.engine.draw(Draw { first, ..draw }, &row_shape)?)
            });
            let drawn = drawn.collect::<Result<Vec<_>, ModelError>>()?;
            return Ok(self.engine.concat(&drawn.iter().collect::<Vec<_>>(), 0)?);
        }
        // One by one, each released before the next: the system maps far more around a row than the row.
        let copied = rows.iter().map(|&row| {
            self.take(name, &shape, |stored| {
                let Values::Pieces(pieces) = &stored.values else { return Err(missing(row).into()) };
                let stored = row_of(pieces, row, &row_shape).ok_or_else(|| missing(row))?;
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
