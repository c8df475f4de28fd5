//! Ranks as processes, on one host or several: a connection between every two of them, optionally with TLS.
//!
//! | module | subject |
//! |---|---|
//! | `handshake` | the first words on a connection: who is there, and is it of this group |
//! | `form` | dialling and answering until every two ranks are linked |
//! | `frame` | what goes over a connection |
//! | `link` | one connection of a formed group, to its end |
//! | `tls` | encryption, and certificates on both sides |
//!
//! Signs of life go four times in the time of silence, also between the parts of a long message and while the rank
//! computes; any bytes count as one. They say whom the sender waits for, so that a stall is blamed on the rank that
//! causes it. Whoever fails tells all others why before it closes its connections; a connection that closes without a
//! word is a rank that is gone. A rank that is done says goodbye, and is missed only by who needs more of it.

mod form;
mod frame;
mod handshake;
mod link;
#[cfg(test)]
mod tests;
mod tls;

use std::net::TcpListener;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;

use tokio::runtime::Runtime;

use self::link::Link;
pub use self::tls::TlsFiles;
use super::inbox::Inboxes;
use super::{Collective, CommError, Exchange, Patience};
use crate::engine::{SequenceOps, Transfer};

/// Most ranks of a group.
const MAX_WORLD: usize = 1024;

/// How one rank finds its group.
#[derive(Clone, Debug)]
pub struct TcpOptions {
    pub rank: usize,
    /// `host:port` of every rank, in rank order; the same list everywhere.
    pub peers: Vec<String>,
    /// `address:port` that this rank listens on, if it is not the port of its own entry on all interfaces.
    pub listen: Option<String>,
    /// What has to be equal on all ranks, for example the clip, the checkpoint and the topology; up to 1 KiB.
    pub group: String,
    pub patience: Patience,
    /// The time that the group has to form.
    pub connect_within: Duration,
    pub tls: Option<TlsFiles>,
    /// Set from elsewhere, ends the forming of the group.
    pub cancel: Arc<AtomicBool>,
}

/// Forms the group: returns when every two ranks are linked. Blocks; not for async code.
///
/// Errors if a rank refuses this one, with its reason; if not all are there in time; and if a rank that was there is
/// lost meanwhile.
pub fn connect<E: SequenceOps>(engine: Arc<E>, options: TcpOptions) -> Result<TcpRank<E>, CommError> {
    check(&options)?;
    // Nobody dials the last rank.
    let listener = if options.rank + 1 < options.peers.len() { Some(form::listen(&options)?) } else { None };
    connect_on(engine, options, listener)
}

/// As [`connect`], for who has opened the port already (to learn its number, for example).
pub fn connect_on<E: SequenceOps>(
    engine: Arc<E>,
    options: TcpOptions,
    listener: Option<TcpListener>,
) -> Result<TcpRank<E>, CommError> {
    check(&options)?;
    let (rank, world) = (options.rank, options.peers.len());
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name(format!("comm-{rank}"))
        .enable_all()
        .build()
        .map_err(|error| CommError::Transport(format!("cannot start the threads of the transport: {error}")))?;
    let inboxes = Arc::new(Inboxes::new(world, rank..rank + 1, options.patience));
    let (done, ended) = mpsc::channel();
    let (formed, links) = mpsc::channel();
    let shared = inboxes.clone();
    // Not `block_on`, which panics where a runtime is already.
    runtime.spawn(async move {
        let mut links: Vec<Option<Link>> = (0..world).map(|_| None).collect();
        let outcome = form::form(&options, listener, &shared, &mut links, done).await;
        let _ = formed.send((outcome, links));
    });
    let (outcome, links) = links.recv().map_err(|_| CommError::Transport("the transport panicked".into()))?;
    let sent = AtomicU64::new(0);
    let formed = TcpRank { rank, engine, inboxes, links, sent, ended: Mutex::new(ended), runtime: Some(runtime) };
    match outcome {
        Ok(()) => Ok(formed),
        // Those that are linked already hear why before it is dropped.
        Err(error) => Err(formed.inboxes.fail(error)),
    }
}

fn check(options: &TcpOptions) -> Result<(), CommError> {
    let (rank, world, group) = (options.rank, options.peers.len(), options.group.len());
    let problem = if world > MAX_WORLD {
        format!("{world} ranks; a group has at most {MAX_WORLD}")
    } else if rank >= world {
        format!("rank {rank} is not among {world} peers; ranks count from 0")
    } else if group > handshake::MAX_TEXT {
        format!("a group's name of {group} bytes; at most {} are taken", handshake::MAX_TEXT)
    } else if options.patience.silence < Duration::from_millis(40) {
        "a silence below 40 ms leaves no time for signs of life".into()
    } else {
        return Ok(());
    };
    Err(CommError::Transport(problem))
}

/// A message between processes.
#[derive(Clone)]
struct Packet {
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Transfer for Packet {
    fn sizes(&self) -> Vec<usize> {
        self.shape.clone()
    }

    fn byte_len(&self) -> usize {
        self.bytes.len()
    }
}

/// One rank's end of a group of processes. Dropping it says goodbye once everything sent has gone out.
pub struct TcpRank<E: SequenceOps> {
    rank: usize,
    engine: Arc<E>,
    inboxes: Arc<Inboxes<Packet>>,
    /// To every rank but this one.
    links: Vec<Option<Link>>,
    sent: AtomicU64,
    /// Hangs up when all links have ended.
    ended: Mutex<mpsc::Receiver<()>>,
    runtime: Option<Runtime>,
}

impl<E: SequenceOps> TcpRank<E> {
    fn pack(&self, to: usize, message: &E::Tensor) -> Result<Packet, CommError> {
        let shape = message.sizes();
        let failed = |why: String| {
            let text = format!("rank {} cannot send {shape:?} to rank {to}: {why}", self.rank);
            self.inboxes.fail(CommError::Transport(text))
        };
        let len = message.byte_len() as u64;
        if len > frame::MAX_MESSAGE {
            return Err(failed(format!("it has {len} bytes, a message at most {}", frame::MAX_MESSAGE)));
        }
        let bytes = self.engine.to_bytes(message).map_err(|error| failed(error.to_string()))?;
        Ok(Packet { shape, bytes })
    }
}

impl<E: SequenceOps> Collective<E::Tensor> for TcpRank<E> {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world(&self) -> usize {
        self.links.len()
    }

    fn start(
        &self,
        sends: Vec<(usize, E::Tensor)>,
        receives: Vec<(usize, Vec<usize>)>,
    ) -> Result<Exchange<'_, E::Tensor>, CommError> {
        let (me, inboxes) = (self.rank, &self.inboxes);
        let receivers: Vec<usize> = sends.iter().map(|(to, _)| *to).collect();
        let senders: Vec<usize> = receives.iter().map(|(from, _)| *from).collect();
        let tickets = inboxes.begin(me, &receivers, receives)?;
        for (to, message) in sends {
            let packet = self.pack(to, &message)?;
            self.sent.fetch_add(packet.bytes.len() as u64, Ordering::Relaxed);
            if let Some(link) = &self.links[to] {
                link.send(packet);
            }
        }
        let pending = |to: usize| self.links[to].as_ref().map_or(0, Link::pending);
        Ok(Exchange::new(move || {
            let packets = inboxes.finish(me, tickets, &receivers, pending)?;
            let unpack = |(packet, from): (Packet, usize)| {
                self.engine.tensor_of_bytes(&packet.bytes, &packet.shape).map_err(|error| {
                    let (expected, got) = (format!("{:?}", packet.shape), error.to_string());
                    inboxes.fail(CommError::Mismatch { rank: from, expected, got })
                })
            };
            packets.into_iter().zip(senders).map(unpack).collect()
        }))
    }

    fn barrier(&self) -> Result<(), CommError> {
        self.inboxes.check()?;
        self.links.iter().flatten().for_each(Link::barrier);
        self.inboxes.take_barriers(self.rank)
    }

    fn abort(&self, reason: &str) {
        self.inboxes.fail(CommError::Aborted { rank: self.rank, reason: reason.to_owned() });
    }

    fn bytes_sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }
}

impl<E: SequenceOps> Drop for TcpRank<E> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.inboxes.fail(CommError::Lost { rank: self.rank, why: "its thread panicked".into() });
        }
        self.links.iter().flatten().for_each(Link::bye);
        // Links end by themselves: with the group, with their peer, or when it has heard the goodbye. A peer may compute
        // before it takes what lies in front of that.
        let limit = self.inboxes.patience().stall;
        let ended = self.ended.get_mut().unwrap_or_else(PoisonError::into_inner);
        let _ = ended.recv_timeout(limit);
        if let Some(runtime) = self.runtime.take() {
            // A lookup of a host's name may still be under way; nothing waits for it.
            runtime.shutdown_background();
        }
    }
}
