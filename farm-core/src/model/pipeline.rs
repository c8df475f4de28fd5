//! One clip from prompt to frames: tokens, T5, denoise, streamed decode.

use std::io;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use crate::api::StageSeconds;
use crate::engine::{Engine, EngineError};
use crate::job::spec::{FRAME_STEP, GenerationDefaults, RenderSpec};
use crate::job::state::{Progress, Stage};
use crate::model::ModelError;
use crate::model::dit::{Dit, TextConditioning};
use crate::model::latent::{DitLatent, VaeLatent};
use crate::model::noise;
use crate::model::sampler::{BranchOrder, Sampler};
use crate::model::schedule::SigmaSchedule;
use crate::model::t5::T5Encoder;
use crate::model::tokenizer::{MAX_IDS, Tokenizer};
use crate::model::vae::VaeDecoder;
use crate::model::weights::Loader;
use crate::model::weights::checkpoint::Checkpoint;

/// Latent frames decoded at once. One is least memory, and no slower: its volumes are the likeliest to stay in cache.
const DECODE_CHUNK: usize = 1;
/// Pixels of a latent pixel; [`RenderSpec::latent_shape`] counts on it.
const SPATIAL_FACTOR: usize = 8;

/// Whom a render tells how it goes, and to whom it gives what it makes. Called on the rendering thread.
pub trait RenderObserver {
    /// How far the render is: before and after every step and every decoded chunk. `Break` stops the render with
    /// [`ModelError::Stopped`].
    fn progress(&mut self, progress: Progress) -> ControlFlow<()>;

    /// Something the user should know, for example a prompt that was cut.
    fn warning(&mut self, message: &str);

    /// The finished latent `[C, T, h, w]`, DiT-normalised, before it is decoded.
    fn latent(&mut self, _values: &[f32], _shape: [usize; 4]) -> io::Result<()> {
        Ok(())
    }

    /// The next `count` frames, RGB24, `height · width · 3` bytes each. The time spent here counts as encoding.
    fn frames(&mut self, rgb24: &[u8], count: usize) -> io::Result<()>;
}

/// The weights of all stages of a checkpoint, loaded at once, so that a checkpoint that opens is one that renders.
/// Shared by the devices of a process (`Arc`); each call names its engine.
pub struct Pipeline<E: Engine> {
    tokenizer: Tokenizer,
    t5: T5Encoder<E>,
    dit: Dit<E>,
    vae: VaeDecoder<E>,
    defaults: GenerationDefaults,
    /// Seconds that the last decode took per pixel of its frames, as bits of an f32; 0 before the first. For ETAs only.
    decode_pace: AtomicU32,
}

/// What a render leaves behind besides its frames.
#[derive(Clone, Copy, Debug)]
pub struct Rendered {
    /// `upload` is the caller's to fill in.
    pub seconds: StageSeconds,
}

/// A finished latent, still on its engine.
pub struct Denoised<E: Engine> {
    pub latent: DitLatent<E::Tensor>,
    /// The same on the host: `[C, T, h, w]`, finite throughout.
    pub values: Vec<f32>,
    pub text_seconds: f64,
    pub denoise_seconds: f64,
}

/// How long a decode took.
#[derive(Clone, Copy, Debug)]
pub struct Decoded {
    pub decode_seconds: f64,
    /// Time spent in [`RenderObserver::frames`].
    pub encode_seconds: f64,
}

impl<E: Engine> Pipeline<E> {
    /// Loads every network of `checkpoint` onto `engine`.
    pub fn load(engine: &E, checkpoint: &Checkpoint) -> Result<Self, ModelError> {
        let lacks = |what: &str| {
            let dir = checkpoint.dir().display();
            ModelError::Input(format!("{dir} has no {what}, and a clip needs one"))
        };
        let (dit, vae) = (
            checkpoint.dit().ok_or_else(|| lacks("transformer"))?,
            checkpoint.vae().ok_or_else(|| lacks("vae decoder"))?,
        );
        let t5 = checkpoint.t5().ok_or_else(|| lacks("text encoder"))?;
        let tokenizer = checkpoint.tokenizer_dir().ok_or_else(|| lacks("tokenizer"))?;

        let time: usize = vae.config().temporal_expansions.iter().product();
        let space: usize = vae.config().spatial_expansions.iter().product();
        if (time, space) != (FRAME_STEP as usize, SPATIAL_FACTOR) {
            return Err(ModelError::Input(format!(
                "the vae makes {time} frames and {space}x{space} pixels of a latent value, clips are made of {FRAME_STEP} \
                 and {SPATIAL_FACTOR}x{SPATIAL_FACTOR}"
            )));
        }
        Ok(Self {
            tokenizer: Tokenizer::open(tokenizer).map_err(|error| ModelError::Input(error.to_string()))?,
            t5: T5Encoder::load(&Loader { engine, source: t5 }, t5.config())?,
            dit: Dit::load(&Loader { engine, source: dit }, dit.config())?,
            vae: VaeDecoder::load(&Loader { engine, source: vae }, vae.config())?,
            defaults: checkpoint.generation_defaults().clone(),
            decode_pace: AtomicU32::new(0),
        })
    }

    /// What a request that leaves values out is resolved with.
    pub fn defaults(&self) -> &GenerationDefaults {
        &self.defaults
    }

    /// Renders a clip. `noise` (values of `[12, T, h, w]`) takes the place of the seed's.
    pub fn render(
        &self,
        engine: &E,
        spec: &RenderSpec,
        noise: Option<&[f32]>,
        observer: &mut dyn RenderObserver,
    ) -> Result<Rendered, ModelError> {
        let started = Instant::now();
        let denoised = self.denoise(engine, spec, noise, observer)?;
        observer.latent(&denoised.values, spec.latent_shape()).map_err(ModelError::Output)?;
        let (text, denoise) = (denoised.text_seconds, denoised.denoise_seconds);
        let Decoded { decode_seconds: decode, encode_seconds: encode } =
            self.decode(engine, &denoised.latent, observer)?;
        let total = started.elapsed().as_secs_f64();
        Ok(Rendered { seconds: StageSeconds { text, denoise, decode, encode, upload: 0.0, total } })
    }

    /// The first half of [`Pipeline::render`]: the latent.
    pub fn denoise(
        &self,
        engine: &E,
        spec: &RenderSpec,
        noise: Option<&[f32]>,
        observer: &mut dyn RenderObserver,
    ) -> Result<Denoised<E>, ModelError> {
        let shape = spec.latent_shape();
        let elements = shape.iter().product::<usize>();
        if let Some(noise) = noise
            && noise.len() != elements
        {
            let got = noise.len();
            return Err(ModelError::Input(format!("noise has {got} values, a latent of {shape:?} has {elements}")));
        }
        let geometry = self.dit.geometry(engine, shape)?;
        let schedule = SigmaSchedule::linear_quadratic(
            spec.num_inference_steps as usize,
            spec.threshold_noise,
            spec.linear_steps.map(|n| n as usize),
        )?;

        let started = Instant::now();
        go_on(observer.progress(Progress { stage: Stage::Text, done: 0, total: 1, eta_seconds: None }))?;
        let cond = self.encode_text(engine, "prompt", &spec.prompt, observer)?;
        let uncond = self.encode_text(engine, "negative prompt", &spec.negative_prompt, observer)?;
        let text_seconds = started.elapsed().as_secs_f64();

        let started = Instant::now();
        let noise = match noise {
            Some(noise) => engine.upload(noise, &shape)?,
            None => engine.upload(&noise::normals(spec.seed, 0..elements as u64), &shape)?,
        };
        let sampler = Sampler {
            dit: &self.dit,
            geometry: &geometry,
            cond: &cond,
            uncond: &uncond,
            schedule: &schedule,
            guidance: &spec.guidance_scale,
            order: BranchOrder::Sequential,
        };
        let pixels = f64::from(spec.width) * f64::from(spec.height);
        let decode_seconds = self.decode_seconds_per_pixel().map(|pace| pace * pixels * f64::from(spec.num_frames));
        let mut pace = Pace::default();
        let latent = sampler.run(engine, &noise, &mut |done, total, _| {
            let steps = pace.seconds_for(done, total - done);
            let eta = steps.map(|steps| (steps + decode_seconds.unwrap_or(0.0)) as f32);
            let (done, total) = (done as u32, total as u32);
            observer.progress(Progress { stage: Stage::Denoise, done, total, eta_seconds: eta })
        })?;
        let values = engine.download(&latent)?;
        if let Some(index) = values.iter().position(|v| !v.is_finite()) {
            // Decoded, it would be a black clip that looks like a result.
            let message = format!("the latent holds {} at element {index}", values[index]);
            return Err(EngineError::Backend { op: "denoise", message }.into());
        }
        let denoise_seconds = started.elapsed().as_secs_f64();
        Ok(Denoised { latent: DitLatent(latent), values, text_seconds, denoise_seconds })
    }

    /// The second half of [`Pipeline::render`]: frames of a latent, handed over as they come.
    pub fn decode(
        &self,
        engine: &E,
        latent: &DitLatent<E::Tensor>,
        observer: &mut dyn RenderObserver,
    ) -> Result<Decoded, ModelError> {
        let started = Instant::now();
        let mut encode_seconds = 0.0;
        let latent = self.vae.denormalize(engine, latent)?.0;
        let &[latent_frames, height, width, _] = &engine.shape(&latent)[..] else {
            return Err(ModelError::Input("a latent to decode has four dimensions".into()));
        };
        let total = FRAME_STEP as usize * latent_frames.saturating_sub(1) + 1;
        let pixels = (SPATIAL_FACTOR * height * SPATIAL_FACTOR * width) as f64;

        let (mut stream, mut done, mut pace) = (self.vae.stream(), 0, Pace::default());
        let mut progress = |done: usize, observer: &mut dyn RenderObserver| {
            let timed = pace.seconds_for(done, total - done);
            let eta = timed.or_else(|| Some(self.decode_seconds_per_pixel()? * pixels * (total - done) as f64));
            let (done, total) = (done as u32, total as u32);
            go_on(observer.progress(Progress {
                stage: Stage::Decode,
                done,
                total,
                eta_seconds: eta.map(|eta| eta as f32),
            }))
        };
        progress(0, observer)?;
        for start in (0..latent_frames).step_by(DECODE_CHUNK) {
            let chunk = engine.narrow(&latent, 0, start, DECODE_CHUNK.min(latent_frames - start))?;
            let frames = stream.push(engine, &VaeLatent(chunk), &mut |_, _| ())?;
            let (count, rgb24) = (engine.shape(&frames)[0], engine.to_rgb8(&frames)?);
            drop(frames);
            let handed_over = Instant::now();
            observer.frames(&rgb24, count).map_err(ModelError::Output)?;
            encode_seconds += handed_over.elapsed().as_secs_f64();
            done += count;
            progress(done, observer)?;
        }
        let decode_seconds = started.elapsed().as_secs_f64() - encode_seconds;
        let per_pixel = decode_seconds / (pixels * done.max(1) as f64);
        self.decode_pace.store((per_pixel as f32).to_bits(), Ordering::Relaxed);
        Ok(Decoded { decode_seconds, encode_seconds })
    }

    /// An empty text is no text at all, positive or negative: the reference masks its lone end of the sentence too.
    fn encode_text(
        &self,
        engine: &E,
        name: &str,
        text: &str,
        observer: &mut dyn RenderObserver,
    ) -> Result<TextConditioning<E>, ModelError> {
        if text.is_empty() {
            return self.dit.text_conditioning(engine, None);
        }
        let encoding = self.tokenizer.encode(text).map_err(|error| ModelError::Input(error.to_string()))?;
        if let Some(tokens) = encoding.truncated {
            let kept = MAX_IDS - 1;
            observer.warning(&format!("the {name} has {tokens} tokens, the first {kept} are used"));
        }
        let features = self.t5.encode(engine, &encoding.ids)?;
        self.dit.text_conditioning(engine, Some(&features))
    }

    fn decode_seconds_per_pixel(&self) -> Option<f64> {
        let pace = f32::from_bits(self.decode_pace.load(Ordering::Relaxed));
        (pace > 0.0).then_some(f64::from(pace))
    }
}

fn go_on(flow: ControlFlow<()>) -> Result<(), ModelError> {
    match flow {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(ModelError::Stopped),
    }
}

/// How fast units of a stage get done. The first report is where timing starts, so that cold caches do not count.
#[derive(Default)]
struct Pace(Option<(usize, Instant)>);

impl Pace {
    /// Seconds for `remaining` more units now that `done` are done, once enough were timed.
    fn seconds_for(&mut self, done: usize, remaining: usize) -> Option<f64> {
        if done == 0 {
            return None;
        }
        let (first, since) = *self.0.get_or_insert_with(|| (done, Instant::now()));
        (done > first).then(|| since.elapsed().as_secs_f64() / (done - first) as f64 * remaining as f64)
    }
}
