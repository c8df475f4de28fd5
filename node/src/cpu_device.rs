//! A share of this machine's processor: renders with the CPU engine, alone or as a rank of a
//! group, and encodes as frames come.

use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

use farm_core::engine::Engine;
use farm_core::engine::cpu::CpuEngine;
use farm_core::job::state::{FailureKind, Progress};
use farm_core::model::ModelError;
use farm_core::model::latent::LatentCheckpoint;
use farm_core::model::pipeline::{Pipeline, RenderObserver};

use crate::device_thread::{Device, RenderError, Rendered, Work};
use crate::encode::{FrameSink, Mp4Sink};
use crate::models::ModelShelf;

pub struct CpuDevice {
    engine: CpuEngine,
    /// Weights are shared; the threads are the device's own.
    shelf: Arc<ModelShelf>,
}

impl CpuDevice {
    pub fn new(threads: usize, shelf: Arc<ModelShelf>) -> anyhow::Result<Self> {
        Ok(Self { engine: CpuEngine::new(threads)?, shelf })
    }

    pub fn name(&self) -> String {
        self.engine.name()
    }
}

impl Device for CpuDevice {
    fn render(&mut self, work: Work) -> Result<Rendered, RenderError> {
        let rendered = if work.group.is_leader() { self.lead(&work) } else { self.follow(&work) };
        rendered.map_err(|error| {
            // Whatever it is, the others must not wait for this rank.
            work.group.abort(&error.to_string());
            match error {
                RenderError::Group(_) if work.monitor.is_stopped() => RenderError::Stopped,
                error => error,
            }
        })
    }
}

impl CpuDevice {
    fn pipeline(&self, work: &Work) -> Result<&Pipeline<CpuEngine>, RenderError> {
        let pipeline = self.shelf.pipeline(&work.model);
        pipeline.ok_or_else(|| RenderError::device(format!("model {} is not loaded", work.model)))
    }

    /// The whole clip.
    fn lead(&self, work: &Work) -> Result<Rendered, RenderError> {
        let pipeline = self.pipeline(work)?;
        let sink = Mp4Sink::create(&work.clip, work.spec.width, work.spec.height)
            .map_err(|error| RenderError::device(format!("cannot begin the mp4: {error}")))?;
        let mut clip = Clip { sink, work, warnings: Vec::new() };
        let rendered = pipeline.render(&self.engine, &work.group, &work.spec, &work.start, &mut clip);
        let mut seconds = rendered.map_err(render_error)?.seconds;
        let finishing = Instant::now();
        clip.sink.finish().map_err(|error| RenderError::device(format!("cannot finish the mp4: {error}")))?;
        seconds.encode += finishing.elapsed().as_secs_f64();
        Ok(Rendered { seconds, warnings: clip.warnings })
    }

    /// This rank's share of the denoising.
    fn follow(&self, work: &Work) -> Result<Rendered, RenderError> {
        let denoised =
            self.pipeline(work)?.denoise(&self.engine, &work.group, &work.spec, &work.start, &mut Follower(work));
        denoised.map_err(render_error)?;
        Ok(Rendered::default())
    }
}

fn render_error(error: ModelError) -> RenderError {
    match error {
        ModelError::Stopped => RenderError::Stopped,
        ModelError::Input(message) => RenderError::Failed { kind: FailureKind::Input, message },
        ModelError::Comm(error) => RenderError::Group(error),
        error => RenderError::device(error),
    }
}

/// The clip on its way into the file.
struct Clip<'a> {
    sink: Mp4Sink,
    work: &'a Work,
    warnings: Vec<String>,
}

impl RenderObserver for Clip<'_> {
    fn progress(&mut self, progress: Progress) -> ControlFlow<()> {
        if self.work.monitor.advance(progress) { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    }

    fn warning(&mut self, message: &str) {
        self.warnings.push(message.to_owned());
    }

    fn wants_checkpoint(&mut self, step: u32, _steps: u32) -> bool {
        self.work.checkpoints.wants(step)
    }

    fn checkpoint(&mut self, checkpoint: LatentCheckpoint) {
        self.work.checkpoints.put(checkpoint);
    }

    fn frames(&mut self, rgb24: &[u8], _count: usize) -> io::Result<()> {
        self.sink.frames(rgb24)
    }
}

/// A rank that has no clip of its own: the leader speaks for the group.
struct Follower<'a>(&'a Work);

impl RenderObserver for Follower<'_> {
    fn progress(&mut self, _progress: Progress) -> ControlFlow<()> {
        if self.0.monitor.is_stopped() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    fn warning(&mut self, _message: &str) {}

    fn frames(&mut self, _rgb24: &[u8], _count: usize) -> io::Result<()> {
        Ok(())
    }
}
