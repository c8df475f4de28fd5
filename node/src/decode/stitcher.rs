//! The shell around a [`Crew`]: carries its messages, and blends and encodes on a thread of its own.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc as thread_mpsc;
use std::time::{Duration, Instant};

use farm_core::tiles::blend::Blender;
use farm_core::tiles::crew::{Action, Counters, Crew, Event, HandId, Patience};
use farm_core::tiles::message::{FromHand, Pixels, ToHand};
use farm_core::tiles::shape::Shape;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;

use crate::encode::FrameSink;
use crate::link::Link;

/// How exactly deadlines are kept.
const TICK: Duration = Duration::from_millis(100);
/// Events that wait for the crew. Hands wait when there are more.
const MAILBOX: usize = 64;

/// The crew's side of a conversation with a hand.
pub type CrewLink = Link<ToHand, FromHand>;

/// A hand that has come, and from where.
pub struct Arrival {
    pub name: String,
    pub link: CrewLink,
}

/// What a stitcher is told, and by whom it gets hands.
pub struct Surroundings<'a> {
    /// Asked for hands, with the number of the round.
    pub want_hands: Box<dyn FnMut(u32) + Send + 'a>,
    /// The answers: how many hands will try to join.
    pub expected: mpsc::Receiver<usize>,
    pub arrivals: mpsc::Receiver<Arrival>,
    /// Told how many frames are encoded.
    pub progress: Box<dyn FnMut(u32) + Send + 'a>,
    /// Ends the decode when it is set.
    pub stop: Arc<AtomicBool>,
    /// Lines for the clip's log.
    pub log: Box<dyn Fn(String) + Send + 'a>,
}

#[derive(Debug, thiserror::Error)]
pub enum StitchError {
    #[error("decode: {0}")]
    Decode(String),
    #[error("cannot encode: {0}")]
    Encode(#[from] io::Error),
    #[error("stopped")]
    Stopped,
}

/// How a decode went.
#[derive(Clone, Debug)]
pub struct Stitched {
    /// Until the last frames were there.
    pub decode_seconds: f64,
    /// Blending and encoding, most of which runs beside the decode.
    pub encode_seconds: f64,
    /// Names of the hands that had a tile.
    pub hands: Vec<String>,
    pub counters: Counters,
}

/// Opens the file that frames go into, on the thread that encodes: encoders do not change threads.
pub type OpenSink = Box<dyn FnOnce() -> io::Result<Box<dyn FrameSink>> + Send>;

/// Decodes a clip into a file with whatever hands come, and finishes it.
pub async fn stitch(shape: Arc<Shape>, sink: OpenSink, mut around: Surroundings<'_>) -> Result<Stitched, StitchError> {
    let began = Instant::now();
    let (mailbox, mut inbox) = mpsc::channel(MAILBOX);
    let mut encoder = Encoder::start(shape.clone(), sink, mailbox.clone())?;
    let mut crew = Crew::new(shape.clone(), Patience::default(), Instant::now());
    let mut decode_seconds = 0.0;
    let mut hands = Hands { links: Vec::new(), tasks: JoinSet::new(), mailbox };
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let event = tokio::select! {
            Some(event) = inbox.recv() => event,
            Some(hands) = around.expected.recv() => Event::Expect { hands },
            Some(arrival) = around.arrivals.recv() => hands.welcome(arrival),
            failed = encoder.failed() => return Err(failed),
            _ = ticks.tick() => Event::Tick,
        };
        // Before anything else: a hand that is stopped looks like one that is lost.
        if around.stop.load(Ordering::Relaxed) {
            return Err(StitchError::Stopped);
        }
        if let Event::Encoded { chunk } = event {
            (around.progress)(shape.frames[..=chunk as usize].iter().sum());
        }
        for action in crew.on(event, Instant::now()) {
            match action {
                Action::Send(hand, message) => hands.send(hand, message),
                Action::Dismiss { hand, reason } => hands.dismiss(hand, reason),
                Action::Chunk { chunk, tiles } => {
                    decode_seconds = began.elapsed().as_secs_f64();
                    encoder.take(chunk, tiles);
                }
                Action::WantHands { round } => (around.want_hands)(round),
                Action::Note(line) => (around.log)(line),
                Action::Failed(reason) => return Err(StitchError::Decode(reason)),
                Action::Finished => {
                    let encode_seconds = encoder.finish().await?;
                    let hands = hands.names();
                    return Ok(Stitched { decode_seconds, encode_seconds, hands, counters: crew.counters() });
                }
            }
        }
    }
}

/// Connections of the hands, by number.
struct Hands {
    links: Vec<Connection>,
    tasks: JoinSet<()>,
    mailbox: mpsc::Sender<Event>,
}

struct Connection {
    name: String,
    /// Not bounded by itself: a hand is sent each step once, and each of its tiles.
    to: Option<mpsc::UnboundedSender<ToHand>>,
    worked: bool,
}

impl Hands {
    fn welcome(&mut self, arrival: Arrival) -> Event {
        let hand = self.links.len() as HandId;
        let Link { to: out, mut from } = arrival.link;
        let (to, mut waiting) = mpsc::unbounded_channel::<ToHand>();
        self.links.push(Connection { name: arrival.name, to: Some(to), worked: false });
        self.tasks.spawn(async move {
            while let Some(message) = waiting.recv().await {
                if out.send(message).await.is_err() {
                    return;
                }
            }
        });
        let mailbox = self.mailbox.clone();
        self.tasks.spawn(async move {
            while let Some(message) = from.recv().await {
                if mailbox.send(Event::Message(hand, message)).await.is_err() {
                    return;
                }
            }
            // The stitcher is gone if this cannot be said.
            let _ = mailbox.send(Event::Left { hand, reason: "its connection ended".to_owned() }).await;
        });
        Event::Joined(hand)
    }

    fn send(&mut self, hand: HandId, message: ToHand) {
        let Some(connection) = self.links.get_mut(hand as usize) else { return };
        connection.worked |= matches!(message, ToHand::Assign { .. });
        if let Some(to) = &connection.to {
            // Fails when its connection has ended, of which the crew hears.
            let _ = to.send(message);
        }
    }

    /// Nothing more is sent. The link ends when what was sent has gone out.
    fn dismiss(&mut self, hand: HandId, reason: Option<String>) {
        let Some(connection) = self.links.get_mut(hand as usize) else { return };
        if let Some(reason) = reason {
            tracing::warn!(hand = connection.name, %reason, "a hand is dismissed");
        }
        connection.to = None;
    }

    fn names(&self) -> Vec<String> {
        self.links.iter().filter(|link| link.worked).map(|link| link.name.clone()).collect()
    }
}

/// The thread that blends and encodes. At most as many chunks wait for it as the crew lets run ahead.
struct Encoder {
    chunks: Option<thread_mpsc::Sender<(u32, Vec<Arc<Pixels>>)>>,
    ended: oneshot::Receiver<io::Result<f64>>,
}

impl Encoder {
    fn start(shape: Arc<Shape>, open: OpenSink, mailbox: mpsc::Sender<Event>) -> io::Result<Self> {
        let (chunks, inbox) = thread_mpsc::channel::<(u32, Vec<Arc<Pixels>>)>();
        let (end, ended) = oneshot::channel();
        let work = move || -> io::Result<f64> {
            let mut sink = open()?;
            let blender = Blender::new(&shape.plan);
            let mut seconds = 0.0;
            while let Ok((chunk, tiles)) = inbox.recv() {
                let began = Instant::now();
                match &tiles[..] {
                    [tile] if let Pixels::Rgb8(frames) = &**tile => sink.frames(frames)?,
                    tiles => {
                        let tiles: Vec<&[u16]> = tiles.iter().map(|tile| rgb16(tile)).collect();
                        let frames = shape.frames[chunk as usize] as usize;
                        sink.frames(&blender.chunk(&tiles, frames).map_err(io::Error::other)?)?;
                    }
                }
                drop(tiles);
                seconds += began.elapsed().as_secs_f64();
                if mailbox.blocking_send(Event::Encoded { chunk }).is_err() {
                    return Err(io::Error::other("the decode was given up"));
                }
            }
            let began = Instant::now();
            sink.finish()?;
            Ok(seconds + began.elapsed().as_secs_f64())
        };
        std::thread::Builder::new().name("encoder".to_owned()).spawn(move || {
            // Nobody waits for a decode that was given up.
            let _ = end.send(work());
        })?;
        Ok(Self { chunks: Some(chunks), ended })
    }

    fn take(&self, chunk: u32, tiles: Vec<Arc<Pixels>>) {
        if let Some(chunks) = &self.chunks {
            // If the thread has ended, `failed` says why.
            let _ = chunks.send((chunk, tiles));
        }
    }

    /// Waits until the thread ends before its time.
    async fn failed(&mut self) -> StitchError {
        match (&mut self.ended).await {
            Ok(Err(error)) => error.into(),
            Ok(Ok(_)) => StitchError::Decode("the encoder ended early".to_owned()),
            Err(_) => StitchError::Decode("the encoder's thread panicked".to_owned()),
        }
    }

    /// Completes the file. Returns the seconds of the thread's work.
    async fn finish(mut self) -> Result<f64, StitchError> {
        self.chunks = None;
        match self.ended.await {
            Ok(seconds) => Ok(seconds?),
            Err(_) => Err(StitchError::Decode("the encoder's thread panicked".to_owned())),
        }
    }
}

fn rgb16(pixels: &Pixels) -> &[u16] {
    match pixels {
        Pixels::Rgb16(values) => values,
        // The crew has checked the kind.
        Pixels::Rgb8(_) => &[],
    }
}
