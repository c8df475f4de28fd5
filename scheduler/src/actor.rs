//! The one owner of the farm's state: takes events in order, lets the core decide, commits, then speaks.
//!
//! What has arrived by the time is taken in one turn and committed in one transaction, for a durable transaction costs
//! about the same whatever is in it. Nothing of a turn is sent or answered before all of it is on disk. An actor is handed
//! one message at a time, so the first of a turn sends another behind all that wait, and that one works the turn.

#[cfg(test)]
mod tests;
mod turn;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use farm_core::id::{BootId, Epoch, JobId};
use farm_core::job::state::JobState;
use jiff::Timestamp;
use ractor::{Actor, ActorProcessingErr, ActorRef, SpawnErr};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use self::turn::{State, within};
use crate::core::events::{Submitted, Time, Wish};
use crate::core::farm::Farm;
use crate::link::NodeLink;
use crate::queue::store::{Batch, Committed, LEADER_TTL, Pruned, QueueError, QueueStore, Retention};

/// How often the core is told that time passes.
const TICK: Duration = Duration::from_millis(200);
/// Messages that may wait for the actor; senders of more wait themselves, for its own mailbox has no bound.
const MAILBOX: usize = 1024;
/// Messages of one turn, at most.
const TURN: usize = 256;
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// A submission of a million lines takes this long at worst.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(120);

/// Why a call has no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    #[error("the scheduler is busy; try again")]
    Timeout,
    #[error("this scheduler is stopping or has been deposed; try again")]
    Stopped,
}

/// Why a wish does nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("there is no job {0}")]
    Unknown(JobId),
    #[error("job {} is {}", job.short(), state.as_str())]
    State { job: JobId, state: JobState },
    /// Its submission is on disk, but the farm has not heard of it yet.
    #[error("job {} is just being queued; try again", .0.short())]
    Early(JobId),
}

/// How a reign ended.
#[derive(Debug)]
pub enum End {
    /// It was told to.
    Stopped,
    /// Somebody else leads now, or may: this process was too late to say that it is there.
    Superseded,
    /// The store failed, so that nobody knows what is committed. What is can be loaded again.
    Failed(QueueError),
}

impl From<QueueError> for End {
    fn from(error: QueueError) -> Self {
        match error {
            QueueError::Superseded(_) => Self::Superseded,
            error => Self::Failed(error),
        }
    }
}

/// One reign, as far as it is known to last.
pub struct Reign {
    epoch: Epoch,
    lasts: Mutex<Lasts>,
}

#[derive(Clone, Copy)]
enum Lasts {
    /// Nobody else can lead this queue.
    Always,
    /// When it last said that it is there and was heard.
    Since(Instant),
    Over,
}

impl Reign {
    /// Over a queue that only this process can lead.
    pub fn alone(epoch: Epoch) -> Self {
        Self { epoch, lasts: Mutex::new(Lasts::Always) }
    }

    /// The store granted it at `since` or later.
    pub fn contested(epoch: Epoch, since: Instant) -> Self {
        Self { epoch, lasts: Mutex::new(Lasts::Since(since)) }
    }

    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The store was told at `since` or later that this leader is there.
    pub fn beaten(&self, since: Instant) {
        self.set(Lasts::Since(since));
    }

    /// Somebody else leads, or may.
    pub fn over(&self) {
        self.set(Lasts::Over);
    }

    fn set(&self, lasts: Lasts) {
        *self.lasts.lock().unwrap_or_else(PoisonError::into_inner) = lasts;
    }

    /// How long nobody may depose it yet. Zero for one that was frozen or cut off from the store for too long: it must
    /// not speak any more, for somebody else may lead.
    pub fn lasts(&self) -> Duration {
        match *self.lasts.lock().unwrap_or_else(PoisonError::into_inner) {
            Lasts::Always => Duration::MAX,
            Lasts::Since(beaten) => LEADER_TTL.saturating_sub(beaten.elapsed()),
            Lasts::Over => Duration::ZERO,
        }
    }
}

type Question = Box<dyn FnOnce(&Farm) + Send>;

/// What somebody wants, and what has to be read of the store first.
#[derive(Debug)]
enum Order {
    Wish(Box<Wish>),
    Retry(JobId),
}

enum Message {
    /// An encoded envelope, stamped when it arrived: a stall of this actor is not the node's silence.
    Frame {
        bytes: Vec<u8>,
        at: Time,
    },
    SessionClosed {
        boot: BootId,
        at: Time,
    },
    /// Looks at the state and answers by itself.
    Ask(Question),
    /// To be committed in the actor's turn.
    Commit(Box<Batch>, oneshot::Sender<Result<Committed, QueueError>>),
    /// Was committed.
    Submitted(Box<Submitted>, oneshot::Sender<()>),
    Order {
        order: Order,
        by: String,
        reply: oneshot::Sender<Result<(), Refusal>>,
        /// Held until the order is carried out.
        permit: Option<OwnedSemaphorePermit>,
    },
    /// Rows may have changed that the core does not know of.
    Broken(QueueError),
}

/// What is in the actor's mailbox.
enum Mail {
    /// With its place among those that may wait.
    Message(Message, OwnedSemaphorePermit),
    /// All that was there when the turn began has been taken: work it.
    Flush,
    /// Time passes.
    Tick,
    /// A job may start for which the last turn was too early.
    Again,
}

impl ractor::Message for Mail {}

/// What everybody else holds of the actor. Cloning shares it.
#[derive(Clone)]
pub struct Scheduler {
    actor: ActorRef<Mail>,
    places: Arc<Semaphore>,
    started: Instant,
    store: Arc<dyn QueueStore>,
    reign: Arc<Reign>,
    /// Held by whoever takes up rows of ended jobs, or removes them: commits, retries, pruning. A job that both of two
    /// take up would be taken up twice.
    rows: Arc<Semaphore>,
}

impl Scheduler {
    /// Runs a farm that was restored from `store` at the clock's zero, `started`. The reign ends by [`Self::stop`], or by
    /// itself, and then the state is to be loaded again by whoever leads next. Nothing is said of the end of an actor that
    /// panics.
    pub async fn start(
        farm: Farm,
        started: Instant,
        reign: Arc<Reign>,
        store: Arc<dyn QueueStore>,
        link: Arc<dyn NodeLink>,
    ) -> Result<(Self, oneshot::Receiver<End>), SpawnErr> {
        let (end, ended) = oneshot::channel();
        let state = State::new(farm, started, reign.clone(), store.clone(), link);
        let (actor, _) = Actor::spawn(None, Owner, (state, end)).await?;
        let (places, rows) = (Arc::new(Semaphore::new(MAILBOX)), Arc::new(Semaphore::new(1)));
        Ok((Self { actor, places, started, store, reign, rows }, ended))
    }

    fn now(&self) -> Time {
        Time(self.started.elapsed())
    }

    /// Takes an encoded envelope from a node. Waits while too many are under way.
    pub async fn frame(&self, bytes: Vec<u8>) -> Result<(), CallError> {
        self.send(Message::Frame { bytes, at: self.now() }).await
    }

    pub async fn session_closed(&self, boot: BootId) -> Result<(), CallError> {
        self.send(Message::SessionClosed { boot, at: self.now() }).await
    }

    /// What `question` says of the farm, with all that happened before committed.
    pub async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&Farm) -> T + Send + 'static,
    ) -> Result<T, CallError> {
        self.call(CALL_TIMEOUT, |reply| {
            Message::Ask(Box::new(move |farm| {
                // Nobody waits any more: nothing to say.
                let _ = reply.send(question(farm));
            }))
        })
        .await
    }

    /// Commits a submission and queues its jobs. The inner error is for its sender; nothing was written then.
    pub async fn commit(&self, batch: Batch) -> Result<Result<Committed, QueueError>, CallError> {
        let this = self.clone();
        // In a task of its own: were it dropped with a client that goes away, its rows might be committed and the core
        // never hear of them.
        tokio::spawn(async move { this.commit_now(batch).await }).await.map_err(|_| CallError::Stopped)?
    }

    async fn commit_now(&self, batch: Batch) -> Result<Result<Committed, QueueError>, CallError> {
        let _permit = self.permit().await?;
        if batch.jobs.iter().any(|job| !job.after.is_empty()) {
            // What a job comes after must not end between the commit and the core's notice of it.
            return self.call(COMMIT_TIMEOUT, |reply| Message::Commit(Box::new(batch), reply)).await;
        }
        // Beside the actor: a long file takes seconds. If this reign ends meanwhile, the store refuses it by its epoch, or
        // the rows are there and the next reign loads them.
        let stored = self.store.commit_submission(self.reign.epoch, batch, Timestamp::now());
        match within(COMMIT_TIMEOUT, stored).await {
            Ok(mut committed) => {
                let submitted = Box::new(std::mem::take(&mut committed.submitted));
                self.call(COMMIT_TIMEOUT, |reply| Message::Submitted(submitted, reply)).await?;
                Ok(Ok(committed))
            }
            Err(error) if is_refusal(&error) => Ok(Err(error)),
            Err(error) => {
                // Nobody knows whether it is committed.
                self.send(Message::Broken(error)).await?;
                Err(CallError::Stopped)
            }
        }
    }

    pub async fn wish(&self, wish: Wish, by: String) -> Result<Result<(), Refusal>, CallError> {
        let order = |reply| Message::Order { order: Order::Wish(Box::new(wish)), by, reply, permit: None };
        self.call(CALL_TIMEOUT, order).await
    }

    /// Queues a failed or cancelled job again.
    pub async fn retry(&self, job: JobId, by: String) -> Result<Result<(), Refusal>, CallError> {
        let waited = tokio::time::timeout(CALL_TIMEOUT, self.permit()).await.map_err(|_| CallError::Timeout)?;
        let permit = Some(waited?);
        self.call(CALL_TIMEOUT, |reply| Message::Order { order: Order::Retry(job), by, reply, permit }).await
    }

    /// Removes old rows, or counts them.
    pub async fn prune(&self, retention: Retention, dry_run: bool) -> Result<Result<Pruned, QueueError>, CallError> {
        let _permit = self.permit().await?;
        let pruned = self.store.prune(self.reign.epoch, retention, Timestamp::now(), dry_run);
        Ok(within(COMMIT_TIMEOUT, pruned).await)
    }

    pub fn epoch(&self) -> Epoch {
        self.reign.epoch
    }

    /// Ends the reign after the turn that the actor is at.
    pub fn stop(&self) {
        self.actor.stop(None);
    }

    async fn permit(&self) -> Result<OwnedSemaphorePermit, CallError> {
        self.rows.clone().acquire_owned().await.map_err(|_| CallError::Stopped)
    }

    async fn send(&self, message: Message) -> Result<(), CallError> {
        let place = self.places.clone().acquire_owned().await.map_err(|_| CallError::Stopped)?;
        self.actor.cast(Mail::Message(message, place)).map_err(|_| CallError::Stopped)
    }

    async fn call<T>(
        &self,
        timeout: Duration,
        message: impl FnOnce(oneshot::Sender<T>) -> Message,
    ) -> Result<T, CallError> {
        let answered = async {
            let (reply, answer) = oneshot::channel();
            self.send(message(reply)).await?;
            answer.await.map_err(|_| CallError::Stopped)
        };
        tokio::time::timeout(timeout, answered).await.map_err(|_| CallError::Timeout)?
    }
}

/// An error that is the caller's affair; the store has written nothing and goes on.
fn is_refusal(error: &QueueError) -> bool {
    matches!(error, QueueError::Refused(_) | QueueError::TooManySubmissions(_))
}

/// The actor, and what it knows between two messages.
struct Owner;

struct Turns {
    state: State,
    /// Messages of the next turn.
    pending: Vec<Message>,
    /// Time has passed since the last one.
    tick: bool,
    /// A [`Mail::Flush`] is on its way.
    is_begun: bool,
    /// A [`Mail::Again`] is.
    is_again: bool,
    /// Whom to tell how it ended.
    end: Option<oneshot::Sender<End>>,
}

impl Actor for Owner {
    type Msg = Mail;
    type State = Turns;
    type Arguments = (State, oneshot::Sender<End>);

    async fn pre_start(
        &self,
        me: ActorRef<Mail>,
        (state, end): (State, oneshot::Sender<End>),
    ) -> Result<Turns, ActorProcessingErr> {
        say(&me, Mail::Tick);
        let pending = Vec::with_capacity(TURN);
        Ok(Turns { state, pending, tick: false, is_begun: false, is_again: false, end: Some(end) })
    }

    async fn handle(&self, me: ActorRef<Mail>, mail: Mail, turns: &mut Turns) -> Result<(), ActorProcessingErr> {
        match mail {
            Mail::Message(message, _place) => turns.pending.push(message),
            Mail::Tick => turns.tick = true,
            Mail::Again => turns.is_again = false,
            Mail::Flush => {
                turns.is_begun = false;
                return turns.work(&me).await;
            }
        }
        if !std::mem::replace(&mut turns.is_begun, true) {
            say(&me, Mail::Flush);
        }
        if turns.pending.len() >= TURN { turns.work(&me).await } else { Ok(()) }
    }

    async fn post_stop(&self, _: ActorRef<Mail>, turns: &mut Turns) -> Result<(), ActorProcessingErr> {
        turns.end(End::Stopped);
        Ok(())
    }
}

impl Turns {
    async fn work(&mut self, me: &ActorRef<Mail>) -> Result<(), ActorProcessingErr> {
        let tick = std::mem::take(&mut self.tick);
        match self.state.turn(&mut self.pending, tick).await {
            Ok(again) => {
                if tick {
                    // The next after this one, so that they do not pile up in a turn that takes long.
                    me.send_after(TICK, || Mail::Tick);
                }
                if let Some(wait) = again
                    && !std::mem::replace(&mut self.is_again, true)
                {
                    me.send_after(wait, || Mail::Again);
                }
                Ok(())
            }
            Err(error) => {
                // The core has decided something that is not on disk. Acting on it, or on what follows from it, would be
                // wrong, so this is the end; whoever leads next has the committed state.
                self.end(End::from(error));
                Err("the reign has ended".into())
            }
        }
    }

    fn end(&mut self, end: End) {
        if let Some(told) = self.end.take() {
            // Nobody waits any more: it was dropped with the reign.
            _ = told.send(end);
        }
    }
}

/// To itself, which fails only when it has ended.
fn say(me: &ActorRef<Mail>, mail: Mail) {
    drop(me.cast(mail));
}
