//! The one owner of the farm's state: takes events in order, lets the core decide, commits, then speaks.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use farm_core::id::{BootId, Epoch, JobId};
use farm_core::job::state::JobState;
use farm_core::tiles::plan::Tiling;
use farm_core::wire::to_scheduler::ToScheduler;
use farm_core::wire::{Envelope, codec};
use jiff::Timestamp;
use ractor::{Actor, ActorProcessingErr, ActorRef};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::task::JoinHandle;

use crate::core::effects::{Effects, Send as ToSend};
use crate::core::events::{Event, Time};
use crate::core::farm::{Farm, Limits};
use crate::link::NodeLink;
use crate::queue::store::{Batch, Committed, QueueError, QueueStore};

/// How often the core is told that time passes.
const TICK: Duration = Duration::from_millis(200);
/// Frames that may wait for the actor; more stay in the cluster's bounded queue.
const MAX_FRAMES: usize = 1024;
/// Calls of the API that may wait for the actor.
const MAX_CALLS: usize = 256;
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// A submission of a million lines takes this long at worst.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(120);
/// A store that takes longer for one transaction is as good as broken.
const STORE_TIMEOUT: Duration = Duration::from_secs(120);

/// Why a call has no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    #[error("the scheduler is busy; try again")]
    Timeout,
    #[error("the scheduler is stopping; try again")]
    Stopped,
}

/// Why a cancel or retry does nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("there is no job {0}")]
    Unknown(JobId),
    #[error("job {} is {}", job.short(), state.as_str())]
    State { job: JobId, state: JobState },
}

type Question = Box<dyn FnOnce(&Farm) + Send>;

pub enum SchedulerMessage {
    /// An encoded envelope, stamped when it arrived: a stall of this actor is not the node's silence.
    Frame {
        bytes: Vec<u8>,
        at: Time,
        _permit: OwnedSemaphorePermit,
    },
    SessionClosed {
        boot: BootId,
        at: Time,
    },
    Tick(Time),
    /// Looks at the state and answers by itself.
    Ask(Question),
    Commit(Box<Batch>, oneshot::Sender<Committed>),
    Cancel(JobId, oneshot::Sender<Result<(), Refusal>>),
    Retry(JobId, oneshot::Sender<Result<(), Refusal>>),
}

impl ractor::Message for SchedulerMessage {}

/// What everybody else holds of the actor. Cloning shares it.
#[derive(Clone)]
pub struct Scheduler {
    actor: ActorRef<SchedulerMessage>,
    started: Instant,
    frames: Arc<Semaphore>,
    calls: Arc<Semaphore>,
}

impl Scheduler {
    /// Begins a new reign over the store's queue. The returned task ends when the actor does: by [`Self::stop`], or
    /// because the store failed, and then the process must end too and start again from what is committed.
    pub async fn start(
        limits: Limits,
        store: Arc<dyn QueueStore>,
        store_url: String,
        tiling: Tiling,
        link: Arc<dyn NodeLink>,
    ) -> anyhow::Result<(Self, JoinHandle<()>)> {
        let epoch = store.begin_epoch().await?;
        let live = store.live_jobs().await?;
        tracing::info!(%epoch, live_jobs = live.len(), "queue loaded");
        let started = Instant::now();
        let farm = Farm::restore(limits, epoch, store_url, tiling, live, Time::default());
        let state = State { farm, epoch, store, link, sent: 0 };
        let (actor, task) = Actor::spawn(None, SchedulerActor, state).await?;
        let scheduler = Self {
            actor,
            started,
            frames: Arc::new(Semaphore::new(MAX_FRAMES)),
            calls: Arc::new(Semaphore::new(MAX_CALLS)),
        };
        let ticking = scheduler.clone();
        tokio::spawn(async move {
            let mut interval = tokio::time::interval(TICK);
            interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                interval.tick().await;
                if ticking.actor.cast(SchedulerMessage::Tick(ticking.now())).is_err() {
                    return;
                }
            }
        });
        Ok((scheduler, task))
    }

    fn now(&self) -> Time {
        Time(self.started.elapsed())
    }

    /// Takes an encoded envelope from a node. Waits while too many are under way.
    pub async fn frame(&self, bytes: Vec<u8>) -> Result<(), CallError> {
        let at = self.now();
        let permit = self.frames.clone().acquire_owned().await.map_err(|_| CallError::Stopped)?;
        self.cast(SchedulerMessage::Frame { bytes, at, _permit: permit })
    }

    pub fn session_closed(&self, boot: BootId) -> Result<(), CallError> {
        self.cast(SchedulerMessage::SessionClosed { boot, at: self.now() })
    }

    /// What `question` says of the farm as it is now.
    pub async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&Farm) -> T + Send + 'static,
    ) -> Result<T, CallError> {
        self.call(CALL_TIMEOUT, |reply| {
            SchedulerMessage::Ask(Box::new(move |farm| {
                // Nobody waits any more: nothing to say.
                let _ = reply.send(question(farm));
            }))
        })
        .await
    }

    /// Commits a submission and queues its jobs.
    pub async fn commit(&self, batch: Batch) -> Result<Committed, CallError> {
        self.call(COMMIT_TIMEOUT, |reply| SchedulerMessage::Commit(Box::new(batch), reply)).await
    }

    pub async fn cancel(&self, job: JobId) -> Result<Result<(), Refusal>, CallError> {
        self.call(CALL_TIMEOUT, |reply| SchedulerMessage::Cancel(job, reply)).await
    }

    pub async fn retry(&self, job: JobId) -> Result<Result<(), Refusal>, CallError> {
        self.call(CALL_TIMEOUT, |reply| SchedulerMessage::Retry(job, reply)).await
    }

    /// Ends the actor after the message it is at.
    pub fn stop(&self) {
        self.actor.stop(None);
    }

    fn cast(&self, message: SchedulerMessage) -> Result<(), CallError> {
        self.actor.cast(message).map_err(|_| CallError::Stopped)
    }

    async fn call<T>(
        &self,
        timeout: Duration,
        message: impl FnOnce(oneshot::Sender<T>) -> SchedulerMessage,
    ) -> Result<T, CallError> {
        let answered = async {
            let _permit = self.calls.acquire().await.map_err(|_| CallError::Stopped)?;
            let (reply, answer) = oneshot::channel();
            self.cast(message(reply))?;
            answer.await.map_err(|_| CallError::Stopped)
        };
        tokio::time::timeout(timeout, answered).await.map_err(|_| CallError::Timeout)?
    }
}

struct SchedulerActor;

struct State {
    farm: Farm,
    epoch: Epoch,
    store: Arc<dyn QueueStore>,
    link: Arc<dyn NodeLink>,
    /// Envelopes sent.
    sent: u64,
}

impl Actor for SchedulerActor {
    type Msg = SchedulerMessage;
    type State = State;
    type Arguments = State;

    async fn pre_start(&self, _: ActorRef<Self::Msg>, state: State) -> Result<State, ActorProcessingErr> {
        Ok(state)
    }

    async fn handle(
        &self,
        _: ActorRef<Self::Msg>,
        message: SchedulerMessage,
        state: &mut State,
    ) -> Result<(), ActorProcessingErr> {
        state.on_message(message).await.map_err(|error| {
            // The core has decided something that is not on disk. Acting on it, or on what follows from it, would be
            // wrong, so this is the end; a fresh start has the committed state.
            tracing::error!(%error, "cannot commit; stopping");
            error.into()
        })
    }
}

impl State {
    async fn on_message(&mut self, message: SchedulerMessage) -> Result<(), QueueError> {
        match message {
            SchedulerMessage::Frame { bytes, at, _permit } => match codec::decode::<ToScheduler>(&bytes) {
                Ok(envelope) => self.run(Event::FromNode(Box::new(envelope)), at).await,
                Err(error) => {
                    tracing::warn!(%error, bytes = bytes.len(), "dropped a frame that does not decode");
                    Ok(())
                }
            },
            SchedulerMessage::SessionClosed { boot, at } => self.run(Event::SessionClosed(boot), at).await,
            SchedulerMessage::Tick(at) => self.run(Event::Tick, at).await,
            SchedulerMessage::Ask(question) => {
                question(&self.farm);
                Ok(())
            }
            SchedulerMessage::Commit(batch, reply) => {
                let mut committed = within(self.store.commit_submission(self.epoch, *batch, Timestamp::now())).await?;
                let queued = std::mem::take(&mut committed.queued);
                self.run(Event::Submitted(queued), self.farm.now()).await?;
                let _ = reply.send(committed);
                Ok(())
            }
            SchedulerMessage::Cancel(job, reply) => {
                let outcome = if self.farm.holds(job) {
                    self.run(Event::Cancel(job), self.farm.now()).await?;
                    Ok(())
                } else {
                    match within(self.store.live_job(job)).await? {
                        None => Err(Refusal::Unknown(job)),
                        Some((state, _)) => Err(Refusal::State { job, state }),
                    }
                };
                let _ = reply.send(outcome);
                Ok(())
            }
            SchedulerMessage::Retry(job, reply) => {
                let outcome = match within(self.store.live_job(job)).await? {
                    None => Err(Refusal::Unknown(job)),
                    Some((JobState::Failed | JobState::Cancelled, live)) => {
                        self.run(Event::Retry(live), self.farm.now()).await?;
                        Ok(())
                    }
                    Some((state, _)) => Err(Refusal::State { job, state }),
                };
                let _ = reply.send(outcome);
                Ok(())
            }
        }
    }

    /// One event and all that follows from it.
    async fn run(&mut self, event: Event, at: Time) -> Result<(), QueueError> {
        let mut effects = self.farm.step(event, at);
        loop {
            let Effects { changes, sends, load, notes } = effects;
            if !changes.is_empty() {
                within(self.store.apply(self.epoch, &changes, Timestamp::now())).await?;
            }
            for note in notes {
                tracing::info!("{note}");
            }
            for send in sends {
                self.deliver(send);
            }
            if load.is_empty() {
                return Ok(());
            }
            let loaded = within(self.store.requests(&load)).await?;
            effects = self.farm.step(Event::Loaded(loaded), at);
        }
    }

    /// Messages may be lost: whatever matters is said again until it is answered.
    fn deliver(&mut self, ToSend { node, boot, message }: ToSend) {
        self.sent += 1;
        let envelope = Envelope { epoch: self.epoch, node, boot, seq: self.sent, body: message };
        let sent = codec::encode(&envelope)
            .map_err(|error| error.to_string())
            .and_then(|bytes| self.link.send(boot, bytes).map_err(|error| error.to_string()));
        if let Err(error) = sent {
            tracing::debug!(node = %envelope.node, error, "message not sent");
        }
    }
}

async fn within<T>(stored: impl Future<Output = Result<T, QueueError>>) -> Result<T, QueueError> {
    tokio::time::timeout(STORE_TIMEOUT, stored).await.unwrap_or(Err(QueueError::Timeout(STORE_TIMEOUT)))
}
