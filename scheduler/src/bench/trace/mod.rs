//! A trace of requests to a public text-to-image service (GenTD26), replayed on simulated nodes: how long requests and
//! tenants wait under the farm's own rules, and first come, first served.
//!
//! | module | subject |
//! |---|---|
//! | [`load`] | the file's rows; the file itself is not of this repository |
//! | [`synthetic`] | requests like those, where the file is not at hand |
//! | [`replay`] | the policies |
//! | [`plot`] | who waits how long, as a picture |

mod load;
mod plot;
mod replay;
mod synthetic;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;

use self::replay::{Outcome, Policy, Setting};
use super::report::{Limit, Report};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// lora_request_trace.csv; without it synthetic requests take its place
    #[arg(long)]
    pub file: Option<PathBuf>,
    #[arg(long, default_value_t = 64)]
    pub nodes: usize,
    /// Of each node
    #[arg(long, default_value_t = 1)]
    pub devices: usize,
    /// Device-seconds asked for, over those there are until the last request comes: arrivals are compressed to this
    #[arg(long, default_value_t = 0.8)]
    pub load: f64,
    /// Seconds that loading another base model takes
    #[arg(long, default_value_t = 0)]
    pub switch: u64,
    /// Milliseconds between ticks
    #[arg(long, default_value_t = 200)]
    pub tick: u64,
    /// Of the synthetic requests
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Writes a plot here
    #[arg(long)]
    pub plot: Option<PathBuf>,
}

/// A request of the trace.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Row {
    /// Seconds after the first.
    pub at: f64,
    pub seconds: f64,
    pub tenant: u32,
    pub model: u32,
    pub images: u32,
    pub steps: u32,
    /// Bytes of the prompt and of the negative prompt.
    pub text: [u32; 2],
}

pub fn run(args: &Args) -> anyhow::Result<Report> {
    let mut report = Report::new("trace");
    let rows = match &args.file {
        Some(file) => {
            let (rows, sha256) = load::read(file)?;
            if !load::is_known(&sha256) {
                eprintln!("{} is not the published file: its sha-256 is {sha256}", file.display());
            }
            rows
        }
        None => synthetic::rows(args.seed),
    };
    describe(&rows, &mut report);
    let setting = Setting {
        nodes: args.nodes,
        devices: args.devices,
        load: args.load,
        switch: Duration::from_secs(args.switch),
        tick: Duration::from_millis(args.tick),
    };
    let outcomes: Vec<Outcome> =
        Policy::ALL.iter().map(|policy| replay::replay(*policy, &rows, &setting)).collect::<Result<_, _>>()?;
    for outcome in &outcomes {
        let name = outcome.policy.name();
        report.figure(format!("{name}: mean wait"), outcome.mean, "s");
        report.figure(format!("{name}: wait p95"), outcome.p95, "s");
        report.figure(format!("{name}: wait p99"), outcome.p99, "s");
        report.figure(format!("{name}: longest wait"), outcome.longest, "s");
        report.figure(format!("{name}: mean of tenant means"), outcome.tenant_mean, "s");
        report.figure(format!("{name}: tenant means, p95"), outcome.tenant_p95, "s");
        report.figure(format!("{name}: use"), 100.0 * outcome.used, "%");
        report.figure(format!("{name}: starts on another model"), 100.0 * outcome.switches, "%");
        report.figure(format!("{name}: handed back"), outcome.preemptions as f64, "");
    }
    let of = |policy| outcomes.iter().find(|outcome| outcome.policy == policy);
    let tenant_mean = |policy| of(policy).map_or(f64::MAX, |outcome| outcome.tenant_mean);
    if args.file.is_some() && args.load == 0.8 && args.switch == 0 {
        report.goal("oracle: mean of tenant means", tenant_mean(Policy::Oracle), "s", Limit::AtMost(44.0));
        report.goal("own prediction: mean of tenant means", tenant_mean(Policy::Own), "s", Limit::AtMost(46.0));
        let mean = of(Policy::Own).map_or(f64::MAX, |outcome| outcome.mean);
        report.goal("own prediction: mean wait", mean, "s", Limit::AtMost(480.0));
    } else {
        // Of the file it is a fifteenth.
        let part = 100.0 * tenant_mean(Policy::Own) / tenant_mean(Policy::Fifo);
        report.goal("mean of tenant means, own prediction over first come", part, "%", Limit::AtMost(10.0));
    }
    if let Some(path) = &args.plot {
        let title = if args.file.is_some() { "GenTD26" } else { "synthetic requests" };
        std::fs::write(path, plot::svg(title, &outcomes))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(report)
}

/// What there is to replay.
fn describe(rows: &[Row], report: &mut Report) {
    use super::report::{quantile, sorted};
    let seconds = sorted(rows.iter().map(|row| row.seconds));
    let mut by_tenant = std::collections::HashMap::<u32, usize>::new();
    let mut by_minute = std::collections::HashMap::<u64, usize>::new();
    for row in rows {
        *by_tenant.entry(row.tenant).or_default() += 1;
        *by_minute.entry(row.at as u64 / 60).or_default() += 1;
    }
    report.figure("requests", rows.len() as f64, "");
    report.figure("tenants", by_tenant.len() as f64, "");
    report.figure("requests of the largest", by_tenant.values().copied().max().unwrap_or(0) as f64, "");
    report.figure("most requests in a minute", by_minute.values().copied().max().unwrap_or(0) as f64, "");
    for (name, part) in [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("longest", 1.0)] {
        report.figure(format!("run time, {name}"), quantile(&seconds, part), "s");
    }
    report.figure("work", seconds.iter().sum(), "device s");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_and_short_requests_first_spare_most_tenants_the_queue() {
        let rows: Vec<Row> = synthetic::rows(1).into_iter().skip(5000).take(800).collect();
        let first = rows[0].at;
        let rows: Vec<Row> = rows.into_iter().map(|row| Row { at: row.at - first, ..row }).collect();
        let (switch, tick) = (Duration::ZERO, Duration::from_millis(500));
        let setting = Setting { nodes: 8, devices: 1, load: 0.9, switch, tick };
        let [fifo, oracle, own] = Policy::ALL.map(|policy| replay::replay(policy, &rows, &setting).unwrap());
        assert!(oracle.tenant_mean < 0.6 * fifo.tenant_mean, "{} {}", oracle.tenant_mean, fifo.tenant_mean);
        assert!(own.tenant_mean < 0.7 * fifo.tenant_mean, "{} {}", own.tenant_mean, fifo.tenant_mean);
        let svg = plot::svg("test", &[fifo, oracle, own]);
        assert!(svg.len() < 100_000 && svg.matches("<polyline").count() == 6);
    }
}
