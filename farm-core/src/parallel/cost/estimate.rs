//! Seconds, bytes and memory of one topology.
//!
//! All ranks work in step, so every phase takes as long as its slowest rank. Traffic that the program starts before a
//! computation and waits for after it hides behind that computation; other traffic adds to the time.

use std::collections::HashMap;

use super::{Candidate, ClipShape, LinkRates, ModelShape, Site, USABLE_MEMORY};
use crate::parallel::shard::{Shares, Split};
use crate::parallel::topology::Topology;

/// Bytes of the values of partial attention results, rotary tables and the like.
const F32: f64 = 4.0;

pub(super) fn candidate(
    model: &ModelShape,
    clip: &ClipShape,
    site: &Site,
    topology: Topology,
    shard: bool,
) -> Candidate {
    let run = Run { model, clip, site, topology, shard };
    let memory = run.memory();
    Candidate {
        topology,
        shard,
        seconds: run.step_seconds() * clip.steps as f64,
        bytes: run.step_values() * (site.device.value_bytes * clip.steps) as u64,
        memory: memory as u64,
        fits: memory <= USABLE_MEMORY * site.device.memory,
    }
}

struct Run<'a> {
    model: &'a ModelShape,
    clip: &'a ClipShape,
    site: &'a Site,
    topology: Topology,
    shard: bool,
}

/// Seconds of one branch in one layer.
#[derive(Default)]
struct Layer {
    /// Computing, with traffic that nothing hides.
    busy: f64,
    /// Part of it in which the links are idle.
    idle_link: f64,
}

impl Run<'_> {
    fn shares(&self, text: usize) -> Shares {
        Shares::new(self.topology, self.clip.tokens, text, self.model.heads, self.model.head_dim)
    }

    fn value_bytes(&self) -> f64 {
        self.site.device.value_bytes as f64
    }

    /// Sets of ranks that work side by side, with the text of the branches that each computes one after the other.
    fn teams(&self) -> Vec<(Vec<usize>, Vec<usize>)> {
        let ranks = |cfg| self.topology.sequence_peers(cfg * self.topology.sequence_ranks());
        let text = self.clip.text;
        match self.topology.cfg() {
            1 => vec![(ranks(0), text.to_vec())],
            _ => (0..2).map(|cfg| (ranks(cfg), vec![text[cfg]])).collect(),
        }
    }

    fn step_seconds(&self) -> f64 {
        // All blocks but the last are alike.
        let kinds = [(0, self.model.layers.saturating_sub(1)), (self.model.layers.saturating_sub(1), 1)];
        let gather: Vec<f64> = kinds.iter().map(|(layer, _)| self.gather_seconds(*layer)).collect();
        let mut slowest: f64 = 0.0;
        for (ranks, texts) in self.teams() {
            let mut seconds = 0.0;
            for ((layer, count), gather) in kinds.iter().zip(&gather) {
                let mut both = Layer::default();
                for text in &texts {
                    let branch = self.layer(*layer, &ranks, *text);
                    both.busy += branch.busy;
                    both.idle_link += branch.idle_link;
                }
                seconds += *count as f64 * (both.busy + (gather - both.idle_link).max(0.0));
            }
            slowest = slowest.max(seconds);
        }
        slowest + self.velocity_seconds()
    }

    fn layer(&self, layer: usize, ranks: &[usize], text: usize) -> Layer {
        let (model, device, shares) = (self.model, &self.site.device, self.shares(text));
        let (ring, ulysses) = (self.topology.ring(), self.topology.ulysses());
        let weights = model.block_parameters(layer) as f64 * self.value_bytes() / device.bandwidth;
        let mut compute: f64 = 0.0;
        let mut attention: f64 = 0.0;
        for rank in ranks {
            let [tokens, text_rows] = shares.row_counts(*rank);
            let segment: usize = shares.segment(self.topology.coords(*rank).ring).iter().sum();
            let heads = shares.heads(*rank).len();
            let mut moved = self.value_bytes() * model.elementwise_values(tokens, text_rows);
            if ulysses > 1 {
                // Of q, k, v and the result: packed and unpacked, each with a read and a write.
                moved += self.value_bytes() * (4 * 4 * (tokens + text_rows) * model.hidden_x) as f64;
            }
            if ring > 1 {
                let values = segment * heads * model.head_dim;
                // Each pass packs keys and values, and its merge reads two partial results and writes one.
                moved += (ring - 1) as f64 * values as f64 * (4.0 * self.value_bytes() + 3.0 * F32);
            }
            let linear = (model.linear_flops(layer, tokens, text_rows) / device.linear).max(weights);
            compute = compute.max(linear + moved / device.bandwidth);
            let flops = model.attention_flops(segment, self.clip.tokens + text, heads);
            attention = attention.max(flops / device.attention);
        }
        let sends = |of: &dyn Fn(usize) -> Vec<(usize, u64)>| -> f64 {
            self.exchange_seconds(ranks.iter().map(|rank| (*rank, of(*rank))))
        };
        let exposed =
            sends(&|rank| shares.ulysses_there(rank).collect()) + sends(&|rank| shares.ulysses_back(rank).collect());
        let mut late = 0.0;
        let mut hidden = 0.0;
        for pass in 0..ring - 1 {
            let seconds = sends(&|rank| shares.ring_passes(rank).skip(pass).take(1).collect());
            let block = attention / ring as f64;
            late += (seconds - block).max(0.0);
            hidden += seconds.min(block);
        }
        Layer { busy: compute + attention + exposed + late, idle_link: compute + attention - hidden }
    }

    /// An exchange that all `ranks` take part in: (rank, [(peer, values)]).
    fn exchange_seconds(&self, sends: impl Iterator<Item = (usize, Vec<(usize, u64)>)>) -> f64 {
        let seconds = |link: &LinkRates, values: u64| match values {
            0 => 0.0,
            values => link.latency + values as f64 * self.value_bytes() / link.bandwidth,
        };
        let mut slowest: f64 = 0.0;
        let mut leaving: HashMap<usize, u64> = HashMap::new();
        for (rank, sends) in sends {
            let host = self.site.host(rank);
            let (inside, outside): (Vec<_>, Vec<_>) =
                sends.into_iter().partition(|(peer, _)| self.site.host(*peer) == host);
            slowest = slowest.max(seconds(&self.site.inside, inside.iter().map(|(_, values)| values).sum()));
            *leaving.entry(host).or_default() += outside.iter().map(|(_, values)| values).sum::<u64>();
        }
        leaving.into_values().map(|values| seconds(&self.site.between, values)).fold(slowest, f64::max)
    }

    /// Gathering block `layer` from all ranks.
    fn gather_seconds(&self, layer: usize) -> f64 {
        if !self.shard {
            return 0.0;
        }
        let world = self.topology.world();
        self.exchange_seconds((0..world).map(|rank| {
            let values = self.held(layer, rank);
            (rank, (0..world).filter(|peer| *peer != rank).map(|peer| (peer, values)).collect())
        }))
    }

    /// Parameters of block `layer` that `rank` keeps.
    fn held(&self, layer: usize, rank: usize) -> u64 {
        let parameters = self.model.block_parameters(layer) as usize;
        Split::new(parameters, self.topology.world()).len(rank) as u64
    }

    /// What a rank sends at the end of a step: the velocity of its tokens to the other ranks of its branch, then that of
    /// all tokens to its peer in the other branch.
    fn velocity_sends(&self, rank: usize) -> [Vec<(usize, u64)>; 2] {
        let others = |peers: Vec<usize>, tokens: usize| {
            let values = (tokens * self.model.velocity_values()) as u64;
            peers.into_iter().filter(|peer| *peer != rank).map(|peer| (peer, values)).collect()
        };
        let [tokens, _] = self.shares(0).row_counts(rank);
        [others(self.topology.sequence_peers(rank), tokens), others(self.topology.cfg_peers(rank), self.clip.tokens)]
    }

    fn velocity_seconds(&self) -> f64 {
        let ranks = 0..self.topology.world();
        let phase =
            |i: usize| self.exchange_seconds(ranks.clone().map(|rank| (rank, self.velocity_sends(rank)[i].clone())));
        phase(0) + phase(1)
    }

    /// Values sent in a step by the rank that sends most.
    fn step_values(&self) -> u64 {
        let model = self.model;
        let mut most = 0;
        for (ranks, texts) in self.teams() {
            for rank in ranks {
                let total =
                    |sends: &mut dyn Iterator<Item = (usize, u64)>| sends.map(|(_, values)| values).sum::<u64>();
                let mut values = 0;
                for text in &texts {
                    let shares = self.shares(*text);
                    let layer = total(&mut shares.ulysses_there(rank))
                        + total(&mut shares.ulysses_back(rank))
                        + total(&mut shares.ring_passes(rank));
                    values += model.layers as u64 * layer;
                }
                if self.shard {
                    let peers = self.topology.world() as u64 - 1;
                    values += (0..model.layers).map(|layer| peers * self.held(layer, rank)).sum::<u64>();
                }
                values += total(&mut self.velocity_sends(rank).into_iter().flatten());
                most = most.max(values);
            }
        }
        most
    }

    /// Bytes at the peak of a step on the rank that needs most. Rank 0 does, as the first ranks have the larger shares.
    /// The branch with more text is counted.
    fn memory(&self) -> f64 {
        let (model, device, bytes) = (self.model, &self.site.device, self.value_bytes());
        let world = self.topology.world();
        let blocks: u64 = (0..model.layers).map(|layer| model.block_parameters(layer)).sum();
        let weights = if self.shard {
            let held: u64 = (0..model.layers).map(|layer| self.held(layer, 0)).sum();
            // The block that computes and the one that is gathered meanwhile.
            (held + 2 * model.block_parameters(0) + model.other_parameters()) as f64
        } else {
            let owners = if device.shared_weights { world.min(self.site.devices_per_host) } else { 1 };
            (blocks + model.other_parameters()) as f64 / owners as f64
        };

        let text = self.clip.text[0].max(self.clip.text[1]);
        let shares = self.shares(text);
        let [tokens, text_rows] = shares.row_counts(0);
        let rows = (tokens + text_rows) as f64;
        let d = model.hidden_x as f64;
        let segment = shares.segment(0).iter().sum::<usize>() as f64 * (shares.heads(0).len() * model.head_dim) as f64;
        // Gathered weights serve both branches of a step before they go.
        let branches = if self.shard && self.topology.cfg() == 1 { 2.0 } else { 1.0 };
        let streams = branches * rows * d * bytes;
        // q, k and v before and after they are split, or exchanged.
        let split = 6.0 * (rows * d).max(segment) * bytes;
        // Queries, the keys and values in use and those on their way; two partial results.
        let ring = if self.topology.ring() > 1 { segment * (5.0 * bytes + 2.0 * F32) } else { 0.0 };
        let mlp = rows * (2.0 * d + model.ffn_x as f64) * bytes;
        let rotation = tokens as f64 * d * F32;
        weights * bytes + streams + rotation + split.max(ring).max(mlp)
    }
}
