//! `farm-bench compare`: what a change did. An earlier revision is built in a folder of its own, and both programs run in
//! turn.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, ensure};
use serde::Serialize;
use serde_json::Value;

use crate::machine::{Setting, git};
use crate::process;
use crate::ratio::{median, ratio, table};
use crate::{farm_node, store};

const MODEL: &str = "assets/mochi-tiny";

#[derive(clap::Args)]
pub struct Args {
    /// The revision to compare the working tree with
    #[arg(long, value_name = "REVISION")]
    base: String,
    /// What to time: the bundled checkpoint's clip, or a network of the benchmark against the peer; may be given again
    #[arg(long = "case", value_name = "NAME", value_parser = CASES, default_values = CASES)]
    cases: Vec<String>,
    /// Threads; may be given again
    #[arg(long, value_name = "N", default_values = ["1", "2"])]
    threads: Vec<NonZeroUsize>,
    /// Times that both take their turn
    #[arg(long, value_name = "N", default_value = "3")]
    rounds: NonZeroUsize,
    /// Networks and inputs, made by `make bench-peer`; without them only the clip is timed
    #[arg(long, value_name = "DIR", default_value = "target/bench-peer")]
    files: PathBuf,
    /// Write the figures there as well, for programs
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

const CASES: [&str; 4] = ["clip", "dit", "t5", "vae"];

/// What one process printed: times in seconds, memory in MiB.
type Figures = BTreeMap<&'static str, f64>;

#[derive(Serialize)]
struct Report {
    setting: Setting,
    base: String,
    rounds: usize,
    rows: Vec<Row>,
}

#[derive(Debug, PartialEq, Serialize)]
struct Row {
    case: String,
    threads: usize,
    figure: &'static str,
    /// Medians.
    base: f64,
    now: f64,
    /// Now over base: below 1 is less.
    ratio: Option<f64>,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let now = farm_node()?;
    let commit = git(Path::new("."), &["rev-parse", "--verify", &format!("{}^{{commit}}", args.base)])?;
    let base = build(&now.with_file_name("..").join("bench/base"), &commit)?;
    let mut rows = Vec::new();
    for &threads in &args.threads {
        for case in &args.cases {
            if case != "clip" && !args.files.join(case).is_dir() {
                println!(
                    "{case}: not timed, {} is not there; `make bench-peer` makes it",
                    args.files.join(case).display()
                );
                continue;
            }
            let (mut before, mut after) = (Vec::new(), Vec::new());
            for round in 1..=args.rounds.get() {
                eprintln!("{case}, {threads} threads, round {round} of {}", args.rounds);
                let Some(figures) = time(&base, case, threads, &args.files)? else {
                    println!("{case}: not timed, {} has no such benchmark", args.base);
                    break;
                };
                before.push(figures);
                after.push(time(&now, case, threads, &args.files)?.context("no such benchmark here")?);
            }
            rows.extend(compare(case, threads.get(), &before, &after));
        }
    }
    let report = Report { setting: Setting::here()?, base: commit, rounds: args.rounds.get(), rows };
    println!("{}\nagainst {}; medians of {} rounds", report.setting.line(), report.base, report.rounds);
    println!("{}", as_text(&report.rows));
    if let Some(path) = &args.json {
        store(path, &report)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// `farm-node` of `commit`, built below `folder` if it is not there yet. Dependencies are shared by all revisions.
fn build(folder: &Path, commit: &str) -> anyhow::Result<PathBuf> {
    std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    let folder = folder.canonicalize()?;
    let program = folder.join(format!("farm-node-{commit}"));
    if program.is_file() {
        return Ok(program);
    }
    let sources = folder.join("sources");
    // An interrupted build has left some.
    remove(&sources)?;
    let at = sources.to_str().context("a path that is not UTF-8")?;
    git(Path::new("."), &["worktree", "add", "--detach", at, commit])?;
    let target = folder.join("target");
    let mut command = Command::new("cargo");
    command.args(["build", "--release", "--locked", "--package", "farm-node"]).current_dir(&sources);
    command.env("CARGO_TARGET_DIR", &target);
    let built = command.status();
    remove(&sources)?;
    let status = built.context("cargo does not run")?;
    ensure!(status.success(), "{commit} cannot be built: {status}");
    std::fs::copy(target.join("release/farm-node"), &program)?;
    Ok(program)
}

/// Removes a working tree, if it is there, and git's note of it.
fn remove(sources: &Path) -> anyhow::Result<()> {
    if sources.exists() {
        std::fs::remove_dir_all(sources).with_context(|| sources.display().to_string())?;
    }
    git(Path::new("."), &["worktree", "prune"]).map(drop)
}

/// One process. None if `program` has no such benchmark.
fn time(program: &Path, case: &str, threads: NonZeroUsize, files: &Path) -> anyhow::Result<Option<Figures>> {
    let mut command = Command::new(program);
    command.args(["bench"]);
    let names: &[&str] = if case == "clip" {
        command.args(["--json", "--model", MODEL]);
        &["load", "text", "step", "denoise", "decode", "encode", "clip", "peak_mib"]
    } else {
        let files = files.join(case);
        command.args(["forward", case, "--model"]).arg(files.join("model"));
        command.arg("--tensors").arg(files.join("tensors.safetensors"));
        // Enough of the short one for a median.
        command.args(["--runs", if case == "t5" { "20" } else { "2" }]);
        &["load", "median", "peak_mib"]
    };
    let finished = process::run(command.args(["--threads", &threads.to_string()]))?;
    // Of the command line's parser.
    if finished.status.code() == Some(2) {
        return Ok(None);
    }
    // A clip that misses its goal ends with a failure, and its figures are as good.
    let finished = if case == "clip" { finished } else { finished.checked(&command)? };
    let printed: Value = finished.json()?;
    Ok(Some(names.iter().filter_map(|&name| Some((name, printed[name].as_f64()?))).collect()))
}

/// Medians of the figures that both have, and their ratio.
fn compare(case: &str, threads: usize, base: &[Figures], now: &[Figures]) -> Vec<Row> {
    let names = base.first().into_iter().flat_map(BTreeMap::keys).copied();
    let of = |all: &[Figures], name| all.iter().map(|figures| figures.get(name).copied()).collect::<Option<Vec<_>>>();
    let row = |figure| {
        let (base, now) = (median(&of(base, figure)?), median(&of(now, figure)?));
        Some(Row { case: case.into(), threads, figure, base, now, ratio: ratio(now, base) })
    };
    names.filter_map(row).collect()
}

fn as_text(rows: &[Row]) -> String {
    let number = |figure: &str, value: f64| {
        if figure == "peak_mib" { format!("{value:.1} MiB") } else { format!("{:.2} ms", 1e3 * value) }
    };
    let rows = rows.iter().map(|row| {
        let name = if row.figure == "median" { "forward" } else { row.figure.trim_end_matches("_mib") };
        vec![
            row.case.clone(),
            name.to_owned(),
            row.threads.to_string(),
            number(row.figure, row.base),
            number(row.figure, row.now),
            row.ratio.map_or("–".into(), |ratio| format!("{ratio:.3}")),
        ]
    });
    table(&["case", "figure", "threads", "base", "now", "ratio"], 2, rows).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ratio_is_of_medians_of_figures_that_both_have() {
        let base = [2.0, 4.0, 90.0].map(|decode| Figures::from([("decode", decode), ("gone", 1.0)]));
        let now = [1.0, 80.0, 1.0].map(|decode| Figures::from([("decode", decode), ("new", 1.0)]));
        let rows = compare("clip", 2, &base, &now);
        let row = Row { case: "clip".into(), threads: 2, figure: "decode", base: 4.0, now: 1.0, ratio: Some(0.25) };
        assert_eq!(rows, [row]);
        assert!(compare("dit", 1, &[], &[]).is_empty());
    }

    #[test]
    fn the_table_has_units() {
        let base = [Figures::from([("median", 0.5), ("peak_mib", 100.0)])];
        let now = [Figures::from([("median", 0.25), ("peak_mib", 150.0)])];
        let text = as_text(&compare("vae", 1, &base, &now));
        for part in ["forward", "500.00 ms", "0.500", "150.0 MiB", "1.500"] {
            assert!(text.contains(part), "{part}\n{text}");
        }
    }
}
