//! A channel whose other end says whatever a test wants, frame by frame.

use farm_core::tiles::codec::Wire;

use super::super::channel::{Channel, Hold, MAX_FRUITLESS, PIECES, Source, Stream};
use super::super::counters::Counting;
use super::super::frame::{Frame, FrameReader, Kind};
use super::*;
use crate::link;

/// The far end of a channel that a test speaks for, frame by frame.
struct Far {
    says: mpsc::Sender<Bytes>,
    hears: mpsc::Receiver<Bytes>,
    reader: FrameReader,
}

impl Far {
    fn stream() -> (Self, Stream) {
        let (says, to_channel) = mpsc::channel(64);
        let (from_channel, hears) = mpsc::channel(PIECES);
        let stream = Stream::new(body(to_channel), from_channel, Hold::Server { _in_use: Arc::new(()) });
        (Self { says, hears, reader: FrameReader::new(1 << 20) }, stream)
    }

    async fn say(&self, kind: Kind, number: u64, payload: Vec<u8>) {
        let frame = Frame { kind, deaf: false, taken: 0, number, payload: payload.into() };
        self.say_bytes([&frame.header()[..], &frame.payload].concat()).await;
    }

    async fn greet(&self, received: u64) {
        self.say(Kind::Hello, received, 1000u64.to_le_bytes().to_vec()).await;
    }

    async fn say_bytes(&self, bytes: Vec<u8>) {
        self.says.send(bytes.into()).await.unwrap();
    }

    /// The next frame that is not a sign of life.
    async fn hear(&mut self) -> Option<Frame> {
        loop {
            match self.reader.next().unwrap() {
                Some(frame) if frame.kind != Kind::Ack => return Some(frame),
                Some(_) => {}
                None => self.reader.push(&self.hears.recv().await?),
            }
        }
    }
}

struct Near {
    link: Link<ToHand, FromHand>,
    offers: mpsc::Sender<Stream>,
    counting: Arc<Counting>,
}

impl Near {
    fn new(patience: Patience) -> Self {
        let (link, ends) = link::pair(2);
        let (offers, offered) = mpsc::channel(1);
        let counting: Arc<Counting> = Arc::default();
        let channel = Channel::new("far".into(), ends, Source::Offered(offered), 1000, patience, counting.clone());
        tokio::spawn(channel.run());
        Self { link, offers, counting }
    }

    async fn stream(&self) -> Far {
        let (far, stream) = Far::stream();
        self.offers.send(stream).await.ok().unwrap();
        far
    }

    fn counters(&self) -> Counters {
        self.counting.counters()
    }
}

fn failed(text: &str) -> FromHand {
    FromHand::Failed { message: text.into() }
}

#[tokio::test]
async fn duplicates_are_dropped_and_counted_and_damage_is_said_again() {
    let mut near = Near::new(Patience::default());
    let mut far = near.stream().await;
    far.greet(0).await;
    assert_eq!(soon(far.hear()).await.map(|hello| hello.kind), Some(Kind::Hello));
    for (number, text) in [(0, "a"), (0, "a"), (1, "b")] {
        far.say(Kind::Message, number, failed(text).encode()).await;
    }
    let payload = failed("c").encode().into();
    let mut damaged = Frame { kind: Kind::Message, deaf: false, taken: 0, number: 2, payload };
    let header = damaged.header();
    damaged.payload = failed("d").encode().into();
    far.say_bytes([&header[..], &damaged.payload].concat()).await;
    assert_eq!(soon(far.hear()).await, None, "it leaves the stream");

    let mut far = near.stream().await;
    far.greet(0).await;
    let hello = soon(far.hear()).await.unwrap();
    assert_eq!((hello.kind, hello.number), (Kind::Hello, 2));
    for (number, text) in [(1, "b"), (2, "c")] {
        far.say(Kind::Message, number, failed(text).encode()).await;
    }
    for text in ["a", "b", "c"] {
        assert_eq!(soon(near.link.from.recv()).await, Some(failed(text)));
    }
    let Counters { duplicates, corrupt_messages, reconnects, .. } = near.counters();
    assert_eq!((duplicates, corrupt_messages, reconnects), (2, 1, 1));
}

#[tokio::test]
async fn what_the_other_end_has_not_heard_is_said_again() {
    let near = Near::new(Patience::default());
    let mut far = near.stream().await;
    far.greet(0).await;
    near.link.to.send(ToHand::Drop { number: 7 }).await.unwrap();
    near.link.to.send(ToHand::Drop { number: 8 }).await.unwrap();
    let mut heard = Vec::new();
    for _ in 0..3 {
        heard.push(soon(far.hear()).await.unwrap().number);
    }
    assert_eq!(heard, [0, 0, 1]);
    drop(far);
    let mut far = near.stream().await;
    far.greet(1).await;
    soon(far.hear()).await.unwrap();
    let again = soon(far.hear()).await.unwrap();
    assert_eq!((again.number, again.payload), (1, ToHand::Drop { number: 8 }.encode().into()));
}

#[tokio::test]
async fn who_breaks_the_rules_loses_the_channel() {
    let breaches = [
        (Kind::Message, 0, vec![99], "no message"),
        (Kind::Message, 0, vec![0; 1001], "over the limit"),
        (Kind::Hello, 5, 9u64.to_le_bytes().to_vec(), "knows what was never said"),
    ];
    for (kind, number, payload, why) in breaches {
        let mut near = Near::new(Patience::default());
        let mut far = near.stream().await;
        if kind != Kind::Hello {
            far.greet(0).await;
        }
        far.say(kind, number, payload).await;
        assert_eq!(soon(near.link.from.recv()).await, None, "{why}");
        let last = soon(async {
            loop {
                let frame = far.hear().await.unwrap();
                if frame.kind == Kind::Lost {
                    break frame;
                }
            }
        });
        assert!(!last.await.payload.is_empty(), "{why}");
        assert_eq!(near.counters().lost_channels, 1, "{why}");
    }
}

#[tokio::test]
async fn streams_that_bring_nothing_are_not_tried_for_ever() {
    let mut near = Near::new(Patience { grace: Duration::from_secs(600), ..Patience::default() });
    let mut streams = 0;
    let tries = async {
        while !near.offers.is_closed() {
            let (far, stream) = Far::stream();
            if near.offers.send(stream).await.is_err() {
                break;
            }
            streams += 1;
            far.say_bytes(vec![0; 100]).await;
            far.says.closed().await;
        }
    };
    soon(tries).await;
    assert!(streams as u32 >= MAX_FRUITLESS && streams as u32 <= MAX_FRUITLESS + 2, "{streams}");
    assert_eq!(soon(near.link.from.recv()).await, None);
}
