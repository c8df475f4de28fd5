//! Decisions in a second with a long queue: jobs are started and ended as fast as the core can, on nodes that never make
//! it wait. A decision is a job's start, with its rows and its command, and the end of its attempt.

use std::time::Duration;

use farm_core::parallel::cost::{DeviceRates, LinkRates, ModelShape, Site};

use super::clock::memory_mib;
use super::report::{Limit, Report, quantile, sorted};
use super::world::{Item, Kind, PROMPT, Rules, World, model, registration, request};
use crate::core::events::Saved;

/// Tenants, models and sizes that the queue is of.
const TENANTS: usize = 20;
const MODELS: usize = 3;
const FRAMES: [u32; 4] = [37, 85, 163, 163];
const STEPS: [u32; 4] = [30, 50, 64, 30];
/// So many decisions are one measurement.
const SLICE: usize = 50_000;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[arg(long, default_value_t = 1_000_000)]
    pub jobs: usize,
    #[arg(long, default_value_t = 1_000)]
    pub nodes: usize,
    /// Of each node
    #[arg(long, default_value_t = 8)]
    pub devices: usize,
    /// Jobs that are started and ended before it stops
    #[arg(long, default_value_t = 500_000)]
    pub decisions: usize,
}

pub fn run(args: &Args) -> anyhow::Result<Report> {
    let mut world = World::new(Rules::default(), TENANTS, Saved::default());
    let before = memory_mib(None);
    let shape = ModelShape::mochi1();
    let models: Vec<_> = (0..MODELS).map(|i| model(&format!("model-{i}"), &shape)).collect();
    for _ in 0..args.nodes {
        world.join(registration(args.devices, "gpu", Some(&site()), &models));
    }
    let kinds: Vec<u32> = (0..MODELS * FRAMES.len())
        .map(|i| {
            let mut request = request(PROMPT);
            request.num_frames = Some(FRAMES[i / MODELS]);
            request.num_inference_steps = Some(STEPS[i / MODELS]);
            world.kind(Kind::new(request, Some(format!("model-{}", i % MODELS))))
        })
        .collect();
    // Of about four ticks: a quarter of the devices become free in each.
    let item = |i: usize| {
        let takes = Duration::from_millis(350 + (i % 7) as u64 * 10);
        Item::new(kinds[i % kinds.len()], (i / 7 % TENANTS) as u32, takes)
    };
    world.items.reserve_exact(args.jobs);
    world.submit((0..args.jobs).map(item));
    let queued = memory_mib(None);

    let mut rates = Vec::new();
    let (mut known, mut spent) = (0, world.costs.total());
    while world.ended < args.decisions.min(args.jobs) {
        world.run_tick();
        if world.ended >= known + SLICE {
            let span = world.costs.total() - spent;
            rates.push((world.ended - known) as f64 / span.cpu.as_secs_f64());
            (known, spent) = (world.ended, world.costs.total());
        }
    }
    let mut report = Report::new("plan");
    let total = world.costs.total();
    let each = |span: super::clock::Span| span.cpu.as_secs_f64() * 1e6 / world.ended.max(1) as f64;
    report.figure("jobs queued at first", args.jobs as f64, "");
    report.figure("decisions", world.ended as f64, "");
    report.figure("admitting a job", world.costs.submits.cpu.as_secs_f64() * 1e6 / args.jobs.max(1) as f64, "us");
    report.figure("of a decision, choosing", each(world.costs.ticks), "us");
    report.figure("of a decision, starting", each(world.costs.starts), "us");
    report.figure("of a decision, ending", each(world.costs.reports), "us");
    report.figure("of a decision, heartbeats beside it", each(world.costs.heartbeats), "us");
    report.figure("decisions in a second of wall time", world.ended as f64 / total.wall.as_secs_f64(), "/s");
    let all = sorted(rates);
    report.figure("slowest slice", quantile(&all, 0.0), "/s");
    report.goal("decisions in a second of one core, median", quantile(&all, 0.5), "/s", Limit::AtLeast(200_000.0));
    if let (Some((before, _)), Some((queued, _)), Some((now, most))) = (before, queued, memory_mib(None)) {
        report.figure("memory before", before, "MiB");
        report.figure("memory with all queued", queued, "MiB");
        report.figure("memory at the end", now, "MiB");
        let limit = if args.jobs <= 200_000 { 120.0 } else { 1024.0 };
        report.goal("peak memory", most, "MiB", Limit::AtMost(limit));
    }
    Ok(report)
}

/// Devices as in a data centre.
pub fn site() -> Site {
    let device = DeviceRates {
        linear: 5e14,
        attention: 4e14,
        memory: 80e9,
        bandwidth: 3e12,
        value_bytes: 2,
        shared_weights: false,
    };
    Site::one_host(device, LinkRates { bandwidth: 2e11, latency: 1e-5 })
}
