//! One connection between two ranks of a formed group: a task that reads and writes it to its end.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, BufWriter};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::Packet;
use super::frame::{Fault, Frame, FrameReader, PART};
use crate::comm::inbox::Inboxes;
use crate::comm::{CommError, Patience};

/// The two directions of a connection, encrypted or not.
pub(super) type ReadHalf = Box<dyn AsyncRead + Send + Unpin>;
pub(super) type WriteHalf = Box<dyn AsyncWrite + Send + Unpin>;

enum Outgoing {
    Message(Packet),
    Barrier,
    Bye,
}

/// This rank's end of the connection to one peer.
pub(super) struct Link {
    /// As long as the program makes it: an exchange that lets too much lie here is held back when it is waited for.
    queue: mpsc::UnboundedSender<Outgoing>,
    /// Bytes of messages in the queue.
    pending: Arc<AtomicUsize>,
}

impl Link {
    /// Starts the link between rank `me` and rank `peer` on the current runtime. `done` is dropped when it has ended.
    pub(super) fn start(
        inboxes: Arc<Inboxes<Packet>>,
        me: usize,
        peer: usize,
        (read, write): (ReadHalf, WriteHalf),
        done: std::sync::mpsc::Sender<()>,
    ) -> Self {
        let (queue, outgoing) = mpsc::unbounded_channel();
        let pending = Arc::new(AtomicUsize::new(0));
        let (peer_left, has_peer_left) = watch::channel(false);
        let (stop_reading, reading_stops) = watch::channel(Reading::Goes);
        let patience = inboxes.patience();
        let writer = Writer {
            out: BufWriter::with_capacity(64 << 10, write),
            inboxes: inboxes.clone(),
            me,
            queue: outgoing,
            pending: pending.clone(),
            alive_every: alive_every(patience),
            next_alive: Instant::now(),
            failure: inboxes.failure(),
            peer_left: has_peer_left,
            reading: stop_reading,
        };
        let frames = FrameReader::new(read, patience.silence);
        let reader = Reader { frames, inboxes, me, peer, peer_left, writing: reading_stops };
        tokio::spawn(async move {
            tokio::join!(reader.run(), writer.run());
            drop(done);
        });
        Self { queue, pending }
    }

    pub(super) fn send(&self, packet: Packet) {
        self.pending.fetch_add(packet.bytes.len(), Ordering::Relaxed);
        self.put(Outgoing::Message(packet));
    }

    pub(super) fn barrier(&self) {
        self.put(Outgoing::Barrier);
    }

    /// Says goodbye after all that was sent.
    pub(super) fn bye(&self) {
        self.put(Outgoing::Bye);
    }

    pub(super) fn pending(&self) -> usize {
        self.pending.load(Ordering::Relaxed)
    }

    fn put(&self, item: Outgoing) {
        // A link that has ended says why in the inboxes.
        let _ = self.queue.send(item);
    }
}

/// Four signs of life in the time of silence, and in the time after which a wait is judged by them.
fn alive_every(patience: Patience) -> Duration {
    patience.silence.min(patience.stall) / 4
}

/// For how long last words are written and read. A peer that does not read any more costs no more than that.
fn grace(patience: Patience) -> Duration {
    (patience.silence / 4).min(Duration::from_secs(1))
}

async fn failed(failure: &mut watch::Receiver<Option<CommError>>) {
    if failure.wait_for(Option::is_some).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// What the writer has to say to the reader of the same link.
#[derive(Clone, Copy, PartialEq)]
enum Reading {
    Goes,
    /// Nothing can be written any more; what has come already tells why, so it is read without regard to the window.
    Broken,
    /// This rank has left, and only waits for the peer to have noticed.
    Left,
}

struct Reader {
    frames: FrameReader<ReadHalf>,
    inboxes: Arc<Inboxes<Packet>>,
    me: usize,
    peer: usize,
    peer_left: watch::Sender<bool>,
    writing: watch::Receiver<Reading>,
}

impl Reader {
    async fn run(mut self) {
        let patience = self.inboxes.patience();
        let mut failure = self.inboxes.failure();
        let outcome = tokio::select! {
            outcome = self.receive() => Some(outcome),
            () = failed(&mut failure) => None,
        };
        match outcome {
            Some(Ok(None)) => {
                self.inboxes.leave(self.peer, self.me, "it left the group");
                self.peer_left.send_replace(true);
                return;
            }
            Some(Err(_)) if *self.writing.borrow() == Reading::Left => return,
            Some(Ok(Some(error))) => _ = self.inboxes.fail(error),
            Some(Err(fault)) => _ = self.inboxes.fail(fault.blame(self.peer, patience.silence)),
            None => {}
        }
        // Closing a connection with unread bytes would reset it, and the peer might lose our last words.
        let _ = timeout(grace(patience), self.frames.drain()).await;
    }

    /// Reads until the peer says goodbye (none) or that the group has ended.
    async fn receive(&mut self) -> Result<Option<CommError>, Fault> {
        loop {
            match self.frames.next().await? {
                Frame::Alive { waits_for } => self.alive(waits_for)?,
                Frame::Barrier => self.inboxes.deliver_barrier(self.peer, self.me),
                Frame::Bye => return Ok(None),
                Frame::End(error) => return self.end(error).map(Some),
                Frame::Message { shape, bytes } => {
                    tokio::select! {
                        () = self.inboxes.room(self.peer, self.me) => {}
                        _ = self.writing.wait_for(|reading| *reading != Reading::Goes) => {}
                    }
                    let mut message = Vec::new();
                    let total = bytes as usize;
                    while message.len() < total {
                        match self.frames.next().await? {
                            Frame::Part { bytes } if bytes <= total - message.len() => {
                                self.frames.part(bytes, total, &mut message).await?;
                            }
                            Frame::Alive { waits_for } => self.alive(waits_for)?,
                            Frame::End(error) => return self.end(error).map(Some),
                            frame => return Err(Fault::Garbage(format!("{frame:?} within a message"))),
                        }
                    }
                    self.inboxes.deliver(self.peer, self.me, Packet { shape, bytes: message });
                }
                frame @ Frame::Part { .. } => return Err(Fault::Garbage(format!("{frame:?} outside a message"))),
            }
        }
    }

    fn alive(&self, waits_for: Option<usize>) -> Result<(), Fault> {
        if let Some(rank) = waits_for.filter(|rank| *rank >= self.inboxes.world()) {
            return Err(Fault::Garbage(format!("it waits for rank {rank}")));
        }
        self.inboxes.set_waiting(self.peer, waits_for);
        Ok(())
    }

    fn end(&self, error: CommError) -> Result<CommError, Fault> {
        match error.rank() {
            Some(rank) if rank >= self.inboxes.world() => Err(Fault::Garbage(format!("it blames rank {rank}"))),
            _ => Ok(error),
        }
    }
}

struct Writer {
    out: BufWriter<WriteHalf>,
    inboxes: Arc<Inboxes<Packet>>,
    me: usize,
    queue: mpsc::UnboundedReceiver<Outgoing>,
    pending: Arc<AtomicUsize>,
    alive_every: Duration,
    next_alive: Instant,
    failure: watch::Receiver<Option<CommError>>,
    peer_left: watch::Receiver<bool>,
    reading: watch::Sender<Reading>,
}

/// Why a writer stops.
#[derive(Clone, Copy)]
enum Last {
    Failed,
    PeerLeft,
    Left,
}

impl Writer {
    async fn run(mut self) {
        let grace = grace(self.inboxes.patience());
        let last = self.work().await;
        match last {
            Ok(Last::Failed) => {
                let error = self.inboxes.check().err();
                let words = error.map(|error| Frame::End(error).encode()).unwrap_or_default();
                let _ = timeout(grace, async {
                    self.out.write_all(&words).await?;
                    self.out.shutdown().await
                })
                .await;
            }
            Ok(Last::PeerLeft) => _ = timeout(grace, self.out.shutdown()).await,
            Ok(Last::Left) => {
                self.reading.send_replace(Reading::Left);
                let _ = timeout(grace, self.out.shutdown()).await;
            }
            // The reader finds out why; it may be that the peer has said so before it closed the connection.
            Err(_) => _ = self.reading.send_replace(Reading::Broken),
        }
    }

    async fn work(&mut self) -> io::Result<Last> {
        loop {
            let next = tokio::select! {
                biased;
                () = failed(&mut self.failure) => return Ok(Last::Failed),
                _ = self.peer_left.wait_for(|left| *left) => return Ok(Last::PeerLeft),
                () = sleep_until(self.next_alive) => None,
                item = self.queue.recv() => Some(item.unwrap_or(Outgoing::Bye)),
            };
            match next {
                None => self.alive().await?,
                Some(Outgoing::Message(packet)) => {
                    if let Some(last) = self.message(packet).await? {
                        return Ok(last);
                    }
                }
                Some(Outgoing::Barrier) => self.write(&Frame::Barrier.encode()).await?,
                Some(Outgoing::Bye) => {
                    self.write(&Frame::Bye.encode()).await?;
                    self.flush().await?;
                    return Ok(Last::Left);
                }
            }
            if self.queue.is_empty() {
                self.flush().await?;
            }
        }
    }

    async fn message(&mut self, packet: Packet) -> io::Result<Option<Last>> {
        let Packet { shape, bytes } = packet;
        self.write(&Frame::Message { shape, bytes: bytes.len() as u64 }.encode()).await?;
        for part in bytes.chunks(PART) {
            if self.failure.borrow().is_some() {
                return Ok(Some(Last::Failed));
            }
            if *self.peer_left.borrow() {
                return Ok(Some(Last::PeerLeft));
            }
            if Instant::now() >= self.next_alive {
                self.alive().await?;
            }
            self.write(&Frame::Part { bytes: part.len() }.encode()).await?;
            self.write(part).await?;
            self.pending.fetch_sub(part.len(), Ordering::Relaxed);
        }
        Ok(None)
    }

    async fn alive(&mut self) -> io::Result<()> {
        self.next_alive = Instant::now() + self.alive_every;
        let waits_for = self.inboxes.waiting(self.me);
        self.write(&Frame::Alive { waits_for }.encode()).await
    }

    async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        within_grace(&mut self.failure, grace(self.inboxes.patience()), self.out.write_all(bytes)).await
    }

    async fn flush(&mut self) -> io::Result<()> {
        within_grace(&mut self.failure, grace(self.inboxes.patience()), self.out.flush()).await
    }
}

/// A write takes as long as the peer lets it, but not much longer than the group. A frame is not cut before that: what
/// follows it would not be understood.
async fn within_grace(
    failure: &mut watch::Receiver<Option<CommError>>,
    grace: Duration,
    write: impl Future<Output = io::Result<()>>,
) -> io::Result<()> {
    let over = async {
        failed(failure).await;
        sleep(grace).await;
    };
    tokio::select! {
        biased;
        done = write => done,
        () = over => Err(io::ErrorKind::TimedOut.into()),
    }
}
