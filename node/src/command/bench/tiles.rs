//! `farm-node bench tiles`: how far decodes in tiles are from the decode of the whole frame.

use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use farm_core::engine::{Engine, SequenceOps};
use farm_core::job::spec::{RenderRequest, RenderSpec};
use farm_core::job::state::Progress;
use farm_core::model::latent::{DitLatent, VaeLatent};
use farm_core::model::noise::normals;
use farm_core::model::pipeline::{Pipeline, RenderObserver, Residency, Start};
use farm_core::model::vae::{VaeDecoder, random};
use farm_core::model::weights::Loader;
use farm_core::model::weights::checkpoint::Checkpoint;
use farm_core::parallel::group::RankGroup;
use farm_core::tiles::local::{Whole, plan_of};
use farm_core::tiles::plan::{Mode, Tiling};
use farm_core::tiles::quality::Quality;
use serde::Serialize;

use crate::devices::{Devices, ThreadArgs};
use crate::engine::DeviceEngine;

/// Width and height in pixels.
const SIZES: [[u32; 2]; 3] = [[64, 64], [192, 128], [320, 192]];
/// Tile and overlap in latent pixels; exact tiles do not overlap. The smallest frame is one tile of all but the first.
const TILES: [[usize; 2]; 6] = [[4, 2], [8, 2], [8, 4], [12, 4], [12, 6], [14, 8]];
const EXACT_TILES: [usize; 4] = [4, 8, 12, 14];
/// Frames of a rendered clip, and latent frames of the random decoder's noise, which takes four times as long.
const FRAMES: u32 = 25;
const NOISE_FRAMES: usize = 2;
/// Goals: PSNR of shared tiles of a rendered clip of this size, and the largest difference of exact ones, always.
const GOAL_SIZE: [u32; 2] = [192, 128];
const GOALS: [(&str, f64); 2] = [("shared:8x8+2", 54.0), ("shared:12x12+4", 63.0)];
const GOAL_EXACT: f32 = 1e-4;

type Tensor = <DeviceEngine as SequenceOps>::Tensor;

#[derive(clap::Args)]
pub struct Args {
    /// Checkpoint folder; goals are set for the bundled one
    #[arg(long, value_name = "DIR", default_value = "assets/mochi-tiny")]
    pub model: PathBuf,
    #[command(flatten)]
    pub threads: ThreadArgs,
    /// Print the figures as JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Serialize)]
struct Row {
    decoder: &'static str,
    width: u32,
    height: u32,
    tiling: String,
    /// In a column and in a row.
    grid: [usize; 2],
    /// Pixels of all tiles over pixels of the frame.
    work: f64,
    quality: Quality,
    /// dB with the statistics of the whole decode instead of the tiles' own sums.
    oracle_psnr: Option<f64>,
    goal: Option<f64>,
    pass: bool,
}

#[derive(Serialize)]
struct Figures {
    rows: Vec<Row>,
    pass: bool,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let compute = args.threads.compute(Devices::CPU)?;
    let engine = compute.engine(0)?;
    compute.settle(0)?;
    if !args.json {
        println!("decodes in tiles against the decode of the whole frame; tiles and overlaps in latent pixels");
        println!("decoder  frame    tiling                 grid  work     PSNR   oracle     SSIM    seam    worst");
    }
    let mut rows = Vec::new();
    let pipeline = Pipeline::open(&engine, Checkpoint::open(&args.model)?, Residency::Kept)?;
    let decoder = decoder_of(&engine, &args.model)?;
    for [width, height] in SIZES {
        let latent = decoder.denormalize(&engine, &render(&engine, &pipeline, width, height)?)?;
        measure(&engine, "bundled", &decoder, &latent, args.json, &mut rows)?;
    }
    let config = random::published_layers();
    let decoder = Arc::new(random::decoder(&engine, &config, 1)?);
    for [width, height] in SIZES {
        let shape = [NOISE_FRAMES, height as usize / 8, width as usize / 8, config.latent_channels];
        let noise = normals(1, 0..shape.iter().product::<usize>() as u64);
        let latent = VaeLatent(engine.upload(&noise, &shape)?);
        measure(&engine, "random", &decoder, &latent, args.json, &mut rows)?;
    }
    let pass = rows.iter().all(|row| row.pass) && rows.iter().filter(|row| row.goal.is_some()).count() == GOALS.len();
    if args.json {
        println!("{}", serde_json::to_string(&Figures { rows, pass })?);
    } else {
        println!("dB of frames in -1 ... 1, not clamped or rounded; seam in levels of 255; worst value of any frame");
        let goals = GOALS.map(|(tiling, goal)| format!("{tiling} {goal} dB")).join(", ");
        let [width, height] = GOAL_SIZE;
        println!(
            "bench tiles: goals at {width}x{height} {goals}, exact tiles within {GOAL_EXACT:e}: {}",
            if pass { "PASS" } else { "FAIL" }
        );
    }
    Ok(if pass { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn measure(
    engine: &DeviceEngine,
    name: &'static str,
    decoder: &Arc<VaeDecoder<DeviceEngine>>,
    latent: &VaeLatent<Tensor>,
    json: bool,
    rows: &mut Vec<Row>,
) -> anyhow::Result<()> {
    let modes = ["independent", "shared"];
    let tilings = modes
        .iter()
        .flat_map(|mode| TILES.map(|[tile, overlap]| format!("{mode}:{tile}x{tile}+{overlap}")))
        .chain(EXACT_TILES.map(|tile| format!("exact:{tile}x{tile}")));
    let whole = Whole::decode(engine, decoder, latent)?;
    for tiling in tilings {
        let plan = plan_of(engine, latent, tiling.parse::<Tiling>().map_err(anyhow::Error::msg)?)?;
        // One tile is no decode in tiles, and the tiles of the smallest frame are too small for others.
        let smallest = plan.latent.map(|extent| extent as u32 * 8) == SIZES[0];
        if plan.mode == Mode::Whole || tiling.contains(":4x4") != smallest {
            continue;
        }
        let measured = whole.measure(engine, decoder, latent, &plan)?;
        let [height, width] = plan.latent.map(|extent| 8 * extent as u32);
        let goal = GOALS.iter().find(|(goal, _)| *goal == tiling && name == "bundled" && [width, height] == GOAL_SIZE);
        let goal = goal.map(|(_, goal)| *goal);
        let quality = measured.quality;
        let row = Row {
            decoder: name,
            width,
            height,
            grid: plan.grid,
            work: plan.tiles.iter().map(|tile| tile.pixels()).sum::<usize>() as f64
                / (plan.latent[0] * plan.latent[1]) as f64,
            quality,
            oracle_psnr: measured.oracle.map(|oracle| oracle.psnr),
            pass: goal.is_none_or(|goal| quality.psnr >= goal)
                && (plan.mode != Mode::Exact || quality.worst <= GOAL_EXACT),
            goal,
            tiling,
        };
        if !json {
            print(&row);
        }
        rows.push(row);
    }
    Ok(())
}

fn print(row: &Row) {
    let (frame, grid) = (format!("{}x{}", row.width, row.height), format!("{}x{}", row.grid[0], row.grid[1]));
    let oracle = row.oracle_psnr.map_or_else(String::new, |psnr| format!("{psnr:.1}"));
    let verdict = match (row.goal, row.pass) {
        (_, false) => "  missed",
        (Some(_), true) => "  reached",
        (None, true) => "",
    };
    println!(
        "{:8} {frame:8} {:20} {grid:>6} {:5.2} {:8.1} {oracle:>8} {:8.5} {:7.2} {:8.5}{verdict}",
        row.decoder, row.tiling, row.work, row.quality.psnr, row.quality.ssim, row.quality.seam, row.quality.worst
    );
}

/// The latent of a clip that the model has made: of noise, figures are others.
fn render(
    engine: &DeviceEngine,
    pipeline: &Pipeline<DeviceEngine>,
    width: u32,
    height: u32,
) -> anyhow::Result<DitLatent<Tensor>> {
    let request: RenderRequest = serde_json::from_value(serde_json::json!({
        "prompt": "a red ball moving left on a black background", "seed": 1,
        "width": width, "height": height, "num_frames": FRAMES,
    }))?;
    let spec = RenderSpec::resolve(&request, pipeline.defaults(), 1)?;
    let solo = RankGroup::solo()?;
    Ok(pipeline.denoise(engine, &solo, &spec, &Start::Seed, &mut Quiet)?.latent)
}

fn decoder_of(engine: &DeviceEngine, model: &Path) -> anyhow::Result<Arc<VaeDecoder<DeviceEngine>>> {
    let checkpoint = Checkpoint::open(model)?;
    let part = checkpoint.vae().context("the checkpoint has no vae decoder")?;
    Ok(Arc::new(VaeDecoder::load(&Loader { engine, source: part }, part.config())?))
}

struct Quiet;

impl RenderObserver for Quiet {
    fn progress(&mut self, _: Progress) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }

    fn warning(&mut self, message: &str) {
        eprintln!("warning: {message}");
    }

    fn frames(&mut self, _: &[u8], _: usize) -> io::Result<()> {
        Ok(())
    }
}
