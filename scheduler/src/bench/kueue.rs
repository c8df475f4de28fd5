//! The shape of Kueue's published baseline: 30 queues, each with 350 small, 100 medium and 50 large workloads that come at
//! fixed intervals and need 1, 5 and 20 units for 0.2, 0.5 and 1 s.
//!
//! Here a queue is a tenant with a share of 1, a unit is a device, and a queue's 20 units are a node of 20 devices. The
//! clips' sizes are such that by memory they fit on at least 1, 5 and 20 devices, and links are so slow that no clip gains
//! by more. Harder than Kueue's: a workload's units are of one node. Easier: no API server, no pods, and predictions.

use std::time::Duration;

use anyhow::{Context, bail};
use farm_core::parallel::cost::{ClipShape, DeviceRates, LinkRates, ModelShape, Site, predict};

use super::report::{Limit, Report, mean, sorted};
use super::world::{Item, Kind, NEVER, PROMPT, Rules, World, model, registration, request};
use crate::core::events::{Ask, Saved};

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
    let shape = ModelShape { layers: 2, ..ModelShape::mochi1() };
    let site = site();
    for _ in 0..QUEUES {
        world.join(registration(UNITS, "unit", Some(&site), &[model("model-0", &shape)]));
    }
    let mut arrivals = Vec::new();
    for (n, size) in SIZES.iter().enumerate() {
        let mut request = request(PROMPT);
        (request.width, request.height, request.num_inference_steps) = (Some(256), Some(256), Some(1));
        request.num_frames = Some(frames(&shape, &site, Ask::of(&request), size.units)?);
        let kind = world.kind(Kind::new(request, Some("model-0".to_owned())));
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

/// Units with little memory and slow links.
fn site() -> Site {
    let device = DeviceRates {
        linear: 1e14,
        attention: 1e14,
        memory: 3e9,
        bandwidth: 1e12,
        value_bytes: 2,
        shared_weights: false,
    };
    Site::one_host(device, LinkRates { bandwidth: 1e6, latency: 1e-2 })
}

/// The longest clip that fits on `units` devices; it must not fit on fewer, nor be faster on more.
fn frames(shape: &ModelShape, site: &Site, ask: Ask, units: usize) -> anyhow::Result<u32> {
    let clip = |frames: u32| {
        let text = ask.text.map(|tokens| tokens as usize);
        ClipShape::new(256, 256, frames, 1, text).context("no such clip")
    };
    let mut found = None;
    for k in 0..1000 {
        let frames = 6 * k + 1;
        let clip = clip(frames)?;
        let least = (1..=UNITS).find(|devices| predict(shape, &clip, site, *devices).is_some());
        match least {
            Some(least) if least == units => found = Some(frames),
            Some(least) if least < units => {}
            _ => break,
        }
    }
    let found = found.with_context(|| format!("no clip fits on {units} devices and no fewer"))?;
    let seconds = |devices| predict(shape, &clip(found).ok()?, site, devices).map(|best| best.seconds);
    let alone = seconds(units).context("it fits")?;
    if let Some(more) = (units + 1..=UNITS).find(|more| seconds(*more).is_some_and(|seconds| seconds < alone)) {
        bail!("a clip for {units} devices is faster on {more}");
    }
    Ok(found)
}
