//! `farm-node render`: one clip, no farm.

mod group;
mod resume;

use std::collections::BTreeMap;
use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, bail};
use farm_core::engine::EngineError;
use farm_core::job::spec::{GuidanceScale, RenderRequest, RenderSpec};
use farm_core::job::state::Progress;
use farm_core::model::ModelError;
use farm_core::model::latent::{LATENT_KEY, LatentCheckpoint, NOISE_KEY, from_safetensors, to_safetensors};
use farm_core::model::pipeline::{RenderObserver, Residency, Start};
use farm_core::model::weights::checkpoint::Checkpoint;
use farm_core::parallel::group::RankGroup;
use farm_core::parallel::topology::Topology;
use farm_core::tiles::plan::Tiling;

use self::group::{Clip, Follower};
use self::resume::{Identity, Saved};
use crate::command::ClipSize;
use crate::command::decode;
use crate::command::target::{Kind, Target};
use crate::command::watch::{Show, progress_bar, stop_on_signals};
use crate::decode::local::LocalDecode;
use crate::decode::shape;
use crate::devices::{ThreadArgs, parse_bytes};
use crate::encode::FrameSink;
use crate::engine::DeviceEngine;
use crate::fit::{Fit, fit, remedy};
use crate::models::Copies;

#[derive(clap::Args)]
pub struct Args {
    /// What the clip shows
    #[arg(long, value_name = "TEXT")]
    pub prompt: String,
    /// What it should keep away from [default: nothing, guidance is against no text at all]
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub negative_prompt: String,
    /// Checkpoint folder
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Where the clip goes: .mp4, .rgb (raw RGB24 frames) or .safetensors (the final latent)
    #[arg(long, value_name = "FILE", required_unless_present = "rank")]
    pub out: Option<PathBuf>,
    #[command(flatten)]
    pub size: ClipSize,
    /// A number, or one number per step, separated by commas [default: the checkpoint's]
    #[arg(long, value_parser = parse_guidance)]
    pub guidance_scale: Option<GuidanceScale>,
    /// Decides the noise [default: drawn, and printed]
    #[arg(long)]
    pub seed: Option<u64>,
    /// Noise to start from instead of the seed's: safetensors, key `noise`, f32 [1, 12, T, height/8, width/8]
    #[arg(long, value_name = "FILE")]
    pub noise: Option<PathBuf>,
    #[command(flatten)]
    pub threads: ThreadArgs,
    /// Decode in tiles, on all of --devices: auto, whole, exact or HxW+OVERLAP in latent pixels of 8x8 pixels [default:
    /// the whole frame at a time, on one device]
    #[arg(long, value_name = "TILES", conflicts_with = "rank")]
    pub tiles: Option<Tiling>,
    /// Bytes of a GPU's memory that may be filled, for example 16GiB; how the clip fits into them is printed
    /// [default: what is free]
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    pub memory: Option<f64>,
    #[command(flatten)]
    pub group: group::GroupArgs,
    #[command(flatten)]
    pub resume: resume::ResumeArgs,
}

fn parse_guidance(text: &str) -> Result<GuidanceScale, String> {
    let number = |s: &str| s.trim().parse::<f64>().map_err(|_| format!("{:?} is not a number", s.trim()));
    match text.split_once(',') {
        None => Ok(GuidanceScale::Constant(number(text)?)),
        Some(_) => Ok(GuidanceScale::PerStep(text.split(',').map(number).collect::<Result<_, _>>()?)),
    }
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let target = match (&args.out, args.group.rank()) {
        (Some(out), 0) => Some(Target::create(out)?),
        (None, 0) => bail!("rank 0 writes the clip: give it --out"),
        (Some(out), rank) => bail!("rank {rank} writes nothing; leave {} to rank 0", out.display()),
        (None, _) => None,
    };
    let checkpoint = Checkpoint::open(&args.model)?;
    for note in checkpoint.notes() {
        eprintln!("note: {note}");
    }
    if args.group.rank.is_some() && args.seed.is_none() {
        bail!("the ranks of a group have to agree on the seed: give all of them the same --seed");
    }
    let seed = args.seed.unwrap_or_else(rand::random);
    let spec = RenderSpec::resolve(&request(&args), checkpoint.generation_defaults(), seed)?;
    let noise = args.noise.as_deref().map(|path| read_noise(path, &spec)).transpose()?;
    let compute = args.threads.compute_within(args.group.devices, args.memory)?;
    let dit = checkpoint.dit().with_context(|| format!("{} has no transformer", args.model.display()))?;
    let (topology, sharded) = args.group.plan(dit.config(), &spec, &compute)?;
    // Only of use, and only worth reading every byte, if it is shared or stored.
    let identity = if args.group.rank.is_some() || args.resume.wanted() {
        Identity::of(&checkpoint, &spec, compute.precision())?
    } else {
        Identity::default()
    };
    let saved = match &target {
        Some(_) => Saved::open(&args.resume, &spec, &identity)?,
        None => None,
    };
    let fit = fit(&compute, &checkpoint, &spec, topology)?;
    if let Some(fit) = &fit {
        eprintln!("{}", fit.table);
    }
    let less = fit.as_ref().map(|fit| fit.less);
    let residency = match &fit {
        _ if sharded => Residency::Sharded,
        // One clip has no more use for a network that it is done with.
        Some(Fit { residency: streamed @ Residency::Streamed(_), .. }) => *streamed,
        _ => Residency::WhileUsed,
    };
    let networks = Copies::open(&compute, checkpoint, residency)?;
    let pipeline = networks.first();
    pipeline.check_group(topology, &spec)?;

    // Before anything is computed.
    let tiles = match args.tiles.or(fit.and_then(|fit| fit.tiling)) {
        Some(tiling) => Some(shape(tiling, spec.latent_shape(), pipeline.vae_config()?).map_err(anyhow::Error::msg)?),
        None => None,
    };
    if args.noise.is_none() && args.group.rank() == 0 {
        eprintln!("seed {seed}");
    }
    if topology != Topology::SOLO {
        eprintln!("{topology}{}", if sharded { ", weights sharded" } else { "" });
    }
    let stop = stop_on_signals()?;
    let start = match saved.as_ref().and_then(Saved::latest) {
        Some(checkpoint) => {
            eprintln!("resuming after step {} of {}", checkpoint.step, spec.num_inference_steps);
            Start::Checkpoint(checkpoint)
        }
        None => noise.map_or(Start::Seed, Start::Noise),
    };
    let identity = identity.to_string();
    let clip = Clip { networks: &networks, topology, spec: &spec, identity, compute: &compute, stop: &stop };
    let bar = progress_bar();
    let mut follower = Follower { stop: stop.clone() };
    let mut in_tiles = None;
    let outcome = match &target {
        None => clip.run(&args.group, |_, _| Ok(()), &mut follower)?,
        Some(target) => {
            let sink = if tiles.is_none() { target.sink(spec.width, spec.height)? } else { None };
            let saved = saved.as_ref();
            let mut watcher = Watcher { show: Show::new(bar.clone()), stop: stop.clone(), sink, saved };
            let lead = |engine: &DeviceEngine, group: &RankGroup<DeviceEngine>| match (target.kind, &tiles) {
                (Kind::Latent, _) => {
                    let denoised = pipeline.denoise(engine, group, &spec, &start, &mut watcher)?;
                    let bytes = to_safetensors(LATENT_KEY, &denoised.values, spec.latent_shape())?;
                    std::fs::write(target.unfinished.path(), bytes).map_err(ModelError::Output)
                }
                (Kind::Mp4 | Kind::Rgb, Some(_)) => {
                    in_tiles = Some(pipeline.denoise(engine, group, &spec, &start, &mut watcher)?.values);
                    Ok(())
                }
                (Kind::Mp4 | Kind::Rgb, None) => {
                    pipeline.render(engine, group, &spec, &start, &mut watcher)?;
                    watcher.sink.as_mut().map_or(Ok(()), |sink| sink.finish()).map_err(ModelError::Output)
                }
            };
            clip.run(&args.group, lead, &mut follower)?
        }
    };
    let outcome = match (outcome, in_tiles, tiles, &target) {
        (Ok(()), Some(values), Some(shape), Some(target)) => {
            let hand = |device| {
                let engine = compute.engine(device)?;
                let decoder = networks.of(&compute, device).decoder(&engine)?;
                anyhow::Ok((engine, decoder))
            };
            let work = LocalDecode {
                hands: (0..args.group.devices.count).map(hand).collect::<anyhow::Result<_>>()?,
                latent: &values,
                size: spec.latent_shape(),
                shape,
                settle: &|device| compute.settle(device),
                stop: stop.clone(),
            };
            decode::in_tiles(work, target, &mut Show::new(bar.clone()))?
        }
        (outcome, ..) => outcome,
    };
    bar.finish_and_clear();
    match outcome {
        // 130, as a shell says of a program that Ctrl-C ended.
        Err(ModelError::Stopped) => return Ok(ExitCode::from(130)),
        Err(error @ ModelError::Engine(EngineError::OutOfMemory { .. })) => match less {
            Some(less) => bail!("{error}; {}", remedy(less, &compute, pipeline.checkpoint(), &spec, topology)),
            None => return Err(error.into()),
        },
        outcome => outcome?,
    }
    if let Some(saved) = saved {
        saved.clear();
    }
    if let Some(target) = target {
        println!("{}", target.publish()?.display());
    }
    Ok(ExitCode::SUCCESS)
}

fn request(args: &Args) -> RenderRequest {
    RenderRequest {
        prompt: args.prompt.clone(),
        negative_prompt: Some(args.negative_prompt.clone()),
        width: args.size.width,
        height: args.size.height,
        num_frames: args.size.num_frames,
        num_inference_steps: args.size.steps,
        guidance_scale: args.guidance_scale.clone(),
        seed: args.seed,
        id: None,
        priority: None,
        model: None,
        labels: BTreeMap::new(),
        after: Vec::new(),
        require: BTreeMap::new(),
    }
}

fn read_noise(path: &Path, spec: &RenderSpec) -> anyhow::Result<Vec<f32>> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    from_safetensors(&bytes, NOISE_KEY, spec.latent_shape()).with_context(|| path.display().to_string())
}

struct Watcher<'a> {
    show: Show,
    stop: Arc<AtomicBool>,
    /// None for a latent, and where frames come later.
    sink: Option<Box<dyn FrameSink>>,
    saved: Option<&'a Saved>,
}

impl RenderObserver for Watcher<'_> {
    fn progress(&mut self, progress: Progress) -> ControlFlow<()> {
        self.show.progress(progress);
        if self.stop.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    fn warning(&mut self, message: &str) {
        self.show.warning(message);
    }

    fn wants_checkpoint(&mut self, step: u32, _steps: u32) -> bool {
        self.saved.is_some_and(|saved| saved.wants(step))
    }

    fn checkpoint(&mut self, checkpoint: LatentCheckpoint) {
        if let Some(saved) = self.saved {
            saved.put(checkpoint);
        }
    }

    fn frames(&mut self, rgb24: &[u8], _count: usize) -> io::Result<()> {
        self.sink.as_mut().map_or(Ok(()), |sink| sink.frames(rgb24))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guidance_list_is_told_from_a_number() {
        assert_eq!(parse_guidance("4.5").unwrap(), GuidanceScale::Constant(4.5));
        assert_eq!(parse_guidance("6, 5,4").unwrap(), GuidanceScale::PerStep(vec![6.0, 5.0, 4.0]));
        assert!(parse_guidance("6,,4").is_err() && parse_guidance("six").is_err());
    }
}
