//! Degrees of parallelism and the place of each rank in them.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Most ranks of a group.
pub const MAX_RANKS: usize = 64;

/// `cfg` × `ring` × `ulysses` ranks that render one clip together.
///
/// - CFG ranks compute the conditional or the unconditional branch of the guidance (cfg rank 0 is conditional).
/// - Ring ranks hold a run of tokens each and pass keys and values round.
/// - Ulysses ranks of one ring place exchange tokens for heads before the attention and back after it.
///
/// `rank = ulysses + U·(ring + R·cfg)`: Ulysses peers, which talk most, are neighbours, and the sequence rank
/// `ulysses + U·ring` is the place of a rank's tokens in the sequence.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "Degrees")]
pub struct Topology {
    cfg: usize,
    ring: usize,
    ulysses: usize,
}

/// Same fields as [`Topology`], before its check: what deserialisation reads.
#[derive(Deserialize)]
struct Degrees {
    cfg: usize,
    ring: usize,
    ulysses: usize,
}

impl TryFrom<Degrees> for Topology {
    type Error = TopologyError;

    fn try_from(degrees: Degrees) -> Result<Self, TopologyError> {
        Self::new(degrees.cfg, degrees.ring, degrees.ulysses)
    }
}

/// A rank's place along each degree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RankCoords {
    pub cfg: usize,
    pub ring: usize,
    pub ulysses: usize,
}

/// Degrees that make no group, or none for this clip.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TopologyError {
    #[error("a degree of 0 in cfg {cfg} x ring {ring} x ulysses {ulysses}; the least is 1")]
    Zero { cfg: usize, ring: usize, ulysses: usize },
    #[error("cfg degree {0}; guidance has two branches, so it is 1 or 2")]
    Cfg(usize),
    #[error("cfg {cfg} x ring {ring} x ulysses {ulysses} is more than {MAX_RANKS} ranks")]
    TooLarge { cfg: usize, ring: usize, ulysses: usize },
    #[error("{topology} needs {} devices, there are {devices}", topology.world())]
    Devices { topology: Topology, devices: usize },
    #[error("{topology}: {ulysses} ulysses ranks share {heads} heads; every rank needs one", ulysses = topology.ulysses())]
    MoreUlyssesThanHeads { topology: Topology, heads: usize },
    #[error(
        "{topology}: {ranks} sequence ranks share {tokens} tokens; every rank needs one",
        ranks = topology.sequence_ranks()
    )]
    MoreRanksThanTokens { topology: Topology, tokens: usize },
}

impl Topology {
    /// One rank that does everything.
    pub const SOLO: Topology = Topology { cfg: 1, ring: 1, ulysses: 1 };

    pub fn new(cfg: usize, ring: usize, ulysses: usize) -> Result<Self, TopologyError> {
        if cfg == 0 || ring == 0 || ulysses == 0 {
            return Err(TopologyError::Zero { cfg, ring, ulysses });
        }
        if cfg > 2 {
            return Err(TopologyError::Cfg(cfg));
        }
        match ring.checked_mul(ulysses).and_then(|ranks| ranks.checked_mul(cfg)) {
            Some(world) if world <= MAX_RANKS => Ok(Self { cfg, ring, ulysses }),
            _ => Err(TopologyError::TooLarge { cfg, ring, ulysses }),
        }
    }

    /// Every rank gets a device of `devices`, none is left over, and every rank has a visual token and a head.
    /// A rank may be without a text row.
    pub fn check(self, devices: usize, heads: usize, tokens: usize) -> Result<(), TopologyError> {
        if self.world() != devices {
            return Err(TopologyError::Devices { topology: self, devices });
        }
        if self.ulysses > heads {
            return Err(TopologyError::MoreUlyssesThanHeads { topology: self, heads });
        }
        if self.sequence_ranks() > tokens {
            return Err(TopologyError::MoreRanksThanTokens { topology: self, tokens });
        }
        Ok(())
    }

    /// All topologies of exactly `world` ranks that are legal for a clip, by cfg, then ring.
    pub fn of_world(world: usize, heads: usize, tokens: usize) -> Vec<Self> {
        let mut all = Vec::new();
        for cfg in (1..=2).filter(|cfg| world.is_multiple_of(*cfg)) {
            let sequence = world / cfg;
            for ring in (1..=sequence).filter(|ring| sequence.is_multiple_of(*ring)) {
                let topology = Self::new(cfg, ring, sequence / ring);
                all.extend(topology.ok().filter(|topology| topology.check(world, heads, tokens).is_ok()));
            }
        }
        all
    }

    /// Degree of guidance parallelism, 1 or 2.
    pub fn cfg(self) -> usize {
        self.cfg
    }

    pub fn ring(self) -> usize {
        self.ring
    }

    pub fn ulysses(self) -> usize {
        self.ulysses
    }

    /// All ranks.
    pub fn world(self) -> usize {
        self.cfg * self.ring * self.ulysses
    }

    /// Ranks that share the tokens of one branch.
    pub fn sequence_ranks(self) -> usize {
        self.ring * self.ulysses
    }

    /// The place of `rank`, which is below [`Topology::world`].
    pub fn coords(self, rank: usize) -> RankCoords {
        let sequence = rank % self.sequence_ranks();
        RankCoords {
            cfg: rank / self.sequence_ranks(),
            ring: sequence / self.ulysses,
            ulysses: sequence % self.ulysses,
        }
    }

    pub fn rank(self, at: RankCoords) -> usize {
        at.ulysses + self.ulysses * (at.ring + self.ring * at.cfg)
    }

    /// Ranks of the same branch and ring place as `rank`, in order: they exchange tokens for heads.
    pub fn ulysses_peers(self, rank: usize) -> Vec<usize> {
        let at = self.coords(rank);
        (0..self.ulysses).map(|ulysses| self.rank(RankCoords { ulysses, ..at })).collect()
    }

    /// Ranks with the same heads of the same branch as `rank`, in ring order: they pass keys and values on.
    pub fn ring_peers(self, rank: usize) -> Vec<usize> {
        let at = self.coords(rank);
        (0..self.ring).map(|ring| self.rank(RankCoords { ring, ..at })).collect()
    }

    /// Ranks of the same branch as `rank`, in the order of their tokens.
    pub fn sequence_peers(self, rank: usize) -> Vec<usize> {
        let first = self.coords(rank).cfg * self.sequence_ranks();
        (first..first + self.sequence_ranks()).collect()
    }

    /// Ranks with the same tokens as `rank`, by branch.
    pub fn cfg_peers(self, rank: usize) -> Vec<usize> {
        let at = self.coords(rank);
        (0..self.cfg).map(|cfg| self.rank(RankCoords { cfg, ..at })).collect()
    }
}

impl fmt::Display for Topology {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cfg {} x ring {} x ulysses {}", self.cfg, self.ring, self.ulysses)
    }
}

impl fmt::Debug for Topology {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn topology(cfg: usize, ring: usize, ulysses: usize) -> Topology {
        Topology::new(cfg, ring, ulysses).unwrap()
    }

    #[test]
    fn ulysses_peers_are_neighbours_and_cfg_comes_last() {
        let t = topology(2, 3, 4);
        assert_eq!(t.world(), 24);
        assert_eq!(t.ulysses_peers(6), [4, 5, 6, 7]);
        assert_eq!(t.ring_peers(6), [2, 6, 10]);
        assert_eq!(t.cfg_peers(6), [6, 18]);
        assert_eq!(t.sequence_peers(13), (12..24).collect::<Vec<_>>());
        for rank in 0..24 {
            assert_eq!(t.rank(t.coords(rank)), rank);
        }
    }

    #[test]
    fn degrees_that_make_no_group_are_refused_with_a_reason() {
        let error = |cfg, ring, ulysses| Topology::new(cfg, ring, ulysses).unwrap_err().to_string();
        assert!(error(1, 0, 2).contains("degree of 0"));
        assert!(error(3, 1, 1).contains("1 or 2"));
        assert!(error(1, 13, 5).contains("more than 64"));
        assert!(error(2, usize::MAX, 2).contains("more than 64"));
        assert_eq!(topology(1, 8, 8).world(), 64);
    }

    #[test]
    fn a_stored_topology_is_checked_when_it_is_read() {
        let json = serde_json::to_string(&topology(2, 1, 2)).unwrap();
        assert_eq!(json, r#"{"cfg":2,"ring":1,"ulysses":2}"#);
        assert_eq!(serde_json::from_str::<Topology>(&json).unwrap(), topology(2, 1, 2));
        let error = serde_json::from_str::<Topology>(r#"{"cfg":3,"ring":1,"ulysses":2}"#).unwrap_err().to_string();
        assert!(error.contains("cfg degree 3"), "{error}");
    }

    #[test]
    fn a_group_has_to_fit_its_devices_and_its_clip() {
        let error = |t: Topology, devices, heads, tokens| t.check(devices, heads, tokens).unwrap_err().to_string();
        assert!(error(topology(2, 1, 2), 3, 6, 105).contains("needs 4 devices, there are 3"));
        assert!(error(topology(1, 1, 7), 7, 6, 105).contains("7 ulysses ranks share 6 heads"));
        assert!(error(topology(1, 7, 2), 14, 6, 13).contains("14 sequence ranks share 13 tokens"));
        assert_eq!(topology(1, 1, 5).check(5, 6, 13), Ok(()), "uneven shards are legal");
    }

    #[test]
    fn all_topologies_of_a_world_are_found_once() {
        assert_eq!(Topology::of_world(1, 6, 105), [Topology::SOLO]);
        let six = Topology::of_world(6, 6, 105);
        let expected = [(1, 1, 6), (1, 2, 3), (1, 3, 2), (1, 6, 1), (2, 1, 3), (2, 3, 1)];
        assert_eq!(six, expected.map(|(c, r, u)| topology(c, r, u)));
        assert_eq!(Topology::of_world(7, 6, 105), [topology(1, 7, 1)], "7 ulysses ranks have too few heads");
        assert_eq!(Topology::of_world(14, 6, 13), [topology(2, 7, 1)]);
    }
}
