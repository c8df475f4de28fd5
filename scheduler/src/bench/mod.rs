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
//! | [`submit`] | how soon a long file is queued, over HTTP |
//! | [`trace`] | how long people wait, in a published trace |
//!
//! All but [`submit`] drive the real core in simulated time ([`world`]). Only what runs inside it, and in the queue store
//! ([`stored`]), is timed ([`clock`]).

mod clock;
mod fill;
mod kueue;
mod plan;
mod report;
mod store;
mod stored;
mod submit;
mod tick;
mod trace;
mod world;

use clap::Subcommand;

use self::report::Report;

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
    /// Seconds until a long file is queued, over HTTP
    Submit(submit::Args),
    /// Waits in a trace of requests, against first come, first served
    Trace(trace::Args),
}

/// Measures and prints. True if all goals are met. Not to be called within a runtime.
pub fn run(args: Args) -> anyhow::Result<bool> {
    let report = measure(args.bench)?;
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print!("{report}");
    }
    Ok(report.is_met())
}

fn measure(bench: Bench) -> anyhow::Result<Report> {
    Ok(match bench {
        Bench::Plan(args) => plan::run(&args)?,
        Bench::Tick(args) => tick::run(&args)?,
        Bench::Kueue(args) => kueue::run(&args)?,
        Bench::Fill(args) => fill::run(&args)?,
        Bench::Store(args) => store::run(&args)?,
        Bench::Submit(args) => submit::run(&args)?,
        Bench::Trace(args) => trace::run(&args)?,
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    /// Small ones of each kind end, and meet the goals that do not depend on the machine.
    fn bench(words: &str) -> Report {
        let Cli { args } = Cli::try_parse_from(["bench"].into_iter().chain(words.split_whitespace())).unwrap();
        measure(args.bench).unwrap()
    }

    fn figure(report: &Report, what: &str) -> f64 {
        report.figures.iter().find(|figure| figure.what.contains(what)).unwrap_or_else(|| panic!("{what}")).value
    }

    #[test]
    fn decisions_and_ticks_are_counted() {
        let plan = bench("plan --jobs 3000 --nodes 20 --decisions 2000");
        assert!(figure(&plan, "decisions") >= 2000.0);
        let tick = bench("tick --nodes 30 --queued 300 --tenants 5 --seconds 3 --clip 2");
        assert!(figure(&tick, "ticks with starts") > 0.0 && figure(&tick, "starts in such a tick") > 0.0);
    }

    #[test]
    fn the_published_mix_of_gangs_comes_near_its_ideal_time() {
        let kueue = bench("kueue");
        assert!(kueue.is_met(), "{kueue}");
    }

    #[test]
    fn all_devices_get_busy_and_all_transitions_reach_the_store() {
        assert_eq!(figure(&bench("fill --nodes 5 --devices 4"), "devices"), 20.0);
        assert!(figure(&bench("store --jobs 100 --nodes 2"), "commits") > 1.0);
    }
}
