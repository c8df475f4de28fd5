//! One OS thread per device: it owns the device, takes one render at a time and answers through a channel. Nothing
//! asynchronous ever waits for a step.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread;

use farm_core::api::StageSeconds;
use farm_core::comm::CommError;
use farm_core::engine::cpu::CpuEngine;
use farm_core::id::DeviceIndex;
use farm_core::job::spec::RenderSpec;
use farm_core::job::state::{FailureKind, Progress};
use farm_core::model::pipeline::Start;
use farm_core::parallel::group::RankGroup;
use tokio::sync::oneshot;

use crate::checkpoints::Slot;
use crate::progress::ProgressCell;

/// A device's part in rendering a clip: the leader of a group makes the mp4, the others denoise with it.
pub struct Work {
    /// A name that the node offers.
    pub model: String,
    pub spec: RenderSpec,
    /// This device's place among those that render the clip. The device's thread owns it: if it panics, its end of the
    /// group is dropped and the other ranks hear of it.
    pub group: RankGroup<CpuEngine>,
    /// Where the leader starts.
    pub start: Arc<Start>,
    /// Where the leader's checkpoints go.
    pub checkpoints: Slot,
    /// Where the leader's mp4 goes.
    pub clip: PathBuf,
    pub monitor: Monitor,
}

/// How a render is watched and stopped. Cloning shares it.
#[derive(Clone)]
pub struct Monitor {
    pub progress: ProgressCell,
    stop: Arc<AtomicBool>,
    log: Arc<dyn Fn(String) + Send + Sync>,
}

impl Monitor {
    pub fn new(progress: ProgressCell, stop: Arc<AtomicBool>, log: Arc<dyn Fn(String) + Send + Sync>) -> Self {
        Self { progress, stop, log }
    }

    /// Takes the progress in and writes a line to the job's log where a stage begins. False: stop, and return
    /// [`RenderError::Stopped`].
    pub fn advance(&self, progress: Progress) -> bool {
        if self.progress.set(progress).is_some() {
            self.log(format!("{} begins", progress.stage.as_str()));
        }
        !self.is_stopped()
    }

    pub fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// A line for the job's log.
    pub fn log(&self, line: String) {
        (self.log)(line);
    }
}

/// A finished mp4, from the leader, and what is to be said about it.
#[derive(Debug, Default)]
pub struct Rendered {
    /// Text to encode; the rest is not the device's business.
    pub seconds: StageSeconds,
    pub warnings: Vec<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum RenderError {
    #[error("{message}")]
    Failed { kind: FailureKind, message: String },
    /// Another rank of the group failed, and this one could not go on.
    #[error(transparent)]
    Group(CommError),
    /// Somebody asked for it.
    #[error("stopped")]
    Stopped,
}

impl RenderError {
    pub fn device(message: impl ToString) -> Self {
        Self::Failed { kind: FailureKind::Device, message: message.to_string() }
    }
}

/// Something that renders clips, one at a time. Lives on its own thread.
pub trait Device: Send + 'static {
    /// Does its part of the clip; the leader renders it into `work.clip`. If it fails it ends the group. The leader calls
    /// `work.monitor.advance` at least once per step and chunk of frames; the others look whether it is stopped.
    fn render(&mut self, work: Work) -> Result<Rendered, RenderError>;
}

/// Shared by all devices of a group: the last to become idle gives it back.
pub type Reservation = Arc<dyn Send + Sync>;

struct Command {
    work: Work,
    /// Dropped when the device is idle again, before the answer: whoever has the answers of all devices may use them.
    reservation: Reservation,
    answer: oneshot::Sender<Result<Rendered, RenderError>>,
}

/// The way to a device's thread. The thread ends when the last handle is dropped.
#[derive(Clone)]
pub struct DeviceHandle {
    index: DeviceIndex,
    commands: SyncSender<Command>,
}

impl DeviceHandle {
    /// Starts the thread of device `index`.
    pub fn spawn(index: DeviceIndex, device: impl Device) -> std::io::Result<Self> {
        // Devices are reserved before they are used, so one place is enough; it is never waited for.
        let (commands, inbox) = sync_channel(1);
        thread::Builder::new().name(format!("device-{index}")).spawn(move || serve(device, inbox))?;
        Ok(Self { index, commands })
    }

    /// Hands work to the thread and waits for its end. `reservation` is dropped when the device is idle again, also
    /// if nobody waits any more.
    pub async fn render(&self, work: Work, reservation: Reservation) -> Result<Rendered, RenderError> {
        let (answer, rendered) = oneshot::channel();
        self.commands.try_send(Command { work, reservation, answer }).map_err(|error| {
            let state = match error {
                TrySendError::Full(_) => "has work already",
                TrySendError::Disconnected(_) => "has no thread any more",
            };
            RenderError::device(format!("device {} {state}", self.index))
        })?;
        rendered.await.unwrap_or_else(|_| Err(RenderError::device(format!("device {} gave no answer", self.index))))
    }
}

fn serve(mut device: impl Device, inbox: Receiver<Command>) {
    while let Ok(Command { work, reservation, answer }) = inbox.recv() {
        // Aborted while it was queued.
        let rendered = if work.monitor.is_stopped() {
            work.group.abort("stopped");
            Err(RenderError::Stopped)
        } else {
            // A panic is a bug of ours or of a library in one clip. The device holds no state between clips that it
            // could have left half changed, so the thread lives on.
            catch_unwind(AssertUnwindSafe(|| device.render(work)))
                .unwrap_or_else(|panic| Err(RenderError::device(format!("panicked: {}", panic_message(&*panic)))))
        };
        drop(reservation);
        // Nobody waits for an aborted attempt.
        let _ = answer.send(rendered);
    }
}

pub fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}
