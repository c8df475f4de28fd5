//! The time of a tick with many nodes and a long queue, while clips end and nodes report.

use std::time::Duration;

use farm_core::parallel::cost::ModelShape;

use super::clock::memory_mib;
use super::plan::site;
use super::report::{Limit, Report, quantile, sorted};
use super::world::{Costs, Item, Kind, PROMPT, Rules, World, model, registration, request};
use crate::core::events::Saved;

const MODELS: usize = 4;
const FRAMES: [u32; 4] = [37, 85, 127, 163];
const STEPS: [u32; 3] = [30, 50, 64];

#[derive(Debug, clap::Args)]
pub struct Args {
    #[arg(long, default_value_t = 10_000)]
    pub nodes: usize,
    /// Of each node
    #[arg(long, default_value_t = 8)]
    pub devices: usize,
    /// Jobs that wait beside those that run; as many come as start
    #[arg(long, default_value_t = 100_000)]
    pub queued: usize,
    #[arg(long, default_value_t = 200)]
    pub tenants: usize,
    /// Simulated seconds
    #[arg(long, default_value_t = 30)]
    pub seconds: u64,
    /// Mean run time of a clip in seconds: the shorter, the more start in a tick
    #[arg(long, default_value_t = 20)]
    pub clip: u64,
    /// Milliseconds between ticks
    #[arg(long, default_value_t = 200)]
    pub tick: u64,
}

pub fn run(args: &Args) -> anyhow::Result<Report> {
    let rules = Rules { tick: Duration::from_millis(args.tick), ..Rules::default() };
    let mut world = World::new(rules, args.tenants, Saved::default());
    let shape = ModelShape::mochi1();
    let models: Vec<_> = (0..MODELS).map(|i| model(&format!("model-{i}"), &shape)).collect();
    for _ in 0..args.nodes {
        world.join(registration(args.devices, "gpu", Some(&site()), &models));
    }
    let mut kinds = Vec::new();
    for i in 0..MODELS * FRAMES.len() * STEPS.len() {
        let mut request = request(PROMPT);
        request.num_frames = Some(FRAMES[i / MODELS % FRAMES.len()]);
        request.num_inference_steps = Some(STEPS[i / MODELS / FRAMES.len()]);
        kinds.push(world.kind(Kind::new(request, Some(format!("model-{}", i % MODELS)))));
    }
    // Between a half and three halves of the mean, all kinds and tenants in turn.
    let tenants = args.tenants.max(1);
    let item = |i: usize| {
        let part = 0.5 + (i as f64 * 0.618_034) % 1.0;
        let takes = Duration::from_secs_f64(args.clip as f64 * part);
        Item::new(kinds[i * 31 % kinds.len()], (i * 17 % tenants) as u32, takes)
    };
    let all = args.nodes * args.devices;
    world.submit((0..all + args.queued).map(item));
    // Until clips end at all times; how soon the farm is full is another question.
    let go_on = |world: &mut World, seconds: u64| {
        let end = world.now + Duration::from_secs(seconds);
        while world.now < end {
            let wanted = world.starts as usize + args.queued;
            let known = world.items.len();
            world.submit((known..wanted.max(known)).map(item));
            world.run_tick();
        }
    };
    go_on(&mut world, 3 * args.clip);
    world.costs = Costs::default();
    go_on(&mut world, args.seconds);
    Ok(summary(args, &world))
}

fn summary(args: &Args, world: &World) -> Report {
    let mut report = Report::new("tick");
    let ms = |(_, span): &(usize, super::clock::Span)| span.cpu.as_secs_f64() * 1e3;
    let ticks = &world.costs.each_tick;
    let placing = sorted(ticks.iter().filter(|(picked, _)| *picked > 0).map(ms));
    let idle = sorted(ticks.iter().filter(|(picked, _)| *picked == 0).map(ms));
    let picked: usize = ticks.iter().map(|(picked, _)| picked).sum();
    report.figure("nodes", args.nodes as f64, "");
    report.figure("jobs that wait", args.queued as f64, "");
    report.figure("devices in use at the end", world.devices_in_use() as f64, "");
    report.figure("ticks with starts", placing.len() as f64, "");
    report.figure("starts in such a tick", picked as f64 / placing.len().max(1) as f64, "");
    report.figure("tick with starts, p50", quantile(&placing, 0.5), "ms");
    report.figure("tick with starts, longest", quantile(&placing, 1.0), "ms");
    report.figure("ticks without starts", idle.len() as f64, "");
    report.figure("tick without starts, p50", quantile(&idle, 0.5), "ms");
    report.figure("tick without starts, p99", quantile(&idle, 0.99), "ms");
    let total = world.costs.total().cpu.as_secs_f64();
    report.figure("of one core, all that the core does", 100.0 * total / args.seconds as f64, "%");
    let beats = world.costs.heartbeats.cpu.as_secs_f64();
    report.figure("of one core, heartbeats", 100.0 * beats / args.seconds as f64, "%");
    if let Some((now, _)) = memory_mib(None) {
        report.figure("memory", now, "MiB");
    }
    report.goal("tick with starts, p99", quantile(&placing, 0.99), "ms", Limit::AtMost(100.0));
    report
}
