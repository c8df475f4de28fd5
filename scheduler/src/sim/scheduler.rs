//! A scheduler process around the real core, by the shell's own rules: turns of messages, then one commit, then what is
//! to be sent, then answers; one leader at a time, by the store's seat and epoch; a leader that has not been heard of by
//! the store for too long, by its own clock, says nothing any more.

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use farm_core::id::{BootId, Epoch, NodeId};
use farm_core::tiles::plan::Tiling;
use farm_core::wire::Envelope;
use farm_core::wire::to_node::ToNode;
use farm_core::wire::to_scheduler::ToScheduler;

use super::Ms;
use super::client::Order;
use super::plan::{STORE, WALL_MS};
use super::store::{NewBatch, Refused, Seat};
use super::world::{Due, World};
use crate::core::effects::{Change, Effects, Send};
use crate::core::events::{Event, Submitted, Time, Wish};
use crate::core::farm::Farm;
use crate::core::planted::{Bug, planted};

const TICK: Ms = 200;
const BEAT: Ms = 1_000;
const CAMPAIGN: Ms = 500;
/// A leader that has been silent for so long may be deposed.
const LEADER_TTL: Ms = 5_000;
/// Messages of a turn.
const TURN: usize = 256;
const LONGEST_COMMIT: Ms = 3_000;
const CHANGES: usize = 4096;

/// What the actor takes.
pub enum Inbound {
    Frame(Box<Envelope<ToScheduler>>),
    Closed(BootId),
    /// It was committed beside the actor, for this call.
    Submitted(Box<Submitted>, u64),
    /// To be committed in the actor's turn.
    Commit(Box<NewBatch>, u64),
    Order(Order, u64),
}

pub struct Scheduler {
    pub up: bool,
    /// SIGSTOP: until then.
    pub stopped: Ms,
    /// Until then it and the database cannot reach each other.
    pub cut: Ms,
    /// How wrong its wall clock is.
    pub wall_error: i64,
    /// What its monotonic clock has jumped.
    pub jumped: Ms,
    /// Number of its reign; events of earlier ones mean nothing.
    pub reign: u32,
    pub lead: Option<Box<Lead>>,
    /// The newest connection of each node.
    pub sessions: Vec<Option<usize>>,
    /// It ends after so many more effects.
    pub effects_left: Option<u64>,
}

/// A reign.
pub struct Lead {
    pub farm: Farm,
    pub epoch: Epoch,
    started: Ms,
    beaten: Ms,
    inbox: VecDeque<(Inbound, Time)>,
    taken: usize,
    /// It waits for the database.
    busy: bool,
    tick: bool,
    due: Effects,
    flight: Effects,
    answers: Vec<u64>,
    sent: u64,
    /// A commit beside the actor is under way, or a retry: no other is begun.
    pub rows_taken: bool,
    /// Drained nodes, by what the core has decided.
    pub drained: BTreeSet<NodeId>,
}

impl Scheduler {
    pub fn new(nodes: usize) -> Self {
        Self {
            up: true,
            stopped: 0,
            cut: 0,
            wall_error: 0,
            jumped: 0,
            reign: 0,
            lead: None,
            sessions: vec![None; nodes],
            effects_left: None,
        }
    }

    /// Its monotonic clock.
    fn clock(&self, now: Ms) -> Ms {
        now + self.jumped
    }

    fn time(&self, now: Ms) -> Time {
        let started = self.lead.as_ref().map_or(0, |lead| lead.started);
        Time(Duration::from_millis(self.clock(now) - started))
    }

    pub fn wall(&self, now: Ms) -> i64 {
        WALL_MS + now as i64 + self.wall_error
    }
}

impl World {
    fn database_reached_by(&self, scheduler: usize) -> bool {
        self.database_down <= self.now && self.schedulers[scheduler].cut <= self.now
    }

    pub fn campaign(&mut self, scheduler: usize) {
        let this = &self.schedulers[scheduler];
        if !this.up || this.lead.is_some() {
            return;
        }
        self.after(CAMPAIGN, Due::Campaign { scheduler });
        if !self.database_reached_by(scheduler) {
            return;
        }
        let free = match self.store.seat {
            None => true,
            Some(seat) => self.now.saturating_sub(seat.beat) > LEADER_TTL,
        };
        if free {
            if self.store.seat.is_some() {
                self.count("leader deposed");
            }
            self.schedulers[scheduler].reign += 1;
            let reign = self.schedulers[scheduler].reign;
            self.store.begin(scheduler, reign, self.now);
            let epoch = self.store.epoch;
            self.note(|| format!("scheduler {scheduler} leads, epoch {epoch}"));
            self.mix(&[1, scheduler as u64, epoch]);
            let takes = self.random.between(5, 200);
            self.after(takes, Due::Reign { scheduler, reign });
        }
    }

    /// The queue is loaded.
    pub fn reign(&mut self, scheduler: usize, reign: u32) {
        let seat = Seat { scheduler, reign, beat: 0 };
        let this = &self.schedulers[scheduler];
        let seated = self.store.seat.is_some_and(|held| Seat { beat: 0, ..held } == seat);
        if !this.up || this.reign != reign || this.lead.is_some() || !seated {
            return;
        }
        let wall = this.wall(self.now);
        let started = this.clock(self.now);
        let epoch = Epoch(self.store.epoch);
        let saved = self.store.load(wall);
        self.store.rows.iter_mut().for_each(|row| row.untold = false);
        let drained = saved.drained.iter().cloned().collect();
        let limits = self.plan.limits.clone();
        let farm = Farm::restore(limits, epoch, STORE.to_owned(), Tiling::AUTO, saved, wall, Time::default());
        self.schedulers[scheduler].lead = Some(Box::new(Lead {
            farm,
            epoch,
            started,
            beaten: started,
            inbox: VecDeque::new(),
            taken: 0,
            busy: false,
            tick: false,
            due: Effects::default(),
            flight: Effects::default(),
            answers: Vec::new(),
            sent: 0,
            rows_taken: false,
            drained,
        }));
        self.truth.values_mut().for_each(|truth| truth.disturbed = true);
        self.after(TICK, Due::Tick { scheduler, reign });
        self.after(BEAT, Due::Beat { scheduler, reign });
        self.audit_farm(scheduler);
    }

    pub fn scheduler_up(&mut self, scheduler: usize) {
        if !self.schedulers[scheduler].up {
            self.schedulers[scheduler].up = true;
            self.campaign(scheduler);
        }
    }

    /// The process is gone, and its sessions with the database and the nodes.
    pub fn crash_scheduler(&mut self, scheduler: usize) {
        self.note(|| format!("scheduler {scheduler} dies"));
        self.end_reign(scheduler);
        let this = &mut self.schedulers[scheduler];
        (this.up, this.effects_left, this.stopped) = (false, None, 0);
        let takes = self.random.between(200, 8_000);
        self.after(takes, Due::SchedulerUp { scheduler });
    }

    /// All that the core knew is dropped.
    pub fn end_reign(&mut self, scheduler: usize) {
        let reign = self.schedulers[scheduler].reign;
        if self.store.seat.is_some_and(|seat| seat.scheduler == scheduler && seat.reign == reign) {
            self.store.seat = None;
        }
        let this = &mut self.schedulers[scheduler];
        this.reign += 1;
        if this.lead.take().is_some() {
            self.note(|| format!("the reign of scheduler {scheduler} is over"));
            self.mix(&[2, scheduler as u64]);
            self.hang_up_all(scheduler);
        }
        if self.schedulers[scheduler].up {
            self.after(CAMPAIGN, Due::Campaign { scheduler });
        }
    }

    pub fn beat(&mut self, scheduler: usize, reign: u32) {
        if self.schedulers[scheduler].reign != reign {
            return;
        }
        self.after(BEAT, Due::Beat { scheduler, reign });
        let clock = self.schedulers[scheduler].clock(self.now);
        let reached = self.database_reached_by(scheduler);
        let Some(lead) = &mut self.schedulers[scheduler].lead else { return };
        if reached && self.store.beat(lead.epoch, self.now) {
            lead.beaten = clock;
        } else if reached || clock - lead.beaten >= LEADER_TTL {
            self.count("leader stepped down");
            self.end_reign(scheduler);
        }
    }

    pub fn tick(&mut self, scheduler: usize, reign: u32) {
        if self.schedulers[scheduler].reign != reign {
            return;
        }
        self.after(TICK, Due::Tick { scheduler, reign });
        if let Some(lead) = &mut self.schedulers[scheduler].lead {
            lead.tick = true;
        }
        self.pump(scheduler);
    }

    pub fn inbound(&mut self, scheduler: usize, reign: u32, what: Inbound) {
        let this = &mut self.schedulers[scheduler];
        if this.reign != reign {
            return;
        }
        let at = this.time(self.now);
        let Some(lead) = &mut this.lead else { return };
        lead.inbox.push_back((what, at));
        self.pump(scheduler);
    }

    /// The actor goes on as far as it can without waiting.
    fn pump(&mut self, scheduler: usize) {
        while self.broken.is_none() {
            let this = &mut self.schedulers[scheduler];
            let now = this.time(self.now);
            let Some(lead) = this.lead.as_mut().filter(|lead| !lead.busy) else { return };
            if !lead.due.load.is_empty() || lead.due.changes.len() >= CHANGES {
                self.begin_commit(scheduler);
            } else if lead.taken < TURN
                && let Some((inbound, at)) = lead.inbox.pop_front()
            {
                lead.taken += 1;
                self.take(scheduler, inbound, at);
            } else if std::mem::take(&mut lead.tick) {
                self.step(scheduler, Event::Tick, now);
            } else if lead.due != Effects::default() {
                self.begin_commit(scheduler);
            } else {
                // The end of the turn.
                lead.taken = 0;
                let again = !lead.inbox.is_empty();
                for call in std::mem::take(&mut lead.answers) {
                    self.answered(call);
                }
                self.audit_turn(scheduler);
                if !again {
                    return;
                }
            }
        }
    }

    fn take(&mut self, scheduler: usize, inbound: Inbound, at: Time) {
        match inbound {
            Inbound::Frame(envelope) => self.step(scheduler, Event::FromNode(envelope), at),
            Inbound::Closed(boot) => self.step(scheduler, Event::SessionClosed(boot), at),
            Inbound::Submitted(submitted, call) => {
                self.tell(scheduler, *submitted);
                if let Some(lead) = &mut self.schedulers[scheduler].lead {
                    lead.rows_taken = false;
                    lead.answers.push(call);
                }
            }
            // Another submission is committed and the core does not know: its sender asks again.
            Inbound::Commit(..) if self.schedulers[scheduler].lead.as_ref().is_some_and(|lead| lead.rows_taken) => {}
            Inbound::Commit(batch, call) => {
                if !self.is_flushed(scheduler) {
                    return self.put_back(scheduler, Inbound::Commit(batch, call), at);
                }
                let Some(epoch) = self.schedulers[scheduler].lead.as_ref().map(|lead| lead.epoch) else { return };
                if !self.database_reached_by(scheduler) || self.ends_here(scheduler) {
                    return self.end_reign(scheduler);
                }
                let wall = self.schedulers[scheduler].wall(self.now);
                match self.store.commit(epoch, *batch, wall) {
                    Ok(submitted) => {
                        if self.ends_here(scheduler) {
                            return;
                        }
                        self.tell(scheduler, submitted);
                        self.answer_later(scheduler, call);
                    }
                    Err(Refused::User(_)) => self.answer_later(scheduler, call),
                    Err(refused) => self.refused(scheduler, refused),
                }
            }
            Inbound::Order(order, call) => {
                if !self.is_flushed(scheduler) {
                    return self.put_back(scheduler, Inbound::Order(order, call), at);
                }
                if let Some(wish) = self.wish_of(scheduler, order) {
                    self.step(scheduler, Event::Wish { wish, by: "somebody".to_owned() }, at);
                }
                self.answer_later(scheduler, call);
            }
        }
    }

    /// The core hears of committed jobs; sometimes twice.
    fn tell(&mut self, scheduler: usize, submitted: Submitted) {
        for job in &submitted.queued {
            if let Some(row) = self.store.rows.get_mut(super::store::index_of(job.job)) {
                row.untold = false;
            }
        }
        let at = self.schedulers[scheduler].time(self.now);
        let again = self.random.chance(0.2).then(|| submitted.clone());
        self.step(scheduler, Event::Submitted(submitted), at);
        if let Some(again) = again {
            self.step(scheduler, Event::Submitted(again), at);
        }
    }

    fn answer_later(&mut self, scheduler: usize, call: u64) {
        if let Some(lead) = &mut self.schedulers[scheduler].lead {
            lead.answers.push(call);
        }
    }

    fn is_flushed(&self, scheduler: usize) -> bool {
        self.schedulers[scheduler].lead.as_ref().is_none_or(|lead| lead.due == Effects::default())
    }

    /// What this turn has decided has to be in the rows first.
    fn put_back(&mut self, scheduler: usize, inbound: Inbound, at: Time) {
        if let Some(lead) = &mut self.schedulers[scheduler].lead {
            lead.inbox.push_front((inbound, at));
            lead.taken -= 1;
        }
        self.begin_commit(scheduler);
    }

    /// One event; what follows is due at the end of the turn.
    fn step(&mut self, scheduler: usize, event: Event, at: Time) {
        let before = self.before_step(scheduler, &event);
        let Some(lead) = &mut self.schedulers[scheduler].lead else { return };
        let effects = lead.farm.step(event, at);
        for change in &effects.changes {
            match change {
                Change::Drained { node, drained: true } => drop(lead.drained.insert(node.clone())),
                Change::Drained { node, drained: false } => drop(lead.drained.remove(node)),
                _ => {}
            }
        }
        self.audit_step(scheduler, before, &effects);
        let Some(lead) = &mut self.schedulers[scheduler].lead else { return };
        lead.due.changes.extend(effects.changes);
        lead.due.sends.extend(effects.sends);
        lead.due.load.extend(effects.load);
    }

    /// A crash may come at each effect.
    fn ends_here(&mut self, scheduler: usize) -> bool {
        let Some(left) = &mut self.schedulers[scheduler].effects_left else { return false };
        if *left > 0 {
            *left -= 1;
            return false;
        }
        self.count("crash at an effect");
        self.crash_scheduler(scheduler);
        true
    }

    fn begin_commit(&mut self, scheduler: usize) {
        let delay = self.plan.commit_delay;
        let this = &mut self.schedulers[scheduler];
        let (reign, clock) = (this.reign, this.clock(self.now));
        let Some(lead) = &mut this.lead else { return };
        lead.flight = std::mem::take(&mut lead.due);
        if planted(Bug::AcknowledgedTooEarly) {
            let is_answer = |send: &Send| matches!(send.message, ToNode::Acknowledged { .. });
            let (early, rest) = std::mem::take(&mut lead.flight.sends).into_iter().partition(is_answer);
            lead.flight.sends = rest;
            let early: Vec<Send> = early;
            early.into_iter().for_each(|send| self.deliver(scheduler, send));
            return self.write(scheduler, reign, delay);
        }
        if lead.flight.changes.is_empty() {
            if clock - lead.beaten >= LEADER_TTL {
                self.count("leader stepped down");
                return self.end_reign(scheduler);
            }
            return self.speak(scheduler);
        }
        self.write(scheduler, reign, delay);
    }

    fn write(&mut self, scheduler: usize, reign: u32, delay: Ms) {
        let takes = if delay == 0 { 0 } else { self.random.span(delay, LONGEST_COMMIT) };
        if takes == 0 {
            return self.commit(scheduler);
        }
        if let Some(lead) = &mut self.schedulers[scheduler].lead {
            lead.busy = true;
        }
        self.after(takes, Due::Written { scheduler, reign });
    }

    pub fn written(&mut self, scheduler: usize, reign: u32) {
        if self.schedulers[scheduler].reign == reign {
            self.commit(scheduler);
            self.pump(scheduler);
        }
    }

    fn commit(&mut self, scheduler: usize) {
        if self.ends_here(scheduler) {
            return;
        }
        let reign = self.schedulers[scheduler].reign;
        if self.schedulers[scheduler].cut > self.now {
            let until = self.schedulers[scheduler].cut;
            if let Some(lead) = &mut self.schedulers[scheduler].lead {
                lead.busy = true;
            }
            return self.at(until, Due::Written { scheduler, reign });
        }
        let wall = self.schedulers[scheduler].wall(self.now);
        let Some(lead) = &mut self.schedulers[scheduler].lead else { return };
        lead.busy = false;
        let (epoch, changes) = (lead.epoch, std::mem::take(&mut lead.flight.changes));
        // In a failover nobody knows whether it was committed.
        let failed = self.database_down > self.now;
        if failed && self.random.chance(0.5) {
            return self.end_reign(scheduler);
        }
        self.audit_changes(&changes);
        match self.store.apply(epoch, &changes, wall) {
            Err(refused) => self.refused(scheduler, refused),
            Ok(()) if failed => self.end_reign(scheduler),
            Ok(()) => {
                self.note_changes(&changes);
                if !self.ends_here(scheduler) {
                    self.speak(scheduler);
                }
            }
        }
    }

    fn refused(&mut self, scheduler: usize, refused: Refused) {
        match refused {
            Refused::Superseded => {
                self.count("commit of an earlier epoch refused");
                self.end_reign(scheduler);
            }
            Refused::Broken(invariant, text) => self.fail(invariant, format!("the store refuses: {text}")),
            Refused::User(_) => {}
        }
    }

    /// What follows a commit: messages, and requests that are loaded.
    fn speak(&mut self, scheduler: usize) {
        let reign = self.schedulers[scheduler].reign;
        let Some(lead) = &mut self.schedulers[scheduler].lead else { return };
        let Effects { sends, load, .. } = std::mem::take(&mut lead.flight);
        for send in sends {
            self.deliver(scheduler, send);
            if self.ends_here(scheduler) {
                return;
            }
        }
        if load.is_empty() || self.schedulers[scheduler].reign != reign {
            return;
        }
        let loaded = self.store.requests(&load);
        let at = self.schedulers[scheduler].time(self.now);
        self.step(scheduler, Event::Loaded(loaded), at);
    }

    fn deliver(&mut self, scheduler: usize, send: Send) {
        self.audit_send(&send);
        let Some(lead) = &mut self.schedulers[scheduler].lead else { return };
        lead.sent += 1;
        let (epoch, sent) = (lead.epoch, lead.sent);
        self.send_down(scheduler, send.boot, epoch, sent, send.message);
    }

    /// What somebody wants, as the shell checks it.
    fn wish_of(&mut self, scheduler: usize, order: Order) -> Option<Wish> {
        let lead = self.schedulers[scheduler].lead.as_ref()?;
        match order {
            Order::Retry(job) => {
                use farm_core::job::state::JobState::{Cancelled, Failed};
                let (state, live) = self.store.live_job(job)?;
                let hopeless = live.after.iter().any(|on| self.store.is_hopeless(on));
                (matches!(state, Failed | Cancelled) && !lead.rows_taken && !hopeless).then_some(Wish::Retry(live))
            }
            Order::Wish(wish) => {
                use crate::core::events::Scope;
                let job = match &*wish {
                    Wish::Cancel(job) | Wish::Pause(Scope::Job(job)) | Wish::Resume(Scope::Job(job)) => Some(*job),
                    _ => None,
                };
                job.is_none_or(|job| lead.farm.holds(job)).then_some(*wish)
            }
        }
    }

    /// How far the core's time is behind.
    pub fn lag(&self, scheduler: usize) -> Ms {
        let this = &self.schedulers[scheduler];
        let core = this.lead.as_ref().map(|lead| lead.farm.now()).unwrap_or_default();
        this.time(self.now).since(core).as_millis() as Ms
    }

    /// A scheduler that leads and can be reached, whether it is the leader or not.
    pub fn reached(&self) -> Option<usize> {
        let leads = |i: &usize| {
            let this = &self.schedulers[*i];
            this.up && this.lead.is_some() && this.stopped <= self.now
        };
        let seated = self.store.seat.map(|seat| seat.scheduler).filter(leads);
        seated.or_else(|| (0..self.schedulers.len()).find(leads))
    }
}
