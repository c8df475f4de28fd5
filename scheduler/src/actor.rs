//! The one owner of the farm's state: takes events in order, lets the core decide, commits, then speaks.
//!
//! What has arrived by the time is taken in one turn and committed in one transaction, for a durable transaction costs
//! about the same whatever is in it. Nothing of a turn is sent or answered before all of it is on disk.

mod turn;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use farm_core::id::{BootId, Epoch, JobId};
use farm_core::job::state::JobState;
use jiff::Timestamp;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use self::turn::{State, within};
use crate::core::events::{Submitted, Time, Wish};
use crate::core::farm::Farm;
use crate::link::NodeLink;
use crate::queue::store::{Batch, Committed, LEADER_TTL, Pruned, QueueError, QueueStore, Retention};

/// How often the core is told that time passes.
const TICK: Duration = Duration::from_millis(200);
/// Messages that may wait for the actor; senders of more wait themselves.
const MAILBOX: usize = 1024;
/// Messages of one turn.
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

/// What everybody else holds of the actor. Cloning shares it.
#[derive(Clone)]
pub struct Scheduler {
    mailbox: mpsc::Sender<Message>,
    started: Instant,
    store: Arc<dyn QueueStore>,
    reign: Arc<Reign>,
    /// Held by whoever takes up rows of ended jobs, or removes them: commits, retries, pruning. A job that both of two
    /// take up would be taken up twice.
    rows: Arc<Semaphore>,
    stop: CancellationToken,
}

impl Scheduler {
    /// Runs a farm that was restored from `store` at the clock's zero, `started`. The returned task ends with the reign:
    /// by [`Self::stop`], or by itself, and then the state is to be loaded again by whoever leads next.
    pub fn start(
        farm: Farm,
        started: Instant,
        reign: Arc<Reign>,
        store: Arc<dyn QueueStore>,
        link: Arc<dyn NodeLink>,
    ) -> (Self, JoinHandle<End>) {
        let (mailbox, inbox) = mpsc::channel(MAILBOX);
        let stop = CancellationToken::new();
        let state = State::new(farm, reign.clone(), store.clone(), link);
        let task = tokio::spawn(run(state, inbox, started, stop.clone()));
        (Self { mailbox, started, store, reign, rows: Arc::new(Semaphore::new(1)), stop }, task)
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
        self.stop.cancel();
    }

    async fn permit(&self) -> Result<OwnedSemaphorePermit, CallError> {
        self.rows.clone().acquire_owned().await.map_err(|_| CallError::Stopped)
    }

    async fn send(&self, message: Message) -> Result<(), CallError> {
        self.mailbox.send(message).await.map_err(|_| CallError::Stopped)
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

/// The actor: turn after turn, until the end of the reign.
async fn run(mut state: State, mut inbox: mpsc::Receiver<Message>, started: Instant, stop: CancellationToken) -> End {
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut messages = Vec::with_capacity(TURN);
    loop {
        let mut tick = false;
        tokio::select! {
            biased;
            () = stop.cancelled() => return End::Stopped,
            // Before the mailbox, which may never be empty.
            _ = ticks.tick() => tick = true,
            taken = inbox.recv_many(&mut messages, TURN) => if taken == 0 { return End::Stopped },
        }
        let tick = tick.then(|| Time(started.elapsed()));
        if let Err(error) = state.turn(&mut messages, tick).await {
            // The core has decided something that is not on disk. Acting on it, or on what follows from it, would be
            // wrong, so this is the end; whoever leads next has the committed state.
            return End::from(error);
        }
    }
}
