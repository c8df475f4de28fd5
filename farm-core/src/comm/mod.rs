//! How the ranks of a group exchange tensors.
//!
//! [`Collective`] is what a transport offers: grouped sends and receives that are started and waited for, a barrier,
//! and an end for everybody. The collective operations ([`Group`]) are written once over it.
//!
//! All ranks run the same program, so there are no tags: the n-th message that a rank starts to send to another is the
//! n-th that this one starts to receive from it. Numbers are given when an exchange starts, so several may be under way
//! and be waited for in any order. A message is a tensor; its receiver says which shape it expects, and another one is an
//! error.

mod inbox;
pub mod local;
#[cfg(feature = "cuda")]
pub mod nccl;
pub(crate) mod ported;
#[cfg(test)]
mod suite;
pub mod tcp;

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Why an exchange failed. Every rank of the group gets an error, and it names the rank that caused it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum CommError {
    #[error("rank {rank} is gone: {why}")]
    Lost { rank: usize, why: String },
    #[error("rank {rank} was silent for {:.1} s", after.as_secs_f32())]
    Silent { rank: usize, after: Duration },
    /// The rank lives, but the others waited for it longer than they may.
    #[error("rank {rank} kept the others waiting for {:.1} s", after.as_secs_f32())]
    Stalled { rank: usize, after: Duration },
    #[error("rank {rank} ended the group: {reason}")]
    Aborted { rank: usize, reason: String },
    #[error("rank {rank} sent {got}, expected {expected}; do all ranks render the same clip?")]
    Mismatch { rank: usize, expected: String, got: String },
    /// The group could not be formed, or this rank's own end of it failed.
    #[error("{0}")]
    Transport(String),
}

impl CommError {
    /// The rank to blame, if it is known.
    pub fn rank(&self) -> Option<usize> {
        match self {
            Self::Lost { rank, .. }
            | Self::Silent { rank, .. }
            | Self::Stalled { rank, .. }
            | Self::Aborted { rank, .. }
            | Self::Mismatch { rank, .. } => Some(*rank),
            Self::Transport(_) => None,
        }
    }
}

/// How long ranks wait for each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// A process that gives no sign of life for so long is silent. Transports between processes send one four times in
    /// that span, also while the rank computes.
    pub silence: Duration,
    /// A rank that lives may let others wait for so long: it may have more to compute, but not for ever.
    pub stall: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { silence: Duration::from_secs(30), stall: Duration::from_secs(600) }
    }
}

/// An exchange under way. Its messages are its own, whatever other exchanges do meanwhile; dropping it unfinished
/// discards what it would have received.
#[must_use = "an exchange has to be waited for"]
pub struct Exchange<'a, T>(Box<dyn FnOnce() -> Result<Vec<T>, CommError> + 'a>);

impl<'a, T> Exchange<'a, T> {
    /// `wait` gives the received messages in the order they were asked for.
    pub fn new(wait: impl FnOnce() -> Result<Vec<T>, CommError> + 'a) -> Self {
        Self(Box::new(wait))
    }

    /// The received messages, in the order they were asked for.
    pub fn wait(self) -> Result<Vec<T>, CommError> {
        (self.0)()
    }
}

/// One rank's end of a group of ranks that exchange messages of type `T` (tensors of one engine).
///
/// After an error every further call of every rank fails with the error that came first. Dropping a rank's end before
/// its peers are done with it is a loss to them: they get [`CommError::Lost`].
pub trait Collective<T>: Send + Sync {
    fn rank(&self) -> usize;
    fn world(&self) -> usize;

    /// Starts sending `(to, message)` and receiving `(from, shape)`, all of them at once; does not wait for any.
    /// Neither `to` nor `from` is this rank itself.
    fn start(&self, sends: Vec<(usize, T)>, receives: Vec<(usize, Vec<usize>)>) -> Result<Exchange<'_, T>, CommError>;

    /// Returns when every rank has called it.
    fn barrier(&self) -> Result<(), CommError>;

    /// Ends the group: every call of every rank, also one under way, fails with [`CommError::Aborted`] by this rank.
    fn abort(&self, reason: &str);

    /// Bytes of messages this rank has sent so far, without framing.
    fn bytes_sent(&self) -> u64;
}

/// The group of one rank, which has nobody to talk to.
pub struct Solo;

impl<T> Collective<T> for Solo {
    fn rank(&self) -> usize {
        0
    }

    fn world(&self) -> usize {
        1
    }

    fn start(&self, sends: Vec<(usize, T)>, receives: Vec<(usize, Vec<usize>)>) -> Result<Exchange<'_, T>, CommError> {
        match sends.len() + receives.len() {
            0 => Ok(Exchange::new(|| Ok(Vec::new()))),
            _ => Err(CommError::Transport("a group of one has no other rank".into())),
        }
    }

    fn barrier(&self) -> Result<(), CommError> {
        Ok(())
    }

    fn abort(&self, _reason: &str) {}

    fn bytes_sent(&self) -> u64 {
        0
    }
}

/// Some ranks of a [`Collective`], in an order of their own: the collective operations among them.
pub struct Group<T> {
    comm: Arc<dyn Collective<T>>,
    members: Vec<usize>,
    me: usize,
}

impl<T: Clone> Group<T> {
    /// `members` are ranks of `comm`, its own among them.
    pub fn new(comm: Arc<dyn Collective<T>>, members: Vec<usize>) -> Result<Self, CommError> {
        let own = comm.rank();
        match members.iter().position(|member| *member == own) {
            Some(me) => Ok(Self { comm, members, me }),
            None => Err(CommError::Transport(format!("rank {own} is not among the ranks {members:?}"))),
        }
    }

    /// This rank's index among the members.
    pub fn me(&self) -> usize {
        self.me
    }

    pub fn size(&self) -> usize {
        self.members.len()
    }

    /// Gives `messages[i]` to member `i` and returns what each member gave to this one; member `i`'s has `shapes[i]`.
    /// Both have a place for every member; one's own message comes back as it is.
    pub fn all_to_all_v(&self, messages: Vec<T>, shapes: &[Vec<usize>]) -> Result<Vec<T>, CommError> {
        self.expect_members("all-to-all", messages.len())?;
        self.expect_members("all-to-all", shapes.len())?;
        let mut own = None;
        let mut sends = Vec::with_capacity(self.size());
        for (i, message) in messages.into_iter().enumerate() {
            if i == self.me { own = Some(message) } else { sends.push((self.members[i], message)) }
        }
        self.with_own("all-to-all", self.comm.start(sends, self.receives_of(shapes))?.wait()?, own)
    }

    /// Every member's message, in their order; member `i`'s has `shapes[i]`.
    pub fn all_gather_v(&self, message: T, shapes: &[Vec<usize>]) -> Result<Vec<T>, CommError> {
        let gathering = self.start_all_gather_v(message.clone(), shapes)?;
        self.finish_all_gather_v(message, gathering)
    }

    /// The first half of [`Group::all_gather_v`].
    pub fn start_all_gather_v(&self, message: T, shapes: &[Vec<usize>]) -> Result<Exchange<'_, T>, CommError> {
        self.expect_members("all-gather", shapes.len())?;
        let sends = self.others().map(|member| (member, message.clone())).collect();
        self.comm.start(sends, self.receives_of(shapes))
    }

    /// The second half, with the same `message`.
    pub fn finish_all_gather_v(&self, message: T, gathering: Exchange<'_, T>) -> Result<Vec<T>, CommError> {
        self.with_own("all-gather", gathering.wait()?, Some(message))
    }

    /// The message of member `root`, which is the only one to give one.
    pub fn broadcast(&self, root: usize, message: Option<T>, shape: &[usize]) -> Result<T, CommError> {
        let received = match (&message, root == self.me) {
            (Some(message), true) => {
                let sends = self.others().map(|member| (member, message.clone())).collect();
                self.comm.start(sends, Vec::new())?.wait()?;
                return Ok(message.clone());
            }
            (None, false) => self.comm.start(Vec::new(), vec![(self.members[root], shape.to_vec())])?.wait()?,
            _ => return Err(CommError::Transport(format!("broadcast: only member {root} gives a message"))),
        };
        self.only("broadcast", received)
    }

    /// Starts giving `message` to member `to` and receiving one of `shape` from member `from`.
    pub fn start_pass(
        &self,
        to: usize,
        message: T,
        from: usize,
        shape: Vec<usize>,
    ) -> Result<Exchange<'_, T>, CommError> {
        self.comm.start(vec![(self.members[to], message)], vec![(self.members[from], shape)])
    }

    fn others(&self) -> impl Iterator<Item = usize> + '_ {
        let own = self.members[self.me];
        self.members.iter().copied().filter(move |member| *member != own)
    }

    fn receives_of(&self, shapes: &[Vec<usize>]) -> Vec<(usize, Vec<usize>)> {
        let others = self.members.iter().zip(shapes).enumerate().filter(|(i, _)| *i != self.me);
        others.map(|(_, (member, shape))| (*member, shape.clone())).collect()
    }

    /// Puts one's own message in its place among those of the others.
    fn with_own(&self, op: &str, mut received: Vec<T>, own: Option<T>) -> Result<Vec<T>, CommError> {
        received.extend(own);
        self.expect_members(op, received.len())?;
        // The last is one's own.
        received[self.me..].rotate_right(1);
        Ok(received)
    }

    fn only(&self, op: &str, mut received: Vec<T>) -> Result<T, CommError> {
        received.pop().ok_or_else(|| CommError::Transport(format!("{op}: nothing received")))
    }

    fn expect_members(&self, op: &str, count: usize) -> Result<(), CommError> {
        if count == self.size() {
            return Ok(());
        }
        Err(CommError::Transport(format!("{op}: {count} messages for {} members", self.size())))
    }
}
