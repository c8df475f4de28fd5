//! One rank's place in the group that renders a clip.

use std::sync::Arc;

use crate::comm::ported::Ported;
use crate::comm::{Collective, CommError, Group};
use crate::engine::SequenceOps;
use crate::parallel::topology::Topology;

/// A rank, its topology, and its peers along every degree.
pub struct RankGroup<O: SequenceOps> {
    topology: Topology,
    rank: usize,
    /// Same branch and ring place: tokens are exchanged for heads.
    pub(super) ulysses: Group<O::Tensor>,
    /// Same branch and heads: keys and values go round.
    pub(super) ring: Group<O::Tensor>,
    /// Same branch: together they hold the sequence.
    pub(crate) sequence: Group<O::Tensor>,
    /// Same tokens: one per branch.
    pub(crate) cfg: Group<O::Tensor>,
    pub(crate) world: Group<O::Tensor>,
    comm: Arc<dyn Collective<O::Tensor>>,
}

impl<O: SequenceOps> RankGroup<O> {
    /// Errors if `comm` has another number of ranks than `topology`.
    pub fn new(topology: Topology, comm: Arc<dyn Collective<O::Tensor>>) -> Result<Self, CommError> {
        if comm.world() != topology.world() {
            let (ranks, needed) = (comm.world(), topology.world());
            return Err(CommError::Transport(format!("{topology} needs {needed} ranks, the group has {ranks}")));
        }
        let rank = comm.rank();
        let group = |members| Group::new(comm.clone(), members);
        Ok(Self {
            topology,
            rank,
            ulysses: group(topology.ulysses_peers(rank))?,
            ring: group(topology.ring_peers(rank))?,
            sequence: group(topology.sequence_peers(rank))?,
            cfg: group(topology.cfg_peers(rank))?,
            world: group((0..topology.world()).collect())?,
            comm,
        })
    }

    /// The same rank with tensors that `ops` can use: what others send is in its device's memory when it has come.
    pub fn on(&self, ops: &O) -> Result<Self, CommError> {
        let comm = match ops.port() {
            Some(port) if self.topology.world() > 1 => Arc::new(Ported::new(self.comm.clone(), port)),
            _ => self.comm.clone(),
        };
        Self::new(self.topology, comm)
    }

    /// A group of one.
    pub fn solo() -> Result<Self, CommError> {
        Self::new(Topology::SOLO, Arc::new(crate::comm::Solo))
    }

    pub fn topology(&self) -> Topology {
        self.topology
    }

    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Rank 0: it encodes the text, draws the noise, decodes, and speaks for the group.
    pub fn is_leader(&self) -> bool {
        self.rank == 0
    }

    /// Ends the group: every rank's next exchange fails.
    pub fn abort(&self, reason: &str) {
        self.comm.abort(reason);
    }

    /// Bytes of tensors that this rank has sent so far.
    pub fn bytes_sent(&self) -> u64 {
        self.comm.bytes_sent()
    }
}
