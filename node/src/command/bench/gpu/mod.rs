//! `farm-node bench gpu`: what a GPU does with its time. First what it can do at most, then each stage of a clip by the
//! model's own code: how long every kernel takes, what part of the most it reaches, and what lies between kernels.
//!
//! Without a checkpoint the networks are of the published size, with weights that are drawn on the device.

mod report;
mod stages;

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, bail, ensure};
use farm_core::engine::cuda::ceiling::ceiling;
use farm_core::engine::cuda::driver::CudaDevice;
use farm_core::engine::cuda::emulation::Emulation;
use farm_core::engine::cuda::plan::{Clip, Networks, plan};
use farm_core::engine::cuda::profile::{Profiled, Timed};
use farm_core::job::spec::GenerationDefaults;
use farm_core::model::ModelError;
use farm_core::model::config::{DitConfig, T5Config, VaeConfig};
use farm_core::model::weights::WeightSource;
use farm_core::model::weights::checkpoint::Checkpoint;
use farm_core::model::weights::drawn::DrawnWeights;
use farm_core::parallel::cost::devices::Devices as Rates;
use farm_core::parallel::cost::shape::MAX_TEXT_TOKENS;
use farm_core::parallel::cost::{ClipShape, DeviceRates};
use farm_core::parallel::topology::Topology;
use farm_core::precision::Precision;

use self::report::Figures;
use self::stages::Bench;
use crate::command::watch::{Show, progress_bar, stop_on_signals};
use crate::devices::{Devices, Kind, gpu_like, parse_bytes};
use crate::fit::target;

/// Decides the drawn weights, and the noise.
const SEED: u64 = 1;

#[derive(clap::Args)]
pub struct Args {
    /// The device to measure: cuda:1; or emulated:1, whose times mean nothing
    #[arg(long, value_name = "KIND:K", default_value = "cuda:1")]
    devices: Devices,
    /// Checkpoint folder [default: the published sizes, with weights that are drawn]
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Pixels, a multiple of 16 [default: the checkpoint's]
    #[arg(long)]
    width: Option<u32>,
    /// Pixels, a multiple of 16 [default: the checkpoint's]
    #[arg(long)]
    height: Option<u32>,
    /// 6k+1 [default: the checkpoint's]
    #[arg(long, alias = "frames")]
    num_frames: Option<u32>,
    /// Denoising steps to take the median of, beside one before and one whose kernels are timed
    #[arg(long, value_name = "N", default_value = "3")]
    steps: NonZeroUsize,
    /// fp32, or bf16, which is what GPUs are fast in
    #[arg(long, value_name = "fp32|bf16", default_value_t = Precision::Bf16)]
    precision: Precision,
    /// Bytes of the GPU's memory that may be filled, for example 16GiB; with few, blocks are streamed
    /// [default: what is free]
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    memory: Option<f64>,
    /// Print the figures as JSON
    #[arg(long)]
    json: bool,
}

/// The networks of a clip, and where their weights come from.
struct Model {
    dit: DitConfig,
    t5: T5Config,
    vae: VaeConfig,
    defaults: GenerationDefaults,
    weights: Weights,
}

enum Weights {
    Stored(Box<Checkpoint>),
    Drawn { dit: DrawnWeights, t5: Arc<DrawnWeights>, vae: DrawnWeights },
}

impl Model {
    fn published() -> Self {
        let (dit, t5, vae) = (DitConfig::mochi1(), T5Config::mochi1(), VaeConfig::mochi1());
        let weights = Weights::Drawn {
            dit: DrawnWeights::dit(&dit, SEED),
            t5: Arc::new(DrawnWeights::t5(&t5, SEED)),
            vae: DrawnWeights::vae(&vae, SEED),
        };
        Self { dit, t5, vae, defaults: GenerationDefaults::default(), weights }
    }

    fn stored(checkpoint: Checkpoint) -> anyhow::Result<Self> {
        Ok(Self {
            dit: checkpoint.dit().context("the checkpoint has no transformer")?.config().clone(),
            t5: checkpoint.t5().context("the checkpoint has no text encoder")?.config().clone(),
            vae: checkpoint.vae().context("the checkpoint has no vae decoder")?.config().clone(),
            defaults: checkpoint.generation_defaults().clone(),
            weights: Weights::Stored(Box::new(checkpoint)),
        })
    }

    fn dit_weights(&self) -> anyhow::Result<&dyn WeightSource> {
        Ok(match &self.weights {
            Weights::Stored(checkpoint) => checkpoint.dit().context("no transformer")?,
            Weights::Drawn { dit, .. } => dit,
        })
    }

    fn t5_weights(&self) -> anyhow::Result<Arc<dyn WeightSource>> {
        Ok(match &self.weights {
            Weights::Stored(checkpoint) => checkpoint.t5().context("no text encoder")?.clone(),
            Weights::Drawn { t5, .. } => t5.clone(),
        })
    }

    fn vae_weights(&self) -> anyhow::Result<&dyn WeightSource> {
        Ok(match &self.weights {
            Weights::Stored(checkpoint) => checkpoint.vae().context("no vae decoder")?,
            Weights::Drawn { vae, .. } => vae,
        })
    }
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let Devices { kind, count } = args.devices;
    ensure!(
        kind != Kind::Cpu,
        "{}: bench gpu measures kernels of GPUs; of a processor, bench kernels and bench forward do",
        args.devices
    );
    ensure!(
        count == 1,
        "{}: one GPU is measured at a time, the first; CUDA_VISIBLE_DEVICES picks another",
        args.devices
    );
    let model = match &args.model {
        None => Model::published(),
        Some(dir) => Model::stored(Checkpoint::open(dir)?)?,
    };
    let stop = stop_on_signals()?;
    let measured = match kind {
        Kind::Cuda | Kind::Shared => {
            let device =
                CudaDevice::open(0).with_context(|| format!("cannot use {}; see farm-node doctor", args.devices))?;
            let rates = Rates::embedded()?.device(gpu_like(&device.properties().name))?;
            let free = |device: &CudaDevice| Ok(device.memory()?.free as f64);
            eprintln!("compiling kernels");
            device.load()?;
            measure(device, free, rates, &model, &args, &stop)
        }
        Kind::Emulated => {
            let limit = args.memory.map_or(usize::MAX, |bytes| bytes as usize);
            let rates = Rates::embedded()?.device("cpu")?;
            measure(Emulation::with_memory(limit), |_| Ok(f64::MAX), rates, &model, &args, &stop)
        }
        Kind::Cpu => bail!("not a GPU"),
    };
    let figures = match measured {
        // 130, as a shell says of a program that Ctrl-C ended.
        Err(error) if matches!(error.downcast_ref(), Some(ModelError::Stopped)) => return Ok(ExitCode::from(130)),
        measured => measured?,
    };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&figures)?);
    } else {
        println!("{figures}");
    }
    Ok(ExitCode::SUCCESS)
}

/// `free`: bytes of the device's memory that nobody has.
fn measure<D: Timed>(
    device: D,
    free: impl Fn(&D) -> anyhow::Result<f64>,
    rates: DeviceRates,
    model: &Model,
    args: &Args,
    stop: &Arc<AtomicBool>,
) -> anyhow::Result<Figures> {
    let defaults = &model.defaults;
    let clip = Clip {
        width: args.width.unwrap_or(defaults.width),
        height: args.height.unwrap_or(defaults.height),
        frames: args.num_frames.unwrap_or(defaults.num_frames),
        text: [MAX_TEXT_TOKENS, 0],
    };
    let clip_steps = defaults.num_inference_steps;
    ClipShape::new(clip.width, clip.height, clip.frames, clip_steps, clip.text)?;
    let networks = Networks { dit: model.dit.shape(), t5: &model.t5, vae: &model.vae };
    // Of no device's rates: what is free decides.
    let memory = free(&device)?.min(args.memory.unwrap_or(f64::MAX));
    let target = target(DeviceRates { memory: memory.min(1e15), ..rates })?;
    let plan = plan(&networks, &clip, args.precision, Topology::SOLO, &target)?;
    eprintln!("{plan}");

    let device = Arc::new(device);
    eprintln!("measuring what the device can do at most");
    let ceiling = ceiling(&device)?;
    go_on(stop)?;
    let device = Arc::new(Profiled::new(device));
    let bar = progress_bar();
    let bench = Bench { model, clip: &clip, plan: &plan, precision: args.precision, steps: args.steps.get(), stop };
    let measured = bench.run(&device, &mut Show::new(bar.clone()));
    bar.finish_and_clear();
    Figures::new(&*device, &clip, clip_steps, plan, &ceiling, measured?)
}

/// Whether nobody has asked for an end.
fn go_on(stop: &AtomicBool) -> Result<(), ModelError> {
    if stop.load(Ordering::Relaxed) { Err(ModelError::Stopped) } else { Ok(()) }
}

#[cfg(test)]
mod tests;
