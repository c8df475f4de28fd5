//! A share of this machine's processor: renders with the CPU engine, encodes as frames come.

use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

use farm_core::engine::Engine;
use farm_core::engine::cpu::CpuEngine;
use farm_core::job::state::{FailureKind, Progress};
use farm_core::model::ModelError;
use farm_core::model::pipeline::{RenderObserver, Start};
use farm_core::parallel::group::RankGroup;

use crate::device_thread::{Device, Monitor, RenderError, Rendered, Work};
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
    fn render(&mut self, work: &Work) -> Result<Rendered, RenderError> {
        let pipeline = self
            .shelf
            .pipeline(&work.model)
            .ok_or_else(|| RenderError::device(format!("model {} is not loaded", work.model)))?;
        let sink = Mp4Sink::create(&work.clip, work.spec.width, work.spec.height)
            .map_err(|error| RenderError::device(format!("cannot begin the mp4: {error}")))?;
        let mut clip = Clip { sink, monitor: &work.monitor, warnings: Vec::new() };
        let solo = RankGroup::solo().map_err(RenderError::device)?;
        let mut seconds = pipeline
            .render(&self.engine, &solo, &work.spec, &Start::Seed, &mut clip)
            .map_err(|error| match error {
                ModelError::Stopped => RenderError::Stopped,
                ModelError::Input(message) => RenderError::Failed { kind: FailureKind::Input, message },
                error => RenderError::device(error),
            })?
            .seconds;
        let finishing = Instant::now();
        clip.sink.finish().map_err(|error| RenderError::device(format!("cannot finish the mp4: {error}")))?;
        seconds.encode += finishing.elapsed().as_secs_f64();
        Ok(Rendered { seconds, warnings: clip.warnings })
    }
}

/// The clip on its way into the file.
struct Clip<'a> {
    sink: Mp4Sink,
    monitor: &'a Monitor,
    warnings: Vec<String>,
}

impl RenderObserver for Clip<'_> {
    fn progress(&mut self, progress: Progress) -> ControlFlow<()> {
        if self.monitor.advance(progress) { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    }

    fn warning(&mut self, message: &str) {
        self.warnings.push(message.to_owned());
    }

    fn frames(&mut self, rgb24: &[u8], _count: usize) -> io::Result<()> {
        self.sink.frames(rgb24)
    }
}
