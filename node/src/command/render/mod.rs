//! `farm-node render`: one clip, no farm.

mod group;
mod resume;

use std::collections::BTreeMap;
use std::io;
use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, bail};
use farm_core::engine::cpu::CpuEngine;
use farm_core::job::spec::{GuidanceScale, RenderRequest, RenderSpec};
use farm_core::job::state::{Progress, Stage};
use farm_core::model::ModelError;
use farm_core::model::latent::{LATENT_KEY, LatentCheckpoint, NOISE_KEY, from_safetensors, to_safetensors};
use farm_core::model::pipeline::{Pipeline, RenderObserver, Residency, Start};
use farm_core::model::weights::checkpoint::Checkpoint;
use farm_core::parallel::group::RankGroup;
use farm_core::parallel::topology::Topology;
use indicatif::{ProgressBar, ProgressStyle};

use self::group::{Clip, Follower};
use self::resume::{Identity, Saved};
use crate::command::ClipSize;
use crate::encode::{self, FrameSink, Mp4Sink, RawSink};

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
    /// Compute threads of each device; the clip has the same bits for any number [default: the processor's cores
    /// divided among the devices]
    #[arg(long, value_name = "N")]
    pub threads: Option<NonZeroUsize>,
    /// Arithmetic of the networks
    #[arg(long, value_enum, default_value_t = Precision::Fp32)]
    pub precision: Precision,
    #[command(flatten)]
    pub group: group::GroupArgs,
    #[command(flatten)]
    pub resume: resume::ResumeArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Precision {
    /// f32 throughout; bf16 checkpoints are widened
    Fp32,
}

fn parse_guidance(text: &str) -> Result<GuidanceScale, String> {
    let number = |s: &str| s.trim().parse::<f64>().map_err(|_| format!("{:?} is not a number", s.trim()));
    match text.split_once(',') {
        None => Ok(GuidanceScale::Constant(number(text)?)),
        Some(_) => Ok(GuidanceScale::PerStep(text.split(',').map(number).collect::<Result<_, _>>()?)),
    }
}

/// What the ending of the output's name asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Mp4,
    Rgb,
    Latent,
}

impl Kind {
    fn of(path: &Path) -> anyhow::Result<Self> {
        match path.extension().and_then(|end| end.to_str()) {
            Some("mp4") => Ok(Self::Mp4),
            Some("rgb") => Ok(Self::Rgb),
            Some("safetensors") => Ok(Self::Latent),
            _ => bail!("{} has to end in .mp4, .rgb or .safetensors", path.display()),
        }
    }
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let Precision::Fp32 = args.precision;
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
    let threads = args.group.devices.threads(args.threads);
    let dit = checkpoint.dit().with_context(|| format!("{} has no transformer", args.model.display()))?;
    let (topology, sharded) = args.group.plan(dit.config(), &spec, threads)?;
    // Only of use, and only worth reading every byte, if it is shared or stored.
    let identity = if args.group.rank.is_some() || args.resume.wanted() {
        Identity::of(&checkpoint, &spec)?
    } else {
        Identity::default()
    };
    let saved = match &target {
        Some(_) => Saved::open(&args.resume, &spec, &identity)?,
        None => None,
    };
    let residency = if sharded { Residency::Sharded } else { Residency::WhileUsed };
    let pipeline = Pipeline::open(&CpuEngine::new(threads)?, checkpoint, residency)?;
    pipeline.check_group(topology, &spec)?;

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
    let clip = Clip { pipeline: &pipeline, topology, spec: &spec, identity, threads, stop: &stop };
    let bar = progress_bar();
    let mut follower = Follower { stop: stop.clone() };
    let outcome = match &target {
        None => clip.run(&args.group, |_, _| Ok(()), &mut follower)?,
        Some(target) => {
            let output = Output::create(target.kind, target.unfinished.path(), &spec)?;
            let saved = saved.as_ref();
            let mut watcher = Watcher { bar: bar.clone(), stop: stop.clone(), output, saved, shown: None };
            let lead = |engine: &CpuEngine, group: &RankGroup<CpuEngine>| match target.kind {
                Kind::Latent => {
                    let denoised = pipeline.denoise(engine, group, &spec, &start, &mut watcher)?;
                    let bytes = to_safetensors(LATENT_KEY, &denoised.values, spec.latent_shape())?;
                    std::fs::write(target.unfinished.path(), bytes).map_err(ModelError::Output)
                }
                Kind::Mp4 | Kind::Rgb => {
                    pipeline.render(engine, group, &spec, &start, &mut watcher)?;
                    watcher.output.finish().map_err(ModelError::Output)
                }
            };
            clip.run(&args.group, lead, &mut follower)?
        }
    };
    bar.finish_and_clear();
    match outcome {
        // 130, as a shell says of a program that Ctrl-C ended.
        Err(ModelError::Stopped) => return Ok(ExitCode::from(130)),
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

/// The file that is being made. It lies beside its place until it is finished, so that it is moved and not copied, and
/// removed on any way out.
struct Target {
    kind: Kind,
    out: PathBuf,
    unfinished: tempfile::NamedTempFile,
}

impl Target {
    fn create(out: &Path) -> anyhow::Result<Self> {
        let kind = Kind::of(out)?;
        if kind == Kind::Mp4 {
            encode::check()?;
        }
        let folder = out.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let unfinished = tempfile::Builder::new()
            .prefix(".farm-node-render-")
            .tempfile_in(folder)
            .with_context(|| format!("cannot write to {}", folder.display()))?;
        Ok(Self { kind, out: out.to_owned(), unfinished })
    }

    fn publish(self) -> anyhow::Result<PathBuf> {
        publish(self.unfinished, &self.out)?;
        Ok(self.out)
    }
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
    }
}

fn read_noise(path: &Path, spec: &RenderSpec) -> anyhow::Result<Vec<f32>> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    from_safetensors(&bytes, NOISE_KEY, spec.latent_shape()).with_context(|| path.display().to_string())
}

/// Moves the finished file to its place. Temporary files are private; a clip gets the usual rights.
fn publish(unfinished: tempfile::NamedTempFile, out: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    // SAFETY: umask only swaps a number of the process; nothing else sets it.
    let umask = unsafe {
        let umask = libc::umask(0o077);
        libc::umask(umask);
        umask
    };
    let rights = std::fs::Permissions::from_mode(0o666 & !umask);
    std::fs::set_permissions(unfinished.path(), rights).with_context(|| out.display().to_string())?;
    unfinished.persist(out).map_err(|error| error.error).with_context(|| format!("cannot write {}", out.display()))?;
    Ok(())
}

/// Set by Ctrl-C or SIGTERM; looked at after every step. A second signal ends the process at once.
fn stop_on_signals() -> anyhow::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = stop.clone();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        runtime.block_on(async {
            use tokio::signal::unix::{SignalKind, signal};
            let (Ok(mut interrupt), Ok(mut terminate)) =
                (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
            else {
                return;
            };
            for _ in 0..2 {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                }
                if flag.swap(true, Ordering::Relaxed) {
                    std::process::exit(130);
                }
            }
        });
    })?;
    Ok(stop)
}

fn progress_bar() -> ProgressBar {
    let style = ProgressStyle::with_template("{prefix:8} {wide_bar} {pos}/{len} {msg}");
    ProgressBar::new(1).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// Where frames go; a latent has none.
enum Output {
    Frames(Box<dyn FrameSink>),
    Nothing,
}

impl Output {
    fn create(kind: Kind, path: &Path, spec: &RenderSpec) -> io::Result<Self> {
        Ok(match kind {
            Kind::Mp4 => Self::Frames(Box::new(Mp4Sink::create(path, spec.width, spec.height)?)),
            Kind::Rgb => Self::Frames(Box::new(RawSink::create(path, spec.width, spec.height)?)),
            Kind::Latent => Self::Nothing,
        })
    }

    fn finish(&mut self) -> io::Result<()> {
        match self {
            Self::Frames(sink) => sink.finish(),
            Self::Nothing => Ok(()),
        }
    }
}

struct Watcher<'a> {
    bar: ProgressBar,
    stop: Arc<AtomicBool>,
    output: Output,
    saved: Option<&'a Saved>,
    /// The last line for those who see no bar.
    shown: Option<(Stage, u32)>,
}

impl RenderObserver for Watcher<'_> {
    fn progress(&mut self, progress: Progress) -> ControlFlow<()> {
        // A log gets a line for every step, and for the beginning of the other stages.
        let line = (progress.stage, if progress.stage == Stage::Denoise { progress.done } else { 0 });
        if self.bar.is_hidden() && self.shown != Some(line) {
            self.shown = Some(line);
            match progress.stage {
                Stage::Denoise => eprintln!("denoise {}/{}", progress.done, progress.total),
                stage => eprintln!("{}", stage.as_str()),
            }
        }
        self.bar.set_prefix(progress.stage.as_str());
        self.bar.set_length(progress.total.into());
        self.bar.set_position(progress.done.into());
        let unit = match progress.stage {
            Stage::Denoise => "steps",
            Stage::Decode => "frames",
            Stage::Starting | Stage::Text | Stage::Upload => "",
        };
        let left = progress.eta_seconds.map(|eta| format!(", about {eta:.0} s left")).unwrap_or_default();
        self.bar.set_message(format!("{unit}{left}"));
        if self.stop.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    fn warning(&mut self, message: &str) {
        self.bar.suspend(|| eprintln!("warning: {message}"));
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
        match &mut self.output {
            Output::Frames(sink) => sink.frames(rgb24),
            Output::Nothing => Ok(()),
        }
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

    #[test]
    fn the_ending_of_the_output_decides_what_is_written() {
        assert_eq!(Kind::of(Path::new("a/b.mp4")).unwrap(), Kind::Mp4);
        assert_eq!(Kind::of(Path::new("b.rgb")).unwrap(), Kind::Rgb);
        assert_eq!(Kind::of(Path::new("b.safetensors")).unwrap(), Kind::Latent);
        assert!(Kind::of(Path::new("mp4")).is_err() && Kind::of(Path::new("b.mov")).is_err());
    }
}
