//! One conversation between two nodes, over as many streams as it takes, one after the other.
//!
//! The layers above see messages in order, each once, or the end of the link. A stream that breaks, damages bytes or is
//! silent is left, and the end that dialled dials again; each end first says how far it has heard the other. Both read
//! whatever comes at any time, also while the application is slow, so silence means the other end or the network.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use farm_core::tiles::codec::Wire;
use http_body_util::BodyExt;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval, timeout};

use super::client::Redial;
use super::counters::{Count, Counting};
use super::frame::{Frame, FrameError, FrameReader, Kind, LEAST};
use super::window::{Inbox, Item, Outbox, Received};
use super::{Patience, body};
use crate::link::Link;

/// Streams that end without a message having come through on any of them.
pub(super) const MAX_FRUITLESS: u32 = 64;
/// Longer payloads are not copied to be sent in one piece with their header.
const COPIED: usize = 64 << 10;
/// Once both ends are done, the time that the other has to close the stream.
const CLOSING: Duration = Duration::from_secs(1);
/// Pieces of frames between a channel and the stream that takes them.
pub(super) const PIECES: usize = 4;

/// A request or an answer that is under way both ways.
pub(super) struct Stream {
    incoming: Body,
    outgoing: mpsc::Sender<Bytes>,
    /// Dropped with the stream: the connection of a client, a server's mark that its connection is in use.
    _hold: Hold,
}

pub(super) enum Hold {
    Client { _connection: JoinSet<()> },
    Server { _in_use: Arc<()> },
}

impl Stream {
    pub(super) fn new(incoming: Body, outgoing: mpsc::Sender<Bytes>, hold: Hold) -> Self {
        Self { incoming, outgoing, _hold: hold }
    }

    /// What this end says, as a body for HTTP.
    pub(super) fn outgoing() -> (mpsc::Sender<Bytes>, Body) {
        let (outgoing, pieces) = mpsc::channel(PIECES);
        (outgoing, body(pieces))
    }
}

/// Where streams come from.
pub(super) enum Source {
    /// A server is given them.
    Offered(mpsc::Receiver<Stream>),
    Dialled(Box<Redial>),
}

impl Source {
    /// Messages come through.
    fn calm(&mut self) {
        if let Self::Dialled(redial) = self {
            redial.calm();
        }
    }
}

/// A channel cannot go on, and why.
#[derive(Debug)]
pub(super) struct Lost(pub(super) String);

pub(super) struct Channel<S, R> {
    /// Who is at the other end, for people.
    pub(super) peer: String,
    /// What the application says; gone when nobody hears it.
    to: Option<mpsc::Receiver<S>>,
    /// What the application hears; gone when there is no more, or it does not want more.
    from: Option<mpsc::Sender<R>>,
    max_message: usize,
    patience: Patience,
    counting: Arc<Counting>,
    source: Source,
    stream: Option<Attached>,
    outbox: Outbox,
    inbox: Inbox,
    /// The application does not listen any more.
    deaf: bool,
    peer_deaf: bool,
    /// No stream works, and none may later than this.
    lost_at: Option<Instant>,
    /// The application has left; what it has said has until then to get through.
    leave_at: Option<Instant>,
    fruitless: u32,
    streams: u64,
    tick: Interval,
}

struct Attached {
    stream: Stream,
    reader: FrameReader,
    heard: Instant,
    spoke: Instant,
    hello_said: bool,
    /// The longest message that the other end takes, once it has said so.
    peer_max: Option<u64>,
    deaf_said: bool,
}

enum Event<S> {
    Stream(Result<Stream, Lost>),
    Came(Option<Result<Bytes, String>>),
    MaySpeak,
    Say(Option<S>),
    Delivered,
    Undecodable(String),
    Deaf,
    Tick,
}

impl<S: Wire, R: Wire> Channel<S, R> {
    pub(super) fn new(
        peer: String,
        ends: Link<R, S>,
        source: Source,
        max_message: usize,
        patience: Patience,
        counting: Arc<Counting>,
    ) -> Self {
        let mut tick = interval(patience.keep_alive / 2);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self {
            peer,
            to: Some(ends.from),
            from: Some(ends.to),
            max_message,
            patience,
            counting,
            source,
            stream: None,
            outbox: Outbox::default(),
            inbox: Inbox::default(),
            deaf: false,
            peer_deaf: false,
            lost_at: Some(Instant::now() + patience.grace),
            leave_at: None,
            fruitless: 0,
            streams: 0,
            tick,
        }
    }

    /// Until both ends are done, or the channel is lost.
    pub(super) async fn run(mut self) {
        loop {
            self.settle();
            if self.is_done() {
                return self.close().await;
            }
            let event = self.next().await;
            if let Err(Lost(reason)) = self.on(event) {
                let (here, there) = (self.outbox.ended(), self.inbox.ended());
                if here && there {
                    tracing::debug!(peer = %self.peer, %reason, "a channel ended without a last word");
                } else {
                    self.counting.add(Count::LostChannel);
                    tracing::warn!(peer = %self.peer, %reason, "a channel is lost");
                    self.say_lost(reason);
                }
                return self.close().await;
            }
        }
    }

    /// Draws conclusions from what has changed.
    fn settle(&mut self) {
        if self.deaf {
            while self.inbox.take().is_some() {}
        }
        if self.inbox.is_done() {
            // The application hears that there is no more.
            self.from = None;
        }
        if self.peer_deaf {
            self.to = None;
            self.outbox.clear();
        }
        if (self.deaf || self.inbox.is_done()) && (self.outbox.ended() || self.peer_deaf) {
            self.leave_at.get_or_insert_with(|| Instant::now() + self.patience.leave);
        }
    }

    fn is_done(&self) -> bool {
        let said = self.peer_deaf || self.outbox.is_done();
        let heard = self.deaf || self.inbox.is_done();
        (said && heard && !self.has_news()) || self.leave_at.is_some_and(|at| at <= Instant::now())
    }

    /// There is something that the other end should be told at once, beside messages.
    fn has_news(&self) -> bool {
        let Some(attached) = &self.stream else { return false };
        !attached.hello_said || self.inbox.is_telling_due() || (self.deaf && !attached.deaf_said)
    }

    /// There is anything to be put on the stream.
    fn has_to_speak(&self) -> bool {
        let Some(attached) = &self.stream else { return false };
        let message = attached.peer_max.is_some() && self.outbox.has_unsent();
        message || self.has_news() || attached.spoke.elapsed() >= self.patience.keep_alive
    }

    /// A stream would change anything.
    fn needs_stream(&self) -> bool {
        !(self.peer_deaf && self.inbox.ended())
    }

    async fn next(&mut self) -> Event<S> {
        let speaks = self.has_to_speak();
        let dials = self.stream.is_none() && self.needs_stream();
        let hears_more = self.to.is_some() && !self.outbox.ended() && self.outbox.has_room();
        let delivers = self.inbox.has_waiting();
        let (incoming, outgoing) = match &mut self.stream {
            Some(Attached { stream, .. }) => (Some(&mut stream.incoming), Some(&stream.outgoing)),
            None => (None, None),
        };
        tokio::select! {
            stream = next_stream(&mut self.source, dials) => Event::Stream(stream),
            came = next_bytes(incoming) => Event::Came(came),
            () = room(outgoing), if speaks => Event::MaySpeak,
            said = next_said(&mut self.to), if hears_more => Event::Say(said),
            permit = listener(&self.from), if delivers => match (permit, self.inbox.take()) {
                (Some(permit), Some(bytes)) => match R::decode(&bytes) {
                    Ok(message) => {
                        permit.send(message);
                        Event::Delivered
                    }
                    Err(error) => Event::Undecodable(error.to_string()),
                },
                _ => Event::Deaf,
            },
            () = gone(&self.from), if !self.deaf => Event::Deaf,
            _ = self.tick.tick() => Event::Tick,
        }
    }

    fn on(&mut self, event: Event<S>) -> Result<(), Lost> {
        match event {
            Event::Stream(stream) => {
                self.attach(stream?);
                Ok(())
            }
            Event::Came(Some(Ok(bytes))) => self.on_bytes(&bytes),
            Event::Came(Some(Err(reason))) => self.detach(&reason),
            Event::Came(None) => self.detach("the other end closed it"),
            Event::MaySpeak => self.speak(),
            Event::Say(Some(message)) => {
                self.outbox.push(Item::Message(message.encode().into()));
                Ok(())
            }
            Event::Say(None) => {
                self.to = None;
                self.outbox.push(Item::End);
                Ok(())
            }
            Event::Delivered => Ok(()),
            Event::Undecodable(reason) => {
                self.counting.add(Count::CorruptMessage);
                Err(Lost(format!("a message cannot be read, is the other end of another version? {reason}")))
            }
            Event::Deaf => {
                self.deaf = true;
                self.from = None;
                Ok(())
            }
            Event::Tick => self.on_tick(),
        }
    }

    fn attach(&mut self, stream: Stream) {
        self.streams += 1;
        if self.streams > 1 {
            self.counting.add(Count::Reconnect);
            tracing::info!(peer = %self.peer, streams = self.streams, "a channel goes on over another stream");
        }
        let now = Instant::now();
        let reader = FrameReader::new(self.max_message);
        self.stream = Some(Attached {
            stream,
            reader,
            heard: now,
            spoke: now,
            hello_said: false,
            peer_max: None,
            deaf_said: false,
        });
        // Until it is heard of, it is not known to work.
        self.lost_at.get_or_insert(now + self.patience.silence + self.patience.grace);
    }

    /// Leaves the stream.
    fn detach(&mut self, reason: &str) -> Result<(), Lost> {
        self.stream = None;
        if !self.needs_stream() {
            return Ok(());
        }
        tracing::info!(peer = %self.peer, reason, "a stream of a channel broke");
        self.lost_at.get_or_insert(Instant::now() + self.patience.grace);
        self.fruitless += 1;
        if self.fruitless > MAX_FRUITLESS {
            return Err(Lost(format!("{MAX_FRUITLESS} streams brought nothing, the last: {reason}")));
        }
        Ok(())
    }

    fn on_corrupt(&mut self, reason: &str) -> Result<(), Lost> {
        self.counting.add(Count::CorruptMessage);
        self.detach(reason)
    }

    fn on_tick(&mut self) -> Result<(), Lost> {
        let now = Instant::now();
        if self.needs_stream() && self.lost_at.is_some_and(|at| at <= now) {
            return Err(Lost(format!("no stream has worked for {:?}", self.patience.grace)));
        }
        match &self.stream {
            Some(attached) if attached.heard + self.patience.silence <= now => self.detach("silence"),
            _ => Ok(()),
        }
    }

    fn on_bytes(&mut self, bytes: &[u8]) -> Result<(), Lost> {
        let Some(attached) = &mut self.stream else { return Ok(()) };
        attached.heard = Instant::now();
        attached.reader.push(bytes);
        // A stream that is left in the middle has no more frames.
        while let Some(attached) = &mut self.stream {
            match attached.reader.next() {
                Ok(None) => break,
                Ok(Some(frame)) => self.on_frame(frame)?,
                Err(FrameError::Corrupt(reason)) => self.on_corrupt(reason)?,
                Err(FrameError::TooLong { bytes }) => {
                    self.counting.add(Count::OverLimit);
                    return Err(Lost(format!("a message has {bytes} bytes, and {} are allowed", self.max_message)));
                }
            }
        }
        Ok(())
    }

    fn on_frame(&mut self, frame: Frame) -> Result<(), Lost> {
        let Some(attached) = &mut self.stream else { return Ok(()) };
        self.lost_at = None;
        if frame.kind == Kind::Lost {
            // It knows that the channel is lost, or has no use for an answer.
            self.stream = None;
            let reason = String::from_utf8_lossy(&frame.payload);
            return Err(Lost(format!("the other end has given up: {reason}")));
        }
        self.peer_deaf |= frame.deaf;
        if self.peer_deaf {
            // Nothing of it will be taken.
            self.outbox.clear();
        } else {
            match self.outbox.on_taken(frame.taken) {
                None => return Err(Lost("the other end says that it took messages which it was not sent".into())),
                Some(0) => {}
                Some(_) => {
                    self.fruitless = 0;
                    self.source.calm();
                }
            }
        }
        match (frame.kind, attached.peer_max) {
            (Kind::Hello, None) => {
                let Some(&max) = frame.payload.first_chunk() else {
                    return Err(Lost("the other end does not say how long messages may be".into()));
                };
                attached.peer_max = Some(u64::from_le_bytes(max));
                if !self.peer_deaf && !self.outbox.resume(frame.number) {
                    return Err(Lost("the other end has forgotten messages, or knows some that were not said".into()));
                }
                Ok(())
            }
            (Kind::Hello, Some(_)) => self.on_corrupt("the other end greets twice"),
            (_, None) => self.on_corrupt("the other end does not greet"),
            (Kind::Ack | Kind::Lost, Some(_)) => Ok(()),
            (Kind::Message, Some(_)) => self.on_item(frame.number, Item::Message(frame.payload)),
            (Kind::End, Some(_)) => self.on_item(frame.number, Item::End),
        }
    }

    fn on_item(&mut self, number: u64, item: Item) -> Result<(), Lost> {
        match self.inbox.receive(number, item) {
            Received::New => {
                self.fruitless = 0;
                self.source.calm();
            }
            Received::Duplicate => self.counting.add(Count::Duplicate),
            Received::Gap => return self.on_corrupt("messages are missing"),
            Received::Wrong(reason) => {
                self.counting.add(Count::OverLimit);
                return Err(Lost(format!("the other end breaks the rules: {reason}")));
            }
        }
        Ok(())
    }

    /// Puts one frame on the stream, which has room for it.
    fn speak(&mut self) -> Result<(), Lost> {
        let Some(attached) = &mut self.stream else { return Ok(()) };
        let (kind, number, payload) = if !attached.hello_said {
            attached.hello_said = true;
            (Kind::Hello, self.inbox.received(), (self.max_message as u64).to_le_bytes().to_vec().into())
        } else if let Some(max) = attached.peer_max
            && let Some((number, item)) = self.outbox.next()
        {
            match item {
                Item::Message(bytes) if bytes.len() as u64 > max || u32::try_from(bytes.len()).is_err() => {
                    self.counting.add(Count::OverLimit);
                    let length = bytes.len();
                    return Err(Lost(format!("a message has {length} bytes, and the other end takes {max}")));
                }
                Item::Message(bytes) => (Kind::Message, number, bytes),
                Item::End => (Kind::End, number, Bytes::new()),
            }
        } else {
            (Kind::Ack, 0, Bytes::new())
        };
        attached.spoke = Instant::now();
        attached.deaf_said = self.deaf;
        let frame = Frame { kind, deaf: self.deaf, taken: self.inbox.tell(), number, payload };
        let header = frame.header();
        let sent = if frame.payload.len() <= COPIED {
            attached.stream.outgoing.try_send([&header[..], &frame.payload].concat().into())
        } else {
            let header = attached.stream.outgoing.try_send(header.to_vec().into());
            header.and_then(|()| attached.stream.outgoing.try_send(frame.payload))
        };
        // There is room for both pieces, as nobody else sends: it is gone.
        if sent.is_err() { self.detach("it takes no more") } else { Ok(()) }
    }

    /// If there is a stream, the other end need not wait for the grace to pass.
    fn say_lost(&mut self, mut reason: String) {
        let Some(attached) = &self.stream else { return };
        reason.truncate(reason.floor_char_boundary(LEAST));
        let (taken, payload) = (self.inbox.tell(), reason.into());
        let frame = Frame { kind: Kind::Lost, deaf: true, taken, number: 0, payload };
        // With no room it waits after all.
        let _ = attached.stream.outgoing.try_send([&frame.header()[..], &frame.payload].concat().into());
    }

    /// Lets the last words go out.
    async fn close(self) {
        let Some(Attached { stream: Stream { mut incoming, outgoing, _hold }, .. }) = self.stream else { return };
        drop(outgoing);
        // The application hears at once that this is the end.
        drop((self.to, self.from));
        let _ = timeout(CLOSING, async { while let Some(Ok(_)) = incoming.frame().await {} }).await;
    }
}

async fn next_stream(source: &mut Source, dials: bool) -> Result<Stream, Lost> {
    match source {
        // Also while there is one: whoever dials knows better whether it works.
        Source::Offered(offers) => match offers.recv().await {
            Some(stream) => Ok(stream),
            None => std::future::pending().await,
        },
        Source::Dialled(redial) if dials => redial.next().await,
        Source::Dialled(_) => std::future::pending().await,
    }
}

async fn next_bytes(incoming: Option<&mut Body>) -> Option<Result<Bytes, String>> {
    let Some(incoming) = incoming else { return std::future::pending().await };
    loop {
        match incoming.frame().await? {
            Ok(frame) => {
                if let Ok(bytes) = frame.into_data() {
                    return Some(Ok(bytes));
                }
            }
            Err(error) => return Some(Err(super::with_causes(&error))),
        }
    }
}

/// Waits until the stream has room for a frame, or is gone.
async fn room(outgoing: Option<&mpsc::Sender<Bytes>>) {
    match outgoing {
        // Dropped unused, they stay for whoever sends next.
        Some(outgoing) => drop(outgoing.reserve_many(2).await),
        None => std::future::pending().await,
    }
}

async fn next_said<S>(to: &mut Option<mpsc::Receiver<S>>) -> Option<S> {
    match to {
        Some(to) => to.recv().await,
        None => std::future::pending().await,
    }
}

async fn listener<R>(from: &Option<mpsc::Sender<R>>) -> Option<mpsc::Permit<'_, R>> {
    match from {
        Some(from) => from.reserve().await.ok(),
        None => std::future::pending().await,
    }
}

async fn gone<R>(from: &Option<mpsc::Sender<R>>) {
    match from {
        Some(from) => from.closed().await,
        None => std::future::pending().await,
    }
}
