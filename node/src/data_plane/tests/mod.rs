//! Two nodes and what is between them, over real sockets.

mod frames;
mod join;
mod latent;
mod proxy;
mod speed;
mod tls;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use farm_core::tiles::message::{FromHand, Pixels, ToHand};
use farm_core::tiles::statistics::{Sums, Totals};
use tokio::time::{sleep, timeout};

use super::window::MAX_MESSAGES;
use super::*;
use proxy::{Proxy, Weather};

const MAX: usize = 4 << 20;

/// Signs of life and their absence, in less time; patient where a busy machine may be slow.
fn patience() -> Patience {
    Patience {
        connect: Duration::from_secs(5),
        keep_alive: Duration::from_millis(20),
        silence: Duration::from_millis(250),
        grace: Duration::from_secs(10),
        leave: Duration::from_secs(10),
    }
}

async fn plane(patience: Patience) -> DataPlane {
    let listen = "127.0.0.1:0".parse().unwrap();
    DataPlane::start(Options { listen, host: None, tls: None, patience }).await.unwrap()
}

fn address(plane: &DataPlane) -> SocketAddr {
    plane.base().strip_prefix("http://").unwrap().parse().unwrap()
}

/// Nothing here takes this long unless it hangs.
async fn soon<T>(what: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(60), what).await.expect("it hangs")
}

async fn until(condition: impl Fn() -> bool) {
    soon(async {
        while !condition() {
            sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
}

fn given(step: u32, groups: usize) -> FromHand {
    let sums = Sums { count: u64::from(step), moments: vec![[f64::from(step), 0.5]; groups] };
    FromHand::Given { number: 1, step, busy_ms: 3, sums, edges: None }
}

fn closed(step: u32, groups: usize) -> ToHand {
    ToHand::Closed { step, totals: Arc::new(Totals(vec![[step as f32, 0.5]; groups])), edges: vec![] }
}

fn frames(chunk: u32, pixels: usize) -> FromHand {
    FromHand::Frames { number: 1, chunk, pixels: Pixels::Rgb16(vec![chunk as u16; pixels]) }
}

/// Both ends of a joined decode, by way of a proxy.
struct Pair {
    crew: Link<ToHand, FromHand>,
    hand: Link<FromHand, ToHand>,
    decode: OpenDecode,
    proxy: Proxy,
    serving: DataPlane,
    joining: DataPlane,
}

async fn pair(patience: Patience) -> Pair {
    let (serving, joining) = (plane(patience).await, plane(patience).await);
    let proxy = Proxy::to(address(&serving)).await;
    let mut decode = serving.open(Bytes::from_static(b"latent"), MAX, 4);
    let hand = soon(joining.join(&proxy.of(&decode.url), &decode.token, "a hand", 100, MAX)).await.unwrap();
    assert_eq!(hand.latent.unwrap(), &b"latent"[..]);
    let Joined { link: crew, .. } = soon(decode.joined.recv()).await.unwrap();
    Pair { crew, hand: hand.link, decode, proxy, serving, joining }
}

/// Each end says `count` messages of changing length and hears as many, at the same time.
async fn converse(pair: &mut Pair, count: u32) {
    let (crew, hand) = (&mut pair.crew, &mut pair.hand);
    let groups = |step: u32| (step as usize * 7919) % 3000;
    let crew_says = async {
        for step in 0..count {
            crew.to.send(closed(step, groups(step))).await.unwrap();
        }
    };
    let hand_says = async {
        for step in 0..count {
            hand.to.send(given(step, groups(step))).await.unwrap();
        }
    };
    let crew_hears = async {
        for step in 0..count {
            assert_eq!(crew.from.recv().await, Some(given(step, groups(step))));
        }
    };
    let hand_hears = async {
        for step in 0..count {
            assert_eq!(hand.from.recv().await, Some(closed(step, groups(step))));
        }
    };
    soon(async { tokio::join!(crew_says, hand_says, crew_hears, hand_hears) }).await;
}

#[tokio::test]
async fn messages_go_both_ways_at_once() {
    let mut pair = pair(patience()).await;
    converse(&mut pair, 100).await;
    for counters in [pair.serving.counters(), pair.joining.counters()] {
        assert_eq!(counters, Counters::default());
    }
}

#[tokio::test]
async fn messages_arrive_in_order_once_over_connections_that_are_cut_and_damaged() {
    let (mut reconnects, mut corrupt) = (0, 0);
    // As many as there is time for: `FARM_FAULTS=500`.
    let seeds = std::env::var("FARM_FAULTS").ok().and_then(|count| count.parse().ok()).unwrap_or(3);
    for seed in 0..seeds {
        let mut pair = pair(patience()).await;
        pair.proxy.set(Weather::Stormy { seed, bytes: 200_000 });
        // That of before the storm.
        pair.proxy.cut();
        converse(&mut pair, 150).await;
        let (serving, joining) = (pair.serving.counters(), pair.joining.counters());
        reconnects += joining.reconnects;
        corrupt += serving.corrupt_messages + joining.corrupt_messages;
        assert_eq!((serving.lost_channels, joining.lost_channels), (0, 0));
    }
    assert!(reconnects >= seeds, "{reconnects}");
    assert!(corrupt > 0);
}

#[tokio::test]
async fn a_silent_connection_is_left_for_another() {
    let mut pair = pair(patience()).await;
    converse(&mut pair, 5).await;
    pair.proxy.set(Weather::Frozen);
    converse(&mut pair, 5).await;
    assert!(pair.joining.counters().reconnects >= 1);
}

#[tokio::test]
async fn without_a_connection_both_ends_are_told_in_time() {
    let quick = Patience {
        silence: Duration::from_millis(200),
        grace: Duration::from_millis(200),
        connect: Duration::from_millis(200),
        ..patience()
    };
    let mut pair = pair(quick).await;
    pair.proxy.set(Weather::Down);
    assert_eq!(soon(pair.crew.from.recv()).await, None);
    assert_eq!(soon(pair.hand.from.recv()).await, None);
    soon(pair.crew.to.closed()).await;
    soon(pair.hand.to.closed()).await;
    assert_eq!((pair.serving.counters().lost_channels, pair.joining.counters().lost_channels), (1, 1));
    // Its place is free again.
    until(|| pair.serving.hands() == 0).await;
}

#[tokio::test]
async fn a_hand_that_does_not_read_makes_the_crew_wait() {
    let mut pair = pair(patience()).await;
    // Longer in all than sockets and HTTP would take without anybody reading.
    let big = 100_000;
    let mut said = 0;
    while let Ok(done) = timeout(Duration::from_millis(300), pair.crew.to.send(closed(said, big))).await {
        done.unwrap();
        said += 1;
        assert!((said as usize) < 3 * MAX_MESSAGES, "nothing makes it wait");
    }
    // 800 KB each: those that the window holds, those in both links, and one on its way between them.
    assert!(said as usize <= window::MAX_BYTES.div_ceil(8 * big) + 2 * DEPTH + 3, "{said}");
    // The other way is free meanwhile, and signs of life pass.
    pair.hand.to.send(given(1, 1)).await.unwrap();
    assert_eq!(soon(pair.crew.from.recv()).await, Some(given(1, 1)));
    for step in 0..said {
        assert_eq!(soon(pair.hand.from.recv()).await, Some(closed(step, big)));
    }
    assert_eq!(pair.joining.counters().reconnects, 0);
}

#[tokio::test]
async fn last_words_are_heard_after_the_link_is_dropped() {
    let Pair { crew, mut hand, serving: _serving, proxy: _proxy, .. } = pair(patience()).await;
    crew.to.send(closed(1, 9)).await.unwrap();
    crew.to.send(ToHand::Done).await.unwrap();
    drop(crew);
    assert_eq!(soon(hand.from.recv()).await, Some(closed(1, 9)));
    assert_eq!(soon(hand.from.recv()).await, Some(ToHand::Done));
    assert_eq!(soon(hand.from.recv()).await, None);
    soon(hand.to.closed()).await;
}

#[tokio::test]
async fn last_words_are_heard_over_a_connection_that_breaks() {
    let Pair { mut crew, hand, proxy, serving, .. } = pair(patience()).await;
    proxy.cut();
    hand.to.send(frames(1, 100)).await.unwrap();
    drop(hand);
    assert_eq!(soon(crew.from.recv()).await, Some(frames(1, 100)));
    assert_eq!(soon(crew.from.recv()).await, None);
    assert_eq!(serving.counters().lost_channels, 0);
}

#[tokio::test]
async fn nothing_is_left_of_links_that_are_dropped() {
    let Pair { crew, hand, decode, proxy, serving, joining } = pair(patience()).await;
    drop((crew, hand, decode));
    // The two servers and the proxy accept; that is all.
    let tasks = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    until(|| tasks() == 3).await;
    assert_eq!(serving.decodes(), 0);
    drop((serving, joining, proxy));
    until(|| tasks() == 0).await;
}

#[tokio::test]
async fn a_message_over_the_limit_of_the_other_end_ends_the_channel_with_a_reason() {
    let (serving, joining) = (plane(patience()).await, plane(patience()).await);
    let mut decode = serving.open(Bytes::new(), 1000, 4);
    let mut hand = soon(joining.join(&decode.url, &decode.token, "a hand", 100, MAX)).await.unwrap().link;
    let Joined { link: mut crew, .. } = soon(decode.joined.recv()).await.unwrap();
    hand.to.send(frames(0, 400)).await.unwrap();
    assert_eq!(soon(crew.from.recv()).await, Some(frames(0, 400)));
    hand.to.send(frames(1, 600)).await.unwrap();
    assert_eq!(soon(hand.from.recv()).await, None);
    assert_eq!(soon(crew.from.recv()).await, None);
    assert_eq!(joining.counters().over_limits, 1);
    assert_eq!(serving.counters().reconnects, 0, "it is told");
}
