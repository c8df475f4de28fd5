//! `farm-bench peer`: the networks and a whole clip, here and in PyTorch with diffusers. Each forward or clip is a process of
//! its own; both sides take turns, so that a slow moment of the machine falls on both.

mod report;

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::Context;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use self::report::{Report, Round, Side};
use crate::machine::Setting;
use crate::process;
use crate::{farm_node, store};

const MODEL: &str = "assets/mochi-tiny";
const SCRIPTS: &str = "tools/bench-peer";
const PROMPT: &str = "a red ball moving left on a black background";
/// Of both sides together in f32: |got − expected| / |expected|.
const F32_TOLERANCE: f64 = 1e-4;

#[derive(clap::Args)]
pub struct Args {
    /// Cases, all without it; may be given again
    #[arg(long = "case", value_name = "NAME", value_parser = CASES.map(|case| case.name))]
    cases: Vec<String>,
    /// Threads of either side; may be given again
    #[arg(long, value_name = "N", default_values = ["1", "2"])]
    threads: Vec<NonZeroUsize>,
    /// Times that both sides take their turn
    #[arg(long, value_name = "N", default_value = "3")]
    rounds: NonZeroUsize,
    /// Networks, inputs and expected outputs, made by make_cases.py
    #[arg(long, value_name = "DIR", default_value = "target/bench-peer")]
    files: PathBuf,
    /// The Python of the peer's environment
    #[arg(long, value_name = "PROGRAM", default_value = ".venv-peer/bin/python")]
    python: PathBuf,
    /// Write the figures there as well, for programs
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// A line of the table for each number of threads.
struct Case {
    name: &'static str,
    work: Work,
    /// Ours over theirs, at most.
    time_goal: f64,
    memory_goal: f64,
}

enum Work {
    /// One network's forward.
    Forward { network: &'static str, precision: &'static str, warm_ups: u32, runs: u32 },
    /// The bundled checkpoint's clip, from the start of the process to the mp4.
    Clip,
}

const CASES: [Case; 5] = [
    forward("dit", "dit", "fp32", [1, 2], 0.6),
    forward("dit-bf16", "dit", "bf16", [1, 3], 0.9),
    forward("t5", "t5", "fp32", [3, 20], 0.6),
    forward("vae", "vae", "fp32", [1, 3], 0.8),
    Case { name: "clip", work: Work::Clip, time_goal: 0.2, memory_goal: MEMORY_GOAL },
];
const MEMORY_GOAL: f64 = 0.6;

const fn forward(
    name: &'static str,
    network: &'static str,
    precision: &'static str,
    [warm_ups, runs]: [u32; 2],
    time_goal: f64,
) -> Case {
    let work = Work::Forward { network, precision, warm_ups, runs };
    Case { name, work, time_goal, memory_goal: MEMORY_GOAL }
}

/// What both sides print of a forward; theirs has `cuda_mib` and `versions` as well.
#[derive(Deserialize)]
struct Printed {
    median: f64,
    peak_mib: f64,
    relative_l2: f64,
    /// Of a forward, printed on our side.
    flops: Option<f64>,
    #[serde(default)]
    cuda_mib: f64,
    #[serde(default)]
    versions: Value,
}

/// What `farm-node bench peak` prints: limits of one core.
#[derive(Deserialize, Serialize)]
struct Peak {
    vectors: String,
    f32_flops: f64,
    tile_flops: Option<f64>,
    copy_bytes: f64,
}

/// What their clip prints.
#[derive(Deserialize)]
struct PrintedClip {
    peak_mib: f64,
    cuda_mib: f64,
    versions: Value,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let sides = Sides { node: farm_node()?, python: &args.python, files: &args.files };
    let mut report = Report::new(Setting::here()?, sides.peak()?, args.rounds.get());
    println!("{}", report.setting.line());
    let chosen = |case: &&Case| args.cases.is_empty() || args.cases.iter().any(|name| name == case.name);
    for &threads in &args.threads {
        for case in CASES.iter().filter(chosen) {
            let (mut ours, mut theirs) = (Vec::new(), Vec::new());
            for round in 1..=args.rounds.get() {
                eprintln!("{}, {threads} threads, round {round} of {}", case.name, args.rounds);
                ours.push(sides.ours(case, threads).with_context(|| format!("{}, ours", case.name))?);
                let (round, versions) =
                    sides.theirs(case, threads).with_context(|| format!("{}, theirs", case.name))?;
                theirs.push(round);
                report.versions = versions;
            }
            let tolerance = matches!(case.work, Work::Forward { precision: "fp32", .. }).then_some(F32_TOLERANCE);
            let (ours, theirs) = (Side::of(ours), Side::of(theirs).context("no round")?);
            report.add(case.name, threads.get(), [case.time_goal, case.memory_goal], tolerance, ours, theirs);
        }
    }
    println!("{}", report.versions_line());
    println!("{}\n\n{}", report.as_text(), report.limits_as_text());
    if let Some(path) = &args.json {
        store(path, &report)?;
    }
    Ok(if report.passed() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// How to start either side.
struct Sides<'a> {
    node: PathBuf,
    python: &'a Path,
    files: &'a Path,
}

impl Sides<'_> {
    fn peak(&self) -> anyhow::Result<Peak> {
        let mut command = Command::new(&self.node);
        command.args(["bench", "peak", "--json"]);
        process::run(&mut command)?.checked(&command)?.json()
    }

    fn ours(&self, case: &Case, threads: NonZeroUsize) -> anyhow::Result<Round> {
        let mut command = Command::new(&self.node);
        match case.work {
            Work::Forward { network, precision, warm_ups, runs } => {
                command.args(["bench", "forward", network, "--precision", precision]);
                self.forward(&mut command, case, threads, [warm_ups, runs]);
                let finished = process::run(&mut command)?.checked(&command)?;
                Ok(Round::forward(&finished.json()?, finished.others))
            }
            Work::Clip => {
                let folder = tempfile::tempdir()?;
                let out = folder.path().join("clip.mp4");
                command.args(["render", "--prompt", PROMPT, "--seed", "1", "--model", MODEL]);
                command.args(["--threads", &threads.to_string(), "--out"]).arg(&out);
                let finished = process::run(&mut command)?.checked(&command)?;
                Ok(Round::clip(&finished, finished.peak_mib, 0.0))
            }
        }
    }

    /// And the versions of the peer.
    fn theirs(&self, case: &Case, threads: NonZeroUsize) -> anyhow::Result<(Round, Value)> {
        let mut command = Command::new(self.python);
        // All is on this machine, and all is to run on its processor.
        command.env("HF_HUB_OFFLINE", "1").env("CUDA_VISIBLE_DEVICES", "");
        match case.work {
            Work::Forward { network, precision, warm_ups, runs } => {
                command.arg(Path::new(SCRIPTS).join("forward.py")).args([network, "--precision", precision]);
                self.forward(&mut command, case, threads, [warm_ups, runs]);
                let finished = process::run(&mut command)?.checked(&command)?;
                let printed: Printed = finished.json()?;
                Ok((Round::forward(&printed, finished.others), printed.versions))
            }
            Work::Clip => {
                let folder = tempfile::tempdir()?;
                let out = folder.path().join("clip.mp4");
                command.arg(Path::new(SCRIPTS).join("clip.py")).args(["--prompt", PROMPT, "--model", MODEL]);
                command.args(["--threads", &threads.to_string(), "--out"]).arg(&out);
                let finished = process::run(&mut command)?.checked(&command)?;
                let printed: PrintedClip = finished.json()?;
                Ok((Round::clip(&finished, printed.peak_mib, printed.cuda_mib), printed.versions))
            }
        }
    }

    /// The options that both sides have.
    fn forward(&self, command: &mut Command, case: &Case, threads: NonZeroUsize, [warm_ups, runs]: [u32; 2]) {
        let files = self.files.join(case.name);
        command.arg("--model").arg(files.join("model")).arg("--tensors").arg(files.join("tensors.safetensors"));
        for (option, value) in [("--threads", threads.get() as u32), ("--warm-ups", warm_ups), ("--runs", runs)] {
            command.args([option, &value.to_string()]);
        }
    }
}
