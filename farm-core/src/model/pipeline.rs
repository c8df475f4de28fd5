//! One clip from prompt to frames: tokens, T5, denoise, streamed decode.

use std::io;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use crate::api::StageSeconds;
use crate::engine::streaming::Streaming;
use crate::engine::{Engine, EngineError};
use crate::job::spec::{FRAME_STEP, GenerationDefaults, RenderSpec};
use crate::job::state::{Progress, Stage};
use crate::model::ModelError;
use crate::model::config::{DitConfig, VaeConfig};
use crate::model::dit::Dit;
use crate::model::latent::{DitLatent, LatentCheckpoint, VaeLatent};
use crate::model::noise;
use crate::model::sampler::Sampler;
use crate::model::schedule::SigmaSchedule;
use crate::model::t5::T5Encoder;
use crate::model::tokenizer::{MAX_IDS, Tokenizer};
use crate::model::vae::VaeDecoder;
use crate::model::weights::checkpoint::Checkpoint;
use crate::model::weights::{self, Loader};
use crate::parallel::group::RankGroup;
use crate::parallel::topology::Topology;

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

    /// Whether [`RenderObserver::checkpoint`] is to be called after `step` of `steps` steps.
    fn wants_checkpoint(&mut self, _step: u32, _steps: u32) -> bool {
        false
    }

    /// Whether the denoise is to end here, between two steps, to be taken up by others. Asked on the leader, which gives
    /// its latent to [`RenderObserver::checkpoint`] unless it is the one that the denoise has started from, and ends the
    /// whole group: only it has to know. Then the denoise fails with [`ModelError::HandedOver`]. Past the last step nobody
    /// is asked.
    fn hands_over(&mut self) -> bool {
        false
    }

    /// Where this denoise can be taken up again.
    fn checkpoint(&mut self, _checkpoint: LatentCheckpoint) {}

    /// The finished latent `[C, T, h, w]`, DiT-normalised, before it is decoded.
    fn latent(&mut self, _values: &[f32], _shape: [usize; 4]) -> io::Result<()> {
        Ok(())
    }

    /// The next `count` frames, RGB24, `height · width · 3` bytes each. The time spent here counts as encoding.
    fn frames(&mut self, rgb24: &[u8], count: usize) -> io::Result<()>;
}

/// What the first step starts from.
#[derive(Clone, Debug)]
pub enum Start {
    /// The noise of the request's seed.
    Seed,
    /// Values of `[12, T, h, w]`.
    Noise(Vec<f32>),
    Checkpoint(LatentCheckpoint),
}

/// The networks of a checkpoint, shared by the devices of a process (`Arc`); each call names its engine.
pub struct Pipeline<E: Engine> {
    checkpoint: Checkpoint,
    text: Part<TextStage<E>>,
    dit: Part<Dit<E>>,
    vae: Part<VaeDecoder<E>>,
    residency: Residency,
    /// Seconds that the last decode took per pixel of its frames, as bits of an f32; 0 before the first. For ETAs only.
    decode_pace: AtomicU32,
}

/// How long weights stay in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Residency {
    /// All networks are loaded at once and stay: a checkpoint that opens is one that renders, again and again.
    Kept,
    /// Each network is loaded for its stage and dropped after it, and only by ranks that have the stage; the text encoder
    /// block by block.
    WhileUsed,
    /// As `WhileUsed`, and each rank keeps its share of the transformer's blocks only.
    Sharded,
    /// As `WhileUsed` but for the transformer, which stays: so many of its blocks on the device, the others in the host's
    /// memory, from where they are fetched as they are used. A device has one denoise at a time then.
    Streamed(Streaming),
}

/// Prompt → features.
struct TextStage<E: Engine> {
    tokenizer: Tokenizer,
    t5: T5Encoder<E>,
}

/// A network that is or is not in memory.
struct Part<T>(Mutex<Option<Arc<T>>>);

impl<T> Part<T> {
    /// The network, loaded by the first who asks while the others wait.
    fn get(&self, load: impl FnOnce() -> Result<T, ModelError>) -> Result<Arc<T>, ModelError> {
        let mut part = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match &*part {
            Some(part) => Ok(part.clone()),
            None => Ok(part.insert(Arc::new(load()?)).clone()),
        }
    }

    /// Drops it once the last who uses it is done.
    fn release(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
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
    /// Checks that `checkpoint` has all networks of a clip; `Kept` loads them onto `engine`.
    pub fn open(engine: &E, checkpoint: Checkpoint, residency: Residency) -> Result<Self, ModelError> {
        let lacks = |what: &str| {
            let dir = checkpoint.dir().display();
            ModelError::Input(format!("{dir} has no {what}, and a clip needs one"))
        };
        checkpoint.dit().ok_or_else(|| lacks("transformer"))?;
        checkpoint.t5().ok_or_else(|| lacks("text encoder"))?;
        checkpoint.tokenizer_dir().ok_or_else(|| lacks("tokenizer"))?;
        let vae = checkpoint.vae().ok_or_else(|| lacks("vae decoder"))?.config();
        let time: usize = vae.temporal_expansions.iter().product();
        let space: usize = vae.spatial_expansions.iter().product();
        if (time, space) != (FRAME_STEP as usize, SPATIAL_FACTOR) {
            return Err(ModelError::Input(format!(
                "the vae makes {time} frames and {space}x{space} pixels of a latent value, clips are made of {FRAME_STEP} \
                 and {SPATIAL_FACTOR}x{SPATIAL_FACTOR}"
            )));
        }
        let pipeline = Self {
            checkpoint,
            text: Part(Mutex::new(None)),
            dit: Part(Mutex::new(None)),
            vae: Part(Mutex::new(None)),
            residency,
            decode_pace: AtomicU32::new(0),
        };
        if residency == Residency::Kept {
            pipeline.text(engine)?;
            pipeline.whole_dit(engine)?;
            pipeline.vae(engine)?;
        }
        Ok(pipeline)
    }

    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// Sizes of the decoder.
    pub fn vae_config(&self) -> Result<&VaeConfig, ModelError> {
        Ok(self.checkpoint.vae().ok_or_else(|| missing("vae decoder"))?.config())
    }

    /// What a request that leaves values out is resolved with.
    pub fn defaults(&self) -> &GenerationDefaults {
        self.checkpoint.generation_defaults()
    }

    /// Whether a group can render a clip: cheap, and without any weight.
    pub fn check_group(&self, topology: Topology, spec: &RenderSpec) -> Result<(), ModelError> {
        let heads = self.dit_part()?.config().num_heads;
        let [_, t, h, w] = spec.latent_shape();
        let fits = topology.check(topology.world(), heads, t * (h / 2) * (w / 2));
        fits.map_err(|error| ModelError::Input(error.to_string()))
    }

    /// Renders a clip. Of a group, this is for the leader; the other ranks call [`Pipeline::denoise`].
    pub fn render(
        &self,
        engine: &E,
        group: &RankGroup<E>,
        spec: &RenderSpec,
        start: &Start,
        observer: &mut dyn RenderObserver,
    ) -> Result<Rendered, ModelError> {
        let started = Instant::now();
        let denoised = self.denoise(engine, group, spec, start, observer)?;
        observer.latent(&denoised.values, spec.latent_shape()).map_err(ModelError::Output)?;
        let (text, denoise) = (denoised.text_seconds, denoised.denoise_seconds);
        let Decoded { decode_seconds: decode, encode_seconds: encode } =
            self.decode(engine, &denoised.latent, observer)?;
        let total = started.elapsed().as_secs_f64();
        Ok(Rendered { seconds: StageSeconds { text, denoise, decode, encode, upload: 0.0, total } })
    }

    /// The first half of [`Pipeline::render`]: the latent, on every rank of the group. Text, noise and start are the
    /// leader's; what other ranks pass as `start` is not looked at.
    ///
    /// If it fails on one rank it fails on all.
    pub fn denoise(
        &self,
        engine: &E,
        group: &RankGroup<E>,
        spec: &RenderSpec,
        start: &Start,
        observer: &mut dyn RenderObserver,
    ) -> Result<Denoised<E>, ModelError> {
        let group = &group.on(engine)?;
        let denoised = self.denoise_rank(engine, group, spec, start, observer);
        if let Err(error) = &denoised
            && !matches!(error, ModelError::Comm(_))
        {
            group.abort(&error.to_string());
        }
        denoised
    }

    fn denoise_rank(
        &self,
        engine: &E,
        group: &RankGroup<E>,
        spec: &RenderSpec,
        start: &Start,
        observer: &mut dyn RenderObserver,
    ) -> Result<Denoised<E>, ModelError> {
        self.check_group(group.topology(), spec)?;
        let schedule = SigmaSchedule::linear_quadratic(
            spec.num_inference_steps as usize,
            spec.threshold_noise,
            spec.linear_steps.map(|n| n as usize),
        )?;
        let started = Instant::now();
        go_on(observer.progress(Progress { stage: Stage::Text, done: 0, total: 1, eta_seconds: None }))?;
        let inputs = if group.is_leader() { Some(self.inputs(engine, spec, start, observer)?) } else { None };
        let Inputs { first, latent, features: [cond, uncond] } = self.share(engine, group, spec, inputs)?;
        let text_seconds = started.elapsed().as_secs_f64();

        let started = Instant::now();
        let dit = match self.residency {
            Residency::Sharded => {
                let part = self.dit_part()?;
                Arc::new(Dit::load_sharded(&Loader { engine, source: part }, part.config(), group)?)
            }
            Residency::Streamed(streaming) => self.streamed_dit(engine, streaming)?,
            Residency::Kept | Residency::WhileUsed => self.whole_dit(engine)?,
        };
        let geometry = dit.geometry(engine, group, spec.latent_shape())?;
        let sampler = Sampler {
            dit: &dit,
            geometry: &geometry,
            cond: &dit.text_conditioning(engine, group, cond.as_ref())?,
            uncond: &dit.text_conditioning(engine, group, uncond.as_ref())?,
            schedule: &schedule,
            guidance: &spec.guidance_scale,
            group,
        };
        let pixels = f64::from(spec.width) * f64::from(spec.height);
        let decode_seconds = self.decode_seconds_per_pixel().map(|pace| pace * pixels * f64::from(spec.num_frames));
        let mut pace = Pace::default();
        let mut end = None;
        let latent = sampler.run(engine, &latent, first, &mut |done, total, z| {
            let steps = pace.seconds_for(done - first, total - done);
            let eta = steps.map(|steps| (steps + decode_seconds.unwrap_or(0.0)) as f32);
            let (step, steps) = (done as u32, total as u32);
            if done < total && group.is_leader() {
                let hands_over = observer.hands_over();
                if done > first && (hands_over || observer.wants_checkpoint(step, steps)) {
                    match engine.download(z) {
                        Ok(values) => {
                            observer.checkpoint(LatentCheckpoint { step, precision: engine.precision(), values })
                        }
                        Err(error) => {
                            end = Some(error.into());
                            return ControlFlow::Break(());
                        }
                    }
                }
                if hands_over {
                    end = Some(ModelError::HandedOver { step });
                    return ControlFlow::Break(());
                }
            }
            observer.progress(Progress { stage: Stage::Denoise, done: step, total: steps, eta_seconds: eta })
        });
        if let Some(end) = end {
            return Err(end);
        }
        let latent = latent?;
        let values = engine.download(&latent)?;
        if let Some(index) = values.iter().position(|v| !v.is_finite()) {
            // Decoded, it would be a black clip that looks like a result.
            let message = format!("the latent holds {} at element {index}", values[index]);
            return Err(EngineError::Backend { op: "denoise", message }.into());
        }
        if self.residency == Residency::WhileUsed {
            self.dit.release();
        }
        let denoise_seconds = started.elapsed().as_secs_f64();
        Ok(Denoised { latent: DitLatent(latent), values, text_seconds, denoise_seconds })
    }

    /// What the leader brings along.
    fn inputs(
        &self,
        engine: &E,
        spec: &RenderSpec,
        start: &Start,
        observer: &mut dyn RenderObserver,
    ) -> Result<Inputs<E>, ModelError> {
        let shape = spec.latent_shape();
        let elements = shape.iter().product::<usize>();
        let (first, latent) = match start {
            Start::Seed => (0, &noise::normals(spec.seed, 0..elements as u64)),
            Start::Noise(values) => (0, values),
            Start::Checkpoint(checkpoint) => (checkpoint.step as usize, &checkpoint.values),
        };
        if latent.len() != elements || first > spec.num_inference_steps as usize {
            let (got, steps) = (latent.len(), spec.num_inference_steps);
            return Err(ModelError::Input(format!(
                "a start with {got} values before step {first}; this clip has {steps} steps and a latent of {shape:?}, \
                 {elements} values"
            )));
        }
        let latent = engine.upload(latent, &shape)?;
        let features = self.encode_texts(engine, spec, observer)?;
        if self.residency != Residency::Kept {
            self.text.release();
        }
        Ok(Inputs { first, latent, features })
    }

    /// Gives the leader's inputs to all ranks: whatever a rank would compute itself, it might compute differently.
    fn share(
        &self,
        engine: &E,
        group: &RankGroup<E>,
        spec: &RenderSpec,
        inputs: Option<Inputs<E>>,
    ) -> Result<Inputs<E>, ModelError> {
        let rows = |features: &Option<E::Tensor>| features.as_ref().map_or(0, |x| engine.shape(x)[0]);
        // First step and rows of both texts: small whole numbers, which f32 holds exactly.
        let sizes = match &inputs {
            Some(Inputs { first, features, .. }) => {
                let sizes = [*first, rows(&features[0]), rows(&features[1])];
                Some(engine.upload(&sizes.map(|size| size as f32), &[sizes.len()])?)
            }
            None => None,
        };
        let sizes = engine.download(&group.world.broadcast(0, sizes, &[3])?)?;
        let [first, cond, uncond] = [0, 1, 2].map(|i| sizes[i] as usize);
        if first > spec.num_inference_steps as usize || cond.max(uncond) > MAX_IDS {
            return Err(ModelError::Input(format!(
                "the leader starts at step {first} with {cond} and {uncond} tokens"
            )));
        }
        let (latent, features) = match inputs {
            Some(Inputs { latent, features: [cond, uncond], .. }) => (Some(latent), [cond, uncond]),
            None => (None, [None, None]),
        };
        let latent = group.world.broadcast(0, latent, &spec.latent_shape())?;
        let width = self.dit_part()?.config().text_dim;
        let mut shared = [None, None];
        for ((features, rows), shared) in features.into_iter().zip([cond, uncond]).zip(&mut shared) {
            if rows > 0 {
                *shared = Some(group.world.broadcast(0, features, &[rows, width])?);
            }
        }
        Ok(Inputs { first, latent, features: shared })
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
        let vae = self.vae(engine)?;
        let &[_, latent_frames, height, width] = &engine.shape(&latent.0)[..] else {
            return Err(ModelError::Input("a latent to decode has four dimensions".into()));
        };
        let total = FRAME_STEP as usize * latent_frames.saturating_sub(1) + 1;
        let pixels = (SPATIAL_FACTOR * height * SPATIAL_FACTOR * width) as f64;

        let (mut done, mut pace) = (0, Pace::default());
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
        decode_whole(engine, &vae, latent, &mut |rgb24, count| {
            let handed_over = Instant::now();
            observer.frames(rgb24, count).map_err(ModelError::Output)?;
            encode_seconds += handed_over.elapsed().as_secs_f64();
            done += count;
            progress(done, observer)
        })?;
        let decode_seconds = started.elapsed().as_secs_f64() - encode_seconds;
        let per_pixel = decode_seconds / (pixels * done.max(1) as f64);
        self.decode_pace.store((per_pixel as f32).to_bits(), Ordering::Relaxed);
        if self.residency != Residency::Kept {
            self.vae.release();
        }
        Ok(Decoded { decode_seconds, encode_seconds })
    }

    /// Features `[tokens, text_dim]` of the prompt and of the negative prompt. An empty text is no text at all, positive or
    /// negative: the reference masks its lone end of the sentence too.
    fn encode_texts(
        &self,
        engine: &E,
        spec: &RenderSpec,
        observer: &mut dyn RenderObserver,
    ) -> Result<[Option<E::Tensor>; 2], ModelError> {
        let texts = [("prompt", &spec.prompt), ("negative prompt", &spec.negative_prompt)];
        if texts.iter().all(|(_, text)| text.is_empty()) {
            return Ok([None, None]);
        }
        let stage = self.text(engine)?;
        let mut ids = Vec::with_capacity(texts.len());
        for (name, text) in texts.iter().filter(|(_, text)| !text.is_empty()) {
            let encoding = stage.tokenizer.encode(text).map_err(|error| ModelError::Input(error.to_string()))?;
            if let Some(tokens) = encoding.truncated {
                let kept = MAX_IDS - 1;
                observer.warning(&format!("the {name} has {tokens} tokens, the first {kept} are used"));
            }
            ids.push(encoding.ids);
        }
        let ids: Vec<&[u32]> = ids.iter().map(Vec::as_slice).collect();
        let mut features = stage.t5.encode_all(engine, &ids)?.into_iter();
        Ok(texts.map(|(_, text)| if text.is_empty() { None } else { features.next() }))
    }

    fn dit_part(&self) -> Result<&weights::checkpoint::Part<DitConfig>, ModelError> {
        self.checkpoint.dit().ok_or_else(|| missing("transformer"))
    }

    fn text(&self, engine: &E) -> Result<Arc<TextStage<E>>, ModelError> {
        self.text.get(|| {
            let t5 = self.checkpoint.t5().ok_or_else(|| missing("text encoder"))?;
            let tokenizer = self.checkpoint.tokenizer_dir().ok_or_else(|| missing("tokenizer"))?;
            Ok(TextStage {
                tokenizer: Tokenizer::open(tokenizer).map_err(|error| ModelError::Input(error.to_string()))?,
                t5: match self.residency {
                    Residency::Kept => T5Encoder::load(engine, t5.clone(), t5.config())?,
                    Residency::WhileUsed | Residency::Sharded | Residency::Streamed(_) => {
                        T5Encoder::open(engine, t5.clone(), t5.config())?
                    }
                },
            })
        })
    }

    fn whole_dit(&self, engine: &E) -> Result<Arc<Dit<E>>, ModelError> {
        let part = self.dit_part()?;
        self.dit.get(|| Dit::load(&Loader { engine, source: part }, part.config()))
    }

    fn streamed_dit(&self, engine: &E, streaming: Streaming) -> Result<Arc<Dit<E>>, ModelError> {
        let part = self.dit_part()?;
        self.dit.get(|| Dit::load_streamed(&Loader { engine, source: part }, part.config(), streaming))
    }

    fn vae(&self, engine: &E) -> Result<Arc<VaeDecoder<E>>, ModelError> {
        let part = self.checkpoint.vae().ok_or_else(|| missing("vae decoder"))?;
        self.vae.get(|| VaeDecoder::load(&Loader { engine, source: part }, part.config()))
    }

    /// The decoder, for who decodes in tiles.
    pub fn decoder(&self, engine: &E) -> Result<Arc<VaeDecoder<E>>, ModelError> {
        self.vae(engine)
    }

    fn decode_seconds_per_pixel(&self) -> Option<f64> {
        let pace = f32::from_bits(self.decode_pace.load(Ordering::Relaxed));
        (pace > 0.0).then_some(f64::from(pace))
    }
}

/// Gets frames, RGB24, and how many.
pub type HandOver<'a> = &'a mut dyn FnMut(&[u8], usize) -> Result<(), ModelError>;

/// Decodes a latent chunk by chunk, each of whole frames, which `hand_over` gets. Its error ends the
/// decode.
pub fn decode_whole<E: Engine>(
    engine: &E,
    vae: &VaeDecoder<E>,
    latent: &DitLatent<E::Tensor>,
    hand_over: HandOver<'_>,
) -> Result<(), ModelError> {
    let latent = vae.denormalize(engine, latent)?.0;
    let latent_frames = engine.shape(&latent)[0];
    let mut stream = vae.stream();
    for start in (0..latent_frames).step_by(DECODE_CHUNK) {
        let chunk = engine.narrow(&latent, 0, start, DECODE_CHUNK.min(latent_frames - start))?;
        let frames = stream.push(engine, &VaeLatent(chunk), &mut |_, _| ())?;
        let (count, rgb24) = (engine.shape(&frames)[0], engine.to_rgb8(&frames)?);
        drop(frames);
        hand_over(&rgb24, count)?;
    }
    Ok(())
}

/// What a denoise starts from.
struct Inputs<E: Engine> {
    /// The first step to be computed.
    first: usize,
    /// `[C, T, h, w]` before it.
    latent: E::Tensor,
    /// Of both branches, `[tokens, text_dim]`; none without text.
    features: [Option<E::Tensor>; 2],
}

/// [`Pipeline::open`] has looked for every network.
fn missing(what: &str) -> ModelError {
    ModelError::Input(format!("the checkpoint has no {what}"))
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
