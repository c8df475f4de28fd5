//! The books of a channel: which messages the other end has not taken yet, and which of its messages come next.
//!
//! A message is kept until the other end's application has taken it, and only so many are under way: that bounds memory
//! at both ends and makes a fast sender wait for a slow reader. Streams may end at any byte; the next one goes on where
//! the receiver says it is.

use std::collections::VecDeque;

use bytes::Bytes;

/// Messages under way in one direction.
pub(super) const MAX_MESSAGES: usize = 64;
/// Bytes under way in one direction after which no more messages are begun. One message may be longer than this.
pub(super) const MAX_BYTES: usize = 4 << 20;
/// Taken messages and bytes that the other end is told of at the latest.
const TELL_MESSAGES: u64 = MAX_MESSAGES as u64 / 4;
const TELL_BYTES: usize = MAX_BYTES / 4;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Item {
    Message(Bytes),
    End,
}

impl Item {
    fn bytes(&self) -> usize {
        if let Self::Message(bytes) = self { bytes.len() } else { 0 }
    }
}

/// What this end says.
#[derive(Default)]
pub(super) struct Outbox {
    /// Numbered from `first` on.
    items: VecDeque<Item>,
    first: u64,
    bytes: usize,
    /// Of `items`, how many went out on the present stream or earlier.
    sent: usize,
    ended: bool,
}

impl Outbox {
    pub(super) fn has_room(&self) -> bool {
        self.items.len() < MAX_MESSAGES && self.bytes < MAX_BYTES
    }

    pub(super) fn push(&mut self, item: Item) {
        self.bytes += item.bytes();
        self.ended |= item == Item::End;
        self.items.push_back(item);
    }

    pub(super) fn has_unsent(&self) -> bool {
        self.sent < self.items.len()
    }

    pub(super) fn next(&mut self) -> Option<(u64, Item)> {
        let item = self.items.get(self.sent)?.clone();
        self.sent += 1;
        Some((self.first + self.sent as u64 - 1, item))
    }

    /// The other end has taken `taken` messages altogether. How many of them are new; `None` if it cannot have.
    pub(super) fn on_taken(&mut self, taken: u64) -> Option<u64> {
        if taken > self.first + self.sent as u64 {
            return None;
        }
        // Less than before was said before.
        let new = taken.saturating_sub(self.first);
        for item in self.items.drain(..new as usize) {
            self.bytes -= item.bytes();
        }
        self.sent -= new as usize;
        self.first += new;
        Some(new)
    }

    /// A new stream, whose other end has received `received` messages. False if that is impossible.
    pub(super) fn resume(&mut self, received: u64) -> bool {
        let Some(kept) = received.checked_sub(self.first).filter(|&kept| kept <= self.items.len() as u64) else {
            return false;
        };
        self.sent = kept as usize;
        true
    }

    pub(super) fn ended(&self) -> bool {
        self.ended
    }

    /// Everything has been said and taken.
    pub(super) fn is_done(&self) -> bool {
        self.ended && self.items.is_empty()
    }

    pub(super) fn clear(&mut self) {
        self.first += self.items.len() as u64;
        (self.bytes, self.sent) = (0, 0);
        self.items.clear();
    }
}

/// What this end hears.
#[derive(Default)]
pub(super) struct Inbox {
    waiting: VecDeque<Bytes>,
    bytes: usize,
    received: u64,
    /// Of `taken`, what the other end has not been told.
    untold_messages: u64,
    untold_bytes: usize,
    taken: u64,
    ended: bool,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Received {
    New,
    Duplicate,
    /// Messages before it did not come.
    Gap,
    /// The other end does not keep to the rules.
    Wrong(&'static str),
}

impl Inbox {
    pub(super) fn receive(&mut self, number: u64, item: Item) -> Received {
        if number < self.received {
            return Received::Duplicate;
        }
        if number > self.received {
            return Received::Gap;
        }
        if self.ended {
            return Received::Wrong("there are messages after the last");
        }
        match item {
            Item::Message(_) if self.waiting.len() >= MAX_MESSAGES || self.bytes >= MAX_BYTES => {
                return Received::Wrong("there are more messages under way than allowed");
            }
            Item::Message(bytes) => {
                self.bytes += bytes.len();
                self.waiting.push_back(bytes);
            }
            Item::End => self.ended = true,
        }
        self.received += 1;
        // Nobody takes the end.
        self.take_end();
        Received::New
    }

    pub(super) fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// The next message for the application, which has room for it.
    pub(super) fn take(&mut self) -> Option<Bytes> {
        let message = self.waiting.pop_front()?;
        self.bytes -= message.len();
        self.taken += 1;
        self.untold_messages += 1;
        self.untold_bytes += message.len();
        self.take_end();
        Some(message)
    }

    fn take_end(&mut self) {
        if self.ended && self.waiting.is_empty() && self.taken < self.received {
            self.taken += 1;
            self.untold_messages += 1;
        }
    }

    pub(super) fn received(&self) -> u64 {
        self.received
    }

    /// How many messages have been taken, for the other end to be told.
    pub(super) fn tell(&mut self) -> u64 {
        (self.untold_messages, self.untold_bytes) = (0, 0);
        self.taken
    }

    /// The other end should not wait longer to be told. After its end it waits for nothing else.
    pub(super) fn is_telling_due(&self) -> bool {
        let pressing = self.untold_messages >= TELL_MESSAGES || self.untold_bytes >= TELL_BYTES;
        pressing || (self.ended && self.untold_messages > 0)
    }

    /// The last message has been received.
    pub(super) fn ended(&self) -> bool {
        self.ended
    }

    /// It has been taken, too.
    pub(super) fn is_done(&self) -> bool {
        self.ended && self.waiting.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(number: u64) -> Item {
        Item::Message(number.to_le_bytes().to_vec().into())
    }

    #[test]
    fn a_sender_waits_when_as_much_is_under_way_as_may_be() {
        let mut out = Outbox::default();
        (0..MAX_MESSAGES as u64).for_each(|number| out.push(message(number)));
        assert!(!out.has_room());
        while out.next().is_some() {}
        assert_eq!(out.on_taken(1), Some(1));
        assert!(out.has_room());
        out.push(Item::Message(vec![0; MAX_BYTES].into()));
        assert_eq!(out.on_taken(10), Some(9));
        assert!(!out.has_room());
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let mut out = Outbox::default();
        out.push(message(0));
        assert_eq!(out.on_taken(1), None, "not even sent");
        assert!(!out.resume(2));
        assert!(out.resume(0));
        out.next();
        assert_eq!(out.on_taken(1), Some(1));
        assert!(!out.resume(0), "taken already");

        let mut inbox = Inbox::default();
        assert_eq!(inbox.receive(1, message(1)), Received::Gap);
        (0..MAX_MESSAGES as u64).for_each(|number| assert_eq!(inbox.receive(number, message(number)), Received::New));
        assert!(matches!(inbox.receive(MAX_MESSAGES as u64, message(0)), Received::Wrong(_)));
        assert_eq!(inbox.receive(MAX_MESSAGES as u64, Item::End), Received::New);
        assert!(matches!(inbox.receive(MAX_MESSAGES as u64 + 1, message(0)), Received::Wrong(_)));
    }

    proptest! {
        /// Every cut loses what is under way either way.
        #[test]
        fn messages_arrive_in_order_once_whatever_streams_lose(
            steps in prop::collection::vec(0..8u8, 0..400), total in 1..200u64
        ) {
            let (mut out, mut inbox) = (Outbox::default(), Inbox::default());
            let (mut said, mut heard) = (0, Vec::new());
            let mut wire = VecDeque::new();
            let calm = [0, 1, 2, 3, 4, 5].into_iter().cycle().take(6 * 8 * total as usize);
            for step in steps.into_iter().chain(calm) {
                match step {
                    0 if said < total && out.has_room() => {
                        out.push(message(said));
                        said += 1;
                    }
                    0 if said == total && !out.ended() => out.push(Item::End),
                    1 | 2 => wire.extend(out.next()),
                    3 => if let Some((number, item)) = wire.pop_front() {
                        prop_assert_eq!(inbox.receive(number, item), Received::New);
                    },
                    4 => heard.extend(inbox.take()),
                    5 => prop_assert!(out.on_taken(inbox.tell()).is_some()),
                    6 => {
                        wire.clear();
                        prop_assert!(out.resume(inbox.received()));
                    }
                    // A stream that stutters.
                    7 => if let Some((number, item)) = wire.front().cloned() {
                        if number == inbox.received() {
                            prop_assert_eq!(inbox.receive(number, item.clone()), Received::New);
                        }
                        prop_assert_eq!(inbox.receive(number, item), Received::Duplicate);
                        wire.pop_front();
                    },
                    _ => {}
                }
                prop_assert!(inbox.waiting.len() <= MAX_MESSAGES && out.items.len() <= MAX_MESSAGES + 1);
            }
            let expected: Vec<Bytes> = (0..total).map(|number| number.to_le_bytes().to_vec().into()).collect();
            prop_assert_eq!(heard, expected);
            prop_assert!(out.is_done() && inbox.is_done());
        }
    }
}
