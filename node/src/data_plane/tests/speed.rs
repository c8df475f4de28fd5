//! How fast it is on this machine. `cargo test --release -p farm-node data_plane -- --ignored --nocapture`

use std::time::Instant;

use super::*;

/// 6 frames of 32 groups for a norm of a chunk: 16 KB of sums given, 8 KB of totals back.
const GROUPS: usize = 1024;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "prints figures"]
async fn exchanges_and_pixels() {
    let (serving, joining) = (plane(Patience::default()).await, plane(Patience::default()).await);
    let mut decode = serving.open(Bytes::new(), 16 << 20, 1);
    let mut hand = joining.join(&decode.url, &decode.token, "a hand", 100, MAX).await.unwrap().link;
    let Joined { link: mut crew, .. } = decode.joined.recv().await.unwrap();

    let (rounds, big, pixels) = (5000, 200, 1_000_000);
    let crew_does = tokio::spawn(async move {
        for step in 0..rounds {
            crew.from.recv().await.unwrap();
            crew.to.send(closed(step, GROUPS)).await.unwrap();
        }
        for _ in 0..big {
            crew.from.recv().await.unwrap();
        }
        crew.to.send(ToHand::Done).await.unwrap();
    });
    let mut took = Vec::new();
    for step in 0..rounds {
        let began = Instant::now();
        hand.to.send(given(step, GROUPS)).await.unwrap();
        hand.from.recv().await.unwrap();
        took.push(began.elapsed());
    }
    took.sort();
    let began = Instant::now();
    for chunk in 0..big {
        hand.to.send(frames(chunk, pixels)).await.unwrap();
    }
    assert_eq!(hand.from.recv().await, Some(ToHand::Done));
    let rate = f64::from(big) * 2.0 * pixels as f64 / began.elapsed().as_secs_f64() / 1e6;
    crew_does.await.unwrap();
    let at = |part: usize| took[took.len() * part / 100];
    println!("exchange of 16 KB and 8 KB: median {:?}, 99% {:?}; messages of 2 MB: {rate:.0} MB/s", at(50), at(99));
}
