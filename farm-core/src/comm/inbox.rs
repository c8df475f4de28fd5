//! What has arrived for the ranks of this process, who waits for whom, and how the group ended: what the transports
//! have in common. Threads of one process share one [`Inboxes`] with a place for every rank; a process that is one rank
//! has one with a single place.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, watch};

use super::{CommError, Patience};
use crate::engine::Transfer;

/// Bytes that may lie between two ranks before the sender is held back while the receiver computes. Little in tests, so
/// that they get beyond it quickly.
pub(super) const WINDOW: usize = if cfg!(test) { 8 << 20 } else { 256 << 20 };

/// What a message costs beside its bytes, so that empty ones are bounded too.
const MESSAGE: usize = 64;

/// How often a sender that is held back looks again whether the receiver still computes.
const HELD_BACK: Duration = Duration::from_millis(20);

/// Stands for "nobody" among the ranks waited for.
const NOBODY: usize = usize::MAX;

pub(super) struct Inboxes<M> {
    patience: Patience,
    /// The first error; it is every rank's from then on.
    failure: watch::Sender<Option<CommError>>,
    /// Whom each rank of the group waits for, as far as known here.
    waits: Vec<AtomicUsize>,
    /// The rank of `inboxes[0]`.
    first: usize,
    inboxes: Vec<Inbox<M>>,
}

/// Of one rank, with a place for every source.
struct Inbox<M> {
    sources: Mutex<Vec<Source<M>>>,
    /// Rung when a message came, a source left or the group failed.
    bell: Condvar,
    /// Bytes of each source that were not taken yet.
    queued: Vec<AtomicUsize>,
    /// Told for a source when one of its messages was asked for or taken, for a transport that reads on only then.
    room: Vec<Notify>,
}

struct Source<M> {
    /// Not taken yet, by their number. Exchanges may be waited for in another order than they were started in.
    messages: BTreeMap<u64, M>,
    /// Numbers of messages that were asked for and given up before they came.
    given_up: BTreeSet<u64>,
    /// Messages that came so far, and messages that were asked for: the n-th is for the n-th.
    came: u64,
    asked: u64,
    /// Barriers that the source has reached and this rank has not.
    barriers: u64,
    /// Whether the rank waits for this source now.
    wanted: bool,
    /// Why no more will come.
    gone: Option<String>,
}

impl<M> Default for Source<M> {
    fn default() -> Self {
        let (messages, given_up) = (BTreeMap::new(), BTreeSet::new());
        Self { messages, given_up, came: 0, asked: 0, barriers: 0, wanted: false, gone: None }
    }
}

/// The place of a message that was asked for. Dropping it gives the message up, so that it does not lie there for ever.
pub(super) struct Ticket<'a, M: Transfer> {
    inboxes: &'a Inboxes<M>,
    me: usize,
    from: usize,
    number: u64,
    shape: Vec<usize>,
}

impl<M: Transfer> Inboxes<M> {
    /// For the ranks `here` of a group of `world`.
    pub(super) fn new(world: usize, here: Range<usize>, patience: Patience) -> Self {
        let inbox = |_| Inbox {
            sources: Mutex::new((0..world).map(|_| Source::default()).collect()),
            bell: Condvar::new(),
            queued: (0..world).map(|_| AtomicUsize::new(0)).collect(),
            room: (0..world).map(|_| Notify::new()).collect(),
        };
        Self {
            patience,
            failure: watch::Sender::new(None),
            waits: (0..world).map(|_| AtomicUsize::new(NOBODY)).collect(),
            first: here.start,
            inboxes: here.map(inbox).collect(),
        }
    }

    pub(super) fn patience(&self) -> Patience {
        self.patience
    }

    pub(super) fn world(&self) -> usize {
        self.waits.len()
    }

    pub(super) fn others(&self, me: usize) -> impl Iterator<Item = usize> + use<M> {
        (0..self.world()).filter(move |rank| *rank != me)
    }

    // ---- the end of the group ----

    /// Ends the group with `error`, unless it has ended already. Returns the error that it ended with.
    pub(super) fn fail(&self, error: CommError) -> CommError {
        self.failure.send_if_modified(|failure| {
            let first = failure.is_none();
            failure.get_or_insert_with(|| error.clone());
            first
        });
        // Each lock is taken, so that nobody is between looking at the failure and sleeping.
        self.inboxes.iter().for_each(|inbox| inbox.ring());
        self.check().err().unwrap_or(error)
    }

    pub(super) fn check(&self) -> Result<(), CommError> {
        self.failure.borrow().clone().map_or(Ok(()), Err)
    }

    /// Tells of the failure as it happens.
    pub(super) fn failure(&self) -> watch::Receiver<Option<CommError>> {
        self.failure.subscribe()
    }

    // ---- what a transport puts in ----

    /// Puts a message of `from` into the inbox of rank `to`.
    pub(super) fn deliver(&self, from: usize, to: usize, message: M) {
        let inbox = self.inbox(to);
        let mut sources = inbox.lock();
        let source = &mut sources[from];
        let number = source.came;
        source.came += 1;
        if source.given_up.remove(&number) {
            return;
        }
        inbox.queued[from].fetch_add(weight(&message), Ordering::Relaxed);
        source.messages.insert(number, message);
        inbox.bell.notify_all();
    }

    /// Rank `from` has reached the next barrier.
    pub(super) fn deliver_barrier(&self, from: usize, to: usize) {
        let inbox = self.inbox(to);
        inbox.lock()[from].barriers += 1;
        inbox.bell.notify_all();
    }

    /// Rank `to` gets nothing more from rank `from`. It is an error only once it needs more.
    pub(super) fn leave(&self, from: usize, to: usize, why: &str) {
        let inbox = self.inbox(to);
        inbox.lock()[from].gone.get_or_insert_with(|| why.to_owned());
        inbox.bell.notify_all();
    }

    /// Whom `rank` waits for, as it says itself.
    pub(super) fn set_waiting(&self, rank: usize, on: Option<usize>) {
        self.waits[rank].store(on.unwrap_or(NOBODY), Ordering::Relaxed);
    }

    pub(super) fn waiting(&self, rank: usize) -> Option<usize> {
        let on = self.waits[rank].load(Ordering::Relaxed);
        (on != NOBODY).then_some(on)
    }

    /// Bytes from `from` that rank `to` has not taken.
    pub(super) fn queued(&self, from: usize, to: usize) -> usize {
        self.inbox(to).queued[from].load(Ordering::Relaxed)
    }

    /// Returns when rank `to` has room for another message of `from`. A rank that waits for it always has.
    pub(super) async fn room(&self, from: usize, to: usize) {
        let inbox = self.inbox(to);
        while self.queued(from, to) > WINDOW && !inbox.lock()[from].wanted {
            inbox.room[from].notified().await;
        }
    }

    // ---- what a rank takes out ----

    /// Takes numbers for what an exchange of rank `me` receives. Fails if the group has, or if it cannot take place.
    pub(super) fn begin(
        &self,
        me: usize,
        to: &[usize],
        receives: Vec<(usize, Vec<usize>)>,
    ) -> Result<Vec<Ticket<'_, M>>, CommError> {
        self.check()?;
        let peers = to.iter().copied().chain(receives.iter().map(|(from, _)| *from));
        if let Some(peer) = peers.clone().find(|peer| *peer == me || *peer >= self.world()) {
            let text = format!("rank {me} of {} cannot exchange a message with rank {peer}", self.world());
            return Err(self.fail(CommError::Transport(text)));
        }
        let mut sources = self.inbox(me).lock();
        let gone = to.iter().find_map(|to| Some((*to, sources[*to].gone.clone()?)));
        if let Some((rank, why)) = gone {
            drop(sources);
            return Err(self.fail(CommError::Lost { rank, why }));
        }
        let ask = |(from, shape): (usize, _)| {
            let source: &mut Source<M> = &mut sources[from];
            source.asked += 1;
            Ticket { inboxes: self, me, from, number: source.asked - 1, shape }
        };
        Ok(receives.into_iter().map(ask).collect())
    }

    /// Waits for what an exchange receives, and while too many bytes lie between rank `me` and those it sends `to`.
    pub(super) fn finish(
        &self,
        me: usize,
        tickets: Vec<Ticket<'_, M>>,
        to: &[usize],
        between: impl Fn(usize) -> usize,
    ) -> Result<Vec<M>, CommError> {
        let received = tickets.into_iter().map(Ticket::take).collect::<Result<_, _>>()?;
        for to in to.iter().copied().filter(|to| between(*to) > WINDOW) {
            let free = |_: &mut _| (between(to) <= WINDOW || self.waiting(to).is_some()).then_some(());
            self.wait_for(me, to, HELD_BACK, free)?;
        }
        Ok(received)
    }

    /// The ranks that have not reached the barrier that rank `me` has.
    pub(super) fn missing(&self, me: usize) -> Vec<usize> {
        let sources = self.inbox(me).lock();
        self.others(me).filter(|from| sources[*from].barriers == 0).collect()
    }

    /// Waits until every other rank has reached the barrier.
    pub(super) fn take_barriers(&self, me: usize) -> Result<(), CommError> {
        for from in self.others(me) {
            self.wait(me, from, |source| {
                let reached = source.barriers > 0;
                source.barriers -= u64::from(reached);
                reached.then_some(())
            })?;
        }
        Ok(())
    }

    fn wait<R>(&self, me: usize, from: usize, ready: impl FnMut(&mut Source<M>) -> Option<R>) -> Result<R, CommError> {
        self.wait_for(me, from, Duration::MAX, ready)
    }

    /// Waits until `ready` finds what it looks for, and looks at least every `look`. Fails with the group, when the
    /// source is gone, and when this took too long.
    fn wait_for<R>(
        &self,
        me: usize,
        from: usize,
        look: Duration,
        mut ready: impl FnMut(&mut Source<M>) -> Option<R>,
    ) -> Result<R, CommError> {
        let inbox = self.inbox(me);
        let mut deadline = None;
        let mut sources = inbox.lock();
        let error = loop {
            if let Some(error) = self.failure.borrow().clone() {
                break error;
            }
            if let Some(found) = ready(&mut sources[from]) {
                sources[from].wanted = false;
                self.set_waiting(me, None);
                return Ok(found);
            }
            if let Some(why) = sources[from].gone.clone() {
                break CommError::Lost { rank: from, why };
            }
            let now = Instant::now();
            // A patience beyond what the clock can count is none.
            let limit = *deadline.get_or_insert_with(|| now.checked_add(self.patience.stall));
            let left = limit.map_or(Duration::MAX, |limit| limit.saturating_duration_since(now));
            if left.is_zero() {
                break CommError::Stalled { rank: self.root_of_wait(me, from), after: self.patience.stall };
            }
            if !sources[from].wanted {
                sources[from].wanted = true;
                self.set_waiting(me, Some(from));
                inbox.room[from].notify_one();
            }
            // Longer sleeps are no use and some overflow the clock of the system.
            let nap = left.min(look).min(Duration::from_secs(3600));
            sources = inbox.bell.wait_timeout(sources, nap).unwrap_or_else(PoisonError::into_inner).0;
        };
        sources[from].wanted = false;
        drop(sources);
        self.set_waiting(me, None);
        Err(self.fail(error))
    }

    /// Who holds up rank `me`: the end of the chain of ranks that wait for each other, or `from` in a cycle.
    fn root_of_wait(&self, me: usize, from: usize) -> usize {
        let mut root = from;
        for _ in 0..self.world() {
            match self.waiting(root) {
                Some(next) if next == me => return from,
                Some(next) => root = next,
                None => return root,
            }
        }
        from
    }

    fn inbox(&self, rank: usize) -> &Inbox<M> {
        &self.inboxes[rank - self.first]
    }
}

fn weight(message: &impl Transfer) -> usize {
    MESSAGE + message.byte_len()
}

impl<M: Transfer> Ticket<'_, M> {
    /// Waits for the message and checks its shape.
    pub(super) fn take(self) -> Result<M, CommError> {
        let Self { inboxes, me, from, number, ref shape } = self;
        let message = inboxes.wait(me, from, |source| source.messages.remove(&number))?;
        inboxes.inbox(me).taken(from, weight(&message));
        let got = message.sizes();
        if got != *shape {
            let (expected, got) = (format!("{shape:?}"), format!("{got:?}"));
            return Err(inboxes.fail(CommError::Mismatch { rank: from, expected, got }));
        }
        Ok(message)
    }
}

impl<M: Transfer> Drop for Ticket<'_, M> {
    fn drop(&mut self) {
        let inbox = self.inboxes.inbox(self.me);
        let mut sources = inbox.lock();
        let source = &mut sources[self.from];
        match source.messages.remove(&self.number) {
            Some(message) => inbox.taken(self.from, weight(&message)),
            None if source.came <= self.number => _ = source.given_up.insert(self.number),
            // It was taken.
            None => {}
        }
    }
}

impl<M> Inbox<M> {
    /// The sources are whole at every moment, also when a thread has panicked while it held them.
    fn lock(&self) -> MutexGuard<'_, Vec<Source<M>>> {
        self.sources.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `bytes` of `from` lie here no longer.
    fn taken(&self, from: usize, bytes: usize) {
        self.queued[from].fetch_sub(bytes, Ordering::Relaxed);
        self.room[from].notify_one();
    }

    fn ring(&self) {
        let _sources = self.lock();
        self.bell.notify_all();
    }
}
