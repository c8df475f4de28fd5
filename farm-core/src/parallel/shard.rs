//! Which part of a whole each rank holds. Any number of parts: those that do not divide the whole get runs that differ
//! by one.

use std::ops::Range;

use crate::parallel::topology::Topology;

/// `total` things in a row, dealt to `parts` ranks in runs as even as can be: the first `total mod parts` get one more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Split {
    total: usize,
    parts: usize,
}

impl Split {
    /// `parts` is at least 1.
    pub fn new(total: usize, parts: usize) -> Self {
        debug_assert!(parts > 0);
        Self { total, parts: parts.max(1) }
    }

    pub fn total(self) -> usize {
        self.total
    }

    /// What part `part` holds; empty beyond the last part.
    pub fn range(self, part: usize) -> Range<usize> {
        let start = |part: usize| part * (self.total / self.parts) + part.min(self.total % self.parts);
        if part >= self.parts { self.total..self.total } else { start(part)..start(part + 1) }
    }

    pub fn len(self, part: usize) -> usize {
        self.range(part).len()
    }

    /// All runs in order.
    pub fn ranges(self) -> impl Iterator<Item = Range<usize>> {
        (0..self.parts).map(move |part| self.range(part))
    }
}

/// Who holds which rows and heads of one branch.
///
/// Visual tokens and text rows are dealt to the sequence ranks, heads to the Ulysses ranks of a ring place. The segment
/// of a ring place is what its Ulysses ranks hold together.
#[derive(Clone, Copy, Debug)]
pub struct Shares {
    topology: Topology,
    tokens: Split,
    text: Split,
    heads: Split,
    head_dim: usize,
}

impl Shares {
    pub fn new(topology: Topology, tokens: usize, text: usize, heads: usize, head_dim: usize) -> Self {
        let ranks = topology.sequence_ranks();
        Self {
            topology,
            tokens: Split::new(tokens, ranks),
            text: Split::new(text, ranks),
            heads: Split::new(heads, topology.ulysses()),
            head_dim,
        }
    }

    pub fn topology(&self) -> Topology {
        self.topology
    }

    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Heads of all ranks.
    pub fn all_heads(&self) -> usize {
        self.heads.total()
    }

    /// Visual tokens and text rows of `rank`.
    pub fn rows(&self, rank: usize) -> [Range<usize>; 2] {
        let at = self.topology.coords(rank);
        let place = at.ulysses + self.topology.ulysses() * at.ring;
        [self.tokens.range(place), self.text.range(place)]
    }

    /// Numbers of [`Shares::rows`].
    pub fn row_counts(&self, rank: usize) -> [usize; 2] {
        self.rows(rank).map(|rows| rows.len())
    }

    /// Numbers of visual tokens and text rows of the segment of ring place `ring`.
    pub fn segment(&self, ring: usize) -> [usize; 2] {
        let first = ring * self.topology.ulysses();
        let sum = |split: Split| (first..first + self.topology.ulysses()).map(|place| split.len(place)).sum();
        [sum(self.tokens), sum(self.text)]
    }

    /// Heads that `rank` attends with.
    pub fn heads(&self, rank: usize) -> Range<usize> {
        self.heads.range(self.topology.coords(rank).ulysses)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_first_parts_get_one_more() {
        assert_eq!(Split::new(24, 5).ranges().collect::<Vec<_>>(), [0..5, 5..10, 10..15, 15..20, 20..24]);
        assert_eq!(Split::new(1, 3).ranges().map(|r| r.len()).collect::<Vec<_>>(), [1, 0, 0]);
        assert_eq!(Split::new(0, 2).ranges().map(|r| r.len()).collect::<Vec<_>>(), [0, 0]);
    }

    proptest! {
        #[test]
        fn runs_cover_the_whole_once_and_differ_by_at_most_one(total in 0usize..100_000, parts in 1usize..65) {
            let split = Split::new(total, parts);
            let mut next = 0;
            for range in split.ranges() {
                prop_assert_eq!(range.start, next);
                next = range.end;
                prop_assert!((total / parts..=total.div_ceil(parts)).contains(&range.len()));
            }
            prop_assert_eq!(next, total);
        }
    }
}
