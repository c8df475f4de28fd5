//! `farm-node decode`: frames of a latent that was kept.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, bail, ensure};
use farm_core::engine::Engine;
use farm_core::job::state::{Progress, Stage};
use farm_core::model::ModelError;
use farm_core::model::latent::read_latent;
use farm_core::model::vae::VaeDecoder;
use farm_core::model::weights::Loader;
use farm_core::model::weights::checkpoint::Checkpoint;
use farm_core::tiles::plan::Tiling;

use crate::command::target::{Kind, Target, open_sink};
use crate::command::watch::{Show, progress_bar, stop_on_signals};
use crate::decode::local::{self, LocalDecode};
use crate::decode::shape;
use crate::decode::stitcher::StitchError;
use crate::devices::{Devices, ThreadArgs};

#[derive(clap::Args)]
pub struct Args {
    /// A latent that `farm-node render --out FILE.safetensors` has written, or a farm has stored
    #[arg(value_name = "LATENT.safetensors")]
    pub latent: PathBuf,
    /// Checkpoint folder
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Where the clip goes: .mp4 or .rgb (raw RGB24 frames)
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// auto, whole, exact or HxW+OVERLAP in latent pixels of 8x8 pixels; before HxW, shared: (the default), independent:
    /// or exact:; after it, @BYTES that a tile may take
    #[arg(long, value_name = "TILES", default_value = "auto")]
    pub tiles: Tiling,
    /// Devices that decode together: cpu:K or cuda:K
    #[arg(long, value_name = "cpu:K", default_value = "cpu:1")]
    pub devices: Devices,
    #[command(flatten)]
    pub threads: ThreadArgs,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let target = Target::create(&args.out)?;
    ensure!(target.kind != Kind::Latent, "{} has to end in .mp4 or .rgb", args.out.display());
    let checkpoint = Checkpoint::open(&args.model)?;
    for note in checkpoint.notes() {
        eprintln!("note: {note}");
    }
    let part = checkpoint.vae().with_context(|| format!("{} has no vae decoder", args.model.display()))?;
    let bytes = std::fs::read(&args.latent).with_context(|| format!("cannot read {}", args.latent.display()))?;
    let latent =
        read_latent(&bytes, part.config().latent_channels).with_context(|| args.latent.display().to_string())?;
    if let Some((step, steps)) = latent.unfinished {
        eprintln!("warning: this latent is of step {step} of {steps}: the clip will be noisy");
    }
    let shape = shape(args.tiles, latent.size, part.config()).map_err(anyhow::Error::msg)?;
    let compute = args.threads.compute(args.devices)?;
    let load = |device| {
        let engine = compute.engine(device)?;
        anyhow::Ok(Arc::new(VaeDecoder::load(&Loader { engine: &engine, source: part }, part.config())?))
    };
    let decoders = (0..compute.memories()).map(load).collect::<anyhow::Result<Vec<_>>>()?;
    let hand = |device| anyhow::Ok((compute.engine(device)?, decoders[compute.memory_of(device)].clone()));

    let plan = &shape.plan;
    eprintln!("{} in {}x{} tiles", plan.mode.as_str(), plan.grid[0], plan.grid[1]);
    let stop = stop_on_signals()?;
    let bar = progress_bar();
    let work = LocalDecode {
        hands: (0..args.devices.count).map(hand).collect::<anyhow::Result<_>>()?,
        latent: &latent.values,
        size: latent.size,
        shape,
        settle: &|device| compute.settle(device),
        stop,
    };
    let outcome = in_tiles(work, &target, &mut Show::new(bar.clone()))?;
    bar.finish_and_clear();
    match outcome {
        Err(ModelError::Stopped) => return Ok(ExitCode::from(130)),
        outcome => outcome?,
    }
    println!("{}", target.publish()?.display());
    Ok(ExitCode::SUCCESS)
}

/// Decodes into the target.
pub fn in_tiles<E: Engine>(
    work: LocalDecode<'_, E>,
    target: &Target,
    show: &mut Show,
) -> anyhow::Result<Result<(), ModelError>> {
    let [height, width] = work.shape.frame_size();
    let (kind, path) = (target.kind, target.unfinished.path().to_owned());
    let sink = Box::new(move || {
        let sink = open_sink(kind, &path, width as u32, height as u32)?;
        sink.ok_or_else(|| std::io::Error::other("a latent is not a file of frames"))
    });
    let total = work.shape.frames.iter().sum();
    let mut progress = |done| show.progress(Progress { stage: Stage::Decode, done, total, eta_seconds: None });
    progress(0);
    Ok(match local::decode(work, sink, Box::new(progress))? {
        Ok(_) => Ok(()),
        Err(StitchError::Stopped) => Err(ModelError::Stopped),
        Err(error) => bail!("{error}"),
    })
}
