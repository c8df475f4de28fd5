//! Runs the simulator: `make sim`, or `cargo run --release -p farm-scheduler --example sim -- --help`.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use farm_scheduler::sim::runner::{Outcome, Size, Totals, run, run_all};

/// Runs the scheduler's core under random faults and checks its invariants after every step.
#[derive(Parser)]
struct Args {
    /// Seed of the first schedule; the others follow. Drawn from the clock if left out.
    #[arg(long)]
    seed: Option<u64>,
    /// Schedules of 2 to 20 nodes.
    #[arg(long, default_value_t = 20_000)]
    schedules: u64,
    /// Schedules with many nodes of eight devices.
    #[arg(long, default_value_t = 20)]
    large: u64,
    /// Nodes of those.
    #[arg(long, default_value_t = 10_000)]
    nodes: usize,
    /// Seconds after which no further schedule begins.
    #[arg(long, default_value_t = 600)]
    seconds: u64,
    /// Schedules that run at a time.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Go on until so many schedules have failed.
    #[arg(long, default_value_t = 1)]
    failures: usize,
    /// Print the last events of the last schedule, even if nothing is wrong.
    #[arg(long)]
    trace: bool,
    /// Print only events about this, for example the end of a job's id.
    #[arg(long)]
    about: Option<String>,
    /// Events that are printed, at most.
    #[arg(long, default_value_t = 100)]
    lines: usize,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let seed = args.seed.unwrap_or_else(from_clock);
    println!("seed {seed}: {} schedules of 2..=20 nodes, {} of {} nodes", args.schedules, args.large, args.nodes);
    let began = Instant::now();
    let small = (0..args.schedules).map(|i| (seed.wrapping_add(i), Size::Small));
    let large = (0..args.large).map(|i| (seed.wrapping_add(i), Size::Large(args.nodes)));
    let mut said = Instant::now();
    let progress = |totals: &Totals| {
        if said.elapsed() >= Duration::from_secs(10) {
            said = Instant::now();
            say(totals, began);
        }
    };
    let limit = Duration::from_secs(args.seconds);
    let (totals, failed) = run_all(large.chain(small), args.threads, limit, args.failures, progress);
    say(&totals, began);
    for (what, times) in &totals.counts {
        println!("{times:>12} {what}");
    }
    for failed in &failed {
        show(failed, &args);
    }
    if !failed.is_empty() {
        return ExitCode::FAILURE;
    }
    if args.trace {
        let last = run(seed.wrapping_add(args.schedules.max(1) - 1), Size::Small, true);
        print_trace(&last, &args);
        println!("hash {:016x}", last.hash);
    }
    let wanted = args.schedules + args.large;
    if totals.schedules < wanted {
        println!("FAIL: only {} of {wanted} schedules in {} s", totals.schedules, args.seconds);
        return ExitCode::FAILURE;
    }
    println!("PASS: {} schedules, no invariant broken", totals.schedules);
    ExitCode::SUCCESS
}

fn from_clock() -> u64 {
    std::time::UNIX_EPOCH.elapsed().map_or(1, |since| since.as_nanos() as u64 % 1_000_000_000)
}

fn say(totals: &Totals, began: Instant) {
    let seconds = began.elapsed().as_secs_f64();
    println!(
        "{seconds:7.1} s: {} schedules ({:.0}/s), {} jobs, {} attempts, {:.1} M events, {:.1} M checks, {:.0} h simulated",
        totals.schedules,
        totals.schedules as f64 / seconds,
        totals.jobs,
        totals.attempts,
        totals.events as f64 / 1e6,
        totals.checks as f64 / 1e6,
        totals.milliseconds as f64 / 3.6e6,
    );
}

fn print_trace(outcome: &Outcome, args: &Args) {
    let wanted = |line: &&String| args.about.as_ref().is_none_or(|about| line.contains(about.as_str()));
    let lines: Vec<&String> = outcome.trace.iter().filter(wanted).collect();
    lines[lines.len().saturating_sub(args.lines)..].iter().for_each(|line| println!("{line}"));
}

/// The schedule that has failed, once more with its last events.
fn show(failed: &Outcome, args: &Args) {
    let again = run(failed.seed, failed.size, true);
    print_trace(&again, args);
    let (large, small) =
        if failed.size == Size::Small { ("--large 0", "--schedules 1") } else { ("--large 1", "--schedules 0") };
    if let Some(broken) = &failed.broken {
        println!("FAIL: seed {}: {broken}", failed.seed);
    }
    println!(
        "again: make sim SIM=\"--seed {} {small} {large}\"; same events: {}",
        failed.seed,
        again.hash == failed.hash
    );
}
