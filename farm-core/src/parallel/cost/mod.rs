//! Which degrees are the fastest for a clip on given devices: a prediction of seconds, traffic and memory from
//! arithmetic and rates alone. docs/parallelism.md explains it in words.
//!
//! - [`shape`]: what there is to compute; [`volume`]: what ranks send each other; [`rates`]: how fast machines are;
//! - [`devices`]: rates by name, from `config/devices.toml` and what `farm-node calibrate` writes;
//! - [`candidates`] and [`predict`]: the choice.
//!
//! Only the denoising is predicted: text encoding and decoding are not spread by these degrees.

pub mod devices;
mod estimate;
pub mod rates;
pub mod shape;
#[cfg(test)]
mod tests;
pub mod volume;

use serde::{Deserialize, Serialize};

pub use self::rates::{DeviceRates, LinkRates, Site};
pub use self::shape::{ClipShape, ModelShape};
pub use self::volume::sent_values_per_layer;
use crate::parallel::topology::{MAX_RANKS, Topology, TopologyError};

/// Part of a device's memory that a group may fill; the rest is for the driver, its kernels and gaps between blocks.
pub const USABLE_MEMORY: f64 = 0.95;
/// How much faster a group with a ring has to be than one without.
const RING_GAIN: f64 = 1.1;

/// One way to spread a clip over a group, and what it is predicted to cost.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(into = "Row", try_from = "Row")]
pub struct Candidate {
    pub topology: Topology,
    /// Each rank keeps a part of every block of weights and gathers the next block while it computes.
    pub shard: bool,
    /// Of the whole denoising.
    pub seconds: f64,
    /// Sent by the rank that sends most, over the whole clip.
    pub bytes: u64,
    /// Bytes at the peak of the denoising, on the device that needs most.
    pub memory: u64,
    /// The devices have that much memory.
    pub fits: bool,
}

/// [`Candidate`] as it is stored and printed.
#[derive(Serialize, Deserialize)]
struct Row {
    world: usize,
    cfg: usize,
    ring: usize,
    ulysses: usize,
    shard: bool,
    seconds: f64,
    bytes: u64,
    memory: u64,
    fits: bool,
}

impl From<Candidate> for Row {
    fn from(candidate: Candidate) -> Self {
        let Candidate { topology, shard, seconds, bytes, memory, fits } = candidate;
        let (cfg, ring, ulysses) = (topology.cfg(), topology.ring(), topology.ulysses());
        Self { world: topology.world(), cfg, ring, ulysses, shard, seconds, bytes, memory, fits }
    }
}

impl TryFrom<Row> for Candidate {
    type Error = TopologyError;

    fn try_from(row: Row) -> Result<Self, TopologyError> {
        let Row { cfg, ring, ulysses, shard, seconds, bytes, memory, fits, .. } = row;
        Ok(Self { topology: Topology::new(cfg, ring, ulysses)?, shard, seconds, bytes, memory, fits })
    }
}

/// What a person has decided; the rest is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Overrides {
    pub cfg: Option<usize>,
    pub ring: Option<usize>,
    pub ulysses: Option<usize>,
    pub shard: Option<bool>,
}

impl Overrides {
    fn allow(&self, topology: Topology) -> bool {
        let agrees = |fixed: Option<usize>, degree| fixed.is_none_or(|fixed| fixed == degree);
        agrees(self.cfg, topology.cfg())
            && agrees(self.ring, topology.ring())
            && agrees(self.ulysses, topology.ulysses())
    }
}

/// All ways to spread a clip over exactly `devices` devices that `fixed` allows, best first: those that fit into memory
/// by seconds, then the others by memory. Never empty.
///
/// Errors if there is no such way, with what is wrong with the degrees.
pub fn candidates(
    model: &ModelShape,
    clip: &ClipShape,
    site: &Site,
    devices: usize,
    fixed: Overrides,
) -> Result<Vec<Candidate>, TopologyError> {
    // No group is larger, and the search would take its time.
    let topologies: Vec<Topology> = Topology::of_world(devices.min(MAX_RANKS + 1), model.heads, clip.tokens)
        .into_iter()
        .filter(|topology| fixed.allow(*topology))
        .collect();
    if topologies.is_empty() {
        return Err(why_none(model, clip, devices, fixed));
    }
    let mut all = Vec::new();
    for topology in topologies {
        // One rank has nobody to share its weights with.
        let choices = match fixed.shard {
            Some(shard) => vec![shard && devices > 1],
            None if devices > 1 => vec![false, true],
            None => vec![false],
        };
        all.extend(choices.into_iter().map(|shard| estimate::candidate(model, clip, site, topology, shard)));
    }
    all.sort_by(|a, b| {
        let by_seconds = a.seconds.total_cmp(&b.seconds).then(a.bytes.cmp(&b.bytes));
        let by_memory = a.memory.cmp(&b.memory);
        b.fits.cmp(&a.fits).then(if a.fits { by_seconds.then(by_memory) } else { by_memory.then(by_seconds) })
    });
    Ok(all)
}

/// The candidate that is used unless a person decides: the first, unless one without a ring is nearly as fast, because
/// without a ring the clip has the same bits as on one device.
///
/// `candidates` are those of [`candidates`], best first. None of an empty list.
pub fn choose(candidates: &[Candidate]) -> Option<Candidate> {
    let best = candidates.first()?;
    let exact = candidates.iter().find(|candidate| candidate.topology.ring() == 1 && candidate.fits == best.fits);
    Some(*exact.filter(|exact| exact.seconds <= RING_GAIN * best.seconds).unwrap_or(best))
}

/// The way to spread a clip over exactly `devices` devices that [`choose`] takes; none if no degrees are legal or none
/// fits into memory.
pub fn predict(model: &ModelShape, clip: &ClipShape, site: &Site, devices: usize) -> Option<Candidate> {
    let all = candidates(model, clip, site, devices, Overrides::default()).ok()?;
    choose(&all).filter(|best| best.fits)
}

/// The error of the topology nearest to what was asked for, when there is no legal one.
fn why_none(model: &ModelShape, clip: &ClipShape, devices: usize, fixed: Overrides) -> TopologyError {
    let mut degrees = [fixed.cfg, fixed.ring, fixed.ulysses];
    let product = degrees.iter().flatten().try_fold(1usize, |product, degree| product.checked_mul(*degree));
    if let Some(rest) = product.filter(|product| *product > 0).map(|product| devices / product)
        && product.is_some_and(|product| rest * product == devices)
        // Whatever is not given takes the devices that are left: the ring before the others, which have upper limits.
        && let Some(free) = [1, 2, 0].into_iter().find(|i| degrees[*i].is_none())
    {
        degrees[free] = Some(rest);
    }
    let [cfg, ring, ulysses] = degrees.map(|degree| degree.unwrap_or(1));
    match Topology::new(cfg, ring, ulysses) {
        Err(error) => error,
        Ok(topology) => match topology.check(devices, model.heads, clip.tokens) {
            Err(error) => error,
            // Not reached: a topology that passes is among those of its world.
            Ok(()) => TopologyError::Devices { topology, devices },
        },
    }
}
