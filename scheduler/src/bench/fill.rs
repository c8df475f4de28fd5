//! A whole farm from idle to busy: nodes have just joined, and more clips than devices wait in the store. What is timed is
//! all that is real: the core, the requests it reads, the rows it commits. The nodes and the network are not.

use std::time::{Duration, Instant};

use anyhow::ensure;
use farm_core::parallel::cost::ModelShape;

use super::report::{Limit, Report};
use super::stored::Place;
use super::world::{Item, Kind, PROMPT, Rules, World, model, registration, request};
use crate::core::events::Saved;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub place: Place,
    #[arg(long, default_value_t = 1553)]
    pub nodes: usize,
    /// Of each node
    #[arg(long, default_value_t = 8)]
    pub devices: usize,
}

pub fn run(args: &Args) -> anyhow::Result<Report> {
    let mut world = World::new(Rules::default(), 1, Saved::default());
    world.changes = Some(Vec::new());
    let models = [model("model-0", &ModelShape::mochi1())];
    let all = args.nodes * args.devices;
    let kind = world.kind(Kind::new(request(PROMPT), Some("model-0".to_owned())));
    let jobs = 2 * all;
    world.submit((0..jobs).map(|_| Item::new(kind, 0, Duration::from_secs(600))));
    let stored = args.place.open()?;
    let queued = stored.submit(&world, 10_000)?;
    for _ in 0..args.nodes {
        // Without rates every clip gets one device: the most starts that there can be.
        world.join(registration(args.devices, "gpu", None, &models));
    }
    let begun = Instant::now();
    let (mut ticks, mut reading, mut writing) = (0, 0.0, 0.0);
    while world.devices_in_use() < all {
        world.run_tick();
        let changes = world.changes.replace(Vec::new()).unwrap_or_default();
        let (read, written) = stored.commit(&changes)?;
        (reading, writing, ticks) = (reading + read, writing + written, ticks + 1);
        ensure!(ticks < 10_000, "{} of {all} devices are busy and no more get so", world.devices_in_use());
    }
    let taken = begun.elapsed().as_secs_f64();
    let mut report = Report::new("fill");
    report.figure(format!("{}: nodes", stored.kind), args.nodes as f64, "");
    report.figure("devices", all as f64, "");
    report.figure("clips that wait", jobs as f64, "");
    report.figure("submitted in", queued.as_secs_f64(), "s");
    report.figure("starts", world.starts as f64, "");
    report.figure("ticks", f64::from(ticks), "");
    report.figure("core", world.costs.total().wall.as_secs_f64(), "s");
    report.figure("requests read in", reading, "s");
    report.figure("rows committed in", writing, "s");
    report.goal(format!("{}: all devices busy after", stored.kind), taken, "s", Limit::AtMost(10.0));
    Ok(report)
}
