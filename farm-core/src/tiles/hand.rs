//! What a device does next with the tiles that it has: bookkeeping without arithmetic, so that it can be tested alone.
//!
//! A device with several tiles takes them norm by norm: whichever can go on, the one furthest ahead first, because others
//! wait for it. A tile that starts late runs through closed steps without asking anybody, and gives nothing for them.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::message::{Edges, Frame, ToHand};
use super::plan::Tile;
use super::statistics::Totals;

/// Totals and the neighbours' edges of a closed step.
type Closed = (Arc<Totals>, Vec<(u32, Arc<Edges>)>);

/// What to do next.
#[derive(Clone, Debug, PartialEq)]
pub enum Todo {
    /// Take a tile up: nothing of it is computed yet.
    Take { number: u32, tile: Tile, frame: Frame },
    /// Compute a chunk of the tile from its beginning: to its first norm where norms are exchanged, else to its frames.
    Begin { number: u32, chunk: u32 },
    /// Say that the tile has come to this step.
    Give { number: u32, step: u32 },
    /// Go on from the norm of this step.
    Advance { number: u32, step: u32, totals: Arc<Totals>, edges: Vec<(u32, Arc<Edges>)> },
    /// Hand out the frames of a chunk.
    Frames { number: u32, chunk: u32 },
    /// Forget the tile.
    Drop { number: u32 },
    /// Wait for messages.
    Wait,
    /// There is nothing more to do.
    Done,
}

/// Where a tile stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Place {
    New,
    /// About to compute the chunk.
    Before(u32),
    /// Computed up to this step; it may have to be given.
    At {
        step: u32,
        given: bool,
    },
    /// The chunk's frames are there.
    After(u32),
}

#[derive(Clone, Debug)]
struct Run {
    tile: Tile,
    frame: Frame,
    place: Place,
    /// Chunks before this one are with the crew already.
    wanted_from: u32,
}

/// The tiles of one device.
#[derive(Clone, Debug)]
pub struct Hand {
    norms: u32,
    /// Steps of a chunk; known from the first tile on.
    steps: u32,
    chunks: u32,
    /// Norms are exchanged: a step is in the middle of a chunk. Otherwise there is one step, before it.
    exchange: bool,
    runs: BTreeMap<u32, Run>,
    dropped: Vec<u32>,
    closed: BTreeMap<u32, Closed>,
    done: bool,
}

impl Hand {
    /// For a clip of `chunks` chunks, and a decoder with this number of norms.
    pub fn new(norms: u32, chunks: u32) -> Self {
        let (runs, closed) = (BTreeMap::new(), BTreeMap::new());
        Self { norms, steps: 1, chunks, exchange: false, runs, dropped: Vec::new(), closed, done: false }
    }

    /// Takes in what the crew says.
    pub fn hear(&mut self, message: ToHand) -> Result<(), String> {
        match message {
            ToHand::Assign { number, tile, frame, wanted_from, closed } => {
                self.exchange = frame.mode.exchanges();
                self.steps = if self.exchange { self.norms.max(1) } else { 1 };
                if closed.len() as u64 > u64::from(self.steps) * u64::from(self.chunks) {
                    return Err(format!("tile {number} comes with totals of {} steps", closed.len()));
                }
                for (step, totals) in (0..).zip(closed) {
                    self.closed.entry(step).or_insert((totals, Vec::new()));
                }
                let run = Run { tile, frame, place: Place::New, wanted_from };
                self.runs.entry(number).or_insert(run);
            }
            ToHand::Closed { step, totals, edges } => {
                if step >= self.steps.saturating_mul(self.chunks) {
                    return Err(format!("step {step} is beyond the clip's end"));
                }
                self.closed.entry(step).or_insert((totals, edges));
            }
            ToHand::Drop { number } => {
                if self.runs.remove(&number).is_some() {
                    self.dropped.push(number);
                }
            }
            ToHand::Done => self.done = true,
        }
        Ok(())
    }

    /// What comes next. It counts as done when this is called again.
    pub fn todo(&mut self) -> Todo {
        if self.done {
            return Todo::Done;
        }
        if let Some(number) = self.dropped.pop() {
            return Todo::Drop { number };
        }
        self.forget_old_steps();
        // The one furthest ahead: others wait for what it gives.
        let next = self
            .runs
            .iter()
            .filter(|(_, run)| self.can_go_on(run))
            .max_by_key(|(number, run)| (self.progress(run.place), std::cmp::Reverse(**number)));
        let Some(number) = next.map(|(number, _)| *number) else { return Todo::Wait };
        self.go_on(number)
    }

    fn can_go_on(&self, run: &Run) -> bool {
        match run.place {
            Place::At { step, given } => !given || self.closed.contains_key(&step),
            Place::Before(chunk) => chunk < self.chunks,
            Place::New | Place::After(_) => true,
        }
    }

    /// Grows along the way of a tile.
    fn progress(&self, place: Place) -> u64 {
        let of_chunk = |chunk: u32| u64::from(chunk) * (u64::from(self.steps) + 2);
        match place {
            Place::New => 0,
            Place::Before(chunk) => of_chunk(chunk),
            Place::At { step, .. } => of_chunk(step / self.steps) + u64::from(step % self.steps) + 1,
            Place::After(chunk) => of_chunk(chunk) + u64::from(self.steps) + 1,
        }
    }

    fn go_on(&mut self, number: u32) -> Todo {
        let (steps, exchange) = (self.steps, self.exchange);
        let Some(run) = self.runs.get_mut(&number) else { return Todo::Wait };
        match run.place {
            Place::New => {
                run.place = start_of(0, steps, exchange);
                Todo::Take { number, tile: run.tile, frame: run.frame }
            }
            Place::Before(chunk) => {
                // With exchange the chunk stops at its first norm, without it goes through.
                run.place =
                    if exchange { Place::At { step: chunk * steps, given: false } } else { Place::After(chunk) };
                Todo::Begin { number, chunk }
            }
            Place::At { step, given } => match self.closed.get(&step).cloned() {
                None if given => Todo::Wait,
                None => {
                    run.place = Place::At { step, given: true };
                    Todo::Give { number, step }
                }
                Some((totals, edges)) if exchange => {
                    let last = step % steps + 1 == steps;
                    run.place =
                        if last { Place::After(step / steps) } else { Place::At { step: step + 1, given: false } };
                    Todo::Advance { number, step, totals, edges }
                }
                Some(_) => {
                    run.place = Place::After(step / steps);
                    Todo::Begin { number, chunk: step / steps }
                }
            },
            Place::After(chunk) => {
                run.place = if chunk + 1 < self.chunks {
                    start_of(chunk + 1, steps, exchange)
                } else {
                    Place::Before(self.chunks)
                };
                if chunk < run.wanted_from {
                    return self.todo();
                }
                Todo::Frames { number, chunk }
            }
        }
    }

    /// Totals that every tile has behind it, as long as no new tile can come that needs them: those come with a log.
    fn forget_old_steps(&mut self) {
        let steps = self.steps;
        let needed = |run: &Run| match run.place {
            Place::New => 0,
            Place::Before(chunk) => chunk.saturating_mul(steps),
            Place::At { step, .. } => step,
            Place::After(chunk) => (chunk + 1) * steps,
        };
        if let Some(oldest) = self.runs.values().map(needed).min() {
            self.closed = self.closed.split_off(&oldest);
        }
    }
}

/// The beginning of a chunk: its computation, or the step in front of it.
fn start_of(chunk: u32, steps: u32, exchange: bool) -> Place {
    if exchange { Place::Before(chunk) } else { Place::At { step: chunk * steps, given: false } }
}
