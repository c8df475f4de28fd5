//! Blocks of weights that wait outside the device's memory until they are used: which stay, and which is fetched when.
//! Arithmetic only; [`walk`] is the loop over it.
//!
//! A fetched block lies in one of a few slots. The fetch of a block is asked for as soon as the block that had its slot
//! before has been asked for, so with two slots every fetch has at least the time of the block before it. Nothing here
//! waits: a device does what it is asked for in order, and begins a fetch when the slot's last reader is done.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

/// How many blocks of a network stay in the device's memory, and into how many slots the others are fetched in turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Streaming {
    pub resident: usize,
    /// At least 1; with 1 nothing is fetched while the block before computes. Not looked at if all blocks stay.
    pub slots: usize,
}

/// What is asked for, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The fetch of a block. Its slot is the one that was given back first.
    Fetch(usize),
    /// All work of a block, after which its slot, if it has one, is given back.
    Compute(usize),
}

impl Streaming {
    /// Whether `block` of `blocks` is fetched. Those that are lie as far apart as can be, the last of all among them:
    /// whatever computes between two of them is time to fetch the second.
    pub fn streams(self, block: usize, blocks: usize) -> bool {
        let streamed = blocks - self.resident.min(blocks);
        (block + 1) * streamed / blocks > block * streamed / blocks
    }

    /// One pass through a network of `blocks` blocks.
    pub fn steps(self, blocks: usize) -> Vec<Step> {
        let streamed: Vec<usize> = (0..blocks).filter(|block| self.streams(*block, blocks)).collect();
        let (first, mut later) = streamed.split_at(self.slots.max(1).min(streamed.len()));
        let mut steps: Vec<Step> = first.iter().map(|block| Step::Fetch(*block)).collect();
        for block in 0..blocks {
            steps.push(Step::Compute(block));
            if self.streams(block, blocks)
                && let Some((next, rest)) = later.split_first()
            {
                steps.push(Step::Fetch(*next));
                later = rest;
            }
        }
        steps
    }

    /// Seconds of a pass through `blocks` blocks that follows another, each of which computes for `compute` and is fetched in
    /// `fetch`: one block computes at a time, one is fetched at a time, beside it.
    pub fn seconds(self, blocks: usize, compute: f64, fetch: f64) -> f64 {
        // When each slot is given back, in that order.
        let mut free: VecDeque<f64> = vec![0.0; self.slots.max(1)].into();
        let (mut computed, mut fetched) = (0f64, 0f64);
        let mut coming = VecDeque::new();
        let mut pass = || {
            let start = computed;
            for step in self.steps(blocks) {
                match step {
                    Step::Fetch(_) => {
                        fetched = fetched.max(free.pop_front().unwrap_or(computed)) + fetch;
                        coming.push_back(fetched);
                    }
                    Step::Compute(block) => {
                        let streams = self.streams(block, blocks);
                        if streams && let Some(there) = coming.pop_front() {
                            computed = computed.max(there);
                        }
                        computed += compute;
                        if streams {
                            free.push_back(computed);
                        }
                    }
                }
            }
            computed - start
        };
        pass();
        pass()
    }
}

/// Goes through a pass over `blocks` blocks: `fetch` starts a fetch, `compute` gets what it has started, or nothing for a
/// block that stays, and gives its slot back when it returns. Ends with the first error.
pub fn walk<F, E>(
    streaming: Streaming,
    blocks: usize,
    mut fetch: impl FnMut(usize) -> Result<F, E>,
    mut compute: impl FnMut(usize, Option<F>) -> Result<(), E>,
) -> Result<(), E> {
    let mut coming = VecDeque::new();
    for step in streaming.steps(blocks) {
        match step {
            Step::Fetch(block) => coming.push_back(fetch(block)?),
            Step::Compute(block) if streaming.streams(block, blocks) => compute(block, coming.pop_front())?,
            Step::Compute(block) => compute(block, None)?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_block_is_computed_once_and_fetched_once_before_if_it_does_not_stay(
            blocks in 1usize..60, resident in 0usize..70, slots in 1usize..5,
        ) {
            let streaming = Streaming { resident, slots };
            let (mut coming, mut next, mut kept) = (VecDeque::new(), 0, 0);
            for step in streaming.steps(blocks) {
                match step {
                    Step::Fetch(block) => coming.push_back(block),
                    Step::Compute(block) => {
                        prop_assert_eq!(block, next);
                        next += 1;
                        if streaming.streams(block, blocks) {
                            // Still in its slot while it computes; the next is on its way.
                            prop_assert!(coming.len() <= slots);
                            let after = (block + 1..blocks).find(|block| streaming.streams(*block, blocks));
                            prop_assert!(slots == 1 || coming.get(1).copied() == after);
                            prop_assert_eq!(coming.pop_front(), Some(block));
                        } else {
                            kept += 1;
                        }
                    }
                }
            }
            prop_assert_eq!((next, coming.len(), kept), (blocks, 0, resident.min(blocks)));
        }

        #[test]
        fn fetched_blocks_lie_as_far_apart_as_can_be(blocks in 1usize..60, resident in 0usize..60) {
            let streaming = Streaming { resident, slots: 2 };
            let at: Vec<usize> = (0..blocks).filter(|block| streaming.streams(*block, blocks)).collect();
            let gaps = at.windows(2).map(|pair| pair[1] - pair[0]);
            let even = blocks.checked_div(at.len()).unwrap_or(0);
            prop_assert!(gaps.into_iter().all(|gap| gap == even || gap == even + 1), "{:?}", at);
            prop_assert!(at.last().is_none_or(|last| last + 1 == blocks));
        }

        #[test]
        fn a_fetch_costs_nothing_if_what_computes_until_it_is_used_takes_longer_and_else_what_it_takes(
            blocks in 2usize..60, resident in 0usize..60, slots in 2usize..4, fetch in 0.01f64..5.0,
        ) {
            let streaming = Streaming { resident, slots };
            let at: Vec<usize> = (0..blocks).filter(|block| streaming.streams(*block, blocks)).collect();
            // The last block of the pass before is fetched, if any is: the first gap begins after it.
            let before = std::iter::once(None).chain(at.iter().copied().map(Some));
            let gaps = at.iter().zip(before).map(|(block, before)| (block - before.map_or(0, |before| before + 1) + 1) as f64);
            let seconds = streaming.seconds(blocks, 1.0, fetch);
            let (least, most) = ((blocks as f64).max(at.len() as f64 * fetch), gaps.map(|gap| gap.max(fetch)).sum::<f64>());
            prop_assert!(seconds >= least * (1.0 - 1e-9));
            prop_assert!(fetch > 1.0 || seconds <= blocks as f64 * (1.0 + 1e-9));
            // The pass before may leave a fetch and a block that are begun.
            let most = most.max(blocks as f64) + fetch + 1.0;
            prop_assert!(seconds <= most, "{} for at most {}", seconds, most);
        }
    }

    #[test]
    fn with_one_slot_fetches_and_blocks_take_turns() {
        let streaming = Streaming { resident: 0, slots: 1 };
        assert_eq!(streaming.seconds(10, 2.0, 1.0), 30.0);
        let order = [Step::Fetch(0), Step::Compute(0), Step::Fetch(1), Step::Compute(1)];
        assert_eq!(streaming.steps(2), order);
    }

    #[test]
    fn a_walk_hands_every_fetch_to_its_block() {
        let mut seen = Vec::new();
        let streaming = Streaming { resident: 2, slots: 2 };
        let all = walk(streaming, 5, Ok::<_, ()>, |block, fetched| {
            seen.push(fetched);
            if block == 3 { Err(()) } else { Ok(()) }
        });
        assert_eq!((all, seen), (Err(()), vec![None, Some(1), None, Some(3)]));
    }
}
