//! `farm-node bench decode`: one clip decoded in tiles by one and by several processes that join over the data plane, as in
//! a farm but without a scheduler; and what the same would take on more devices.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use farm_core::engine::Engine;
use farm_core::engine::cpu::CpuEngine;
use farm_core::job::spec::FRAME_STEP;
use farm_core::model::latent::{DitLatent, LATENT_KEY, read_latent, to_safetensors};
use farm_core::model::noise;
use farm_core::model::vae::VaeDecoder;
use farm_core::model::weights::Loader;
use farm_core::model::weights::checkpoint::Checkpoint;
use farm_core::tiles::plan::Tiling;
use farm_core::tiles::shape::Shape;
use serde::Serialize;
use tokio::sync::mpsc;

use super::median;
use crate::data_plane::{DataPlane, Options, Patience};
use crate::decode::hand::{self, HandError};
use crate::decode::shape;
use crate::decode::stitcher::{Arrival, Surroundings, stitch};
use crate::encode::{FrameSink, Mp4Sink};

/// Two processes against one.
const GOAL: f64 = 1.7;
/// The network that predictions are made for: bytes a second each way, and seconds for a message to come and be answered.
const NETWORK: f64 = 1.25e9;
const ROUND_TRIP: f64 = 2e-4;

#[derive(clap::Args)]
pub struct Args {
    /// Checkpoint folder
    #[arg(long, value_name = "DIR", default_value = "assets/mochi-tiny")]
    pub model: PathBuf,
    #[arg(long, default_value_t = 640)]
    pub width: usize,
    #[arg(long, default_value_t = 384)]
    pub height: usize,
    /// 6k+1
    #[arg(long, default_value_t = 13)]
    pub num_frames: usize,
    #[arg(long, default_value = "auto")]
    pub tiles: Tiling,
    /// Processes of one device with one thread each: as many as there are cores, at most
    #[arg(long, default_value = "2")]
    pub processes: NonZeroUsize,
    /// Decodes to take the medians of, alternating
    #[arg(long, value_name = "N", default_value = "3")]
    pub runs: NonZeroUsize,
    /// Print the figures as JSON
    #[arg(long)]
    pub json: bool,
    /// Be one of the processes
    #[arg(long, hide = true, requires = "token")]
    join: Option<String>,
    #[arg(long, hide = true)]
    token: Option<String>,
}

#[derive(Serialize)]
struct Figures {
    tiles: usize,
    exchanges: u32,
    /// Medians in seconds, from the first hand's joining to the complete mp4.
    one_process: f64,
    processes: usize,
    together: f64,
    speed_up: f64,
    goal: f64,
    pass: bool,
    /// What the decode would take on more devices like these, with everything else as it is.
    predicted: Vec<Predicted>,
}

#[derive(Serialize)]
struct Predicted {
    devices: usize,
    seconds: f64,
    speed_up: f64,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    if let (Some(url), Some(token)) = (&args.join, &args.token) {
        runtime.block_on(be_hand(&args.model, url, token))?;
        return Ok(ExitCode::SUCCESS);
    }
    let Args { width, height, num_frames, .. } = args;
    ensure!(width.is_multiple_of(16) && height.is_multiple_of(16) && width * height > 0, "sizes are multiples of 16");
    ensure!(num_frames % FRAME_STEP as usize == 1, "frames are 6k+1");
    let checkpoint = Checkpoint::open(&args.model)?;
    let vae = checkpoint.vae().with_context(|| format!("{} has no vae decoder", args.model.display()))?.config();
    let size = [vae.latent_channels, num_frames / FRAME_STEP as usize + 1, height / 8, width / 8];
    let shape = shape(args.tiles, size, vae).map_err(anyhow::Error::msg)?;
    // What is in it makes no difference to the time.
    let latent = noise::normals(1, 0..size.iter().product::<usize>() as u64);
    let latent = Bytes::from(to_safetensors(LATENT_KEY, &latent, size)?);
    let (mut alone, mut together) = (Vec::new(), Vec::new());
    for _ in 0..args.runs.get() {
        for (processes, seconds) in [(1, &mut alone), (args.processes.get(), &mut together)] {
            seconds.push(runtime.block_on(decode(&args.model, &shape, latent.clone(), processes))?);
        }
    }
    let (one_process, together) = (median(&alone), median(&together));
    let speed_up = one_process / together;
    let devices = [1, 2, 4, 8, 16, 32, 64].into_iter();
    let predicted = devices.map(|devices| {
        let seconds = predict(&shape, one_process, devices);
        Predicted { devices, seconds, speed_up: one_process / seconds }
    });
    let figures = Figures {
        tiles: shape.plan.tiles.len(),
        exchanges: shape.all_steps(),
        one_process,
        processes: args.processes.get(),
        together,
        speed_up,
        goal: GOAL,
        pass: speed_up >= GOAL || args.processes.get() != 2,
        predicted: predicted.collect(),
    };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&figures)?);
    } else {
        println!(
            "{num_frames} frames of {width}x{height}, {} tiles, {} exchanges, one thread a process",
            figures.tiles, figures.exchanges
        );
        println!(
            "1 process {one_process:.2} s, {} processes {together:.2} s: {speed_up:.2} times as fast",
            figures.processes
        );
        println!("predicted for devices like these on {:.0} Gbit/s and {:.1} ms:", 8e-9 * NETWORK, 1e3 * ROUND_TRIP);
        for Predicted { devices, seconds, speed_up } in &figures.predicted {
            println!("{devices:>4} devices {seconds:>8.2} s {speed_up:>6.1} times");
        }
        println!("bench decode: {speed_up:.2} (goal {GOAL}): {}", if figures.pass { "PASS" } else { "FAIL" });
    }
    Ok(if figures.pass { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Seconds of a decode with this many processes, from the moment that all have joined.
async fn decode(model: &Path, shape: &Arc<Shape>, latent: Bytes, processes: usize) -> anyhow::Result<f64> {
    let options = Options { listen: ([127, 0, 0, 1], 0).into(), host: None, tls: None, patience: Patience::default() };
    let plane = DataPlane::start(options).await?;
    let mut open = plane.open(latent, largest_message(shape), processes);
    let program = std::env::current_exe()?;
    let children = (0..processes).map(|_| {
        let mut command = Command::new(&program);
        command.args(["bench", "decode", "--join", &open.url, "--token", &open.token, "--model"]).arg(model);
        Ok(Hand(command.stdin(Stdio::null()).stdout(Stdio::null()).spawn()?))
    });
    let _children = children.collect::<anyhow::Result<Vec<Hand>>>()?;
    let (expect, expected) = mpsc::channel(1);
    let (arrive, arrivals) = mpsc::channel(processes);
    for _ in 0..processes {
        let joined = open.joined.recv().await.context("the data plane ended")?;
        arrive.try_send(Arrival { name: joined.name, link: joined.link }).ok().context("a hand has no place")?;
    }
    let folder = tempfile::tempdir()?;
    let (path, [height, width]) = (folder.path().join("clip.mp4"), shape.frame_size());
    let sink = move || Ok(Box::new(Mp4Sink::create(&path, width as u32, height as u32)?) as Box<dyn FrameSink>);
    let around = Surroundings {
        want_hands: Box::new(move |round| {
            // There is room: one question is open at a time.
            let _ = expect.try_send(if round == 1 { processes } else { 0 });
        }),
        expected,
        arrivals,
        progress: Box::new(|_| ()),
        stop: Arc::new(AtomicBool::new(false)),
        log: Box::new(|line| eprintln!("{line}")),
    };
    let started = Instant::now();
    stitch(shape.clone(), Box::new(sink), around).await?;
    Ok(started.elapsed().as_secs_f64())
}

/// One of the processes that decode.
async fn be_hand(model: &Path, url: &str, token: &str) -> anyhow::Result<()> {
    let options = Options { listen: ([127, 0, 0, 1], 0).into(), host: None, tls: None, patience: Patience::default() };
    let plane = DataPlane::start(options).await?;
    // Loaded first: who joins is ready.
    let checkpoint = Checkpoint::open(model)?;
    let part = checkpoint.vae().context("no vae decoder")?;
    let engine = CpuEngine::new(1)?;
    let decoder = Arc::new(VaeDecoder::load(&Loader { engine: &engine, source: part }, part.config())?);
    let joined = plane.join(url, token, "process", 1 << 30, 1 << 30).await?;
    let Ok(bytes) = joined.latent else { bail!("no latent") };
    let latent = read_latent(&bytes, part.config().latent_channels)?;
    let latent = DitLatent(engine.upload(&latent.values, &latent.size)?);
    let work = move || hand::work(&engine, &decoder, &latent, joined.link, &AtomicBool::new(false));
    match tokio::task::spawn_blocking(work).await? {
        // The bench goes on to its next decode without a word.
        Ok(()) | Err(HandError::Left) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Killed, and waited for, when dropped.
struct Hand(Child);

impl Drop for Hand {
    fn drop(&mut self) {
        // Both fail only for a process that has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Bytes of the largest chunk of a tile.
fn pixel_bytes(shape: &Shape) -> usize {
    let last = shape.chunks() - 1;
    shape.plan.tiles.iter().map(|&tile| 2 * shape.pixel_values(tile, last)).max().unwrap_or(0)
}

fn largest_message(shape: &Shape) -> usize {
    pixel_bytes(shape).max(8 << 20) + (1 << 16)
}

/// Seconds on so many devices: the tiles of the busiest, one after the other, as fast as one process has decoded all, then
/// for each step a round trip, and whatever goes through the stitcher's network: sums in, totals out, pixels in.
fn predict(shape: &Shape, one_process: f64, devices: usize) -> f64 {
    let tiles = shape.plan.tiles.len();
    let compute = one_process * tiles.div_ceil(devices.min(tiles)) as f64 / tiles as f64;
    if devices == 1 {
        return one_process;
    }
    let sums = |chunk: u32| {
        shape.norms.iter().map(|norm| norm.frames[usize::from(chunk > 0)] * norm.groups).sum::<usize>() as f64
    };
    let chunks = 0..shape.chunks();
    let pixels: f64 = chunks
        .clone()
        .map(|chunk| shape.plan.tiles.iter().map(|&tile| 2 * shape.pixel_values(tile, chunk)).sum::<usize>() as f64)
        .sum();
    let inbound = chunks.clone().map(|chunk| 16.0 * sums(chunk)).sum::<f64>() * tiles as f64 + pixels;
    let outbound = chunks.map(|chunk| 8.0 * sums(chunk)).sum::<f64>() * devices.min(tiles) as f64;
    compute + f64::from(shape.all_steps()) * ROUND_TRIP + inbound.max(outbound) / NETWORK
}
