//! `farm-node bench usp`: what a second rank gains, and what its exchanges cost.

use std::io;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use farm_core::comm::{Collective, CommError, Exchange, Patience, local};
use farm_core::engine::SequenceOps;
use farm_core::engine::cpu::CpuEngine;
use farm_core::job::spec::{RenderRequest, RenderSpec};
use farm_core::job::state::{Progress, Stage};
use farm_core::model::pipeline::{Pipeline, RenderObserver, Residency, Start};
use farm_core::model::weights::checkpoint::Checkpoint;
use farm_core::parallel::group::RankGroup;
use farm_core::parallel::topology::Topology;
use serde::Serialize;

use super::median;
use crate::cores;

type Tensor = <CpuEngine as SequenceOps>::Tensor;

#[derive(clap::Args)]
pub struct Args {
    /// Checkpoint folder
    #[arg(long, value_name = "DIR", default_value = "assets/mochi-tiny")]
    pub model: PathBuf,
    /// Pixels
    #[arg(long, default_value_t = 256)]
    pub width: u32,
    /// Pixels
    #[arg(long, default_value_t = 256)]
    pub height: u32,
    /// 6k+1
    #[arg(long, default_value_t = 49)]
    pub num_frames: u32,
    /// Steps of a run; the first is not counted
    #[arg(long, default_value_t = 4)]
    pub steps: u32,
    /// Runs of each topology, in turn
    #[arg(long, default_value_t = 3)]
    pub runs: usize,
    /// Print the figures as JSON
    #[arg(long)]
    pub json: bool,
}

/// Medians over the counted steps of all runs, milliseconds of the slowest rank.
#[derive(Serialize)]
struct Figure {
    cfg: usize,
    ring: usize,
    ulysses: usize,
    step_ms: f64,
    /// Of it: waiting for other ranks' messages, which includes waiting for a slower rank.
    exposed_ms: f64,
    speedup: f64,
    /// Speed-up over ranks.
    efficiency: f64,
    /// What each rank sent in a step, at most.
    bytes_per_step: u64,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    ensure!(args.steps >= 2 && args.runs >= 1, "at least 2 steps and 1 run");
    let engine = CpuEngine::new(1)?;
    let pipeline = Pipeline::open(&engine, Checkpoint::open(&args.model)?, Residency::Kept)?;
    let request: RenderRequest = serde_json::from_value(serde_json::json!({
        "prompt": "a red ball moving left on a black background", "width": args.width, "height": args.height,
        "num_frames": args.num_frames, "num_inference_steps": args.steps,
    }))?;
    let spec = RenderSpec::resolve(&request, pipeline.defaults(), 1)?;
    let topologies =
        [(1, 1, 1), (2, 1, 1), (1, 1, 2), (1, 2, 1)].map(|(cfg, ring, ulysses)| Topology::new(cfg, ring, ulysses));
    let topologies = topologies.into_iter().collect::<Result<Vec<_>, _>>()?;

    // In turn, so that a slow moment of the machine falls on all of them.
    let mut timings = vec![Timings::default(); topologies.len()];
    for _ in 0..args.runs {
        for (topology, timings) in topologies.iter().zip(&mut timings) {
            timings.extend(time(*topology, &pipeline, &spec)?);
        }
    }
    let solo = median(&timings[0].steps);
    let figures: Vec<Figure> = topologies
        .iter()
        .zip(&timings)
        .map(|(topology, timings)| {
            let step = median(&timings.steps);
            Figure {
                cfg: topology.cfg(),
                ring: topology.ring(),
                ulysses: topology.ulysses(),
                step_ms: 1e3 * step,
                exposed_ms: 1e3 * median(&timings.exposed),
                speedup: solo / step,
                efficiency: solo / step / topology.world() as f64,
                bytes_per_step: timings.bytes,
            }
        })
        .collect();
    if args.json {
        println!("{}", serde_json::to_string(&figures)?);
        return Ok(ExitCode::SUCCESS);
    }
    println!(
        "{}x{}, {} frames; one thread a rank, each on a core of its own; medians of {} steps",
        spec.width,
        spec.height,
        spec.num_frames,
        timings[0].steps.len()
    );
    println!("cfg ring ulysses     step   of it exposed   speed-up  efficiency   sent a step");
    for f in figures {
        println!(
            "{:3} {:4} {:7} {:6.1} ms {:6.1} ms ({:2.0} %) {:10.2} {:11.2} {:10.2} MB",
            f.cfg,
            f.ring,
            f.ulysses,
            f.step_ms,
            f.exposed_ms,
            100.0 * f.exposed_ms / f.step_ms,
            f.speedup,
            f.efficiency,
            f.bytes_per_step as f64 / 1e6
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// Seconds of every counted step, of the slowest rank.
#[derive(Clone, Default)]
struct Timings {
    steps: Vec<f64>,
    exposed: Vec<f64>,
    bytes: u64,
}

impl Timings {
    fn extend(&mut self, other: Timings) {
        self.steps.extend(other.steps);
        self.exposed.extend(other.exposed);
        self.bytes = other.bytes;
    }
}

/// One denoise, each rank's thread on a core of its own.
fn time(topology: Topology, pipeline: &Pipeline<CpuEngine>, spec: &RenderSpec) -> anyhow::Result<Timings> {
    let ranks = thread::scope(|scope| {
        let ranks: Vec<_> = local::ranks::<Tensor>(topology.world(), Patience::default())
            .into_iter()
            .map(|end| {
                scope.spawn(move || -> anyhow::Result<Stopwatch> {
                    pin_to_core(end.rank())?;
                    let comm = Arc::new(Watched { end, waited: AtomicU64::new(0) });
                    let group = RankGroup::new(topology, comm.clone())?;
                    // A single thread computes on the calling one.
                    let engine = CpuEngine::new(1)?;
                    let mut watch = Stopwatch { comm, marks: Vec::new() };
                    pipeline.denoise(&engine, &group, spec, &Start::Seed, &mut watch)?;
                    Ok(watch)
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap_or_else(|_| bail!("a rank panicked"))).collect::<Vec<_>>()
    });
    let ranks = ranks.into_iter().collect::<anyhow::Result<Vec<_>>>()?;
    let mut timings = Timings::default();
    // Marks are before the first step and after each; the first step warms the caches.
    for step in 2..=spec.num_inference_steps as usize {
        let of = |rank: &Stopwatch| -> Option<[f64; 2]> {
            let [(before, waited_before, _), (after, waited, _)] = [rank.marks.get(step - 1)?, rank.marks.get(step)?];
            Some([(*after - *before).as_secs_f64(), (*waited - *waited_before).as_secs_f64()])
        };
        let slowest =
            ranks.iter().filter_map(of).max_by(|a, b| a[0].total_cmp(&b[0])).context("a step without time")?;
        timings.steps.push(slowest[0]);
        timings.exposed.push(slowest[1]);
    }
    let sent = |rank: &Stopwatch| Some(rank.marks.last()?.2 - rank.marks.get(1)?.2);
    let steps = u64::from(spec.num_inference_steps - 1);
    timings.bytes = ranks.iter().filter_map(sent).max().unwrap_or(0) / steps;
    Ok(timings)
}

/// Keeps the calling thread on one core, so that ranks do not share one while another is idle.
fn pin_to_core(rank: usize) -> anyhow::Result<()> {
    let [core] = cores::assign(&[], &cores::allowed()?, rank + 1, 1)?[rank][..] else {
        bail!("no core for rank {rank}")
    };
    cores::pin_thread(&[core]).with_context(|| format!("cannot pin a thread to core {core}"))
}

/// A rank's end that counts the time spent waiting in it.
struct Watched {
    end: local::LocalRank<Tensor>,
    /// Nanoseconds.
    waited: AtomicU64,
}

impl Watched {
    fn waited(&self) -> Duration {
        Duration::from_nanos(self.waited.load(Ordering::Relaxed))
    }
}

impl Collective<Tensor> for Watched {
    fn rank(&self) -> usize {
        self.end.rank()
    }

    fn world(&self) -> usize {
        self.end.world()
    }

    fn start(
        &self,
        sends: Vec<(usize, Tensor)>,
        receives: Vec<(usize, Vec<usize>)>,
    ) -> Result<Exchange<'_, Tensor>, CommError> {
        let exchange = self.end.start(sends, receives)?;
        Ok(Exchange::new(move || {
            let started = Instant::now();
            let received = exchange.wait();
            self.waited.fetch_add(started.elapsed().as_nanos() as u64, Ordering::Relaxed);
            received
        }))
    }

    fn barrier(&self) -> Result<(), CommError> {
        self.end.barrier()
    }

    fn abort(&self, reason: &str) {
        self.end.abort(reason);
    }

    fn bytes_sent(&self) -> u64 {
        self.end.bytes_sent()
    }
}

struct Stopwatch {
    comm: Arc<Watched>,
    /// When a step began or ended, how long was waited until then, and the bytes sent.
    marks: Vec<(Instant, Duration, u64)>,
}

impl RenderObserver for Stopwatch {
    fn progress(&mut self, progress: Progress) -> ControlFlow<()> {
        if progress.stage == Stage::Denoise {
            self.marks.push((Instant::now(), self.comm.waited(), self.comm.bytes_sent()));
        }
        ControlFlow::Continue(())
    }

    fn warning(&mut self, _message: &str) {}

    fn frames(&mut self, _rgb24: &[u8], _count: usize) -> io::Result<()> {
        Ok(())
    }
}
