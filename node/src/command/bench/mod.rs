//! `farm-node bench`: where the time of one clip goes, and how much memory it takes. `bench usp`: what ranks gain.
//! `bench tiles`: what decodes in tiles lose. `bench forward`: one network alone, of any checkpoint. `bench kernels`: the
//! operations of networks. `bench peak`: what a core can do at most. `bench gpu`: the same questions about a GPU, at the
//! published size.

mod decode;
mod forward;
#[cfg(feature = "cuda")]
mod gpu;
mod kernels;
mod peak;
mod stitch;
mod tiles;
mod usp;

use std::io;
use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context;
use farm_core::job::spec::{RenderRequest, RenderSpec};
use farm_core::job::state::Progress;
use farm_core::model::pipeline::{Pipeline, RenderObserver, Residency, Start};
use farm_core::model::weights::checkpoint::Checkpoint;
use farm_core::parallel::group::RankGroup;
use serde::Serialize;

use crate::devices::{Devices, ThreadArgs};
use crate::encode::{FrameSink, Mp4Sink};

/// The goal for a clip of the bundled checkpoint with its own defaults, on two cores.
const GOAL_SECONDS: f64 = 1.0;
const GOAL_MIB: f64 = 128.0;

#[derive(clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    #[command(subcommand)]
    other: Option<Other>,
    /// Checkpoint folder; the goal is set for the bundled one
    #[arg(long, value_name = "DIR", default_value = "assets/mochi-tiny")]
    pub model: PathBuf,
    #[command(flatten)]
    pub threads: ThreadArgs,
    /// Clips to take the medians of
    #[arg(long, value_name = "N", default_value = "5")]
    pub runs: NonZeroUsize,
    /// Print the figures as JSON
    #[arg(long)]
    pub json: bool,
    /// Write the figures there as well, as JSON
    #[arg(long, value_name = "FILE")]
    pub save: Option<PathBuf>,
}

#[derive(clap::Subcommand)]
enum Other {
    /// Time a step on one and on two ranks, and the part of it that exchanges cost
    Usp(usp::Args),
    /// Compare decodes in tiles with the decode of the whole frame
    Tiles(tiles::Args),
    /// Decode a clip in one and in several processes, and predict it for more
    Decode(decode::Args),
    /// Time and weigh the stitching of a large clip from made-up tiles
    Stitch(stitch::Args),
    /// Time one network over stored inputs, and compare with a stored result
    Forward(forward::Args),
    /// Time the operations that networks spend their time in, each alone
    Kernels(kernels::Args),
    /// Measure what one core computes and its memory moves at most
    Peak(peak::Args),
    /// Measure what a GPU does with its time: every kernel of a clip's stages, against what the GPU can do at most
    #[cfg(feature = "cuda")]
    Gpu(gpu::Args),
}

/// Medians in seconds.
#[derive(Serialize)]
struct Figures {
    threads: usize,
    runs: usize,
    width: u32,
    height: u32,
    frames: u32,
    steps: u32,
    load: f64,
    text: f64,
    /// Both branches of one step.
    step: f64,
    denoise: f64,
    decode: f64,
    encode: f64,
    clip: f64,
    peak_mib: f64,
    goal_clip: f64,
    goal_peak_mib: f64,
    pass: bool,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    match args.other {
        Some(Other::Usp(args)) => return usp::run(args),
        Some(Other::Tiles(args)) => return tiles::run(args),
        Some(Other::Decode(args)) => return decode::run(args),
        Some(Other::Stitch(args)) => return stitch::run(args),
        Some(Other::Forward(args)) => return forward::run(args),
        Some(Other::Kernels(args)) => return kernels::run(args),
        Some(Other::Peak(args)) => return peak::run(args),
        #[cfg(feature = "cuda")]
        Some(Other::Gpu(args)) => return gpu::run(args),
        None => {}
    }
    let compute = args.threads.compute(Devices::CPU)?;
    let started = Instant::now();
    let engine = compute.engine(0)?;
    compute.settle(0)?;
    let pipeline = Pipeline::open(&engine, Checkpoint::open(&args.model)?, Residency::Kept)?;
    let solo = RankGroup::solo()?;
    let load = started.elapsed().as_secs_f64();
    let request: RenderRequest =
        serde_json::from_str(r#"{"prompt": "a red ball moving left on a black background", "seed": 1}"#)?;
    let spec = RenderSpec::resolve(&request, pipeline.defaults(), 1)?;

    let folder = tempfile::tempdir().context("no folder for the clips")?;
    let mut runs = Vec::new();
    for _ in 0..args.runs.get() {
        let path = folder.path().join("clip.mp4");
        let mut clip = Clip(Mp4Sink::create(&path, spec.width, spec.height)?);
        let mut seconds = pipeline.render(&engine, &solo, &spec, &Start::Seed, &mut clip)?.seconds;
        let finishing = Instant::now();
        clip.0.finish()?;
        let finished = finishing.elapsed().as_secs_f64();
        seconds.encode += finished;
        seconds.total += finished;
        runs.push(seconds);
    }
    let median = |of: fn(&farm_core::api::StageSeconds) -> f64| {
        let mut values: Vec<f64> = runs.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let (denoise, clip, peak_mib) = (median(|s| s.denoise), median(|s| s.total), peak_mib()?);
    let figures = Figures {
        threads: compute.threads(),
        runs: runs.len(),
        width: spec.width,
        height: spec.height,
        frames: spec.num_frames,
        steps: spec.num_inference_steps,
        load,
        text: median(|s| s.text),
        step: denoise / f64::from(spec.num_inference_steps),
        denoise,
        decode: median(|s| s.decode),
        encode: median(|s| s.encode),
        clip,
        peak_mib,
        goal_clip: GOAL_SECONDS,
        goal_peak_mib: GOAL_MIB,
        pass: clip <= GOAL_SECONDS && peak_mib <= GOAL_MIB,
    };
    if let Some(path) = &args.save {
        std::fs::write(path, serde_json::to_string(&figures)?).with_context(|| path.display().to_string())?;
    }
    if args.json {
        println!("{}", serde_json::to_string(&figures)?)
    } else {
        print(&figures)
    }
    Ok(if figures.pass { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn print(f: &Figures) {
    println!(
        "{}x{}, {} frames, {} steps, {} threads, median of {} clips",
        f.width, f.height, f.frames, f.steps, f.threads, f.runs
    );
    let part = |name: &str, seconds: f64| {
        println!("{name:8} {:8.1} ms  {:5.1} %", 1e3 * seconds, 100.0 * seconds / f.clip);
    };
    part("text", f.text);
    part("denoise", f.denoise);
    part("  step", f.step);
    part("decode", f.decode);
    part("encode", f.encode);
    println!("load     {:8.1} ms  before the first clip", 1e3 * f.load);
    println!(
        "bench: clip {:.3} s (goal {:.1}), peak memory {:.0} MiB (goal {:.0}): {}",
        f.clip,
        f.goal_clip,
        f.peak_mib,
        f.goal_peak_mib,
        if f.pass { "PASS" } else { "FAIL" }
    );
}

/// The middle one of `values`, of an even number the upper of the two.
fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The largest resident size that this process had.
fn peak_mib() -> anyhow::Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status").context("peak memory is read from /proc")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("/proc/self/status has no VmHWM")?;
    let kib: f64 = line.trim().trim_end_matches(" kB").parse().with_context(|| format!("VmHWM is {line:?}"))?;
    Ok(kib / 1024.0)
}

struct Clip(Mp4Sink);

impl RenderObserver for Clip {
    fn progress(&mut self, _: Progress) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }

    fn warning(&mut self, message: &str) {
        eprintln!("warning: {message}");
    }

    fn frames(&mut self, rgb24: &[u8], _: usize) -> io::Result<()> {
        self.0.frames(rgb24)
    }
}
