//! What ranks send each other in a layer.

use crate::parallel::shard::Shares;
use crate::parallel::topology::{RankCoords, Topology};

impl Shares {
    /// Before the attention: q, k and v of a rank's rows, the heads of each Ulysses peer to that peer. (peer, values)
    pub fn ulysses_there(&self, rank: usize) -> impl Iterator<Item = (usize, u64)> + '_ {
        let [tokens, text] = self.row_counts(rank);
        let values_to = move |peer| values(&[3, tokens + text, self.heads(peer).len(), self.head_dim()]);
        self.others(rank).map(move |peer| (peer, values_to(peer)))
    }

    /// After it: the attended rows of each Ulysses peer back to that peer, in this rank's heads. (peer, values)
    pub fn ulysses_back(&self, rank: usize) -> impl Iterator<Item = (usize, u64)> + '_ {
        self.others(rank).map(move |peer| {
            let [tokens, text] = self.row_counts(peer);
            (peer, values(&[tokens + text, self.heads(rank).len(), self.head_dim()]))
        })
    }

    /// The passes of a ring: at pass s a rank hands the keys and values that came from s places before it to the next
    /// place. (peer, values)
    pub fn ring_passes(&self, rank: usize) -> impl Iterator<Item = (usize, u64)> + '_ {
        let (at, ring) = (self.topology().coords(rank), self.topology().ring());
        let next = self.topology().rank(RankCoords { ring: (at.ring + 1) % ring, ..at });
        (0..ring - 1).map(move |pass| {
            let [tokens, text] = self.segment((at.ring + ring - pass) % ring);
            (next, values(&[2, tokens + text, self.heads(rank).len(), self.head_dim()]))
        })
    }

    fn others(&self, rank: usize) -> impl Iterator<Item = usize> {
        self.topology().ulysses_peers(rank).into_iter().filter(move |peer| *peer != rank)
    }
}

fn values(sizes: &[usize]) -> u64 {
    sizes.iter().map(|size| *size as u64).product()
}

/// Values (not bytes) that `rank` sends to other ranks in one layer of one branch with `text` text tokens.
///
/// With n visual and l text rows of a rank, h heads of a Ulysses rank and d values a head:
/// - to each other Ulysses peer p before the attention: 3·(n + l)·h_p·d, packed q, k, v;
/// - to each other Ulysses peer p after it: (n_p + l_p)·h·d;
/// - to the next ring place, ring − 1 times: 2·(rows of the segment passed on)·h·d, keys and values.
///
/// With even shares and no text that is 4·(tokens·heads·d/P)·(U−1)/U + 2·(tokens·heads·d/P)·(R−1) for P = U·R.
pub fn sent_values_per_layer(
    topology: Topology,
    rank: usize,
    tokens: usize,
    text: usize,
    heads: usize,
    head_dim: usize,
) -> u64 {
    let shares = Shares::new(topology, tokens, text, heads, head_dim);
    let exchanges = shares.ulysses_there(rank).chain(shares.ulysses_back(rank)).chain(shares.ring_passes(rank));
    exchanges.map(|(_, values)| values).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn topology(cfg: usize, ring: usize, ulysses: usize) -> Topology {
        Topology::new(cfg, ring, ulysses).unwrap()
    }

    #[test]
    fn the_published_clip_sends_what_the_published_table_says() {
        // ulysses, ring, MB per layer at 163 frames in bf16
        let table = [
            (2, 1, 273.5),
            (1, 2, 273.5),
            (4, 1, 205.1),
            (2, 2, 273.5),
            (1, 4, 410.3),
            (3, 1, 243.1),
            (6, 1, 152.0),
            (3, 2, 212.8),
            (8, 1, 119.7),
            (4, 2, 171.0),
            (2, 4, 273.5),
            (1, 8, 478.7),
        ];
        for (ulysses, ring, megabytes) in table {
            for rank in 0..ulysses * ring {
                let sent = 2 * sent_values_per_layer(topology(1, ring, ulysses), rank, 44_520, 0, 24, 128);
                assert!((sent as f64 / 1e6 - megabytes).abs() < 0.1, "{ulysses}x{ring}: {sent} bytes");
            }
        }
    }

    #[test]
    fn uneven_shares_are_counted_as_they_are() {
        // Five heads and 13 tokens over two ulysses ranks (3 and 2; 7 and 6), one text row on the first.
        let t = topology(1, 1, 2);
        assert_eq!(sent_values_per_layer(t, 0, 13, 1, 5, 10), (3 * 8 * 2 + 6 * 3) * 10);
        assert_eq!(sent_values_per_layer(t, 1, 13, 1, 5, 10), (3 * 6 * 3 + 8 * 2) * 10);
        // A ring of three with segments of 5, 4 and 4 tokens: each rank passes its own and then the one before it.
        let t = topology(1, 3, 1);
        assert_eq!(sent_values_per_layer(t, 0, 13, 0, 5, 10), 2 * (5 + 4) * 5 * 10);
        assert_eq!(sent_values_per_layer(t, 1, 13, 0, 5, 10), 2 * (4 + 5) * 5 * 10);
        assert_eq!(sent_values_per_layer(t, 2, 13, 0, 5, 10), 2 * (4 + 4) * 5 * 10);
    }

    proptest! {
        #[test]
        fn even_shares_send_what_the_closed_formula_says(
            cfg in 1usize..=2, ring in 1usize..=5, ulysses in 1usize..=6, rows in 1usize..40, share in 1usize..5,
            head_dim in 1usize..65,
        ) {
            let t = topology(cfg, ring, ulysses);
            let (tokens, heads) = (rows * t.sequence_ranks(), share * ulysses);
            let mine = (rows * heads * head_dim) as u64;
            let (u, r) = (ulysses as u64, ring as u64);
            let expected = 4 * mine * (u - 1) / u + 2 * mine * (r - 1);
            for rank in 0..t.world() {
                prop_assert_eq!(sent_values_per_layer(t, rank, tokens, 0, heads, head_dim), expected);
            }
        }

        #[test]
        fn no_row_is_sent_to_its_owner_and_none_is_forgotten(
            ring in 1usize..=4, ulysses in 1usize..=5, tokens in 20usize..200, text in 0usize..20, heads in 5usize..12,
        ) {
            let t = topology(1, ring, ulysses);
            let shares = Shares::new(t, tokens, text, heads, 1);
            for ring_place in 0..ring {
                let group = (0..ulysses).map(|ulysses| t.rank(RankCoords { cfg: 0, ring: ring_place, ulysses }));
                let (mut there, mut back, mut kept) = (0, 0, 0);
                for rank in group {
                    there += shares.ulysses_there(rank).map(|(_, values)| values).sum::<u64>();
                    back += shares.ulysses_back(rank).map(|(_, values)| values).sum::<u64>();
                    kept += (shares.row_counts(rank).iter().sum::<usize>() * shares.heads(rank).len()) as u64;
                }
                // Every row in every head either stays or goes, three times before and once after.
                let all = (shares.segment(ring_place).iter().sum::<usize>() * heads) as u64;
                prop_assert_eq!(there, 3 * (all - kept));
                prop_assert_eq!(back, all - kept);
            }
        }
    }
}
