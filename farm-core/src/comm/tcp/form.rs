//! Forming a group: every rank dials those below it and answers those above it, until all links are there.

use std::collections::VecDeque;
use std::net::TcpListener as StdListener;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep, timeout};

use super::handshake::{self, Identity, Refused};
use super::link::{Link, ReadHalf, WriteHalf};
use super::tls::{self, Tls};
use super::{Packet, TcpOptions};
use crate::comm::CommError;
use crate::comm::inbox::Inboxes;

/// How often a forming group looks whether it was cancelled or is complete.
const LOOK: Duration = Duration::from_millis(20);
/// One attempt to open a connection, and the time that whoever dials has for its handshake.
const ATTEMPT: Duration = Duration::from_secs(5);
/// Between attempts to open a connection: from the first to the longest.
const PAUSES: [Duration; 2] = [Duration::from_millis(20), Duration::from_secs(1)];
/// Strangers that may be in a handshake at once; the oldest has to go when there are more.
const STRANGERS: usize = 64;

/// Opens the port on which the ranks above dial this one.
pub(super) fn listen(options: &TcpOptions) -> Result<StdListener, CommError> {
    let failed = |address: &str, error| CommError::Transport(format!("cannot listen on {address}: {error}"));
    if let Some(address) = &options.listen {
        return StdListener::bind(address).map_err(|error| failed(address, error));
    }
    let own = &options.peers[options.rank];
    let port = own.rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok());
    let port = port.ok_or_else(|| CommError::Transport(format!("{own:?} is not host:port")))?;
    // Where there is no IPv6, of IPv4 only.
    let all = format!("[::]:{port}");
    StdListener::bind(&all).or_else(|_| StdListener::bind(("0.0.0.0", port))).map_err(|error| failed(&all, error))
}

/// What the tasks that form a group share.
struct Forming {
    me: Identity,
    peers: Vec<String>,
    tls: Option<Tls>,
    /// Connections that are through the handshake.
    met: mpsc::UnboundedSender<(usize, ReadHalf, WriteHalf)>,
    /// Which ranks have met this one.
    present: Mutex<Vec<bool>>,
    /// What last went wrong with a peer, or with whoever dialled, for the error if the group does not form.
    notes: Mutex<Vec<Option<String>>>,
    /// Why the group can never form.
    refused: Mutex<Option<String>>,
}

/// Links this rank with all others. Every link that was made is in `links` also after an error.
pub(super) async fn form(
    options: &TcpOptions,
    listener: Option<StdListener>,
    inboxes: &Arc<Inboxes<Packet>>,
    links: &mut [Option<Link>],
    done: std::sync::mpsc::Sender<()>,
) -> Result<(), CommError> {
    let (rank, world) = (options.rank, options.peers.len());
    let (met, mut meetings) = mpsc::unbounded_channel();
    let forming = Arc::new(Forming {
        me: Identity { rank, world, group: options.group.clone() },
        peers: options.peers.clone(),
        tls: options.tls.as_ref().map(Tls::load).transpose()?,
        met,
        present: Mutex::new(vec![false; world]),
        notes: Mutex::new(vec![None; world]),
        refused: Mutex::new(None),
    });
    let mut tasks = JoinSet::new();
    (0..rank).for_each(|to| _ = tasks.spawn(forming.clone().dial(to)));
    if let Some(listener) = listener {
        let listener = listener.set_nonblocking(true).and_then(|()| TcpListener::from_std(listener));
        let listener = listener.map_err(|error| CommError::Transport(format!("cannot listen: {error}")))?;
        tasks.spawn(forming.clone().answer(listener));
    }

    let outcome = link_all(options, &forming, &mut meetings, inboxes, links, done).await;
    // The port is free again when this returns.
    tasks.shutdown().await;
    outcome
}

async fn link_all(
    options: &TcpOptions,
    forming: &Forming,
    meetings: &mut mpsc::UnboundedReceiver<(usize, ReadHalf, WriteHalf)>,
    inboxes: &Arc<Inboxes<Packet>>,
    links: &mut [Option<Link>],
    done: std::sync::mpsc::Sender<()>,
) -> Result<(), CommError> {
    let (rank, world) = (options.rank, options.peers.len());
    let start = Instant::now();
    let mut linked = 0;
    loop {
        // A new link counts at once; everything else is looked at now and then.
        let meeting = if linked + 1 < world { timeout(LOOK, meetings.recv()).await.ok().flatten() } else { None };
        if let Some((peer, read, write)) = meeting {
            links[peer] = Some(Link::start(inboxes.clone(), rank, peer, (read, write), done.clone()));
            linked += 1;
            if linked + 1 == world {
                links.iter().flatten().for_each(Link::barrier);
            }
            continue;
        }
        inboxes.check()?;
        let refused = forming.refused.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(text) = refused {
            return Err(CommError::Transport(text));
        }
        if linked + 1 == world {
            if inboxes.missing(rank).is_empty() {
                return inboxes.take_barriers(rank);
            }
            sleep(LOOK / 4).await;
        }
        if options.cancel.load(Ordering::Relaxed) {
            return Err(CommError::Transport(format!("rank {rank} was cancelled while the group formed")));
        }
        if start.elapsed() >= options.connect_within {
            return Err(forming.late(options.connect_within, inboxes));
        }
    }
}

impl Forming {
    /// Dials rank `to` until it welcomes this one.
    async fn dial(self: Arc<Self>, to: usize) {
        let address = &self.peers[to];
        let [mut pause, longest] = PAUSES;
        loop {
            match self.attempt(to, address).await {
                Ok((read, write)) => return self.meet(to, read, write),
                Err(Refused::ForGood(text)) => {
                    let text = format!("rank {to} at {address} refused: {text}");
                    self.refused.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(text);
                    return;
                }
                Err(Refused::ForNow(text)) => self.note(to, format!("rank {to} at {address}: {text}")),
            }
            sleep(pause).await;
            pause = (2 * pause).min(longest);
        }
    }

    async fn attempt(&self, to: usize, address: &str) -> Result<(ReadHalf, WriteHalf), Refused> {
        let stream = timeout(ATTEMPT, TcpStream::connect(address)).await;
        let mut stream = stream.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))?;
        stream.set_nodelay(true)?;
        // Who is connected waits for an answer as long as the group may take to form: the other rank may be busy.
        match &self.tls {
            None => {
                handshake::dial(&mut stream, &self.me, to).await?;
                Ok(split(stream))
            }
            Some(tls) => {
                let name = tls::name(address).map_err(Refused::ForGood)?;
                let dialled = async {
                    let mut stream = tls.connector.connect(name, stream).await?;
                    handshake::dial(&mut stream, &self.me, to).await?;
                    Ok(split_tls(stream))
                };
                // A certificate that the other side does not take is known only when its answer is read.
                dialled.await.map_err(|refused| match refused {
                    Refused::ForNow(text) => Refused::ForNow(format!("tls: {text}")),
                    refused => refused,
                })
            }
        }
    }

    /// Answers whoever dials. Each caller has a task and a deadline of its own, so none keeps another waiting.
    async fn answer(self: Arc<Self>, listener: TcpListener) {
        let mut callers = JoinSet::new();
        let mut oldest: VecDeque<AbortHandle> = VecDeque::new();
        loop {
            // Ends of callers are of no interest, but they hold memory until they are looked at.
            while callers.try_join_next().is_some() {}
            let stream = match listener.accept().await {
                Ok((stream, address)) => (stream, address),
                Err(error) => {
                    // For example too many open files.
                    self.note(self.me.rank, format!("cannot answer: {error}"));
                    sleep(PAUSES[0]).await;
                    continue;
                }
            };
            let (stream, address) = stream;
            let forming = self.clone();
            oldest.push_back(callers.spawn(async move {
                let outcome = timeout(ATTEMPT, forming.hear(stream)).await;
                if let Err(Refused::ForGood(text) | Refused::ForNow(text)) =
                    outcome.unwrap_or_else(|_| Err(Refused::ForNow("nothing was said".into())))
                {
                    forming.note(forming.me.rank, format!("{address} dialled: {text}"));
                }
            }));
            oldest.retain(|caller| !caller.is_finished());
            if oldest.len() > STRANGERS + self.me.world {
                oldest.pop_front().into_iter().for_each(|caller| caller.abort());
            }
        }
    }

    async fn hear(&self, mut stream: TcpStream) -> Result<(), Refused> {
        stream.set_nodelay(true)?;
        let free = |rank: usize| !self.present.lock().unwrap_or_else(PoisonError::into_inner)[rank];
        match &self.tls {
            None => {
                let from = handshake::answer(&mut stream, &self.me, free).await?;
                let (read, write) = split(stream);
                self.meet(from, read, write);
            }
            Some(tls) => {
                let stream = tls.acceptor.accept(stream).await;
                let mut stream = stream.map_err(|error| Refused::ForNow(format!("tls: {error}")))?;
                let from = handshake::answer(&mut stream, &self.me, free).await?;
                let (read, write) = split_tls(stream);
                self.meet(from, read, write);
            }
        }
        Ok(())
    }

    /// The first connection with a rank is the one.
    fn meet(&self, peer: usize, read: ReadHalf, write: WriteHalf) {
        let mut present = self.present.lock().unwrap_or_else(PoisonError::into_inner);
        if !std::mem::replace(&mut present[peer], true) {
            // Nobody takes it when the group has failed meanwhile.
            let _ = self.met.send((peer, read, write));
        }
    }

    fn note(&self, about: usize, text: String) {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)[about] = Some(text);
    }

    fn late(&self, within: Duration, inboxes: &Inboxes<Packet>) -> CommError {
        let (me, within) = (self.me.rank, within.as_secs_f32());
        let present = self.present.lock().unwrap_or_else(PoisonError::into_inner);
        let absent: Vec<usize> = inboxes.others(me).filter(|rank| !present[*rank]).collect();
        let mut text = format!("the group did not form within {within:.1} s: ");
        if absent.is_empty() {
            text += &format!("ranks {:?} have not met all others", inboxes.missing(me));
        } else {
            text += &format!("rank {me} has not met ranks {absent:?}");
        }
        let notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
        // What went wrong with a rank that is there by now explains nothing.
        let about = |rank: usize| rank == me || absent.contains(&rank);
        let notes = notes.iter().enumerate().filter(|(rank, _)| about(*rank)).filter_map(|(_, note)| note.as_deref());
        notes.for_each(|note| text += &format!("; {note}"));
        CommError::Transport(text)
    }
}

fn split(stream: TcpStream) -> (ReadHalf, WriteHalf) {
    let (read, write) = stream.into_split();
    (Box::new(read), Box::new(write))
}

fn split_tls<S>(stream: S) -> (ReadHalf, WriteHalf)
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + 'static,
{
    let (read, write) = tokio::io::split(stream);
    (Box::new(read), Box::new(write))
}
