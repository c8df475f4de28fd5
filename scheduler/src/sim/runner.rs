//! Runs schedules.

use std::collections::BTreeMap;
use std::fmt;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::plan::Plan;
use super::random::Random;
use super::world::{Broken, World};

/// The kind of a schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// 2 to 20 nodes, everything looked at after every step.
    Small,
    /// So many nodes of eight devices; what a step touches is looked at, and everything now and then.
    Large(usize),
}

/// How a schedule went.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub seed: u64,
    pub size: Size,
    pub broken: Option<Broken>,
    /// Of all that happened, in order: equal for equal seeds.
    pub hash: u64,
    pub events: u64,
    pub checks: u64,
    /// Simulated.
    pub milliseconds: u64,
    pub jobs: u64,
    pub attempts: u64,
    pub counts: BTreeMap<&'static str, u64>,
    /// The last events, if they were asked for.
    pub trace: Vec<String>,
}

pub fn run(seed: u64, size: Size, traced: bool) -> Outcome {
    let mut random = Random::new(seed ^ if size == Size::Small { 0 } else { 0x5eed_0000_0000_0000 });
    let plan = match size {
        Size::Small => Plan::small(&mut random),
        Size::Large(nodes) => Plan::large(&mut random, nodes),
    };
    let mut world = World::new(plan, random, traced);
    // A panic is a broken invariant too, and has a seed.
    if std::panic::catch_unwind(AssertUnwindSafe(|| world.run())).is_err() {
        world.fail("panic", "the core has panicked".to_owned());
    }
    let World { broken, hash, events, checks, now, counts, trace, store, .. } = world;
    Outcome {
        seed,
        size,
        broken,
        hash,
        events,
        checks,
        milliseconds: now,
        jobs: store.rows.len() as u64,
        attempts: store.rows.iter().map(|row| row.attempts.len() as u64).sum(),
        counts,
        trace: trace.into_iter().flatten().collect(),
    }
}

/// Sums over schedules.
#[derive(Clone, Debug, Default)]
pub struct Totals {
    pub schedules: u64,
    pub events: u64,
    pub checks: u64,
    pub milliseconds: u64,
    pub jobs: u64,
    pub attempts: u64,
    pub counts: BTreeMap<&'static str, u64>,
}

impl Totals {
    fn add(&mut self, outcome: &Outcome) {
        self.schedules += 1;
        self.events += outcome.events;
        self.checks += outcome.checks;
        self.milliseconds += outcome.milliseconds;
        self.jobs += outcome.jobs;
        self.attempts += outcome.attempts;
        for (what, times) in &outcome.counts {
            *self.counts.entry(what).or_default() += times;
        }
    }
}

/// Runs the schedules of `seeds` on so many threads, until `most` have broken an invariant or the time is up. `report`
/// hears of the sums now and then.
pub fn run_all(
    seeds: impl Iterator<Item = (u64, Size)>,
    threads: usize,
    limit: Duration,
    most: usize,
    mut report: impl FnMut(&Totals),
) -> (Totals, Vec<Outcome>) {
    let seeds: Vec<(u64, Size)> = seeds.collect();
    let (next, stop, began) = (AtomicU64::new(0), AtomicBool::new(false), Instant::now());
    let mut totals = Totals::default();
    let mut failed: Vec<Outcome> = Vec::new();
    std::thread::scope(|scope| {
        let (sender, outcomes) = mpsc::sync_channel::<Outcome>(64);
        for _ in 0..threads.max(1) {
            let (sender, seeds, next, stop) = (sender.clone(), &seeds, &next, &stop);
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed)
                    && let Some((seed, size)) = seeds.get(next.fetch_add(1, Ordering::Relaxed) as usize)
                {
                    if sender.send(run(*seed, *size, false)).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        for outcome in outcomes {
            totals.add(&outcome);
            let over = began.elapsed() >= limit;
            if outcome.broken.is_some() {
                failed.push(outcome);
            }
            if failed.len() >= most || over {
                stop.store(true, Ordering::Relaxed);
            }
            report(&totals);
        }
    });
    (totals, failed)
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {:.3} s: {}", self.invariant, self.at as f64 / 1000.0, self.text)
    }
}
