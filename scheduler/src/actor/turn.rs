//! One turn of the actor: the core takes the messages, the store what follows, and then everybody hears of it.

#[cfg(test)]
pub(super) mod tests;

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use farm_core::id::JobId;
use farm_core::job::state::JobState;
use farm_core::wire::to_scheduler::ToScheduler;
use farm_core::wire::{Envelope, codec};
use jiff::Timestamp;

use super::{COMMIT_TIMEOUT, Message, Order, Question, Refusal, Reign, is_refusal};
use crate::core::effects::{Effects, Send as ToSend};
use crate::core::events::{Event, Scope, Time, Wish};
use crate::core::farm::Farm;
use crate::link::NodeLink;
use crate::queue::store::{QueueError, QueueStore};

/// A store that takes longer for one transaction is as good as broken.
const STORE_TIMEOUT: Duration = Duration::from_secs(120);
/// A plan in between two ticks comes so long after the one before at least, or as long as that one took: a thousand
/// reports a second do not plan a thousand times.
const REST: Duration = Duration::from_millis(20);
/// Changes of one transaction, about.
const CHANGES: usize = 4096;

pub(super) struct State {
    farm: Farm,
    /// The clock's zero.
    started: Instant,
    /// No plan in between before this.
    rests_until: Instant,
    reign: Arc<Reign>,
    store: Arc<dyn QueueStore>,
    link: Arc<dyn NodeLink>,
    /// Envelopes sent.
    sent: u64,
    /// What follows from the turn so far and is not committed.
    due: Effects,
    /// What to say to callers after that.
    answers: Vec<Question>,
}

impl State {
    pub fn new(
        farm: Farm,
        started: Instant,
        reign: Arc<Reign>,
        store: Arc<dyn QueueStore>,
        link: Arc<dyn NodeLink>,
    ) -> Self {
        let (due, answers) = (Effects::default(), Vec::new());
        Self { farm, started, rests_until: started, reign, store, link, sent: 0, due, answers }
    }

    /// Takes all messages, and then a tick if it is time for one or if a job may start at once. Gives how long to wait
    /// with the next turn at most, if one may start later.
    pub async fn turn(&mut self, messages: &mut Vec<Message>, tick: bool) -> Result<Option<Duration>, QueueError> {
        for message in messages.drain(..) {
            self.take(message).await?;
        }
        let begun = Instant::now();
        if tick || self.farm.wants_tick() && begun >= self.rests_until {
            self.step(Event::Tick, Time(self.started.elapsed())).await?;
            self.rests_until = Instant::now() + REST.max(begun.elapsed());
        }
        self.flush().await?;
        Ok(self.farm.wants_tick().then(|| self.rests_until.saturating_duration_since(Instant::now())))
    }

    async fn take(&mut self, message: Message) -> Result<(), QueueError> {
        match message {
            Message::Frame { bytes, at } => match codec::decode::<ToScheduler>(&bytes) {
                Ok(envelope) => self.step(Event::FromNode(Box::new(envelope)), at).await?,
                Err(error) => {
                    tracing::warn!(%error, bytes = bytes.len(), "dropped a frame that does not decode");
                }
            },
            Message::SessionClosed { boot, at } => self.step(Event::SessionClosed(boot), at).await?,
            Message::Ask(question) => self.answers.push(question),
            Message::Commit(batch, reply) => {
                self.flush().await?;
                let stored = self.store.commit_submission(self.reign.epoch(), *batch, Timestamp::now());
                let outcome = match within(COMMIT_TIMEOUT, stored).await {
                    Ok(mut committed) => {
                        let submitted = std::mem::take(&mut committed.submitted);
                        self.step(Event::Submitted(submitted), self.farm.now()).await?;
                        Ok(committed)
                    }
                    Err(error) if is_refusal(&error) => Err(error),
                    Err(error) => return Err(error),
                };
                self.answer(move || _ = reply.send(outcome));
            }
            Message::Submitted(submitted, reply) => {
                self.step(Event::Submitted(*submitted), self.farm.now()).await?;
                self.answer(move || _ = reply.send(()));
            }
            Message::Order { order, by, reply, permit } => {
                let outcome = match self.checked(order).await? {
                    Ok(wish) => {
                        self.step(Event::Wish { wish, by }, self.farm.now()).await?;
                        Ok(())
                    }
                    Err(refusal) => Err(refusal),
                };
                self.answer(move || {
                    drop(permit);
                    _ = reply.send(outcome);
                });
            }
            Message::Broken(error) => return Err(error),
        }
        Ok(())
    }

    /// A caller that waits no more is no failure.
    fn answer(&mut self, say: impl FnOnce() + Send + 'static) {
        self.answers.push(Box::new(|_| say()));
    }

    /// The wish, if the job that it is about is in a state for it.
    async fn checked(&mut self, order: Order) -> Result<Result<Wish, Refusal>, QueueError> {
        let (job, retry) = match order {
            Order::Retry(job) => (job, true),
            Order::Wish(wish) => match live_job(&wish) {
                Some(job) if !self.farm.holds(job) => (job, false),
                _ => return Ok(Ok(*wish)),
            },
        };
        // What this turn has decided of the job has to be in the row that is read now.
        self.flush().await?;
        Ok(match within(STORE_TIMEOUT, self.store.live_job(job)).await? {
            None => Err(Refusal::Unknown(job)),
            Some((JobState::Failed | JobState::Cancelled, live)) if retry => Ok(Wish::Retry(live)),
            Some((JobState::Queued | JobState::Running, _)) if !retry => Err(Refusal::Early(job)),
            Some((state, _)) => Err(Refusal::State { job, state }),
        })
    }

    /// One event. What follows waits for the end of the turn, unless it is much, or has to be read first.
    async fn step(&mut self, event: Event, at: Time) -> Result<(), QueueError> {
        self.collect(event, at);
        if !self.due.load.is_empty() || self.due.changes.len() >= CHANGES {
            self.commit().await?;
        }
        Ok(())
    }

    fn collect(&mut self, event: Event, at: Time) {
        let Effects { changes, sends, load, notes } = self.farm.step(event, at);
        self.due.changes.extend(changes);
        self.due.sends.extend(sends);
        self.due.load.extend(load);
        self.due.notes.extend(notes);
    }

    /// Commits, sends and answers all that is due.
    async fn flush(&mut self) -> Result<(), QueueError> {
        self.commit().await?;
        for answer in std::mem::take(&mut self.answers) {
            answer(&self.farm);
        }
        Ok(())
    }

    /// Commits and sends.
    async fn commit(&mut self) -> Result<(), QueueError> {
        loop {
            let Effects { changes, sends, load, notes } = std::mem::take(&mut self.due);
            if !changes.is_empty() {
                let applied = self.store.apply(self.reign.epoch(), &changes, Timestamp::now());
                within(STORE_TIMEOUT, applied).await?;
            } else if self.reign.lasts().is_zero() {
                // The store has not checked the epoch just now.
                return Err(QueueError::Superseded(self.reign.epoch()));
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
            let loaded = within(STORE_TIMEOUT, self.store.requests(&load)).await?;
            self.collect(Event::Loaded(loaded), self.farm.now());
        }
    }

    /// Messages may be lost: whatever matters is said again until it is answered.
    fn deliver(&mut self, ToSend { node, boot, message }: ToSend) {
        self.sent += 1;
        let envelope = Envelope { epoch: self.reign.epoch(), node, boot, seq: self.sent, body: message };
        let sent = codec::encode(&envelope)
            .map_err(|error| error.to_string())
            .and_then(|bytes| self.link.send(boot, bytes).map_err(|error| error.to_string()));
        if let Err(error) = sent {
            tracing::debug!(node = %envelope.node, error, "message not sent");
        }
    }
}

/// The job that has to be queued or running for this wish.
fn live_job(wish: &Wish) -> Option<JobId> {
    match wish {
        Wish::Cancel(job) | Wish::Pause(Scope::Job(job)) | Wish::Resume(Scope::Job(job)) => Some(*job),
        _ => None,
    }
}

pub(super) async fn within<T>(
    timeout: Duration,
    stored: impl Future<Output = Result<T, QueueError>>,
) -> Result<T, QueueError> {
    tokio::time::timeout(timeout, stored).await.unwrap_or(Err(QueueError::Timeout(timeout)))
}
