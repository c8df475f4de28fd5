//! Durable transitions in a second: jobs start and end on simulated nodes, and each tick's changes are one commit, as the
//! scheduler commits what has come together.

use std::time::Duration;

use farm_core::parallel::cost::ModelShape;

use super::plan::site;
use super::report::{Limit, Report, quantile, sorted};
use super::stored::Place;
use super::world::{Item, Kind, PROMPT, Rules, World, model, registration, request};
use crate::core::effects::Change;
use crate::core::events::Saved;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub place: Place,
    #[arg(long, default_value_t = 20_000)]
    pub jobs: usize,
    /// Of eight devices each: with more, more changes are of one commit
    #[arg(long, default_value_t = 128)]
    pub nodes: usize,
}

pub fn run(args: &Args) -> anyhow::Result<Report> {
    let mut world = World::new(Rules::default(), 1, Saved::default());
    world.changes = Some(Vec::new());
    let models = [model("model-0", &ModelShape::mochi1())];
    for _ in 0..args.nodes {
        world.join(registration(8, "gpu", Some(&site()), &models));
    }
    let kind = world.kind(Kind::new(request(PROMPT), Some("model-0".to_owned())));
    world.submit((0..args.jobs).map(|i| Item::new(kind, 0, Duration::from_millis(350 + (i % 7) as u64 * 10))));
    let stored = args.place.open()?;
    let queued = stored.submit(&world, 10_000)?;

    let (mut commits, mut transitions, mut reading) = (Vec::new(), 0usize, 0.0);
    while world.ended < args.jobs {
        world.run_tick();
        let changes = world.changes.replace(Vec::new()).unwrap_or_default();
        if changes.is_empty() {
            continue;
        }
        let of_job = |change: &&Change| matches!(change, Change::Started { .. } | Change::Done { .. });
        transitions += changes.iter().filter(of_job).count();
        let (read, written) = stored.commit(&changes)?;
        reading += read;
        commits.push(written);
    }
    let mut report = Report::new("store");
    let writing: f64 = commits.iter().sum();
    let first = commits.first().copied().unwrap_or(0.0);
    let each = sorted(commits);
    report.figure(format!("{}: jobs", stored.kind), args.jobs as f64, "");
    report.figure("submitted in", queued.as_secs_f64(), "s");
    report.figure("commits", each.len() as f64, "");
    report.figure("transitions in a commit", transitions as f64 / each.len().max(1) as f64, "");
    report.figure("first commit", 1e3 * first, "ms");
    report.figure("commit, p50", 1e3 * quantile(&each, 0.5), "ms");
    report.figure("commit, p99", 1e3 * quantile(&each, 0.99), "ms");
    report.figure("reading requests, of each start", 1e6 * reading / args.jobs.max(1) as f64, "us");
    let rate = transitions as f64 / writing;
    report.figure("with the reading of requests", transitions as f64 / (writing + reading), "/s");
    report.goal(format!("{}: durable transitions", stored.kind), rate, "/s", Limit::AtLeast(5_000.0));
    Ok(report)
}
