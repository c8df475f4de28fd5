//! The decode of one clip as a state machine: which hand has which tile, which steps are closed, what is lost or late.
//!
//! Every tile gives its sums once per step. When all have given, the step is closed: the totals are logged and go to
//! every hand. Only the first that is given for a tile and step counts, and nothing counts for a closed step, so a tile
//! may be decoded by several hands at once, and a hand that takes a tile over starts from the beginning with the log
//! without disturbing anybody. Frames of a chunk are handed on when all tiles have theirs; the first step of a chunk is
//! only closed when the chunk two before it is encoded, and so nothing runs ahead of the encoder.
//!
//! Nothing waits without an end: hands that were announced are waited for until a deadline, a tile without a hand goes to
//! those that are there, and without any hand more are asked for, a few times.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::message::{Edges, FromHand, Pixels, ToHand};
use super::plan::Mode;
use super::shape::Shape;
use super::statistics::{Sums, Totals, merge};
use crate::parallel::shard::Split;

/// Chunks that are decoded and not encoded yet, at most.
const WINDOW: u32 = 2;

/// A tile is not decoded twice for a delay shorter than this.
const HEDGE_AFTER: Duration = Duration::from_secs(1);

/// How long what is waited for.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// For hands that were announced to join.
    pub join: Duration,
    /// For what is missing of a step, at least; longer where others needed longer.
    pub stall: Duration,
    /// Times that hands are asked for while no step is closed.
    pub rounds: u32,
}

impl Default for Patience {
    fn default() -> Self {
        Self { join: Duration::from_secs(3), stall: Duration::from_secs(20), rounds: 3 }
    }
}

/// A hand's number in its crew, never used twice.
pub type HandId = u32;

#[derive(Clone, Debug)]
pub enum Event {
    /// The answer of the current round: so many hands will try to join.
    Expect {
        hands: usize,
    },
    Joined(HandId),
    /// Its connection is lost.
    Left {
        hand: HandId,
        reason: String,
    },
    Message(HandId, FromHand),
    /// The chunk is with the encoder, and out of memory.
    Encoded {
        chunk: u32,
    },
    Tick,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    Send(HandId, ToHand),
    /// End the connection: the hand has lied, or is not needed. Nothing it says counts any more.
    Dismiss {
        hand: HandId,
        reason: Option<String>,
    },
    /// All tiles of the next chunk, in plan order.
    Chunk {
        chunk: u32,
        tiles: Vec<Arc<Pixels>>,
    },
    /// Ask for hands; `Event::Expect` is the answer.
    WantHands {
        round: u32,
    },
    /// Something for the clip's log.
    Note(String),
    /// Every chunk is encoded.
    Finished,
    /// It cannot go on.
    Failed(String),
}

/// Things that changed nothing, or should not happen, counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Counters {
    pub duplicates: u64,
    pub refused: u64,
    pub lost: u64,
    pub hedges: u64,
}

#[derive(Clone, Debug, Default)]
struct Member {
    tiles: Vec<u32>,
    busy: Duration,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Phase {
    /// Before anybody was asked for.
    New,
    /// Hands have been asked for. Who asks repeats it until there is an answer.
    Asking,
    /// So many are on their way.
    Gathering {
        expected: usize,
        until: Instant,
    },
    Decoding,
    /// All frames are there; the encoder is not done with them.
    Draining,
    Ended,
}

#[derive(Clone, Debug)]
struct Given {
    sums: Sums,
    edges: Option<Arc<Edges>>,
}

#[derive(Clone, Debug)]
pub struct Crew {
    shape: Arc<Shape>,
    patience: Patience,
    phase: Phase,
    round: u32,
    /// Rounds that are left until a step is closed.
    rounds_left: u32,
    members: BTreeMap<HandId, Member>,
    /// Totals of the closed steps, in order.
    log: Vec<Arc<Totals>>,
    /// For the step that is open, by tile.
    given: Vec<Option<Given>>,
    opened: Instant,
    /// When a tile gave last.
    latest: Instant,
    /// The longest that a step was open.
    longest: Duration,
    /// When the first tile was assigned.
    began: Option<Instant>,
    /// What a tile that starts over may take until it has caught up.
    catching_up: Duration,
    /// Chunks of which some tiles are there.
    frames: BTreeMap<u32, Vec<Option<Arc<Pixels>>>>,
    handed_on: u32,
    encoded: u32,
    counters: Counters,
}

impl Crew {
    /// Asks for hands at its first event.
    pub fn new(shape: Arc<Shape>, patience: Patience, now: Instant) -> Self {
        let tiles = shape.plan.tiles.len();
        Self {
            shape,
            patience,
            phase: Phase::New,
            round: 0,
            rounds_left: patience.rounds,
            members: BTreeMap::new(),
            log: Vec::new(),
            given: vec![None; tiles],
            opened: now,
            latest: now,
            longest: Duration::ZERO,
            began: None,
            catching_up: Duration::ZERO,
            frames: BTreeMap::new(),
            handed_on: 0,
            encoded: 0,
            counters: Counters::default(),
        }
    }

    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Takes one event in and says what follows, in order.
    pub fn on(&mut self, event: Event, now: Instant) -> Vec<Action> {
        let mut out = Vec::new();
        if self.phase == Phase::Ended {
            return out;
        }
        match event {
            Event::Expect { hands } if self.phase == Phase::Asking => {
                self.phase = Phase::Gathering { expected: hands, until: now + self.patience.join };
            }
            Event::Expect { .. } | Event::Tick => {}
            Event::Joined(hand) => self.join(hand, &mut out),
            Event::Left { hand, reason } => self.lose(hand, &reason, now, &mut out),
            Event::Message(hand, message) => self.hear(hand, message, now, &mut out),
            Event::Encoded { chunk } => self.encoded = self.encoded.max(chunk + 1),
        }
        self.close_steps(now, &mut out);
        self.go_on(now, &mut out);
        out
    }

    fn join(&mut self, hand: HandId, out: &mut Vec<Action>) {
        match self.phase {
            Phase::New | Phase::Asking | Phase::Gathering { .. } => {
                self.members.insert(hand, Member::default());
            }
            // It would have nothing to do, and others may have something for its device.
            Phase::Decoding | Phase::Draining | Phase::Ended => self.dismiss(hand, out),
        }
    }

    fn hear(&mut self, hand: HandId, message: FromHand, now: Instant, out: &mut Vec<Action>) {
        let Some(member) = self.members.get_mut(&hand) else { return };
        let heard = match message {
            FromHand::Given { number, step, busy_ms, sums, edges } => {
                member.busy = Duration::from_millis(busy_ms);
                self.give(number, step, sums, edges, now)
            }
            FromHand::Frames { number, chunk, pixels } => self.take_frames(number, chunk, pixels, out),
            FromHand::Failed { message } => Err(format!("its device failed: {message}")),
        };
        if let Err(reason) = heard {
            self.refuse(hand, &reason, now, out);
        }
    }

    fn give(&mut self, number: u32, step: u32, sums: Sums, edges: Option<Edges>, now: Instant) -> Result<(), String> {
        let open = self.log.len() as u32;
        let given = self.given.get_mut(number as usize).ok_or_else(|| format!("there is no tile {number}"))?;
        if step < open || (step == open && given.is_some()) {
            self.counters.duplicates += 1;
            return Ok(());
        }
        if step > open || step == self.shape.all_steps() {
            return Err(format!("tile {number} is at step {step}, and step {open} is not closed"));
        }
        self.shape.check_sums(number, step, &sums)?;
        if edges.is_some() != (self.shape.plan.mode == Mode::Exact) {
            return Err(format!("the edges of tile {number} at step {step} are not as this mode has them"));
        }
        *given = Some(Given { sums, edges: edges.map(Arc::new) });
        self.latest = now;
        Ok(())
    }

    fn take_frames(&mut self, number: u32, chunk: u32, pixels: Pixels, out: &mut Vec<Action>) -> Result<(), String> {
        let tiles = self.given.len();
        if number as usize >= tiles || chunk >= self.shape.chunks() {
            return Err(format!("there is no chunk {chunk} of tile {number}"));
        }
        if self.log.len() < ((chunk + 1) * self.shape.steps()) as usize {
            return Err(format!("frames of tile {number} in chunk {chunk} came before its steps were closed"));
        }
        if chunk < self.handed_on {
            self.counters.duplicates += 1;
            return Ok(());
        }
        self.shape.check_pixels(number, chunk, &pixels)?;
        let slot = &mut self.frames.entry(chunk).or_insert_with(|| vec![None; tiles])[number as usize];
        if slot.is_some() {
            self.counters.duplicates += 1;
            return Ok(());
        }
        *slot = Some(Arc::new(pixels));
        while let Some(complete) = self.frames.get(&self.handed_on).filter(|tiles| tiles.iter().all(Option::is_some)) {
            let tiles = complete.iter().flatten().cloned().collect();
            self.frames.remove(&self.handed_on);
            out.push(Action::Chunk { chunk: self.handed_on, tiles });
            self.handed_on += 1;
        }
        if self.handed_on == self.shape.chunks() {
            // The devices are free before the encoder is done.
            self.dismiss_all(out);
            self.phase = Phase::Draining;
        }
        Ok(())
    }

    /// Closes the step that is open if every tile has given for it. The next cannot be complete then.
    fn close_steps(&mut self, now: Instant, out: &mut Vec<Action>) {
        let step = self.log.len() as u32;
        if self.phase != Phase::Decoding || self.is_ahead(step) || !self.given.iter().all(Option::is_some) {
            return;
        }
        let given: Vec<Given> = self.given.iter_mut().filter_map(Option::take).collect();
        let totals = match self.shape.exchange() {
            true => merge(given.iter().map(|given| &given.sums)),
            false => Ok(Totals::default()),
        };
        let totals = match totals {
            Ok(totals) => Arc::new(totals),
            Err(error) => return self.fail(format!("step {step} cannot be closed: {error}"), out),
        };
        self.log.push(totals.clone());
        if self.catching_up.is_zero() {
            self.longest = self.longest.max(now.saturating_duration_since(self.opened));
        }
        self.catching_up = Duration::ZERO;
        self.opened = now;
        self.rounds_left = self.patience.rounds;
        for (&hand, member) in &self.members {
            let edges = self.edges_for(member, &given);
            out.push(Action::Send(hand, ToHand::Closed { step, totals: totals.clone(), edges }));
        }
    }

    /// The step waits for the encoder, or is beyond the end.
    fn is_ahead(&self, step: u32) -> bool {
        let steps = self.shape.steps();
        step == self.shape.all_steps() || step.is_multiple_of(steps) && step / steps >= self.encoded + WINDOW
    }

    /// Edges of the tiles around those of a hand.
    fn edges_for(&self, member: &Member, given: &[Given]) -> Vec<(u32, Arc<Edges>)> {
        let cols = self.shape.plan.grid[1];
        let near = |tile: usize| {
            member.tiles.iter().any(|&own| {
                let own = own as usize;
                (own / cols).abs_diff(tile / cols) <= 1 && (own % cols).abs_diff(tile % cols) <= 1
            })
        };
        let edges = given.iter().enumerate().filter_map(|(tile, given)| Some((tile, given.edges.clone()?)));
        edges.filter(|(tile, _)| near(*tile)).map(|(tile, edges)| (tile as u32, edges)).collect()
    }

    /// What the time, or an event before, makes due.
    fn go_on(&mut self, now: Instant, out: &mut Vec<Action>) {
        match self.phase {
            Phase::New => self.ask(out),
            Phase::Gathering { expected, until } if self.members.len() >= expected || now >= until => {
                if self.members.is_empty() {
                    self.ask(out);
                } else {
                    self.start(now, out);
                }
            }
            Phase::Decoding if self.members.is_empty() => self.ask(out),
            Phase::Decoding => self.chase(now, out),
            Phase::Draining if self.encoded == self.shape.chunks() => {
                self.phase = Phase::Ended;
                out.push(Action::Finished);
            }
            Phase::Asking | Phase::Gathering { .. } | Phase::Draining | Phase::Ended => {}
        }
    }

    fn ask(&mut self, out: &mut Vec<Action>) {
        if self.rounds_left == 0 {
            let rounds = self.patience.rounds;
            return self.fail(format!("no device has joined the decode, or stayed in it, in {rounds} rounds"), out);
        }
        self.rounds_left -= 1;
        self.round += 1;
        self.phase = Phase::Asking;
        out.push(Action::WantHands { round: self.round });
    }

    /// Deals all tiles to those that are there, neighbours to the same.
    fn start(&mut self, now: Instant, out: &mut Vec<Action>) {
        self.phase = Phase::Decoding;
        self.wait_anew(now);
        let hands: Vec<HandId> = self.members.keys().copied().collect();
        let split = Split::new(self.given.len(), hands.len());
        for (hand, tiles) in hands.into_iter().zip(split.ranges()) {
            if tiles.is_empty() {
                self.members.remove(&hand);
                self.dismiss(hand, out);
            }
            tiles.for_each(|tile| self.assign(hand, tile as u32, out));
        }
    }

    /// Tiles change hands: those that get them start over, at about the pace of everybody so far.
    fn wait_anew(&mut self, now: Instant) {
        let began = *self.began.get_or_insert(now);
        self.opened = now;
        self.catching_up = 3 * now.saturating_duration_since(began);
    }

    fn assign(&mut self, hand: HandId, number: u32, out: &mut Vec<Action>) {
        let Some(member) = self.members.get_mut(&hand) else { return };
        member.tiles.push(number);
        let (tile, frame) = (self.shape.plan.tiles[number as usize], self.shape.frame());
        let has = |tiles: &Vec<Option<Arc<Pixels>>>| tiles[number as usize].is_some();
        let kept = self.frames.range(self.handed_on..).take_while(|(_, tiles)| has(tiles)).count() as u32;
        let (wanted_from, closed) = (self.handed_on + kept, self.log.clone());
        out.push(Action::Send(hand, ToHand::Assign { number, tile, frame, wanted_from, closed }));
    }

    fn dismiss(&self, hand: HandId, out: &mut Vec<Action>) {
        out.push(Action::Send(hand, ToHand::Done));
        out.push(Action::Dismiss { hand, reason: None });
    }

    fn dismiss_all(&mut self, out: &mut Vec<Action>) {
        for hand in std::mem::take(&mut self.members).into_keys() {
            self.dismiss(hand, out);
        }
    }

    /// A hand that cannot be worked with.
    fn refuse(&mut self, hand: HandId, reason: &str, now: Instant, out: &mut Vec<Action>) {
        self.counters.refused += 1;
        out.push(Action::Dismiss { hand, reason: Some(reason.to_owned()) });
        self.lose(hand, reason, now, out);
    }

    /// A hand is gone: its tiles go to those that are left.
    fn lose(&mut self, hand: HandId, reason: &str, now: Instant, out: &mut Vec<Action>) {
        let Some(member) = self.members.remove(&hand) else { return };
        self.counters.lost += 1;
        let (tiles, left) = (member.tiles.len(), self.members.len());
        out.push(Action::Note(format!("decode: hand {hand} with {tiles} tiles is lost, {left} are left: {reason}")));
        if let Phase::Gathering { expected, .. } = &mut self.phase {
            *expected -= 1;
        }
        if self.phase != Phase::Decoding || self.members.is_empty() {
            return;
        }
        if self.shape.plan.mode == Mode::Exact {
            // Edges are too much to be kept.
            return self.fail(format!("exact tiles cannot be taken over, and a device was lost: {reason}"), out);
        }
        self.wait_anew(now);
        for number in member.tiles {
            if self.members.values().any(|other| other.tiles.contains(&number)) {
                continue;
            }
            if let Some((&heir, _)) = self.members.iter().min_by_key(|(_, member)| member.tiles.len()) {
                self.assign(heir, number, out);
            }
        }
    }

    /// Hands that keep the others waiting: without end they are lost, and beside a slow one a second starts.
    fn chase(&mut self, now: Instant, out: &mut Vec<Action>) {
        let open = self.log.len() as u32;
        let missing: Vec<u32> = (0..).zip(&self.given).filter(|(_, given)| given.is_none()).map(|(n, _)| n).collect();
        if missing.is_empty() || self.is_ahead(open) {
            return;
        }
        let waited = now.saturating_duration_since(self.opened);
        if waited >= self.patience.stall.max(10 * self.longest).max(self.catching_up) {
            let blamed = self.members.iter().filter(|(_, member)| member.tiles.iter().any(|n| missing.contains(n)));
            for hand in blamed.map(|(hand, _)| *hand).collect::<Vec<_>>() {
                self.refuse(hand, &format!("step {open} has waited for it for {} s", waited.as_secs()), now, out);
            }
        } else if let Some((tile, hand)) = self.late(&missing).or_else(|| self.silent(&missing, now)) {
            self.hedge(tile, hand, out);
        }
    }

    /// A tile that keeps the others waiting, since the last of them came to this step, for as long as it took them and as
    /// another hand would need to decode it from the start; and one that has nothing else to do.
    fn silent(&self, missing: &[u32], now: Instant) -> Option<(u32, HandId)> {
        let so_far = self.opened.saturating_duration_since(self.began?);
        let took = self.latest.saturating_duration_since(self.opened);
        let kept = now.saturating_duration_since(self.latest.max(self.opened));
        if self.shape.plan.mode == Mode::Exact || kept < HEDGE_AFTER.max(so_far).max(took).max(self.catching_up) {
            return None;
        }
        let holders = |tile: &u32| self.members.values().filter(|member| member.tiles.contains(tile)).count();
        let tile = *missing.iter().find(|tile| holders(tile) == 1)?;
        let idle = self.members.iter().filter(|(_, member)| !member.tiles.iter().any(|own| missing.contains(own)));
        idle.min_by_key(|(_, member)| member.tiles.len()).map(|(hand, _)| (tile, *hand))
    }

    /// A tile whose hand works more than twice as long for each of its tiles as the median does, where another that
    /// starts over is done sooner; and that other.
    fn late(&self, missing: &[u32]) -> Option<(u32, HandId)> {
        let (open, all) = (self.log.len() as f64, f64::from(self.shape.all_steps()));
        if self.shape.plan.mode == Mode::Exact || self.members.len() < 2 || self.log.is_empty() {
            return None;
        }
        let pace = |member: &Member| member.busy.as_secs_f64() / member.tiles.len().max(1) as f64;
        let by_pace = |a: &(&HandId, &Member), b: &(&HandId, &Member)| pace(a.1).total_cmp(&pace(b.1));
        let mut paces: Vec<f64> = self.members.values().map(pace).collect();
        paces.sort_by(f64::total_cmp);
        let median = paces[(paces.len() - 1) / 2];
        let (slow, member) = self.members.iter().max_by(by_pace)?;
        // What it loses over the rest of the clip, against what starting over costs.
        let lost = (pace(member) - median) * (all - open) / open;
        if pace(member) <= 2.0 * median || lost <= 2.0 * median || lost < 1.0 {
            return None;
        }
        let tile = *member.tiles.iter().find(|tile| missing.contains(tile))?;
        let taken = self.members.iter().any(|(hand, other)| hand != slow && other.tiles.contains(&tile));
        let (hand, _) = self.members.iter().min_by(by_pace)?;
        (!taken && hand != slow).then_some((tile, *hand))
    }

    /// Gives a tile to a second hand as well.
    fn hedge(&mut self, tile: u32, hand: HandId, out: &mut Vec<Action>) {
        self.counters.hedges += 1;
        out.push(Action::Note(format!("decode: tile {tile} is late; hand {hand} decodes it too")));
        self.assign(hand, tile, out);
    }

    fn fail(&mut self, reason: String, out: &mut Vec<Action>) {
        self.dismiss_all(out);
        self.phase = Phase::Ended;
        out.push(Action::Failed(reason));
    }
}

#[cfg(test)]
#[path = "crew_tests.rs"]
mod tests;
