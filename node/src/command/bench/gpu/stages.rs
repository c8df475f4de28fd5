//! The stages of a clip on a device whose launches are timed, in the order and with the networks in memory that a render has.

use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use farm_core::engine::cuda::CudaEngine;
use farm_core::engine::cuda::plan::{Clip, Plan};
use farm_core::engine::cuda::profile::{Profile, Profiled, Timed};
use farm_core::engine::{Engine, SequenceOps};
use farm_core::job::spec::{FRAME_STEP, GuidanceScale};
use farm_core::job::state::{Progress, Stage};
use farm_core::model::ModelError;
use farm_core::model::dit::Dit;
use farm_core::model::latent::DitLatent;
use farm_core::model::noise;
use farm_core::model::pipeline::decode_whole;
use farm_core::model::sampler::Sampler;
use farm_core::model::schedule::SigmaSchedule;
use farm_core::model::t5::T5Encoder;
use farm_core::model::vae::VaeDecoder;
use farm_core::model::weights::Loader;
use farm_core::parallel::group::RankGroup;
use farm_core::precision::Precision;
use farm_core::tiles::plan::Tiling;

use super::{Model, SEED, go_on};
use crate::command::watch::Show;
use crate::decode::local::{self, LocalDecode};
use crate::decode::shape;
use crate::decode::stitcher::StitchError;
use crate::encode::FrameSink;

/// Pixels of a latent pixel.
const PIXELS: usize = 8;
/// Latent frames that are decoded before the decode that counts: the first of a clip is another than all others.
const WARM_UP: usize = 2;

/// What to measure.
pub struct Bench<'a> {
    pub model: &'a Model,
    pub clip: &'a Clip,
    pub plan: &'a Plan,
    pub precision: Precision,
    pub steps: usize,
    pub stop: &'a Arc<AtomicBool>,
}

pub struct Measured {
    pub text: Profile,
    /// Of each step whose kernels are not timed.
    pub steps: Vec<Duration>,
    /// Of one more.
    pub step: Profile,
    pub decode: Profile,
}

type Watched<D> = CudaEngine<Profiled<D>>;
type Tensor<D> = <Watched<D> as SequenceOps>::Tensor;

impl Bench<'_> {
    pub fn run<D: Timed>(&self, device: &Arc<Profiled<D>>, show: &mut Show) -> anyhow::Result<Measured> {
        let engine = CudaEngine::new(device.clone(), self.precision);
        let Model { dit, t5, vae, .. } = self.model;
        let shown = |stage, done, total| Progress { stage, done, total, eta_seconds: None };

        show.progress(shown(Stage::Text, 0, 1));
        let source = self.model.t5_weights()?;
        let encoder = match self.plan.kept {
            true => T5Encoder::load(&engine, source, t5)?,
            false => T5Encoder::open(&engine, source, t5)?,
        };
        let load_dit = || -> anyhow::Result<_> {
            let loader = Loader { engine: &engine, source: self.model.dit_weights()? };
            Ok(match self.plan.streaming.resident < dit.num_layers {
                true => Dit::load_streamed(&loader, dit, self.plan.streaming)?,
                false => Dit::load(&loader, dit)?,
            })
        };
        let load_vae = || -> anyhow::Result<_> {
            let loader = Loader { engine: &engine, source: self.model.vae_weights()? };
            Ok(Arc::new(VaeDecoder::load(&loader, vae)?))
        };
        // With room for all, all networks are there from the beginning, as in a render.
        let kept = if self.plan.kept { Some((load_dit()?, load_vae()?)) } else { None };
        go_on(self.stop)?;
        let (features, text) = self.text(&engine, &encoder)?;
        let (encoder, (dit, vae)) = match kept {
            Some((dit, vae)) => (Some(encoder), (dit, Some(vae))),
            None => {
                drop(encoder);
                (None, (load_dit()?, None))
            }
        };
        let (latent, steps, step) = self.denoise(&engine, &dit, &features, show)?;
        drop(features);
        let vae = vae.map_or_else(load_vae, Ok)?;
        go_on(self.stop)?;
        let decode = self.decode(&engine, &vae, latent, show)?;
        // Until here they take their room.
        drop((encoder, dit));
        Ok(Measured { text, steps, step, decode })
    }

    fn text<D: Timed>(
        &self,
        engine: &Watched<D>,
        encoder: &T5Encoder<Watched<D>>,
    ) -> anyhow::Result<(Tensor<D>, Profile)> {
        let ids: Vec<u32> = (0..self.clip.text[0] as u32).map(|i| i % self.model.t5.vocab_size as u32).collect();
        drop(encoder.encode(engine, &ids)?);
        go_on(self.stop)?;
        engine.device().begin()?;
        let features = encoder.encode(engine, &ids)?;
        Ok((features, engine.device().end()?))
    }

    /// Steps as they come in a clip: one that does not count, those by the clock, and one whose kernels are timed.
    fn denoise<D: Timed>(
        &self,
        engine: &Watched<D>,
        dit: &Dit<Watched<D>>,
        features: &Tensor<D>,
        show: &mut Show,
    ) -> anyhow::Result<(Tensor<D>, Vec<Duration>, Profile)> {
        let (defaults, timed, group) = (&self.model.defaults, self.steps + 1, RankGroup::solo()?);
        let linear_steps = defaults.linear_steps.map(|steps| steps as usize);
        let all = (defaults.num_inference_steps as usize).max(timed + 1);
        let schedule = SigmaSchedule::linear_quadratic(all, defaults.threshold_noise, linear_steps)?;
        let size = self.latent_size();
        let noise = engine.upload(&noise::normals(SEED, 0..size.iter().product::<usize>() as u64), &size)?;
        let sampler = Sampler {
            dit,
            geometry: &dit.geometry(engine, &group, size)?,
            cond: &dit.text_conditioning(engine, &group, Some(features))?,
            uncond: &dit.text_conditioning(engine, &group, None)?,
            schedule: &schedule,
            guidance: &GuidanceScale::Constant(defaults.guidance_scale.at(0)),
            group: &group,
        };
        let (mut began, mut steps) = (Instant::now(), Vec::new());
        let mut profile = None;
        let mut latest = None;
        let mut on_step = |done: usize, z: &Tensor<D>| -> Result<bool, ModelError> {
            show.progress(Progress {
                stage: Stage::Denoise,
                done: done as u32,
                total: timed as u32 + 1,
                eta_seconds: None,
            });
            engine.device().settle()?;
            let now = Instant::now();
            if (2..=timed).contains(&done) {
                steps.push(now - began);
            }
            began = now;
            if done == timed {
                engine.device().begin()?;
            } else if done > timed {
                profile = Some(engine.device().end()?);
                latest = Some(z.clone());
                return Ok(false);
            }
            go_on(self.stop)?;
            Ok(true)
        };
        let mut failed = None;
        let ended = sampler.run(engine, &noise, 0, &mut |done, _, z| match on_step(done, z) {
            Ok(true) => ControlFlow::Continue(()),
            Ok(false) => ControlFlow::Break(()),
            Err(error) => {
                failed = Some(error);
                ControlFlow::Break(())
            }
        });
        if let Some(error) = failed {
            return Err(error.into());
        }
        let (Some(profile), Some(latent)) = (profile, latest) else {
            // It ends where it is told to, or with an error.
            return Err(ended.err().unwrap_or(ModelError::Stopped).into());
        };
        ensure!(engine.download(&latent)?.iter().all(|value| value.is_finite()), "the latent is not finite");
        Ok((latent, steps, profile))
    }

    fn decode<D: Timed>(
        &self,
        engine: &Watched<D>,
        vae: &Arc<VaeDecoder<Watched<D>>>,
        latent: Tensor<D>,
        show: &mut Show,
    ) -> anyhow::Result<Profile> {
        let mut shown = |done| {
            let total = self.clip.frames;
            show.progress(Progress { stage: Stage::Decode, done, total, eta_seconds: None });
        };
        shown(0);
        let device = engine.device();
        if self.plan.tiling != Tiling::WHOLE {
            // The first decode has whatever a library takes to choose its ways; tiles are long, and it is little.
            let size = self.latent_size();
            let work = LocalDecode {
                hands: vec![(CudaEngine::new(device.clone(), self.precision), vae.clone())],
                latent: &engine.download(&latent)?,
                size,
                shape: shape(self.plan.tiling, size, &self.model.vae).map_err(anyhow::Error::msg)?,
                settle: &|_| Ok(()),
                stop: self.stop.clone(),
            };
            drop(latent);
            device.begin()?;
            let decoded = local::decode(work, Box::new(|| Ok(Box::new(Nowhere))), Box::new(&mut shown))?;
            let profile = device.end()?;
            return match decoded {
                Ok(_) => Ok(profile),
                Err(StitchError::Stopped) => Err(ModelError::Stopped.into()),
                Err(error) => bail!("{error}"),
            };
        }
        let first = engine.narrow(&latent, 1, 0, WARM_UP.min(self.latent_size()[1]))?;
        let latent = DitLatent(latent);
        decode_whole(engine, vae, &DitLatent(first), &mut |_, _| go_on(self.stop))?;
        let mut done = 0;
        device.begin()?;
        decode_whole(engine, vae, &latent, &mut |_, count| {
            done += count as u32;
            shown(done);
            go_on(self.stop)
        })?;
        device.end().context("cannot read the times of the decode")
    }

    /// `[C, T, h, w]`
    fn latent_size(&self) -> [usize; 4] {
        let Clip { width, height, frames, .. } = *self.clip;
        let [height, width] = [height, width].map(|size| size as usize / PIXELS);
        [self.model.dit.in_channels, (frames - 1) as usize / FRAME_STEP as usize + 1, height, width]
    }
}

/// Frames that nobody wants.
struct Nowhere;

impl FrameSink for Nowhere {
    fn frames(&mut self, _rgb24: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn finish(&mut self) -> io::Result<()> {
        Ok(())
    }
}
