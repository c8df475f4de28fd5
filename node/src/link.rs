//! Both directions of a conversation inside this process.

use tokio::sync::mpsc;

/// One end: what it says and what it hears. Full queues make the sender wait; when one end is dropped the other hears
/// `None` and cannot send.
pub struct Link<S, R> {
    pub to: mpsc::Sender<S>,
    pub from: mpsc::Receiver<R>,
}

/// Both ends, with room for `depth` messages each way.
pub fn pair<A, B>(depth: usize) -> (Link<A, B>, Link<B, A>) {
    let (to_b, from_a) = mpsc::channel(depth);
    let (to_a, from_b) = mpsc::channel(depth);
    (Link { to: to_b, from: from_b }, Link { to: to_a, from: from_a })
}
