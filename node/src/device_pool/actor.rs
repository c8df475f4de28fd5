//! Owns the devices' reservations and the running attempts.

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use farm_core::id::AttemptKey;
use farm_core::job::state::FailureKind;
use farm_core::wire::to_node::StartAttempt;
use farm_core::wire::to_scheduler::AttemptOutcome;
use futures::FutureExt;
use ractor::{Actor, ActorProcessingErr, ActorRef};
use tokio::task::JoinHandle;

use super::messages::PoolMessage;
use super::state::{Devices, Holder, Reserve};
use crate::attempt::{self, Workshop};
use crate::device_thread::panic_message;
use crate::progress::ProgressCell;
use crate::session::messages::SessionMessage;

pub struct DevicePool;

pub struct Arguments {
    pub workshop: Arc<Workshop>,
    pub session: ActorRef<SessionMessage>,
}

pub struct State {
    workshop: Arc<Workshop>,
    session: ActorRef<SessionMessage>,
    devices: Devices,
    /// Attempts that wait for devices which are being aborted.
    waiting: HashMap<AttemptKey, (Box<StartAttempt>, ProgressCell)>,
    running: HashMap<AttemptKey, Running>,
}

struct Running {
    /// Read by the device between two steps.
    stop: Arc<AtomicBool>,
    task: JoinHandle<()>,
}

impl Actor for DevicePool {
    type Msg = PoolMessage;
    type State = State;
    type Arguments = Arguments;

    async fn pre_start(&self, _: ActorRef<PoolMessage>, arguments: Arguments) -> Result<State, ActorProcessingErr> {
        let Arguments { workshop, session } = arguments;
        let devices = Devices::new(workshop.devices.len());
        Ok(State { workshop, session, devices, waiting: HashMap::new(), running: HashMap::new() })
    }

    async fn handle(
        &self,
        me: ActorRef<PoolMessage>,
        message: PoolMessage,
        state: &mut State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            PoolMessage::Start { start, progress } => {
                match state.devices.reserve(Holder::Attempt(start.key), &start.devices) {
                    Ok(Reserve::Granted) => state.launch(&me, *start, progress),
                    Ok(Reserve::Waiting) => {
                        state.waiting.insert(start.key, (start, progress));
                    }
                    Err(refusal) => {
                        tracing::warn!(key = %start.key, %refusal, "lease refused");
                        let outcome =
                            AttemptOutcome::Failed { kind: FailureKind::Device, message: refusal.to_string() };
                        state.session.cast(SessionMessage::Ended { key: start.key, outcome })?;
                    }
                }
            }
            PoolMessage::Abort(key) => {
                state.devices.abort(Holder::Attempt(key));
                state.waiting.remove(&key);
                if let Some(Running { stop, task }) = state.running.remove(&key) {
                    stop.store(true, Ordering::Relaxed);
                    task.abort();
                }
            }
            PoolMessage::Released(key) => {
                for granted in state.devices.release(Holder::Attempt(key)) {
                    if let Holder::Attempt(granted) = granted
                        && let Some((start, progress)) = state.waiting.remove(&granted)
                    {
                        state.launch(&me, *start, progress);
                    }
                }
            }
            PoolMessage::Finished(key) => {
                state.running.remove(&key);
            }
            // No attempt asks for hands yet, and no device can help.
            PoolMessage::Hands { .. } | PoolMessage::Dismiss { .. } => {}
            PoolMessage::Help(help) => {
                state.session.cast(SessionMessage::HelpEnded { key: help.key, device: help.device })?;
            }
        }
        Ok(())
    }
}

impl State {
    fn launch(&mut self, me: &ActorRef<PoolMessage>, start: StartAttempt, progress: ProgressCell) {
        let key = start.key;
        let stop = Arc::new(AtomicBool::new(false));
        let reservation = Arc::new(Reservation { pool: me.clone(), key });
        let attempt = attempt::run(self.workshop.clone(), start, reservation, progress, stop.clone());
        let (pool, session) = (me.clone(), self.session.clone());
        let task = tokio::spawn(async move {
            // Without this a panic of ours would leave the attempt listed as running for ever.
            let outcome = AssertUnwindSafe(attempt).catch_unwind().await.unwrap_or_else(|panic| {
                let message = format!("the node's program panicked: {}", panic_message(&*panic));
                AttemptOutcome::Failed { kind: FailureKind::Device, message }
            });
            // Both actors end only with the process.
            let _ = session.cast(SessionMessage::Ended { key, outcome });
            let _ = pool.cast(PoolMessage::Finished(key));
        });
        self.running.insert(key, Running { stop, task });
    }
}

/// Travels with the work to the device's thread, and says so when it is dropped there or anywhere before.
struct Reservation {
    pool: ActorRef<PoolMessage>,
    key: AttemptKey,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // Fails only when the process ends.
        let _ = self.pool.cast(PoolMessage::Released(self.key));
    }
}
