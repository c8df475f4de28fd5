//! How many devices a clip gets: the rule of group sizes, as arithmetic.
//!
//! A clip on a larger group is done sooner, but k devices are never quite k times as fast, so a queue is done sooner
//! with many small groups. The rule takes the size whose predicted finish of the whole queue is earliest:
//!
//! ```text
//! finish(g) = ceil(waiting / groups of g that the free devices make) · seconds(g)
//! ```
//!
//! The clips that start at one time are one round, and have the size that was best for the queue when the round began.
//! When as many devices as clips are left, the rule is asked anew for each: so what equal groups would leave over goes
//! to the last clips. Devices that are busy do not count, and no clip waits for them: what is free is used now.

/// What a clip that stands for its queue gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grant {
    /// So many devices of one node, at least 1.
    Devices(usize),
    /// It needs more devices than any node has free now: at least so many.
    Needs(usize),
}

/// What there is to share out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Load {
    /// How many of the nodes that could take the clip have `i` devices free, at index i. A group is on one node.
    pub free: Vec<usize>,
    /// Clips that want these devices, the one in question too.
    pub waiting: usize,
}

impl Load {
    /// Devices of the largest group that can be had.
    fn most(&self) -> usize {
        self.free.iter().rposition(|nodes| *nodes > 0).unwrap_or(0)
    }

    fn devices(&self) -> usize {
        self.free.iter().enumerate().map(|(free, nodes)| nodes * free).sum()
    }

    /// Seconds until all clips that wait are done in groups of `size`, if there is any such group.
    fn finish(&self, size: usize, seconds: &[Option<f64>]) -> Option<f64> {
        let groups: usize = self.free.iter().enumerate().map(|(free, nodes)| nodes * (free / size)).sum();
        let rounds = (groups > 0).then(|| self.waiting.max(1).div_ceil(groups))?;
        Some(rounds as f64 * time(seconds, size)?)
    }

    /// The size that finishes first; of equals, the smallest.
    pub fn best(&self, seconds: &[Option<f64>]) -> Option<usize> {
        let sizes = (1..=self.most()).filter_map(|size| Some((size, self.finish(size, seconds)?)));
        sizes.reduce(|best, next| if next.1 < best.1 { next } else { best }).map(|(size, _)| size)
    }
}

/// Chooses the size of the next group of a round that began with `start` and has `now` left. `seconds[k - 1]` is the
/// predicted time of the clip on k devices, `None` if it cannot be rendered on k. A clip about which nothing is
/// predicted gets one device.
pub fn grant(start: &Load, now: &Load, seconds: &[Option<f64>]) -> Grant {
    let most = now.most();
    if most == 0 {
        return Grant::Needs(1);
    }
    let enough = now.waiting <= now.devices();
    let of_round = if enough { None } else { start.best(seconds).filter(|size| *size <= most) };
    match of_round.or_else(|| now.best(seconds)) {
        Some(size) => Grant::Devices(size),
        None => match (most..=seconds.len()).find(|size| time(seconds, *size).is_some()) {
            Some(size) => Grant::Needs(size),
            None => Grant::Devices(1),
        },
    }
}

/// A prediction that is no time is none.
fn time(seconds: &[Option<f64>], size: usize) -> Option<f64> {
    seconds.get(size - 1).copied().flatten().filter(|time| time.is_finite() && *time > 0.0)
}

#[cfg(test)]
mod tests {
    use farm_core::parallel::cost::devices::Devices;
    use farm_core::parallel::cost::{ClipShape, ModelShape, Site, predict};
    use proptest::prelude::*;

    use super::*;

    /// Every doubling of the devices takes 0.7 of the time.
    fn imperfect(count: usize) -> Vec<Option<f64>> {
        (1..=count).map(|k| Some(100.0 * 0.7f64.powf((k as f64).log2()))).collect()
    }

    fn load(free: &[usize], waiting: usize) -> Load {
        let mut nodes = vec![0; free.iter().max().map_or(0, |most| most + 1)];
        free.iter().for_each(|free| nodes[*free] += 1);
        Load { free: nodes, waiting }
    }

    /// The first of a round.
    fn first(free: &[usize], waiting: usize, seconds: &[Option<f64>]) -> Grant {
        grant(&load(free, waiting), &load(free, waiting), seconds)
    }

    #[test]
    fn one_clip_gets_the_size_of_the_least_time() {
        assert_eq!(first(&[4], 1, &imperfect(4)), Grant::Devices(4));
        let worse_beyond_three = [Some(10.0), Some(6.0), Some(5.0), Some(5.5)];
        assert_eq!(first(&[4], 1, &worse_beyond_three), Grant::Devices(3));
        let no_use = [Some(10.0), Some(10.0), Some(11.0), Some(10.0)];
        assert_eq!(first(&[4], 1, &no_use), Grant::Devices(1), "ties go to the smaller group");
    }

    #[test]
    fn a_short_queue_shares_the_devices_and_a_long_one_takes_them_singly() {
        let sizes = |waiting| first(&[4], waiting, &imperfect(4));
        assert_eq!([1, 2, 3, 4, 12].map(sizes), [4, 2, 1, 1, 1].map(Grant::Devices));
    }

    #[test]
    fn with_perfect_scaling_rounds_that_come_out_even_take_the_smaller_groups() {
        let perfect: Vec<_> = (1..=4).map(|k| Some(12.0 / k as f64)).collect();
        assert_eq!(first(&[4], 4, &perfect), Grant::Devices(1));
        assert_eq!(first(&[4], 5, &perfect), Grant::Devices(4), "a fifth clip would leave three devices idle");
    }

    #[test]
    fn groups_do_not_span_nodes() {
        assert_eq!(first(&[2, 2], 1, &imperfect(4)), Grant::Devices(2));
        // Two nodes of three make two groups of three or of two.
        assert_eq!(first(&[3, 3], 2, &imperfect(4)), Grant::Devices(3));
    }

    #[test]
    fn a_clip_that_fits_no_group_of_the_free_devices_says_what_it_needs() {
        let from_three = [None, None, Some(9.0), Some(8.0)];
        assert_eq!(first(&[2, 1], 5, &from_three), Grant::Needs(3));
        assert_eq!(first(&[3], 5, &from_three), Grant::Devices(3));
        assert_eq!(first(&[], 5, &from_three), Grant::Needs(1));
    }

    #[test]
    fn without_a_prediction_a_clip_gets_one_device() {
        assert_eq!(first(&[4], 1, &[]), Grant::Devices(1));
        assert_eq!(first(&[4], 1, &[Some(f64::NAN), Some(-1.0), Some(0.0)]), Grant::Devices(1));
    }

    #[test]
    fn a_round_keeps_its_size_while_clips_are_more_than_devices() {
        // Taken by itself, what the first clip leaves of a queue of twelve would make another choice: eleven clips one
        // after the other on three devices end before four rounds of single devices.
        let nearly_perfect = [Some(1.0), Some(0.5), Some(0.34), Some(0.26)];
        assert_eq!(first(&[3], 11, &nearly_perfect), Grant::Devices(3));
        assert_eq!(run(vec![4], 12, &nearly_perfect).unwrap(), [1, 1, 1, 1]);
    }

    #[test]
    fn what_equal_groups_leave_over_goes_to_the_last_clips() {
        assert_eq!(run(vec![4], 3, &imperfect(4)).unwrap(), [1, 1, 2]);
        assert_eq!(run(vec![5], 2, &imperfect(5)).unwrap(), [2, 3]);
    }

    /// What is predicted of the bundled checkpoint's clip, with 8 steps, on typical processors of one thread each: nearly
    /// perfect scaling.
    fn bundled() -> Vec<Option<f64>> {
        let shape = ModelShape {
            layers: 3,
            heads: 12,
            head_dim: 16,
            hidden_x: 192,
            hidden_y: 48,
            ffn_x: 512,
            ffn_y: 128,
            text_dim: 64,
            time_dim: 256,
            channels: 12,
        };
        let clip = ClipShape::new(64, 64, 25, 8, [64, 0]).unwrap();
        let known = Devices::embedded().unwrap();
        let site = Site::one_host(known.device("cpu").unwrap(), known.link("local").unwrap());
        (1..=4).map(|devices| Some(predict(&shape, &clip, &site, devices)?.seconds)).collect()
    }

    #[test]
    fn near_its_end_a_queue_that_leaves_devices_over_gets_groups_and_far_from_it_none() {
        let sizes = |free, waiting| run(vec![free], waiting, &bundled()).unwrap();
        assert_eq!(sizes(4, 12), [1, 1, 1, 1]);
        // Of four rounds of single devices the last would be half empty.
        assert_eq!((sizes(2, 7), sizes(2, 8)), (vec![2], vec![1, 1]));
        assert_eq!((sizes(3, 8), sizes(4, 7)), (vec![3], vec![4]));
        // The more rounds there are, the less the last one counts, and the loss of every group is the same.
        for (free, waiting) in (1..=4).flat_map(|free| (120..=160).map(move |waiting| (free, waiting))) {
            assert_eq!(sizes(free, waiting), vec![1; free], "{waiting} clips wait for {free} devices");
        }
    }

    fn node_sizes() -> impl Strategy<Value = Vec<usize>> {
        prop::collection::vec(1..9usize, 1..5)
    }

    /// Times with k · time(k) growing: no more devices are ever a better use of device-seconds.
    fn scaling() -> impl Strategy<Value = Vec<Option<f64>>> {
        (1.0..1000.0f64, prop::collection::vec(0.001..0.5f64, 8)).prop_map(|(alone, losses)| {
            let mut device_seconds = alone;
            let times = losses.iter().enumerate().map(|(i, loss)| {
                if i > 0 {
                    device_seconds *= 1.0 + loss;
                }
                Some(device_seconds / (i + 1) as f64)
            });
            times.collect()
        })
    }

    fn any_times() -> impl Strategy<Value = Vec<Option<f64>>> {
        prop::collection::vec(prop::option::weighted(0.8, 0.1..1000.0f64), 0..10)
    }

    /// A round, as the scheduler starts it: until no clip is left or no device is free.
    fn run(mut free: Vec<usize>, mut waiting: usize, seconds: &[Option<f64>]) -> Result<Vec<usize>, TestCaseError> {
        let mut started = Vec::new();
        let start = load(&free, waiting);
        while waiting > 0 {
            free.retain(|free| *free > 0);
            let Grant::Devices(size) = grant(&start, &load(&free, waiting), seconds) else { break };
            let node = free.iter_mut().max().expect("a grant needs a node");
            prop_assert!((1..=*node).contains(&size), "a group of {size} on a node with {node} free");
            *node -= size;
            waiting -= 1;
            started.push(size);
        }
        Ok(started)
    }

    proptest! {
        #[test]
        fn a_group_is_never_larger_than_a_node_has_free(free in node_sizes(), waiting in 1..40usize, times in any_times()) {
            run(free, waiting, &times)?;
        }

        #[test]
        fn no_device_idles_while_clips_that_could_use_it_wait(
            free in node_sizes(), waiting in 1..40usize, times in scaling()
        ) {
            let devices: usize = free.iter().sum();
            let started = run(free, waiting, &times)?;
            prop_assert!(started.len() == waiting || started.iter().sum::<usize>() == devices, "{started:?}");
        }

        #[test]
        fn the_choice_finishes_first(free in node_sizes(), waiting in 1..40usize, times in any_times()) {
            let most = *free.iter().max().unwrap();
            let all: Vec<f64> = (1..=most).filter_map(|size| load(&free, waiting).finish(size, &times)).collect();
            if let Grant::Devices(size) = first(&free, waiting, &times)
                && let Some(chosen) = load(&free, waiting).finish(size, &times)
            {
                prop_assert!(all.iter().all(|other| chosen <= *other));
                let smaller = (1..size).filter_map(|size| load(&free, waiting).finish(size, &times));
                prop_assert!(smaller.into_iter().all(|other| chosen < other), "a smaller group is as good");
            } else {
                prop_assert!(all.is_empty());
            }
        }

        #[test]
        fn a_longer_queue_never_finishes_earlier(free in node_sizes(), waiting in 1..40usize, times in scaling()) {
            let best = |waiting| match first(&free, waiting, &times) {
                Grant::Devices(size) => load(&free, waiting).finish(size, &times),
                Grant::Needs(_) => None,
            };
            prop_assert!(best(waiting) <= best(waiting + 1));
        }

        #[test]
        fn a_long_queue_gets_single_devices(free in node_sizes(), rounds in 1..10usize, times in scaling()) {
            // Whole rounds, so that no size wins by the devices that the last round leaves idle.
            let devices: usize = free.iter().sum();
            prop_assert_eq!(run(free, rounds * devices, &times)?, vec![1; devices]);
        }

        #[test]
        fn on_one_node_a_queue_of_at_most_its_devices_gets_no_larger_groups_as_it_doubles(
            log in 0..4u32, times in scaling()
        ) {
            let devices = 1usize << log;
            let sizes: Vec<_> = (0..=log).map(|queue| match first(&[devices], 1 << queue, &times) {
                Grant::Devices(size) => size,
                Grant::Needs(size) => size,
            }).collect();
            prop_assert!(sizes.windows(2).all(|pair| pair[0] >= pair[1]), "{sizes:?}");
        }
    }
}
