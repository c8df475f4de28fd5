//! What the session does, as a function of its state, an event and the time. The actor delivers.
//!
//! Any message may be lost, late or doubled. So a `Register` is repeated until answered, a report until acknowledged,
//! a wish for hands until its round is answered, a `Start` or `Help` for what is known is nothing new, and a session on
//! which heartbeats go unanswered is given up.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use farm_core::id::{AttemptKey, BootId, DeviceIndex, Epoch};
use farm_core::wire::to_node::{HelpDecode, SCHEDULER_SILENCE, StartAttempt, ToNode};
use farm_core::wire::to_scheduler::{AttemptOutcome, AttemptReport, Registration, RunningAttempt, ToScheduler};
use farm_core::wire::{Envelope, StopNo};

use super::dialer::{Dialer, Missed};
use super::events::{Action, Event, Offer};
use super::helps::Helps;
use super::reports::Reports;
use crate::progress::ProgressCell;

/// Wait after the scheduler has refused the node: somebody has to change something first.
const REFUSED_REDIAL: Duration = Duration::from_secs(10);
/// More than the transport's own time limits add up to.
const DIAL: Duration = Duration::from_secs(30);
/// From a successful dial to a usable session, and from `Register` to its answer.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// An unanswered `Register` is sent again after this.
const RESEND: Duration = Duration::from_secs(3);
/// An unanswered wish for hands is sent again after this: devices wait for the answer.
const RESEND_WISH: Duration = Duration::from_secs(1);
/// Without any scheduler for this long, a node stops its attempts and whatever helps others': their leases have run out
/// and others have them.
const CUT_OFF: Duration = Duration::from_secs(120);
/// Heartbeat intervals that a scheduler may ask for.
const HEARTBEAT_RANGE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(3));
/// A node that leaves says so as often.
const SAY_LEAVING: Duration = Duration::from_secs(1);
/// What is left of its time when a node that leaves gives up waiting for attempts, and hands them back as they are.
const LAST_WORD: Duration = Duration::from_secs(1);
/// A node that leaves and has nothing but reports to hand over waits so long for a scheduler to come back.
const NOBODY: Duration = Duration::from_secs(3);
/// Ended attempts that are remembered, so that a late repeat of their `Start` is not taken for a new one.
const REMEMBERED: usize = 1024;
/// Attempts and unacknowledged reports per device that a node takes on, and likewise helps.
const HELD_PER_DEVICE: usize = 8;

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
pub struct Held {
    key: AttemptKey,
    progress: ProgressCell,
    /// Devices of its lease that it has not given back.
    devices: Vec<DeviceIndex>,
    /// Not answered yet.
    wish: Option<Wish>,
    /// It was told to hand over.
    yielding: bool,
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

/// How a node leaves.
#[derive(Debug)]
struct Farewell {
    reason: String,
    since: Instant,
    /// It exits at the latest.
    until: Instant,
    /// What it still runs is handed back as it is.
    last_word: Instant,
    say: Instant,
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
    /// The newest command to stop.
    heard: StopNo,
    /// Reports that are not acknowledged, oldest first.
    reports: Reports,
    ended: VecDeque<AttemptKey>,
    /// Commands that came from an older epoch or were meant for another process.
    refused: u64,
    dialer: Dialer,
    /// When the node was last joined; none while it is.
    cut_off: Option<Instant>,
    /// Set when the node is leaving.
    farewell: Option<Farewell>,
}

impl Session {
    /// A session that dials at its first tick, with the reports that earlier processes of the node could not deliver.
    pub fn new(boot: BootId, offer: Offer, earlier: Vec<(u64, AttemptReport)>, dialer: Dialer, now: Instant) -> Self {
        Self {
            boot,
            offer,
            link: Link::Waiting { until: now },
            epoch: Epoch(0),
            running: Vec::new(),
            helps: Helps::default(),
            heard: StopNo::default(),
            reports: Reports::new(earlier, now),
            ended: VecDeque::new(),
            refused: 0,
            dialer,
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
            Event::Dialed(Err(missed)) => {
                if matches!(self.link, Link::Dialing { .. }) {
                    self.miss(missed, now);
                }
            }
            // The session may be usable before the dialler has said so.
            Event::Ready(peer) => match self.link {
                Link::Dialing { .. } | Link::Opening { .. } => self.register(peer, now, out),
                _ => out.push(Action::Disconnect(peer)),
            },
            Event::Closed(peer) => {
                if self.peer() == Some(peer) {
                    let reason = "the scheduler closed the session";
                    match self.link {
                        Link::Joined { .. } => self.lose(reason, now),
                        _ => self.miss(Missed::Unreachable(reason.to_owned()), now),
                    }
                }
            }
            Event::Undecodable(reason) => {
                tracing::warn!(%reason, "cannot read what the scheduler sent");
                self.refuse_link(now, out);
            }
            Event::Received(envelope) => self.receive(envelope, now, out),
            Event::Ended { key, outcome } => self.end(key, outcome, now, out),
            Event::Kept { number } => self.reports.kept(number),
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
            Event::Leave { reason, patience } => self.leave(reason, patience, now, out),
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
            ToNode::Welcome { heartbeat_ms } => self.welcome(envelope.epoch, heartbeat_ms, now, out),
            ToNode::Refused { reason } => {
                if let Link::Registering { .. } | Link::Joined { .. } = self.link {
                    tracing::error!(%reason, retry_seconds = REFUSED_REDIAL.as_secs(), "the scheduler refused this node");
                    self.refuse_link(now, out);
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
            ToNode::Abort { key, stop, reason } => {
                self.heard = self.heard.max(stop);
                out.extend(self.reports.aborted(key).into_iter().map(|number| Action::Forget { number }));
                if self.forget(key).is_some() {
                    tracing::info!(%key, %reason, "attempt aborted by the scheduler");
                    out.push(Action::Abort(key));
                }
                // Also if it is unknown: its `Start` may still be on the way.
                self.remember(key);
            }
            ToNode::Yield { key, reason } => {
                if self.hand_over(key, out) {
                    tracing::info!(%key, %reason, "attempt is to be handed back");
                } else {
                    // Ended already; the scheduler has not seen the report yet.
                    self.reports.resend_of(key, now);
                }
            }
            ToNode::Hands { key, round, keep, helpers } => {
                let asked = |held: &&mut Held| held.wish.as_ref().is_some_and(|wish| wish.round == round);
                if let Some(held) = self.held_mut(key).filter(asked) {
                    held.wish = None;
                    out.push(Action::Hands { key, round, keep, helpers });
                }
            }
            ToNode::Help(help) => self.help(help, now, out),
            ToNode::Dismiss { key, device, stop } => {
                self.heard = self.heard.max(stop);
                self.helps.dismiss(key, device, out);
            }
            ToNode::Acknowledged { report } => {
                out.extend(self.reports.acknowledged(report).into_iter().map(|number| Action::Forget { number }));
            }
        }
    }

    fn welcome(&mut self, epoch: Epoch, heartbeat_ms: u64, now: Instant, out: &mut Vec<Action>) {
        let Link::Registering { peer, .. } = self.link else { return };
        let interval = Duration::from_millis(heartbeat_ms).clamp(HEARTBEAT_RANGE.0, HEARTBEAT_RANGE.1);
        tracing::info!(%epoch, heartbeat_ms = interval.as_millis(), "joined the farm");
        self.epoch = epoch;
        self.dialer.joined();
        self.cut_off = None;
        if self.offer.crash.take().is_some() {
            out.push(Action::CrashKnown);
        }
        self.link = Link::Joined { peer, interval, next_heartbeat: now, last_answer: now };
        self.reports.resend(now);
        if let Some(farewell) = &mut self.farewell {
            farewell.say = now;
        }
        for wish in self.running.iter_mut().filter_map(|held| held.wish.as_mut()) {
            wish.resend = now;
        }
    }

    fn start(&mut self, start: Box<StartAttempt>, now: Instant, out: &mut Vec<Action>) {
        let key = start.key;
        if self.reports.resend_of(key, now) {
            // The scheduler has not seen the report yet.
            return;
        }
        let known = self.running.iter().any(|held| held.key == key) || self.ended.contains(&key);
        let joined = matches!(self.link, Link::Joined { .. });
        if known || !joined {
            return;
        }
        if self.running.len() + self.reports.held().count() >= self.limit() {
            // Not reported, so that the outbox stays bounded; the scheduler repeats what is not listed.
            tracing::warn!(%key, "not started: too many attempts and reports are held already");
            return;
        }
        let progress = ProgressCell::new();
        let devices = start.devices.clone();
        self.running.push(Held { key, progress: progress.clone(), devices, wish: None, yielding: false });
        if self.farewell.is_some() {
            // Told so, the scheduler need not find out that nobody begins.
            return self.end(key, AttemptOutcome::Interrupted { step: 0 }, now, out);
        }
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

    fn end(&mut self, key: AttemptKey, outcome: AttemptOutcome, now: Instant, out: &mut Vec<Action>) {
        // Aborted in the meantime: nothing is reported for it.
        let Some(mut held) = self.forget(key) else { return };
        self.remember(key);
        held.devices.clear();
        held.wish = None;
        let report = AttemptReport { key, outcome };
        let number = self.reports.add(held, report.clone(), now);
        out.push(Action::Keep { number, report });
        // While the report is written, a heartbeat says how far the attempt came.
        self.beat(now);
    }

    /// True if the attempt runs. It is told once.
    fn hand_over(&mut self, key: AttemptKey, out: &mut Vec<Action>) -> bool {
        let Some(held) = self.held_mut(key) else { return false };
        if !std::mem::replace(&mut held.yielding, true) {
            out.push(Action::Yield(key));
        }
        true
    }

    fn leave(&mut self, reason: String, patience: Duration, now: Instant, out: &mut Vec<Action>) {
        let until = now + patience;
        let last_word = until - LAST_WORD.min(patience / 4);
        if let Some(farewell) = &mut self.farewell {
            // Whoever asks again may have less time, never more.
            farewell.until = farewell.until.min(until);
            farewell.last_word = farewell.last_word.min(last_word);
            return;
        }
        self.farewell = Some(Farewell { reason, since: now, until, last_word, say: now });
        let keys: Vec<AttemptKey> = self.running.iter().map(|held| held.key).collect();
        for key in keys {
            self.hand_over(key, out);
        }
        self.helps.dismiss_all(out);
    }

    /// The farewell of a node that leaves, as far as it is due.
    fn part(&mut self, now: Instant, out: &mut Vec<Action>) {
        let joined = matches!(self.link, Link::Joined { .. });
        let Some(farewell) = &mut self.farewell else { return };
        let (since, until, last_word) = (farewell.since, farewell.until, farewell.last_word);
        if joined && now >= farewell.say {
            farewell.say = now + SAY_LEAVING;
            out.push(Action::Send(ToScheduler::Leaving { reason: farewell.reason.clone() }));
        }
        if now >= last_word {
            let left: Vec<(AttemptKey, u32)> =
                self.running.iter().map(|held| (held.key, held.progress.saved())).collect();
            for (key, step) in left {
                tracing::warn!(%key, step, "attempt is handed back as it is: there is no time left");
                out.push(Action::Abort(key));
                self.end(key, AttemptOutcome::Interrupted { step }, now, out);
            }
        }
        let nobody = self.cut_off.is_some_and(|lost| now >= lost.max(since) + NOBODY);
        let said = self.running.is_empty() && (self.reports.is_empty() || nobody);
        if said || now >= until {
            out.push(Action::Exit);
        }
    }

    /// Whatever is due by now.
    fn tick(&mut self, now: Instant, out: &mut Vec<Action>) {
        self.part(now, out);
        let unreachable = |why: &str| Missed::Unreachable(why.to_owned());
        match self.link {
            Link::Waiting { until } if now >= until => {
                self.link = Link::Dialing { until: now + DIAL };
                out.push(Action::Dial(self.dialer.at()));
            }
            Link::Dialing { until } if now >= until => self.miss(unreachable("the dialler does not answer"), now),
            Link::Opening { until } if now >= until => self.miss(unreachable("the session did not open"), now),
            Link::Registering { peer, until, .. } if now >= until => {
                out.push(Action::Disconnect(peer));
                self.miss(unreachable("the scheduler does not answer the registration"), now);
            }
            Link::Registering { peer, resend, until } if now >= resend => {
                self.link = Link::Registering { peer, resend: now + RESEND, until };
                out.push(Action::Send(self.registration()));
            }
            Link::Joined { peer, last_answer, .. } if now >= last_answer + SCHEDULER_SILENCE => {
                out.push(Action::Disconnect(peer));
                let seconds = SCHEDULER_SILENCE.as_secs();
                self.miss(Missed::Unreachable(format!("no heartbeat was answered for {seconds} s")), now);
            }
            Link::Joined { peer, interval, next_heartbeat, last_answer } => {
                out.extend(self.reports.due(now).into_iter().map(Action::Send));
                for Held { key, wish, .. } in &mut self.running {
                    let Some(wish) = wish.as_mut().filter(|wish| now >= wish.resend) else { continue };
                    wish.resend = now + RESEND_WISH;
                    let (round, tiles, url, token) = (wish.round, wish.tiles, wish.url.clone(), wish.token.clone());
                    out.push(Action::Send(ToScheduler::WantHands { key: *key, round, tiles, url, token }));
                }
                if now >= next_heartbeat {
                    // From now, not from the time it was due: after a pause one heartbeat is enough.
                    self.link = Link::Joined { peer, interval, next_heartbeat: now + interval, last_answer };
                    let (running, helping, heard) = (self.held(), self.helps.listed(), self.heard);
                    out.push(Action::Send(ToScheduler::Heartbeat { running, helping, heard }));
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
    }

    fn register(&mut self, peer: BootId, now: Instant, out: &mut Vec<Action>) {
        self.link = Link::Registering { peer, resend: now + RESEND, until: now + HANDSHAKE };
        out.push(Action::Send(self.registration()));
    }

    fn registration(&self) -> ToScheduler {
        let Offer { devices, site_json, models, store, roles, labels, crash } = self.offer.clone();
        let version = farm_core::VERSION.to_owned();
        ToScheduler::Register(Registration {
            version,
            devices,
            site_json,
            models,
            store,
            roles,
            labels,
            crash,
            running: self.held(),
            helping: self.helps.listed(),
            heard: self.heard,
        })
    }

    /// Every attempt that is the node's business still: also those whose report is not acknowledged, or the scheduler
    /// would take them for lost between their end and their report.
    fn held(&self) -> Vec<RunningAttempt> {
        let listed = |held: &Held| RunningAttempt {
            key: held.key,
            progress: held.progress.get(),
            devices: held.devices.clone(),
        };
        self.running.iter().chain(self.reports.held()).map(listed).collect()
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

    /// The session is gone by itself: the same scheduler is tried again before the others.
    fn lose(&mut self, reason: &str, now: Instant) {
        self.cut_off.get_or_insert(now);
        let wait = self.dialer.lost();
        tracing::warn!(%reason, retry_ms = wait.as_millis(), "not connected to the scheduler");
        self.link = Link::Waiting { until: now + wait };
    }

    /// This scheduler does not do; the next is tried.
    fn miss(&mut self, missed: Missed, now: Instant) {
        self.cut_off.get_or_insert(now);
        let wait = self.dialer.missed(&missed);
        match missed {
            Missed::Unreachable(reason) => {
                tracing::warn!(%reason, retry_ms = wait.as_millis(), "not connected to a scheduler");
            }
            Missed::Standby { .. } => tracing::debug!(retry_ms = wait.as_millis(), "the scheduler stands by"),
        }
        self.link = Link::Waiting { until: now + wait };
    }

    /// The scheduler and the node do not go together: we end the link and dial again later.
    fn refuse_link(&mut self, now: Instant, out: &mut Vec<Action>) {
        if let Some(peer) = self.peer() {
            out.push(Action::Disconnect(peer));
        }
        self.cut_off.get_or_insert(now);
        self.link = Link::Waiting { until: now + self.dialer.jittered(REFUSED_REDIAL) };
    }
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
