//! The weights of all blocks: whole on every rank, dealt to the ranks of a group, or fetched from the host's memory.

use std::cell::Cell;
use std::cell::RefCell;

use crate::comm::Exchange;
use crate::engine::streaming::{Streaming, walk};
use crate::engine::{Engine, Over};
use crate::model::ModelError;
use crate::model::block::Block;
use crate::model::config::DitConfig;
use crate::model::weights::{Loader, Tensors};
use crate::parallel::group::RankGroup;
use crate::parallel::shard::Split;

pub(super) enum Blocks<E: Engine> {
    Resident(Vec<Block<E>>),
    Sharded(ShardedBlocks<E>),
    Streamed(StreamedBlocks<E>),
}

/// Every rank keeps an equal part of each block's weights, as one flat run of values; a block is put together from all
/// parts when it is needed, while the block before it computes.
pub(super) struct ShardedBlocks<E: Engine> {
    config: DitConfig,
    blocks: Vec<ShardedBlock<E>>,
}

struct ShardedBlock<E: Engine> {
    /// This rank's run of values, `[len]`.
    part: E::Tensor,
    /// How the values of the block are dealt.
    split: Split,
}

/// Some blocks are on the device. Of the others the vectors are, which are few; their matrices wait in the host's memory, and
/// a block is put together when they are fetched, which goes on while blocks before it compute.
pub(super) struct StreamedBlocks<E: Engine> {
    config: DitConfig,
    streaming: Streaming,
    blocks: Vec<StreamedBlock<E>>,
    slots: E::Slots,
}

enum StreamedBlock<E: Engine> {
    Resident(Block<E>),
    Parked { vectors: Vec<E::Tensor>, matrices: E::Parked },
}

impl<E: Engine> Blocks<E> {
    pub fn load(loader: &Loader<'_, E>, config: &DitConfig) -> Result<Self, ModelError> {
        Ok(Self::Resident((0..config.num_layers).map(|i| Block::load(loader, config, i)).collect::<Result<_, _>>()?))
    }

    /// Loads block by block and keeps this rank's part of each. The order of a block's values is the order in which
    /// [`Block::load`] asks for them.
    pub fn load_sharded(loader: &Loader<'_, E>, config: &DitConfig, group: &RankGroup<E>) -> Result<Self, ModelError> {
        let engine = loader.engine;
        let mut blocks = Vec::with_capacity(config.num_layers);
        for i in 0..config.num_layers {
            let recorder = Recorder { loader, flat: RefCell::new(Vec::new()) };
            drop(Block::load(&recorder, config, i)?);
            let flat = recorder.flat.into_inner();
            let split = Split::new(flat.iter().map(|x| engine.shape(x)[0]).sum(), group.world.size());
            let range = split.range(group.rank());
            let (mut start, mut mine) = (0, Vec::new());
            for tensor in &flat {
                let len = engine.shape(tensor)[0];
                let (from, to) = (range.start.max(start), range.end.min(start + len));
                if from < to {
                    mine.push(engine.narrow(tensor, 0, from - start, to - from)?);
                }
                start += len;
            }
            let part = match &mine[..] {
                [] => engine.upload(&[], &[0])?,
                mine => engine.concat(&mine.iter().collect::<Vec<_>>(), 0)?,
            };
            blocks.push(ShardedBlock { part, split });
        }
        Ok(Self::Sharded(ShardedBlocks { config: config.clone(), blocks }))
    }

    /// Loads block by block and moves the matrices of those that do not stay out of the device's memory: beside what stays
    /// it takes that of one block, which the slots take after it.
    pub fn load_streamed(loader: &Loader<'_, E>, config: &DitConfig, streaming: Streaming) -> Result<Self, ModelError> {
        let mut blocks = Vec::with_capacity(config.num_layers);
        for i in 0..config.num_layers {
            blocks.push(if streaming.streams(i, config.num_layers) {
                let parts = Parts { loader, vectors: RefCell::new(Vec::new()), matrices: RefCell::new(Vec::new()) };
                drop(Block::load(&parts, config, i)?);
                let matrices = loader.engine.park(parts.matrices.into_inner())?;
                StreamedBlock::Parked { vectors: parts.vectors.into_inner(), matrices }
            } else {
                StreamedBlock::Resident(Block::load(loader, config, i)?)
            });
        }
        let parked = blocks.iter().filter_map(|block| match block {
            StreamedBlock::Parked { matrices, .. } => Some(matrices),
            StreamedBlock::Resident(_) => None,
        });
        let parked: Vec<&E::Parked> = parked.collect();
        let slots = loader.engine.slots(&parked, streaming.slots.min(parked.len()))?;
        Ok(Self::Streamed(StreamedBlocks { config: config.clone(), streaming, blocks, slots }))
    }

    /// Calls `compute` with every block in order.
    pub fn for_each(
        &self,
        engine: &E,
        group: &RankGroup<E>,
        mut compute: impl FnMut(usize, &Block<E>) -> Result<(), ModelError>,
    ) -> Result<(), ModelError> {
        match self {
            Self::Resident(blocks) => blocks.iter().enumerate().try_for_each(|(i, block)| compute(i, block)),
            Self::Sharded(sharded) => {
                let mut gathering = sharded.start(0, group)?;
                for i in 0..sharded.blocks.len() {
                    let block = sharded.finish(i, engine, group, gathering)?;
                    // On its way while this block computes. One block beyond the last asks for nothing.
                    gathering = sharded.start(i + 1, group)?;
                    compute(i, &block)?;
                }
                Ok(())
            }
            Self::Streamed(streamed) => streamed.for_each(engine, compute),
        }
    }

    /// Whether blocks are brought to the device for each pass.
    pub fn are_brought(&self) -> bool {
        match self {
            Self::Resident(_) => false,
            Self::Sharded(_) => true,
            Self::Streamed(streamed) => streamed.streaming.resident < streamed.blocks.len(),
        }
    }
}

impl<E: Engine> ShardedBlocks<E> {
    /// Starts gathering block `i`; nothing beyond the last.
    fn start<'g>(&self, i: usize, group: &'g RankGroup<E>) -> Result<Option<Exchange<'g, E::Tensor>>, ModelError> {
        let Some(block) = self.blocks.get(i) else { return Ok(None) };
        let shapes: Vec<_> = block.split.ranges().map(|range| vec![range.len()]).collect();
        Ok(Some(group.world.start_all_gather_v(block.part.clone(), &shapes)?))
    }

    fn finish(
        &self,
        i: usize,
        engine: &E,
        group: &RankGroup<E>,
        gathering: Option<Exchange<'_, E::Tensor>>,
    ) -> Result<Block<E>, ModelError> {
        let gathering = gathering.ok_or_else(|| ModelError::Input(format!("block {i} was not asked for")))?;
        let parts = group.world.finish_all_gather_v(self.blocks[i].part.clone(), gathering)?;
        let flat = Flat { engine, values: engine.concat(&parts.iter().collect::<Vec<_>>(), 0)?, taken: Cell::new(0) };
        Block::load(&flat, &self.config, i)
    }
}

impl<E: Engine> StreamedBlocks<E> {
    fn for_each(
        &self,
        engine: &E,
        mut compute: impl FnMut(usize, &Block<E>) -> Result<(), ModelError>,
    ) -> Result<(), ModelError> {
        let fetch = |i: usize| match &self.blocks[i] {
            StreamedBlock::Parked { matrices, .. } => Ok(Some(engine.start_fetch(&self.slots, matrices)?)),
            StreamedBlock::Resident(_) => Ok(None),
        };
        walk(self.streaming, self.blocks.len(), fetch, |i, fetched| match (&self.blocks[i], fetched.flatten()) {
            (StreamedBlock::Resident(block), _) => compute(i, block),
            (StreamedBlock::Parked { vectors, .. }, Some(fetched)) => {
                let matrices = engine.finish_fetch(fetched)?.into_iter();
                let kept = Kept { engine, vectors: RefCell::new(vectors.iter()), matrices: RefCell::new(matrices) };
                // Put together here and gone after its work was asked for: that gives the slot back.
                compute(i, &Block::load(&kept, &self.config, i)?)
            }
            (StreamedBlock::Parked { .. }, None) => Err(ModelError::Input(format!("block {i} was not fetched"))),
        })
    }
}

/// Hands tensors and matrices on and keeps a clone of each.
struct Parts<'a, E: Engine> {
    loader: &'a Loader<'a, E>,
    vectors: RefCell<Vec<E::Tensor>>,
    matrices: RefCell<Vec<E::Matrix>>,
}

impl<E: Engine> Tensors<E> for Parts<'_, E> {
    fn engine(&self) -> &E {
        self.loader.engine
    }

    fn tensor(&self, name: &str, shape: &[usize]) -> Result<E::Tensor, ModelError> {
        let tensor = self.loader.tensor(name, shape)?;
        self.vectors.borrow_mut().push(tensor.clone());
        Ok(tensor)
    }

    fn matrix(&self, name: &str, shape: &[usize], over: Over) -> Result<E::Matrix, ModelError> {
        let matrix = self.loader.matrix(name, shape, over)?;
        self.matrices.borrow_mut().push(matrix.clone());
        Ok(matrix)
    }
}

/// Gives out what [`Parts`] has kept of a block, in the same order.
struct Kept<'a, E: Engine> {
    engine: &'a E,
    vectors: RefCell<std::slice::Iter<'a, E::Tensor>>,
    matrices: RefCell<std::vec::IntoIter<E::Matrix>>,
}

impl<E: Engine> Tensors<E> for Kept<'_, E> {
    fn engine(&self) -> &E {
        self.engine
    }

    fn tensor(&self, name: &str, _shape: &[usize]) -> Result<E::Tensor, ModelError> {
        self.vectors.borrow_mut().next().cloned().ok_or_else(|| lacks(name))
    }

    fn matrix(&self, name: &str, _shape: &[usize], _over: Over) -> Result<E::Matrix, ModelError> {
        self.matrices.borrow_mut().next().ok_or_else(|| lacks(name))
    }
}

/// Blocks are put together in the order in which they were taken apart.
fn lacks(name: &str) -> ModelError {
    ModelError::Input(format!("{name} was not kept"))
}

/// Hands tensors on and keeps a flat view of each.
struct Recorder<'a, E: Engine> {
    loader: &'a Loader<'a, E>,
    flat: RefCell<Vec<E::Tensor>>,
}

impl<E: Engine> Tensors<E> for Recorder<'_, E> {
    fn engine(&self) -> &E {
        self.loader.engine
    }

    fn tensor(&self, name: &str, shape: &[usize]) -> Result<E::Tensor, ModelError> {
        let tensor = self.loader.tensor(name, shape)?;
        let flat = self.loader.engine.reshape(&tensor, &[shape.iter().product()])?;
        self.flat.borrow_mut().push(flat);
        Ok(tensor)
    }
}

/// Gives out the values of a block in the order in which they were recorded.
struct Flat<'a, E: Engine> {
    engine: &'a E,
    values: E::Tensor,
    taken: Cell<usize>,
}

impl<E: Engine> Tensors<E> for Flat<'_, E> {
    fn engine(&self) -> &E {
        self.engine
    }

    fn tensor(&self, _name: &str, shape: &[usize]) -> Result<E::Tensor, ModelError> {
        let len = shape.iter().product();
        let start = self.taken.replace(self.taken.get() + len);
        Ok(self.engine.reshape(&self.engine.narrow(&self.values, 0, start, len)?, shape)?)
    }
}
