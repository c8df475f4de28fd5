//! A device of this node by its engine: denoises, alone or as a rank of a group, and decodes tiles.

use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;

use farm_core::engine::{Engine, EngineError};
use farm_core::job::state::{FailureKind, Progress};
use farm_core::model::ModelError;
use farm_core::model::latent::{DitLatent, LatentCheckpoint};
use farm_core::model::pipeline::{self, Pipeline, RenderObserver};
use farm_core::precision::Precision;
use farm_core::tiles::message::FromHand;

use crate::decode::hand::{self, HandError};
use crate::device_thread::{Decode, Denoise, Denoised, Device, RenderError};
use crate::devices::Compute;
use crate::engine::DeviceEngine;
use crate::models::ModelShelf;

pub struct EngineDevice {
    engine: DeviceEngine,
    /// What the engine is of, and which of its devices this is.
    place: (Compute, usize),
    shelf: Arc<ModelShelf>,
}

impl EngineDevice {
    /// Device `index` of `compute`.
    pub fn new(compute: &Compute, index: usize, shelf: Arc<ModelShelf>) -> anyhow::Result<Self> {
        Ok(Self { engine: compute.engine(index)?, place: (compute.clone(), index), shelf })
    }

    /// Devices of one name are taken to be equally fast: what one has taken is expected of all.
    pub fn name(&self) -> String {
        named(self.engine.name(), self.engine.precision())
    }

    pub fn precision(&self) -> Precision {
        self.engine.precision()
    }
}

fn named(engine: String, precision: Precision) -> String {
    match precision {
        Precision::F32 => engine,
        other => format!("{engine} in {other}"),
    }
}

impl Device for EngineDevice {
    fn start(&mut self) {
        let (compute, index) = &self.place;
        if let Err(error) = compute.settle(*index) {
            // The engine's own threads are in their place.
            tracing::warn!("device {index} computes on any core: {error:#}");
        }
    }

    fn denoise(&mut self, work: Denoise) -> Result<Denoised, RenderError> {
        self.try_denoise(&work).map_err(|error| {
            // Whatever it is, the others must not wait for this rank.
            work.group.abort(&error.to_string());
            match error {
                RenderError::Group(_) if work.monitor.is_stopped() => RenderError::Stopped,
                error => error,
            }
        })
    }

    fn decode(&mut self, work: Decode) {
        let Decode { model, shape, latent, link, stop } = work;
        let decoder = self.pipeline(&model).and_then(|pipeline| pipeline.decoder(&self.engine).map_err(render_error));
        let ready = decoder.and_then(|decoder| {
            Ok((decoder, DitLatent(self.engine.upload(&latent.values, &shape).map_err(RenderError::device)?)))
        });
        match ready {
            Ok((decoder, latent)) => match hand::work(&self.engine, &decoder, &latent, link, &stop) {
                Ok(()) | Err(HandError::Left | HandError::Stopped) => {}
                Err(error) => tracing::warn!(%error, "a decode failed on this device"),
            },
            Err(error) => {
                // If it cannot be said, nobody listens.
                let _ = link.to.blocking_send(FromHand::Failed { message: error.to_string() });
            }
        }
    }
}

impl EngineDevice {
    fn pipeline(&self, model: &str) -> Result<&Pipeline<DeviceEngine>, RenderError> {
        let (compute, index) = &self.place;
        let pipeline = self.shelf.pipeline(model, compute, *index);
        pipeline.ok_or_else(|| RenderError::device(format!("model {model} is not loaded")))
    }

    fn try_denoise(&self, work: &Denoise) -> Result<Denoised, RenderError> {
        let leads = work.group.is_leader();
        let mut watcher = Watcher { work, leads, warnings: Vec::new() };
        let pipeline = self.pipeline(&work.model)?;
        let denoised = pipeline.denoise(&self.engine, &work.group, &work.spec, &work.start, &mut watcher);
        let denoised = denoised.map_err(|error| match error {
            ModelError::Engine(EngineError::OutOfMemory { .. }) => {
                let topology = work.group.topology();
                let remedy = self.shelf.remedy(&work.model, &self.place.0, &work.spec, topology);
                let remedy = remedy.map_or_else(String::new, |remedy| format!("; {remedy}"));
                RenderError::failed(FailureKind::OutOfMemory, format!("{error}{remedy}"))
            }
            error => render_error(error),
        });
        let pipeline::Denoised { values, text_seconds, denoise_seconds, .. } = denoised?;
        Ok(match leads {
            true => Denoised { latent: values, text_seconds, denoise_seconds, warnings: watcher.warnings },
            false => Denoised::default(),
        })
    }
}

fn render_error(error: ModelError) -> RenderError {
    match error {
        ModelError::Stopped => RenderError::Stopped,
        ModelError::HandedOver { step } => RenderError::HandedOver { step },
        error @ ModelError::Engine(EngineError::OutOfMemory { .. }) => {
            RenderError::failed(FailureKind::OutOfMemory, error)
        }
        ModelError::Input(message) => RenderError::failed(FailureKind::Input, message),
        ModelError::Comm(error) => RenderError::Group(error),
        error => RenderError::device(error),
    }
}

/// What a rank says while it denoises. The leader speaks for the group.
struct Watcher<'a> {
    work: &'a Denoise,
    leads: bool,
    warnings: Vec<String>,
}

impl RenderObserver for Watcher<'_> {
    fn progress(&mut self, progress: Progress) -> ControlFlow<()> {
        let monitor = &self.work.monitor;
        let goes_on = if self.leads { monitor.advance(progress) } else { !monitor.is_stopped() };
        if goes_on { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    }

    fn warning(&mut self, message: &str) {
        self.warnings.push(message.to_owned());
    }

    fn wants_checkpoint(&mut self, step: u32, _steps: u32) -> bool {
        self.work.checkpoints.wants(step)
    }

    fn hands_over(&mut self) -> bool {
        self.work.monitor.hands_over()
    }

    fn checkpoint(&mut self, checkpoint: LatentCheckpoint) {
        self.work.checkpoints.put(checkpoint);
    }

    fn frames(&mut self, _rgb24: &[u8], _count: usize) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_that_compute_differently_have_different_names() {
        let name = |precision| named("cpu (2 threads)".to_owned(), precision);
        assert_eq!(name(Precision::F32), "cpu (2 threads)", "what was learned of older versions' nodes is kept");
        assert_eq!(name(Precision::Bf16), "cpu (2 threads) in bf16");
    }
}
