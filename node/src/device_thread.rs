//! One OS thread per device: it owns the device, takes one piece of work at a time and answers through a channel. Nothing
//! asynchronous ever waits for a step.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread;

use farm_core::comm::CommError;
use farm_core::id::DeviceIndex;
use farm_core::job::spec::RenderSpec;
use farm_core::job::state::{FailureKind, Progress};
use farm_core::model::latent::LatentCheckpoint;
use farm_core::model::pipeline::Start;
use farm_core::parallel::group::RankGroup;
use farm_core::tiles::message::{FromHand, ToHand};
use tokio::sync::oneshot;

use crate::checkpoints::Slot;
use crate::engine::DeviceEngine;
use crate::link::Link;
use crate::progress::ProgressCell;

/// A device's part in denoising a clip: the leader of a group encodes the text, the others denoise with it.
pub struct Denoise {
    /// A name that the node offers.
    pub model: String,
    pub spec: RenderSpec,
    /// This device's place among those that render the clip. The device's thread owns it: if it panics, its end of the
    /// group is dropped and the other ranks hear of it.
    pub group: RankGroup<DeviceEngine>,
    /// Where the leader starts.
    pub start: Arc<Start>,
    /// Where the leader's checkpoints go.
    pub checkpoints: Slot,
    pub monitor: Monitor,
}

/// A device's part in decoding a clip.
pub struct Decode {
    /// A name that the node offers.
    pub model: String,
    /// `[C, T, h, w]`
    pub shape: [usize; 4],
    pub latent: Arc<LatentCheckpoint>,
    /// To the crew of the decode, wherever that is.
    pub link: Link<FromHand, ToHand>,
    pub stop: Arc<AtomicBool>,
}

/// What an attempt is told while it runs. Cloning shares it.
#[derive(Clone, Debug, Default)]
pub struct Orders {
    stop: Arc<AtomicBool>,
    hand_over: Arc<AtomicBool>,
}

impl Orders {
    /// End; nobody waits for what is made.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// End at the next step border, with the latent in the store. Past the last step there is none.
    pub fn hand_over(&self) {
        self.hand_over.store(true, Ordering::Relaxed);
    }

    pub fn stop_flag(&self) -> Arc<AtomicBool> {
        self.stop.clone()
    }
}

/// How a render is watched and told what to do. Cloning shares it.
#[derive(Clone)]
pub struct Monitor {
    pub progress: ProgressCell,
    pub orders: Orders,
    log: Arc<dyn Fn(String) + Send + Sync>,
}

impl Monitor {
    pub fn new(progress: ProgressCell, orders: Orders, log: Arc<dyn Fn(String) + Send + Sync>) -> Self {
        Self { progress, orders, log }
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
        self.orders.stop.load(Ordering::Relaxed)
    }

    pub fn hands_over(&self) -> bool {
        self.orders.hand_over.load(Ordering::Relaxed)
    }

    /// A line for the job's log.
    pub fn log(&self, line: String) {
        (self.log)(line);
    }
}

/// A finished latent, from the leader, and what is to be said about it. Other ranks leave it empty.
#[derive(Debug, Default)]
pub struct Denoised {
    pub latent: Vec<f32>,
    pub text_seconds: f64,
    pub denoise_seconds: f64,
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
    /// Somebody asked for it: the leader has ended the group after so many steps, and put that latent where checkpoints go.
    #[error("handed over at step {step}")]
    HandedOver { step: u32 },
}

impl RenderError {
    pub fn device(message: impl ToString) -> Self {
        Self::failed(FailureKind::Device, message)
    }

    pub fn failed(kind: FailureKind, message: impl ToString) -> Self {
        Self::Failed { kind, message: message.to_string() }
    }
}

/// Something that works on clips, one at a time. Lives on its own thread.
pub trait Device: Send + 'static {
    /// Called first, on the device's own thread.
    fn start(&mut self) {}

    /// Does its part of the denoising. If it fails it ends the group. The leader calls `work.monitor.advance` at least once
    /// per step, and hands over where it is told to; the others look whether it is stopped.
    fn denoise(&mut self, work: Denoise) -> Result<Denoised, RenderError>;

    /// Decodes tiles until the crew is done with it, or gone. What goes wrong is told to the crew.
    fn decode(&mut self, work: Decode);
}

/// Dropped when a device is idle again.
pub type Reservation = Arc<dyn Send + Sync>;

enum Command {
    Denoise(Box<Denoise>, oneshot::Sender<Result<Denoised, RenderError>>),
    Decode(Decode, oneshot::Sender<()>),
}

/// The way to a device's thread. The thread ends when the last handle is dropped.
#[derive(Clone)]
pub struct DeviceHandle {
    index: DeviceIndex,
    /// With each the reservation, dropped when the device is idle again, before the answer: whoever has the answers of all
    /// devices may use them.
    commands: SyncSender<(Command, Reservation)>,
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
    pub async fn denoise(&self, work: Denoise, reservation: Reservation) -> Result<Denoised, RenderError> {
        let (answer, denoised) = oneshot::channel();
        self.command(Command::Denoise(Box::new(work), answer), reservation)?;
        let gone = || RenderError::device(format!("device {} gave no answer", self.index));
        denoised.await.unwrap_or_else(|_| Err(gone()))
    }

    /// As [`DeviceHandle::denoise`], for tiles.
    pub async fn decode(&self, work: Decode, reservation: Reservation) -> Result<(), RenderError> {
        let (answer, ended) = oneshot::channel();
        self.command(Command::Decode(work, answer), reservation)?;
        ended.await.map_err(|_| RenderError::device(format!("device {} gave no answer", self.index)))
    }

    fn command(&self, command: Command, reservation: Reservation) -> Result<(), RenderError> {
        self.commands.try_send((command, reservation)).map_err(|error| {
            let state = match error {
                TrySendError::Full(_) => "has work already",
                TrySendError::Disconnected(_) => "has no thread any more",
            };
            RenderError::device(format!("device {} {state}", self.index))
        })
    }
}

fn serve(mut device: impl Device, inbox: Receiver<(Command, Reservation)>) {
    device.start();
    while let Ok((command, reservation)) = inbox.recv() {
        // A panic is a bug of ours or of a library in one clip. The device holds no state between clips that it could
        // have left half changed, so the thread lives on. Nobody waits for the answers of an aborted attempt.
        match command {
            Command::Denoise(work, answer) => {
                // Aborted while it was queued.
                let denoised = if work.monitor.is_stopped() {
                    work.group.abort("stopped");
                    Err(RenderError::Stopped)
                } else {
                    catch_unwind(AssertUnwindSafe(|| device.denoise(*work))).unwrap_or_else(|panic| {
                        Err(RenderError::device(format!("panicked: {}", panic_message(&*panic))))
                    })
                };
                drop(reservation);
                let _ = answer.send(denoised);
            }
            Command::Decode(work, answer) => {
                // Its end of the link is dropped by a panic, of which the crew hears.
                if let Err(panic) = catch_unwind(AssertUnwindSafe(|| device.decode(work))) {
                    tracing::error!(panic = panic_message(&*panic), "a device panicked in a decode");
                }
                drop(reservation);
                let _ = answer.send(());
            }
        }
    }
}

pub fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}
