//! What the session does, as a function of its state, an event and the time. The actor delivers.
//!
//! Any message may be lost, late or doubled. So a `Register` is repeated until answered, a report until acknowledged,
//! a wish for hands until its round is answered, a `Start` or `Help` for what is known is nothing new, and a session on
//! which heartbeats go unanswered is given up.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use farm_core::id::{AttemptKey, BootId, DeviceIndex, Epoch};
use farm_core::job::state::FailureKind;
use farm_core::wire::Envelope;
use farm_core::wire::to_node::{HelpDecode, SCHEDULER_SILENCE, StartAttempt, ToNode};
use farm_core::wire::to_scheduler::{
    AttemptOutcome, AttemptReport, DeviceInfo, ModelInfo, Registration, Roles, RunningAttempt, ToScheduler,
};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::helps::Helps;
use crate::progress::ProgressCell;

/// Waits before dialling again: doubled from the first to the last, then kept. Jittered, so that the nodes of a farm do
/// not come back in step.
const FIRST_REDIAL: Duration = Duration::from_millis(200);
const LAST_REDIAL: Duration = Duration::from_secs(5);
/// Wait after the scheduler has refused the node: somebody has to change something first.
const REFUSED_REDIAL: Duration = Duration::from_secs(10);
/// More than the transport's own time limits add up to.
const DIAL: Duration = Duration::from_secs(30);
/// From a successful dial to a usable session, and from `Register` to its answer.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// An unanswered `Register`, and a report that is not acknowledged, are sent again after this.
const RESEND: Duration = Duration::from_secs(3);
/// An unanswered wish for hands is sent again after this: devices wait for the answer.
const RESEND_WISH: Duration = Duration::from_secs(1);
/// Without any scheduler for this long, a node stops its attempts and whatever helps others': their leases have run out
/// and others have them.
const CUT_OFF: Duration = Duration::from_secs(120);
/// Heartbeat intervals that a scheduler may ask for.
const HEARTBEAT_RANGE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(3));
/// How long a node that leaves waits for its last reports to be acknowledged.
const FAREWELL: Duration = Duration::from_millis(500);
/// Ended attempts that are remembered, so that a late repeat of their `Start` is not taken for a new one.
const REMEMBERED: usize = 1024;
/// Attempts and unacknowledged reports per device that a node takes on, and likewise helps.
const HELD_PER_DEVICE: usize = 8;

#[derive(Debug)]
pub enum Event {
    Dialed(Result<(), String>),
    /// A session with this peer can carry frames.
    Ready(BootId),
    Closed(BootId),
    Received(Envelope<ToNode>),
    /// The peer sent what cannot be read.
    Undecodable(String),
    Ended {
        key: AttemptKey,
        outcome: AttemptOutcome,
    },
    /// An attempt's latent is finished: which devices may decode its tiles, that others reach at `url` with `token`?
    /// Takes the place of earlier rounds.
    WantHands {
        key: AttemptKey,
        round: u32,
        tiles: u32,
        url: String,
        token: String,
    },
    /// A running attempt has given back all its devices but these.
    Released {
        key: AttemptKey,
        keep: Vec<DeviceIndex>,
    },
    /// The device has stopped helping the attempt and is idle.
    HelpEnded {
        key: AttemptKey,
        device: DeviceIndex,
    },
    Log {
        key: AttemptKey,
        line: String,
    },
    Tick,
    Stop,
}

#[derive(Debug)]
pub enum Action {
    Dial,
    Disconnect(BootId),
    Send(ToScheduler),
    Start {
        start: Box<StartAttempt>,
        progress: ProgressCell,
    },
    /// Stop the attempt; its end is of no interest any more.
    Abort(AttemptKey),
    /// The answer to the attempt's wish, once a round: it keeps these devices, and so many others will join.
    Hands {
        key: AttemptKey,
        round: u32,
        keep: Vec<DeviceIndex>,
        helpers: u32,
    },
    Help(Box<HelpDecode>),
    /// Stop helping. The device counts as helping until [`Event::HelpEnded`].
    Dismiss {
        key: AttemptKey,
        device: DeviceIndex,
    },
    /// The node has left the farm: end the process.
    Exit,
}

#[derive(Debug)]
enum Link {
    Waiting {
        until: Instant,
    },
    Dialing {
        until: Instant,
    },
    /// Dialled; the session is not usable yet.
    Opening {
        until: Instant,
    },
    Registering {
        peer: BootId,
        resend: Instant,
        until: Instant,
    },
    Joined {
        peer: BootId,
        interval: Duration,
        next_heartbeat: Instant,
        last_answer: Instant,
    },
}

#[derive(Debug)]
struct Held {
    key: AttemptKey,
    progress: ProgressCell,
    /// Devices of its lease that it has not given back.
    devices: Vec<DeviceIndex>,
    /// Not answered yet.
    wish: Option<Wish>,
}

/// For devices that decode.
#[derive(Debug)]
struct Wish {
    round: u32,
    tiles: u32,
    url: String,
    token: String,
    resend: Instant,
}

#[derive(Debug)]
struct Pending {
    number: u64,
    held: Held,
    report: AttemptReport,
    resend: Instant,
}

/// What the node offers; sent with every registration.
#[derive(Clone, Debug)]
pub struct Offer {
    pub devices: Vec<DeviceInfo>,
    /// How fast they are, as the registration says it.
    pub site_json: Option<String>,
    pub models: Vec<ModelInfo>,
    pub store: String,
    pub roles: Roles,
}

#[derive(Debug)]
pub struct Session {
    boot: BootId,
    offer: Offer,
    link: Link,
    /// Of the newest `Welcome`.
    epoch: Epoch,
    running: Vec<Held>,
    helps: Helps,
    /// Reports that are not acknowledged, oldest first.
    outbox: Vec<Pending>,
    last_report: u64,
    ended: VecDeque<AttemptKey>,
    /// Commands that came from an older epoch or were meant for another process.
    refused: u64,
    redial: Duration,
    rng: StdRng,
    /// When the node was last joined; none while it is.
    cut_off: Option<Instant>,
    /// Set when the node is leaving.
    farewell: Option<Instant>,
}

impl Session {
    /// A session that dials at its first tick. `seed` is for the jitter.
    pub fn new(boot: BootId, offer: Offer, seed: u64, now: Instant) -> Self {
        Self {
            boot,
            offer,
            link: Link::Waiting { until: now },
            epoch: Epoch(0),
            running: Vec::new(),
            helps: Helps::default(),
            outbox: Vec::new(),
            last_report: 0,
            ended: VecDeque::new(),
            refused: 0,
            redial: FIRST_REDIAL,
            rng: StdRng::seed_from_u64(seed),
            cut_off: Some(now),
            farewell: None,
        }
    }

    /// The epoch that outgoing messages carry.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    #[cfg(test)]
    fn refused(&self) -> u64 {
        self.refused
    }

    /// Takes one event in and pushes what has to be done, in order; then whatever is due by now.
    pub fn on(&mut self, event: Event, now: Instant, out: &mut Vec<Action>) {
        match event {
            Event::Dialed(Ok(())) => {
                if matches!(self.link, Link::Dialing { .. }) {
                    self.link = Link::Opening { until: now + HANDSHAKE };
                }
            }
            Event::Dialed(Err(reason)) => {
                if matches!(self.link, Link::Dialing { .. }) {
                    self.dial_later(&reason, now);
                }
            }
            // The session may be usable before the dialler has said so.
            Event::Ready(peer) => match self.link {
                Link::Dialing { .. } | Link::Opening { .. } => self.register(peer, now, out),
                _ => out.push(Action::Disconnect(peer)),
            },
            Event::Closed(peer) => {
                if self.peer() == Some(peer) {
                    self.lose("the scheduler closed the session", now);
                }
            }
            Event::Undecodable(reason) => {
                tracing::warn!(%reason, "cannot read what the scheduler sent");
                self.drop_link(REFUSED_REDIAL, now, out);
            }
            Event::Received(envelope) => self.receive(envelope, now, out),
            Event::Ended { key, outcome } => self.end(key, outcome, now),
            Event::WantHands { key, round, tiles, url, token } => {
                let newer = |wish: &Wish| wish.round < round;
                if let Some(held) = self.held_mut(key).filter(|held| held.wish.as_ref().is_none_or(newer)) {
                    held.wish = Some(Wish { round, tiles, url, token, resend: now });
                }
            }
            Event::Released { key, keep } => {
                if let Some(held) = self.held_mut(key) {
                    held.devices.retain(|device| keep.contains(device));
                    self.beat(now);
                }
            }
            Event::HelpEnded { key, device } => {
                if self.helps.end(key, device) {
                    self.beat(now);
                }
            }
            Event::Log { key, line } => {
                // Best effort: without a session the line is in the node's own log only.
                if matches!(self.link, Link::Joined { .. }) && self.running.iter().any(|held| held.key == key) {
                    out.push(Action::Send(ToScheduler::Log { key, line }));
                }
            }
            Event::Tick => {}
            Event::Stop => self.leave(now, out),
        }
        self.tick(now, out);
    }

    fn receive(&mut self, envelope: Envelope<ToNode>, now: Instant, out: &mut Vec<Action>) {
        // A ghost: a scheduler that was replaced, or a command for the process that had this node's name before.
        if envelope.epoch < self.epoch || envelope.boot != self.boot {
            self.refused += 1;
            tracing::warn!(
                epoch = %envelope.epoch, ours = %self.epoch, boot = %envelope.boot, refused = self.refused,
                "refused a command of an older epoch or for another process"
            );
            return;
        }
        match envelope.body {
            ToNode::Welcome { heartbeat_ms } => self.welcome(envelope.epoch, heartbeat_ms, now),
            ToNode::Refused { reason } => {
                if let Link::Registering { .. } | Link::Joined { .. } = self.link {
                    tracing::error!(%reason, retry_seconds = REFUSED_REDIAL.as_secs(), "the scheduler refused this node");
                    self.drop_link(REFUSED_REDIAL, now, out);
                }
            }
            ToNode::Reregister => {
                if let Some(peer) = self.peer() {
                    self.cut_off.get_or_insert(now);
                    self.register(peer, now, out);
                }
            }
            ToNode::HeartbeatSeen => {
                if let Link::Joined { last_answer, .. } = &mut self.link {
                    *last_answer = now;
                }
            }
            ToNode::Start(start) => self.start(start, now, out),
            ToNode::Abort { key, reason } => {
                self.outbox.retain(|pending| pending.held.key != key);
                if self.forget(key).is_some() {
                    tracing::info!(%key, %reason, "attempt aborted by the scheduler");
                    out.push(Action::Abort(key));
                }
                // Also if it is unknown: its `Start` may still be on the way.
                self.remember(key);
            }
            ToNode::Hands { key, round, keep, helpers } => {
                let asked = |held: &&mut Held| held.wish.as_ref().is_some_and(|wish| wish.round == round);
                if let Some(held) = self.held_mut(key).filter(asked) {
                    held.wish = None;
                    out.push(Action::Hands { key, round, keep, helpers });
                }
            }
            ToNode::Help(help) => self.help(help, now, out),
            ToNode::Dismiss { key, device } => self.helps.dismiss(key, device, out),
            ToNode::Acknowledged { report } => self.outbox.retain(|pending| pending.number != report),
        }
    }

    fn welcome(&mut self, epoch: Epoch, heartbeat_ms: u64, now: Instant) {
        let Link::Registering { peer, .. } = self.link else { return };
        let interval = Duration::from_millis(heartbeat_ms).clamp(HEARTBEAT_RANGE.0, HEARTBEAT_RANGE.1);
        tracing::info!(%epoch, heartbeat_ms = interval.as_millis(), "joined the farm");
        self.epoch = epoch;
        self.redial = FIRST_REDIAL;
        self.cut_off = None;
        self.link = Link::Joined { peer, interval, next_heartbeat: now, last_answer: now };
        for pending in &mut self.outbox {
            pending.resend = now;
        }
        for wish in self.running.iter_mut().filter_map(|held| held.wish.as_mut()) {
            wish.resend = now;
        }
    }

    fn start(&mut self, start: Box<StartAttempt>, now: Instant, out: &mut Vec<Action>) {
        let key = start.key;
        if let Some(pending) = self.outbox.iter_mut().find(|pending| pending.held.key == key) {
            // The scheduler has not seen the report yet.
            pending.resend = now;
            return;
        }
        let known = self.running.iter().any(|held| held.key == key) || self.ended.contains(&key);
        let joined = matches!(self.link, Link::Joined { .. });
        if known || !joined || self.farewell.is_some() {
            return;
        }
        if self.running.len() + self.outbox.len() >= self.limit() {
            // Not reported, so that the outbox stays bounded; the scheduler repeats what is not listed.
            tracing::warn!(%key, "not started: too many attempts and reports are held already");
            return;
        }
        let progress = ProgressCell::new();
        self.running.push(Held { key, progress: progress.clone(), devices: start.devices.clone(), wish: None });
        out.push(Action::Start { start, progress });
    }

    fn help(&mut self, help: Box<HelpDecode>, now: Instant, out: &mut Vec<Action>) {
        let joined = matches!(self.link, Link::Joined { .. });
        if joined && self.farewell.is_none() && self.helps.begin(&help, self.limit()) {
            // It may end before the next one is due, and the scheduler would take it for not begun.
            self.beat(now);
            out.push(Action::Help(help));
        }
    }

    /// Attempts with their reports, and helps, that are taken on.
    fn limit(&self) -> usize {
        HELD_PER_DEVICE * self.offer.devices.len().max(1)
    }

    /// A heartbeat is due now: a device is free, or not.
    fn beat(&mut self, now: Instant) {
        if let Link::Joined { next_heartbeat, .. } = &mut self.link {
            *next_heartbeat = now;
        }
    }

    fn end(&mut self, key: AttemptKey, outcome: AttemptOutcome, now: Instant) {
        // Aborted in the meantime: nothing is reported for it.
        let Some(mut held) = self.forget(key) else { return };
        self.remember(key);
        held.devices.clear();
        held.wish = None;
        self.last_report += 1;
        let report = AttemptReport { key, outcome };
        self.outbox.push(Pending { number: self.last_report, held, report, resend: now });
    }

    fn leave(&mut self, now: Instant, out: &mut Vec<Action>) {
        if self.farewell.is_some() {
            return;
        }
        self.farewell = Some(now + FAREWELL);
        let keys: Vec<AttemptKey> = self.running.iter().map(|held| held.key).collect();
        for key in keys {
            out.push(Action::Abort(key));
            // Told now, the scheduler need not wait for the lease to run out.
            let message = "the node was stopped".to_owned();
            self.end(key, AttemptOutcome::Failed { kind: FailureKind::NodeLost, message }, now);
        }
        self.helps.dismiss_all(out);
    }

    /// Whatever is due by now.
    fn tick(&mut self, now: Instant, out: &mut Vec<Action>) {
        match self.link {
            Link::Waiting { until } if now >= until && self.farewell.is_none() => {
                self.link = Link::Dialing { until: now + DIAL };
                out.push(Action::Dial);
            }
            Link::Dialing { until } if now >= until => self.lose("the dialler does not answer", now),
            Link::Opening { until } if now >= until => self.lose("the session did not open", now),
            Link::Registering { until, .. } if now >= until => {
                tracing::warn!("the scheduler does not answer the registration");
                self.drop_link(self.redial, now, out);
            }
            Link::Registering { peer, resend, until } if now >= resend => {
                self.link = Link::Registering { peer, resend: now + RESEND, until };
                out.push(Action::Send(self.registration()));
            }
            Link::Joined { last_answer, .. } if now >= last_answer + SCHEDULER_SILENCE => {
                tracing::warn!(
                    seconds = SCHEDULER_SILENCE.as_secs(),
                    "no heartbeat was answered; dropping the session"
                );
                self.drop_link(self.redial, now, out);
            }
            Link::Joined { peer, interval, next_heartbeat, last_answer } => {
                for pending in self.outbox.iter_mut().filter(|pending| now >= pending.resend) {
                    pending.resend = now + RESEND;
                    let (number, report) = (pending.number, pending.report.clone());
                    out.push(Action::Send(ToScheduler::Report { number, report }));
                }
                for Held { key, wish, .. } in &mut self.running {
                    let Some(wish) = wish.as_mut().filter(|wish| now >= wish.resend) else { continue };
                    wish.resend = now + RESEND_WISH;
                    let (round, tiles, url, token) = (wish.round, wish.tiles, wish.url.clone(), wish.token.clone());
                    out.push(Action::Send(ToScheduler::WantHands { key: *key, round, tiles, url, token }));
                }
                if now >= next_heartbeat {
                    // From now, not from the time it was due: after a pause one heartbeat is enough.
                    self.link = Link::Joined { peer, interval, next_heartbeat: now + interval, last_answer };
                    let (running, helping) = (self.held(), self.helps.listed());
                    out.push(Action::Send(ToScheduler::Heartbeat { running, helping }));
                }
            }
            _ => {}
        }
        if self.cut_off.is_some_and(|since| now >= since + CUT_OFF) {
            for held in std::mem::take(&mut self.running) {
                tracing::warn!(key = %held.key, seconds = CUT_OFF.as_secs(), "attempt stopped: no scheduler for too long");
                self.remember(held.key);
                out.push(Action::Abort(held.key));
            }
            self.helps.dismiss_all(out);
        }
        if let Some(until) = self.farewell {
            let said = self.outbox.is_empty() || !matches!(self.link, Link::Joined { .. });
            if said || now >= until {
                out.push(Action::Exit);
            }
        }
    }

    fn register(&mut self, peer: BootId, now: Instant, out: &mut Vec<Action>) {
        self.link = Link::Registering { peer, resend: now + RESEND, until: now + HANDSHAKE };
        out.push(Action::Send(self.registration()));
    }

    fn registration(&self) -> ToScheduler {
        let Offer { devices, site_json, models, store, roles } = self.offer.clone();
        let version = farm_core::VERSION.to_owned();
        ToScheduler::Register(Registration {
            version,
            devices,
            site_json,
            models,
            store,
            roles,
            running: self.held(),
            helping: self.helps.listed(),
        })
    }

    /// Every attempt that is the node's business still: also those whose report is not acknowledged, or the scheduler
    /// would take them for lost between their end and their report.
    fn held(&self) -> Vec<RunningAttempt> {
        let unreported = self.outbox.iter().map(|pending| &pending.held);
        let listed = |held: &Held| RunningAttempt {
            key: held.key,
            progress: held.progress.get(),
            devices: held.devices.clone(),
        };
        self.running.iter().chain(unreported).map(listed).collect()
    }

    fn held_mut(&mut self, key: AttemptKey) -> Option<&mut Held> {
        self.running.iter_mut().find(|held| held.key == key)
    }

    fn peer(&self) -> Option<BootId> {
        match self.link {
            Link::Registering { peer, .. } | Link::Joined { peer, .. } => Some(peer),
            Link::Waiting { .. } | Link::Dialing { .. } | Link::Opening { .. } => None,
        }
    }

    fn forget(&mut self, key: AttemptKey) -> Option<Held> {
        let at = self.running.iter().position(|held| held.key == key)?;
        Some(self.running.swap_remove(at))
    }

    fn remember(&mut self, key: AttemptKey) {
        if !self.ended.contains(&key) {
            self.ended.push_back(key);
        }
        if self.ended.len() > REMEMBERED {
            self.ended.pop_front();
        }
    }

    /// The link is gone by itself.
    fn lose(&mut self, reason: &str, now: Instant) {
        self.cut_off.get_or_insert(now);
        self.dial_later(reason, now);
    }

    /// We end the link and dial again after about `wait`.
    fn drop_link(&mut self, wait: Duration, now: Instant, out: &mut Vec<Action>) {
        if let Some(peer) = self.peer() {
            out.push(Action::Disconnect(peer));
        }
        self.cut_off.get_or_insert(now);
        self.link = Link::Waiting { until: now + self.jittered(wait) };
    }

    fn dial_later(&mut self, reason: &str, now: Instant) {
        let wait = self.jittered(self.redial);
        self.redial = (self.redial * 2).min(LAST_REDIAL);
        tracing::warn!(%reason, retry_ms = wait.as_millis(), "not connected to the scheduler");
        self.link = Link::Waiting { until: now + wait };
    }

    /// Half to all of `wait`.
    fn jittered(&mut self, wait: Duration) -> Duration {
        wait.mul_f64(self.rng.random_range(0.5..=1.0))
    }
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
