//! `farm-node bench stitch`: what the stitcher of a clip in tiles takes by itself. Its hands are made up: their tiles come
//! at once, of a picture that moves, with sums as a decoder of the published size has them.

use std::io;
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::ensure;
use farm_core::job::spec::FRAME_STEP;
use farm_core::model::config::VaeConfig;
use farm_core::tiles::hand::{Hand, Todo};
use farm_core::tiles::message::{FromHand, Pixels, ToHand};
use farm_core::tiles::plan::Tiling;
use farm_core::tiles::shape::Shape;
use farm_core::tiles::statistics::Sums;
use serde::Serialize;
use tokio::sync::mpsc;

use super::peak_mib;
use crate::decode::local::DEPTH;
use crate::decode::shape;
use crate::decode::stitcher::{Arrival, Surroundings, stitch};
use crate::encode::{FrameSink, Mp4Sink};
use crate::link::{self, Link};

/// The goal for 163 frames of 848×480.
const GOAL_MIB: f64 = 400.0;

#[derive(clap::Args)]
pub struct Args {
    #[arg(long, default_value_t = 848)]
    pub width: usize,
    #[arg(long, default_value_t = 480)]
    pub height: usize,
    /// 6k+1
    #[arg(long, default_value_t = 163)]
    pub num_frames: usize,
    /// How the clip is cut
    #[arg(long, default_value = "auto")]
    pub tiles: Tiling,
    /// Made-up devices
    #[arg(long, default_value_t = 8)]
    pub hands: usize,
    /// Print the figures as JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Serialize)]
struct Figures {
    tiles: usize,
    hands: usize,
    frames: usize,
    /// From the start until frames come to the encoder, and until the file is complete.
    first_frame_seconds: f64,
    seconds: f64,
    /// Of the encoder's thread: blending, encoding.
    encode_seconds: f64,
    peak_mib: f64,
    goal_peak_mib: f64,
    pass: bool,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let Args { width, height, num_frames, tiles, hands, json } = args;
    ensure!(
        width.is_multiple_of(16) && height.is_multiple_of(16) && width > 0 && height > 0,
        "sizes are multiples of 16"
    );
    ensure!(num_frames % FRAME_STEP as usize == 1, "frames are 6k+1");
    ensure!((1..=256).contains(&hands), "1 to 256 hands");
    let latent = [12, num_frames / FRAME_STEP as usize + 1, height / 8, width / 8];
    let shape = shape(tiles, latent, &VaeConfig::mochi1()).map_err(anyhow::Error::msg)?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("clip.mp4");

    let (expect, expected) = mpsc::channel(1);
    let (arrive, arrivals) = mpsc::channel(hands);
    for hand in 0..hands {
        let (crew, own) = link::pair(DEPTH);
        let shape = shape.clone();
        std::thread::Builder::new().name(format!("hand {hand}")).spawn(move || work(&shape, own))?;
        arrive.try_send(Arrival { name: format!("hand {hand}"), link: crew }).ok();
    }
    let started = Instant::now();
    let first = Arc::new(Mutex::new(None));
    let sink = {
        let first = first.clone();
        move || {
            let inner = Mp4Sink::create(&path, width as u32, height as u32)?;
            Ok(Box::new(Timed { inner, started, first }) as Box<dyn FrameSink>)
        }
    };
    let around = Surroundings {
        want_hands: Box::new(|round| {
            // There is room: one question is open at a time.
            let _ = expect.try_send(if round == 1 { hands } else { 0 });
        }),
        expected,
        arrivals,
        progress: Box::new(|_| ()),
        stop: Arc::new(AtomicBool::new(false)),
        log: Box::new(|line| eprintln!("{line}")),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let stitched = runtime.block_on(stitch(shape.clone(), Box::new(sink), around))?;
    let seconds = started.elapsed().as_secs_f64();
    let first_frame = first.lock().ok().and_then(|first| *first).unwrap_or_default();
    let peak_mib = peak_mib()?;
    let figures = Figures {
        tiles: shape.plan.tiles.len(),
        hands: stitched.hands.len(),
        frames: num_frames,
        first_frame_seconds: first_frame.as_secs_f64(),
        seconds,
        encode_seconds: stitched.encode_seconds,
        peak_mib,
        goal_peak_mib: GOAL_MIB,
        pass: peak_mib < GOAL_MIB,
    };
    if json {
        println!("{}", serde_json::to_string_pretty(&figures)?);
    } else {
        let Figures { tiles, hands, frames, first_frame_seconds, encode_seconds, .. } = figures;
        println!(
            "{frames} frames of {width}x{height} from {tiles} tiles of {hands} hands, {} exchanges",
            shape.all_steps()
        );
        println!(
            "first frame at {first_frame_seconds:.2} s, mp4 at {seconds:.2} s, of which blending and encoding {encode_seconds:.2} s"
        );
        println!("peak memory {peak_mib:.0} MiB (goal {GOAL_MIB}) {}", if figures.pass { "PASS" } else { "FAIL" });
    }
    Ok(if figures.pass { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Says everything that a device would, without computing anything.
fn work(shape: &Shape, mut link: Link<FromHand, ToHand>) {
    let mut hand = Hand::new(shape.norms.len() as u32, shape.chunks());
    loop {
        let message = match hand.todo() {
            Todo::Done => return,
            Todo::Wait => match link.from.blocking_recv().map(|message| hand.hear(message)) {
                Some(Ok(())) => continue,
                _ => return,
            },
            Todo::Give { number, step } => {
                FromHand::Given { number, step, busy_ms: 0, sums: sums(shape, number, step), edges: None }
            }
            Todo::Frames { number, chunk } => FromHand::Frames { number, chunk, pixels: pixels(shape, number, chunk) },
            _ => continue,
        };
        if link.to.blocking_send(message).is_err() {
            return;
        }
    }
}

fn sums(shape: &Shape, number: u32, step: u32) -> Sums {
    let tile = shape.plan.tiles[number as usize];
    let own = (tile.rows.own().len() * tile.cols.own().len()) as u64;
    match shape.norms.get((step % shape.steps()) as usize) {
        Some(norm) => {
            let frames = norm.frames[usize::from(step >= shape.steps())];
            Sums { count: own * norm.per_pixel, moments: vec![[0.1, 1.0]; frames * norm.groups] }
        }
        None => Sums::default(),
    }
}

/// Slanted waves that move.
fn pixels(shape: &Shape, number: u32, chunk: u32) -> Pixels {
    let tile = shape.plan.tiles[number as usize];
    let [height, width] = shape.tile_size(tile);
    let (top, left) = (tile.rows.start * 8, tile.cols.start * 8);
    let mut values = Vec::with_capacity(shape.pixel_values(tile, chunk));
    for frame in 0..shape.frames[chunk as usize] as usize {
        let time = 6 * chunk as usize + frame;
        for row in 0..height {
            for col in 0..width {
                let slant = (top + row) + 2 * (left + col) + 3 * time;
                values.extend([slant * 300, slant * 170, slant * 90].map(|value| value as u16));
            }
        }
    }
    match shape.plan.tiles.len() {
        1 => Pixels::Rgb8(values.into_iter().map(|value| (value >> 8) as u8).collect()),
        _ => Pixels::Rgb16(values),
    }
}

/// Notes when the first frames come.
struct Timed {
    inner: Mp4Sink,
    started: Instant,
    first: Arc<Mutex<Option<Duration>>>,
}

impl FrameSink for Timed {
    fn frames(&mut self, rgb24: &[u8]) -> io::Result<()> {
        if let Ok(mut first) = self.first.lock() {
            first.get_or_insert(self.started.elapsed());
        }
        self.inner.frames(rgb24)
    }

    fn finish(&mut self) -> io::Result<()> {
        self.inner.finish()
    }
}
