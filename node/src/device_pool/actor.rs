//! Owns the devices' reservations, the running attempts, and what helps others'.

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use farm_core::id::{AttemptKey, DeviceIndex};
use farm_core::job::state::FailureKind;
use farm_core::wire::to_node::{HelpDecode, StartAttempt};
use farm_core::wire::to_scheduler::AttemptOutcome;
use futures::FutureExt;
use ractor::{Actor, ActorProcessingErr, ActorRef};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::messages::PoolMessage;
use super::state::{Devices, Holder, Reserve};
use crate::attempt::{self, Hands, Lease, Workshop, help};
use crate::device_thread::{Orders, Reservation, panic_message};
use crate::progress::ProgressCell;
use crate::session::messages::SessionMessage;

/// Answers about hands that wait for an attempt. It takes one at a time, and each round has one.
const ANSWERS: usize = 4;

pub struct DevicePool;

pub struct Arguments {
    pub workshop: Arc<Workshop>,
    pub session: ActorRef<SessionMessage>,
}

pub struct State {
    workshop: Arc<Workshop>,
    session: ActorRef<SessionMessage>,
    devices: Devices,
    /// What waits for devices which are being stopped.
    waiting: HashMap<Holder, Waiting>,
    running: HashMap<AttemptKey, Running>,
    helping: HashMap<(AttemptKey, DeviceIndex), Running>,
    /// Attempts that hold devices, as last said.
    noted: Vec<AttemptKey>,
}

enum Waiting {
    Start(Box<StartAttempt>, ProgressCell),
    Help(Box<HelpDecode>),
}

struct Running {
    orders: Orders,
    task: JoinHandle<()>,
    hands: Option<mpsc::Sender<Hands>>,
}

impl Running {
    fn stop(self) {
        self.orders.stop();
        self.task.abort();
    }
}

impl Actor for DevicePool {
    type Msg = PoolMessage;
    type State = State;
    type Arguments = Arguments;

    async fn pre_start(&self, _: ActorRef<PoolMessage>, arguments: Arguments) -> Result<State, ActorProcessingErr> {
        let Arguments { workshop, session } = arguments;
        let devices = Devices::new(workshop.devices.len());
        let (running, helping) = (HashMap::new(), HashMap::new());
        Ok(State { workshop, session, devices, waiting: HashMap::new(), running, helping, noted: Vec::new() })
    }

    async fn handle(
        &self,
        me: ActorRef<PoolMessage>,
        message: PoolMessage,
        state: &mut State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            PoolMessage::Start { start, progress } => {
                let holder = Holder::Attempt(start.key);
                match state.devices.reserve(holder, &start.devices) {
                    Ok(Reserve::Granted) => state.launch(&me, *start, progress),
                    Ok(Reserve::Waiting) => drop(state.waiting.insert(holder, Waiting::Start(start, progress))),
                    Err(refusal) => {
                        tracing::warn!(key = %start.key, %refusal, "lease refused");
                        let message = refusal.to_string();
                        let outcome = AttemptOutcome::Failed { kind: FailureKind::Device, message };
                        state.session.cast(SessionMessage::Ended { key: start.key, outcome })?;
                    }
                }
            }
            PoolMessage::Help(help) => {
                let (key, device) = (help.key, help.device);
                let holder = Holder::Help(key, device);
                match state.devices.reserve(holder, &[device]) {
                    Ok(Reserve::Granted) => state.help(&me, *help),
                    Ok(Reserve::Waiting) => drop(state.waiting.insert(holder, Waiting::Help(help))),
                    Err(refusal) => {
                        tracing::warn!(%key, %device, %refusal, "help refused");
                        state.session.cast(SessionMessage::HelpEnded { key, device })?;
                    }
                }
            }
            PoolMessage::Hands { key, round, keep, helpers } => {
                if let Some(hands) = state.running.get(&key).and_then(|running| running.hands.as_ref()) {
                    // Fails when the attempt has ended, or went on without an answer and does not listen.
                    let _ = hands.try_send(Hands { round, keep, helpers });
                }
            }
            PoolMessage::Abort(key) => {
                state.devices.abort(Holder::Attempt(key));
                state.waiting.remove(&Holder::Attempt(key));
                if let Some(running) = state.running.remove(&key) {
                    running.stop();
                }
            }
            PoolMessage::Yield(key) => {
                if let Some(running) = state.running.get(&key) {
                    running.orders.hand_over();
                } else if state.waiting.remove(&Holder::Attempt(key)).is_some() {
                    state.devices.abort(Holder::Attempt(key));
                    let outcome = AttemptOutcome::Interrupted { step: 0 };
                    state.session.cast(SessionMessage::Ended { key, outcome })?;
                }
            }
            PoolMessage::Dismiss { key, device } => {
                let holder = Holder::Help(key, device);
                state.devices.abort(holder);
                if let Some(running) = state.helping.remove(&(key, device)) {
                    // Its end is said when the device is idle.
                    running.stop();
                } else if state.waiting.remove(&holder).is_some() {
                    state.session.cast(SessionMessage::HelpEnded { key, device })?;
                }
            }
            PoolMessage::Released { holder, device } => {
                let granted = state.devices.release(holder, device);
                match holder {
                    Holder::Attempt(key) => {
                        let keep = state.devices.held(holder);
                        state.session.cast(SessionMessage::Released { key, keep })?;
                    }
                    Holder::Help(key, device) => {
                        state.helping.remove(&(key, device));
                        state.session.cast(SessionMessage::HelpEnded { key, device })?;
                    }
                }
                state.note();
                for holder in granted {
                    match state.waiting.remove(&holder) {
                        Some(Waiting::Start(start, progress)) => state.launch(&me, *start, progress),
                        Some(Waiting::Help(help)) => state.help(&me, *help),
                        None => {}
                    }
                }
            }
            PoolMessage::Finished(key) => {
                state.running.remove(&key);
                // A device may still be in the middle of a step that nobody waits for.
                state.devices.abort(Holder::Attempt(key));
            }
        }
        Ok(())
    }
}

impl State {
    /// Whose work is on the devices, if that has changed.
    fn note(&mut self) {
        let holding = self.devices.attempts();
        if holding != self.noted {
            (self.workshop.holding)(&holding);
            self.noted = holding;
        }
    }

    fn launch(&mut self, me: &ActorRef<PoolMessage>, start: StartAttempt, progress: ProgressCell) {
        let key = start.key;
        self.note();
        let orders = Orders::default();
        let lease: Lease =
            start.devices.iter().map(|&device| (device, reserved(me, Holder::Attempt(key), device))).collect();
        let (hands, answers) = mpsc::channel(ANSWERS);
        let attempt = attempt::run(self.workshop.clone(), start, lease, answers, progress, orders.clone());
        let (pool, session) = (me.clone(), self.session.clone());
        let task = tokio::spawn(async move {
            // Without this a panic of ours would leave the attempt listed as running for ever.
            let outcome = AssertUnwindSafe(attempt).catch_unwind().await.unwrap_or_else(|panic| {
                let message = format!("the node's program panicked: {}", panic_message(&*panic));
                AttemptOutcome::Failed { kind: FailureKind::Device, message }
            });
            // Before the scheduler can lease the devices again. Both actors end only with the process.
            let _ = pool.cast(PoolMessage::Finished(key));
            let _ = session.cast(SessionMessage::Ended { key, outcome });
        });
        self.running.insert(key, Running { orders, task, hands: Some(hands) });
    }

    fn help(&mut self, me: &ActorRef<PoolMessage>, help: HelpDecode) {
        let (key, device) = (help.key, help.device);
        self.note();
        let orders = Orders::default();
        let reservation = reserved(me, Holder::Help(key, device), device);
        // If it panics the reservation is dropped all the same.
        let task = tokio::spawn(help::run(self.workshop.clone(), help, reservation, orders.stop_flag()));
        self.helping.insert((key, device), Running { orders, task, hands: None });
    }
}

/// Travels with the work to the device's thread, and says so when the last that has it drops it.
struct Reserved {
    pool: ActorRef<PoolMessage>,
    holder: Holder,
    device: DeviceIndex,
}

fn reserved(pool: &ActorRef<PoolMessage>, holder: Holder, device: DeviceIndex) -> Reservation {
    Arc::new(Reserved { pool: pool.clone(), holder, device })
}

impl Drop for Reserved {
    fn drop(&mut self) {
        // Fails only when the process ends.
        let _ = self.pool.cast(PoolMessage::Released { holder: self.holder, device: self.device });
    }
}
