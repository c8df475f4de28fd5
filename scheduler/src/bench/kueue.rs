//! The shape of Kueue's published baseline: 30 queues, each with 350 small, 100 medium and 50 large workloads that come at
//! fixed intervals and need 1, 5 and 20 units for 0.2, 0.5 and 1 s.
//!
//! Here a queue is a tenant with a share of 1, a unit is a device, and a queue's 20 units are a node of 20 devices, which
//! all tenants may use, as queues of a cohort borrow. The nodes say no rates of their devices, so a clip gets the least
//! number that it can do with: the clips are like such that have run out of memory on fewer. How long they take the farm
//! learns as it goes. Harder than Kueue's: a workload's units are of one node. Easier: no API server and no pods.

use std::time::Duration;

use anyhow::bail;
use farm_core::parallel::cost::ModelShape;

use super::report::{Limit, Report, mean, sorted};
use super::world::{Item, Kind, NEVER, PROMPT, Rules, World, model, registration, request};
use crate::core::events::Saved;

const QUEUES: usize = 30;
const UNITS: usize = 20;

/// Of each queue's workloads.
struct Size {
    name: &'static str,
    units: usize,
    count: usize,
    every: Duration,
    takes: Duration,
    priority: i16,
}

const SIZES: [Size; 3] = [
    Size {
        name: "small",
        units: 1,
        count: 350,
        every: Duration::from_millis(100),
        takes: Duration::from_millis(200),
        priority: 50,
    },
    Size {
        name: "medium",
        units: 5,
        count: 100,
        every: Duration::from_millis(500),
        takes: Duration::from_millis(500),
        priority: 100,
    },
    Size {
        name: "large",
        units: 20,
        count: 50,
        every: Duration::from_millis(1200),
        takes: Duration::from_millis(1000),
        priority: 200,
    },
];

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Milliseconds between ticks
    #[arg(long, default_value_t = 100)]
    pub tick: u64,
    /// All workloads come at once
    #[arg(long)]
    pub at_once: bool,
    /// With Kueue's priorities: large first
    #[arg(long)]
    pub priorities: bool,
    /// Devices are given again only by ticks on their timer, not as soon as a clip has ended
    #[arg(long)]
    pub lazy: bool,
}

pub fn run(args: &Args) -> anyhow::Result<Report> {
    let rules = Rules { tick: Duration::from_millis(args.tick), eager: !args.lazy, ..Rules::default() };
    let mut world = World::new(rules, QUEUES, Saved::default());
    let models = [model("model-0", &ModelShape::mochi1())];
    for _ in 0..QUEUES {
        world.join(registration(UNITS, "unit", None, &models));
    }
    let mut arrivals = Vec::new();
    for (n, size) in SIZES.iter().enumerate() {
        let mut request = request(PROMPT);
        // Kinds of clips are told apart by what is asked for.
        request.num_inference_steps = Some(size.units as u32);
        let kind = Kind { least_devices: size.units as u32, ..Kind::new(request, Some("model-0".to_owned())) };
        let kind = world.kind(kind);
        for i in 0..size.count {
            let at = if args.at_once { Duration::ZERO } else { size.every * i as u32 };
            for queue in 0..QUEUES {
                let mut item = Item::new(kind, queue as u32, size.takes);
                item.priority = if args.priorities { size.priority } else { 0 };
                arrivals.push((at, n, item));
            }
        }
    }
    arrivals.sort_by_key(|(at, ..)| *at);
    let total = arrivals.len();
    let mut sizes = Vec::new();
    let mut arrivals = arrivals.into_iter().peekable();
    while world.ended < total {
        let mut come = Vec::new();
        while let Some((_, n, item)) = arrivals.next_if(|(at, ..)| *at <= world.now.0) {
            come.push(item);
            sizes.push(n);
        }
        world.submit(come);
        world.run_tick();
        if world.now.0 > Duration::from_secs(3600) {
            bail!("{} of {total} workloads have not ended after an hour", total - world.ended);
        }
    }
    let end = world.items.iter().map(|item| item.ended_ms).filter(|at| *at != NEVER).max().unwrap_or(0);
    let end = f64::from(end) / 1e3;
    let mut report = Report::new("kueue");
    report.figure("workloads", total as f64, "");
    report.figure("ideal, without a scheduler", 66.0, "s");
    for (n, Size { name, .. }) in SIZES.iter().enumerate() {
        let of_size = world.items.iter().zip(&sizes).filter(|(_, size)| **size == n);
        let waits = sorted(of_size.map(|(item, _)| f64::from(item.started_ms - item.submitted_ms) / 1e3));
        report.figure(format!("mean wait, {name}"), mean(&waits), "s");
    }
    let used = world.busy.as_secs_f64() / (end * (QUEUES * UNITS) as f64);
    report.figure("core, processor time", world.costs.total().cpu.as_secs_f64(), "s");
    report.goal("until the last has ended", end, "s", Limit::AtMost(75.0));
    report.goal("use of the units", 100.0 * used, "%", Limit::AtLeast(90.0));
    Ok(report)
}
