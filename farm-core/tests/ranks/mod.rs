//! Groups of ranks as threads of the test.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use farm_core::comm::{Patience, local};
use farm_core::engine::SequenceOps;
use farm_core::parallel::group::RankGroup;
use farm_core::parallel::topology::Topology;

/// A test's ranks are never far apart.
pub const PATIENCE: Patience = Patience { silence: Duration::from_secs(20), stall: Duration::from_secs(20) };

/// What `run` gives on every rank.
pub fn on_ranks<O: SequenceOps, R: Send>(topology: Topology, run: impl Fn(&RankGroup<O>) -> R + Sync) -> Vec<R> {
    thread::scope(|scope| {
        let run = &run;
        let ranks: Vec<_> = local::ranks::<O::Tensor>(topology.world(), PATIENCE)
            .into_iter()
            .map(|end| scope.spawn(move || run(&RankGroup::new(topology, Arc::new(end)).unwrap())))
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// Every legal topology of up to `ranks` ranks.
#[allow(dead_code, reason = "not every test walks through all of them")]
pub fn topologies(ranks: usize, heads: usize, tokens: usize) -> Vec<Topology> {
    (1..=ranks).flat_map(|world| Topology::of_world(world, heads, tokens)).collect()
}
