//! `farm-scheduler bench`: how fast the scheduler decides and how well it shares, against goals. docs/performance.md has
//! the figures.
//!
//! | module | question |
//! |---|---|
//! | [`plan`] | how many jobs it starts and ends in a second, with a million queued |
//! | [`tick`] | how long a tick takes with ten thousand nodes |
//! | [`kueue`] | how near it comes to the ideal time of a published mix of gangs |
//! | [`fill`] | how soon a whole farm is busy, rows and all |
//! | [`store`] | how many changes of jobs a second the queue store takes |
//! | [`trace`] | how long people wait, in a published trace |
//!
//! All drive the real core in simulated time ([`world`]). Only what runs inside the core is timed ([`clock`]).

mod clock;
mod fill;
mod kueue;
mod plan;
mod report;
mod store;
mod stored;
mod tick;
mod trace;
mod world;

use clap::Subcommand;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    bench: Bench,
    /// Figures and goals as one line of JSON
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Bench {
    /// Decisions in a second, and memory, with a long queue
    Plan(plan::Args),
    /// Time of a tick with many nodes
    Tick(tick::Args),
    /// Kueue's published mix of small and large workloads
    Kueue(kueue::Args),
    /// Seconds until a whole farm is busy, with a queue store
    Fill(fill::Args),
    /// Durable transitions in a second
    Store(store::Args),
    /// Waits in a trace of requests, against first come, first served
    Trace(trace::Args),
}

/// Measures and prints. True if all goals are met. Not to be called within a runtime.
pub fn run(args: Args) -> anyhow::Result<bool> {
    let report = match args.bench {
        Bench::Plan(args) => plan::run(&args)?,
        Bench::Tick(args) => tick::run(&args)?,
        Bench::Kueue(args) => kueue::run(&args)?,
        Bench::Fill(args) => fill::run(&args)?,
        Bench::Store(args) => store::run(&args)?,
        Bench::Trace(args) => trace::run(&args)?,
    };
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print!("{report}");
    }
    Ok(report.is_met())
}
