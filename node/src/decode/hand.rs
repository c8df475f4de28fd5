//! A device's part in the decode of a clip: whatever tiles the crew assigns, norm by norm.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use farm_core::engine::{Engine, EngineError, SequenceOps};
use farm_core::model::ModelError;
use farm_core::model::latent::{DitLatent, VaeLatent};
use farm_core::model::vae::{Advance, TileStream, VaeDecoder};
use farm_core::tiles::hand::{Hand, Todo};
use farm_core::tiles::message::{FromHand, Pixels, ToHand};
use farm_core::tiles::statistics::Sums;
use tokio::sync::mpsc::error::TryRecvError;

use super::CHUNK;
use crate::link::Link;

#[derive(Debug, thiserror::Error)]
pub enum HandError {
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error("the crew asks for what cannot be: {0}")]
    Confused(String),
    /// Nobody wants to hear of it any more.
    #[error("the crew is gone")]
    Left,
    #[error("stopped")]
    Stopped,
}

impl From<EngineError> for HandError {
    fn from(error: EngineError) -> Self {
        Self::Model(error.into())
    }
}

/// Works until the crew is done with this hand. `latent` is the whole clip's. What goes wrong here is told to the crew.
/// Runs on the device's thread.
pub fn work<E: Engine>(
    engine: &E,
    decoder: &Arc<VaeDecoder<E>>,
    latent: &DitLatent<E::Tensor>,
    mut link: Link<FromHand, ToHand>,
    stop: &AtomicBool,
) -> Result<(), HandError> {
    let worked = decoder.denormalize(engine, latent).map_err(HandError::from).and_then(|latent| {
        let chunks = engine.shape(&latent.0)[0].div_ceil(CHUNK) as u32;
        let hand = Hand::new(decoder.norms(), chunks);
        let (tiles, busy) = (BTreeMap::new(), Duration::ZERO);
        Worker { engine, decoder, latent: latent.0, hand, tiles, busy }.run(&mut link, stop)
    });
    if let Err(error @ (HandError::Model(_) | HandError::Confused(_))) = &worked {
        // If it cannot be said, nobody listens.
        let _ = link.to.blocking_send(FromHand::Failed { message: error.to_string() });
    }
    worked
}

struct Worker<'a, E: Engine> {
    engine: &'a E,
    decoder: &'a Arc<VaeDecoder<E>>,
    /// `[T, h, w, C]`
    latent: E::Tensor,
    hand: Hand,
    tiles: BTreeMap<u32, Running<E>>,
    /// How long the device has computed.
    busy: Duration,
}

/// A tile in the middle of its decode, and what came of its last computation.
struct Running<E: Engine> {
    stream: TileStream<E>,
    latest: Option<Advance<<E as SequenceOps>::Tensor>>,
    /// It is the only one: its frames need no blending.
    alone: bool,
}

impl<E: Engine> Worker<'_, E> {
    fn run(mut self, link: &mut Link<FromHand, ToHand>, stop: &AtomicBool) -> Result<(), HandError> {
        loop {
            if stop.load(Ordering::Relaxed) {
                return Err(HandError::Stopped);
            }
            loop {
                match link.from.try_recv() {
                    Ok(message) => self.hand.hear(message).map_err(HandError::Confused)?,
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return Err(HandError::Left),
                }
            }
            let said = match self.hand.todo() {
                Todo::Done => return Ok(()),
                Todo::Wait => {
                    let message = link.from.blocking_recv().ok_or(HandError::Left)?;
                    self.hand.hear(message).map_err(HandError::Confused)?;
                    None
                }
                todo => {
                    let began = Instant::now();
                    let said = self.follow(todo)?;
                    self.busy += began.elapsed();
                    said
                }
            };
            if let Some(message) = said {
                link.to.blocking_send(message).map_err(|_| HandError::Left)?;
            }
        }
    }

    /// Does what is next. Returns what is to be said about it.
    fn follow(&mut self, todo: Todo) -> Result<Option<FromHand>, HandError> {
        let engine = self.engine;
        match todo {
            Todo::Take { number, tile, frame } => {
                let stream = TileStream::new(self.decoder.clone(), number, tile, frame)?;
                self.tiles.insert(number, Running { stream, latest: None, alone: frame.grid == [1, 1] });
            }
            Todo::Begin { number, chunk } => {
                let (start, frames) = (chunk as usize * CHUNK, engine.shape(&self.latent)[0]);
                let part = VaeLatent(engine.narrow(&self.latent, 0, start, CHUNK.min(frames - start))?);
                let tile = self.tile(number)?;
                tile.latest = Some(tile.stream.begin(engine, &part)?);
            }
            Todo::Advance { number, totals, edges, .. } => {
                let tile = self.tile(number)?;
                // What it was is not needed beside what it becomes.
                tile.latest = None;
                tile.latest = Some(tile.stream.advance(engine, &totals, &edges)?);
            }
            Todo::Give { number, step } => {
                // In modes without exchange there is nothing to give but the fact.
                let (sums, edges) = match self.tile(number)?.latest.take() {
                    Some(Advance::Norm { sums, edges }) => (sums, edges),
                    _ => (Sums::default(), None),
                };
                let busy_ms = self.busy.as_millis() as u64;
                return Ok(Some(FromHand::Given { number, step, busy_ms, sums, edges }));
            }
            Todo::Frames { number, chunk } => {
                let tile = self.tile(number)?;
                let Some(Advance::Frames(frames)) = tile.latest.take() else {
                    return Err(HandError::Confused(format!("tile {number} ends chunk {chunk} without frames")));
                };
                let pixels = match tile.alone {
                    true => Pixels::Rgb8(engine.to_rgb8(&frames)?),
                    false => Pixels::Rgb16(engine.to_rgb16(&frames)?),
                };
                return Ok(Some(FromHand::Frames { number, chunk, pixels }));
            }
            Todo::Drop { number } => drop(self.tiles.remove(&number)),
            Todo::Wait | Todo::Done => {}
        }
        Ok(None)
    }

    fn tile(&mut self, number: u32) -> Result<&mut Running<E>, HandError> {
        let absent = || HandError::Confused(format!("tile {number} was never assigned"));
        self.tiles.get_mut(&number).ok_or_else(absent)
    }
}
