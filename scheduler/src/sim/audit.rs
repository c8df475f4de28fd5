//! The twelve invariants, looked at after every step: of the core, of the store, and of what really happens.
//!
//! | | invariant | where it is looked at |
//! |---|---|---|
//! | I1 | no device in two live attempts | a node is never told to give away a device whose holder was not told to stop |
//! | I2 | at most one accepted result for a job | the store's guard; the manifest is created once |
//! | I3 | an accepted result has a manifest, and it is that | at the commit |
//! | I4 | a quota is never exceeded | after every step that starts something, by the leases themselves |
//! | I5 | the ledger is the sum of attempts, and those are what devices were held for | at the end of an attempt; after turns |
//! | I6 | every line ends: done, failed with a reason, or cancelled | at the end, within a bounded time |
//! | I7 | nobody starves | likewise; and while one tenant floods the farm |
//! | I8 | a gang has all its devices or none | where it gets them |
//! | I9 | what is stale changes nothing | after every report, at every commit and command |
//! | I10 | nothing starts on a drained node, and a drain ends | at the commit; at the end, within a bounded time |
//! | I11 | a report heard again changes nothing | after every report |
//! | I12 | reasons add up to the queue | after turns |

use farm_core::api::WaitCode;
use farm_core::id::{AttemptKey, BootId, NodeId};
use farm_core::job::state::JobState;
use farm_core::wire::to_node::ToNode;
use farm_core::wire::to_scheduler::ToScheduler;

use super::Ms;
use super::store::index_of;
use super::world::{World, of_boot};
use crate::core::check::Held;
use crate::core::effects::{Change, Effects, Outcome, Send};
use crate::core::events::Event;

/// Between two full looks at a large farm.
const SELDOM: Ms = 1_000;
/// A bill is exact to this for each device: it is counted in whole milliseconds.
const ROUNDED: Ms = 5;

/// What is to be compared after a step.
pub enum Before {
    Nothing,
    /// A report, and whether it is of the attempt that runs, from its own process.
    Report {
        event: Box<Event>,
        current: bool,
    },
}

impl World {
    pub fn before_step(&mut self, scheduler: usize, event: &Event) -> Before {
        let Event::FromNode(envelope) = event else { return Before::Nothing };
        let ToScheduler::Report { report, .. } = &envelope.body else { return Before::Nothing };
        let Some(lead) = &self.schedulers[scheduler].lead else { return Before::Nothing };
        let owner: Option<(&NodeId, BootId)> = lead.farm.owner(&report.key);
        let current = owner == Some((&envelope.node, envelope.boot));
        Before::Report { event: Box::new(event.clone()), current }
    }

    pub fn audit_step(&mut self, scheduler: usize, before: Before, effects: &Effects) {
        for change in &effects.changes {
            self.mix_change(change);
            if let Change::AttemptEnded { key, outcome, device_ms, .. } = change {
                self.audit_bill(scheduler, *key, *outcome, *device_ms);
            }
        }
        self.mix(&[7, scheduler as u64, effects.sends.len() as u64]);
        if let Before::Report { event, current } = before {
            if !current && !effects.changes.is_empty() {
                return self.fail("I9", format!("a stale report changes {:?}", effects.changes));
            }
            let at = self.schedulers[scheduler].lead.as_ref().map(|lead| lead.farm.now());
            let again = at.zip(self.schedulers[scheduler].lead.as_mut()).map(|(at, lead)| lead.farm.step(*event, at));
            if let Some(changes) = again.map(|again| again.changes).filter(|changes| !changes.is_empty()) {
                return self.fail("I11", format!("a report heard again changes {changes:?}"));
            }
        }
        for job in &effects.load {
            self.picked.insert(*job, self.now);
        }
        let mut starts = false;
        for change in &effects.changes {
            let Change::Started { start, .. } = change else { continue };
            let truth = self.truth.entry(start.key).or_default();
            // For the core it begins when its request is asked for.
            let began = self.picked.remove(&start.key.job).unwrap_or(self.now);
            (truth.began, truth.devices) = (began, start.devices.len() as u64);
            starts = true;
        }
        if starts {
            self.audit_starts(scheduler, effects);
        }
        if !self.plan.large {
            self.audit_farm(scheduler);
        } else {
            self.audit_touched(scheduler, effects);
        }
    }

    /// The core's own structures agree.
    pub fn audit_farm(&mut self, scheduler: usize) {
        self.checks += 1;
        let Some(lead) = &self.schedulers[scheduler].lead else { return };
        if let Err(text) = lead.farm.check() {
            self.fail(invariant_of(&text), format!("the core disagrees with itself: {text}"));
        }
    }

    fn audit_touched(&mut self, scheduler: usize, effects: &Effects) {
        self.checks += 1;
        let Some(lead) = &self.schedulers[scheduler].lead else { return };
        let mut wrong = None;
        for change in &effects.changes {
            let checked = match change {
                Change::Started { start, node, .. } => {
                    lead.farm.check_node(node).and_then(|()| lead.farm.check_job(start.key.job))
                }
                Change::Requeued { job, .. } | Change::Cancelled { job } => lead.farm.check_job(*job),
                _ => Ok(()),
            };
            wrong = wrong.or(checked.err());
        }
        for send in effects.sends.iter().filter(|send| !matches!(send.message, ToNode::HeartbeatSeen)) {
            wrong = wrong.or(lead.farm.check_node(&send.node).err());
        }
        if let Some(text) = wrong {
            self.fail(invariant_of(&text), format!("the core disagrees with itself: {text}"));
        }
    }

    fn audit_starts(&mut self, scheduler: usize, effects: &Effects) {
        let Some(lead) = &self.schedulers[scheduler].lead else { return };
        let mut wrong = None;
        for change in &effects.changes {
            let Change::Started { start, node, .. } = change else { continue };
            if lead.drained.contains(node) {
                wrong = wrong.or(Some(("I10", format!("{} starts on node {node}, which is drained", start.key))));
            }
            let ranks = start.topology.world();
            if ranks != start.devices.len() || start.devices.is_empty() {
                wrong = wrong.or(Some(("I8", format!("{} has {ranks} ranks on {:?}", start.key, start.devices))));
            }
            let Some(tenant) = lead.farm.tenant_of(start.key.job) else { continue };
            let Some(view) = lead.farm.tenant_view(tenant) else { continue };
            if view.spec.quota.devices.is_some_and(|most| view.devices > u64::from(most)) {
                wrong = wrong
                    .or(Some(("I4", format!("tenant {tenant} has {} devices by {:?}", view.devices, view.spec.quota))));
            }
            if view.spec.quota.device_seconds.is_some_and(|most| view.day > most as f64) {
                wrong =
                    wrong.or(Some(("I4", format!("tenant {tenant} has used {} by {:?}", view.day, view.spec.quota))));
            }
        }
        if let Some((invariant, text)) = wrong {
            self.fail(invariant, text);
        }
    }

    /// Before a commit: what the changes say is so.
    pub fn audit_changes(&mut self, changes: &[Change]) {
        for change in changes {
            let Change::Done { job, result_json, .. } = change else { continue };
            let manifest = self.bucket.result(*job).map(|(_, json)| json.clone());
            if manifest.as_deref() != Some(result_json.as_str()) {
                return self.fail("I3", format!("job {job} is done by another manifest than {manifest:?}"));
            }
        }
    }

    /// What an attempt is charged, against what its devices and its helpers were held for.
    fn audit_bill(&mut self, scheduler: usize, key: AttemptKey, outcome: Outcome, charged: u64) {
        let Some(truth) = self.truth.get(&key).filter(|truth| !truth.disturbed) else { return };
        let same_reign = self.schedulers[scheduler].lead.as_ref().is_some_and(|lead| lead.epoch == key.epoch);
        let calm = self.schedulers[scheduler].jumped == 0;
        if !same_reign || !calm || !matches!(outcome, Outcome::Completed | Outcome::Interrupted) {
            return;
        }
        // The core's time is that of the event.
        let lag = self.lag(scheduler) + ROUNDED;
        let least = truth.held;
        let most = (self.now - truth.began + ROUNDED) * truth.devices;
        if charged + lag * truth.devices < least || charged > most {
            let text =
                format!("attempt {key} is charged {charged} ms; its devices were held {least} ms, at most {most}");
            self.fail("I5", text);
        }
    }

    /// After a commit.
    pub fn note_changes(&mut self, changes: &[Change]) {
        for change in changes {
            if let Change::Started { start, node, .. } = change {
                self.note(|| format!("{} starts on {node} {:?}", start.key, start.devices));
            } else if self.trace.is_some() && !matches!(change, Change::Log { .. } | Change::Audit { .. }) {
                self.note(|| format!("committed {change:?}").chars().take(200).collect());
            }
        }
    }

    /// Before a message goes out: what a node hears is committed.
    pub fn audit_send(&mut self, send: &Send) {
        let (n, boots) = of_boot(send.boot);
        match &send.message {
            ToNode::Acknowledged { report } => {
                let known = self.nodes[n].reports.iter().find(|known| known.number == *report);
                let Some(key) = known.filter(|known| known.own).map(|known| known.report.key) else { return };
                if self.nodes[n].boot == send.boot && !self.store.is_over(&key) {
                    self.fail("I9", format!("the report on {key} is acknowledged before it is committed"));
                }
            }
            ToNode::Help(help) => {
                let truth = self.truth.entry(help.key).or_default();
                let helper = (n, boots, help.device);
                if !truth.helpers.contains(&helper) {
                    truth.helpers.push(helper);
                    truth.devices += 1;
                }
            }
            _ => {}
        }
    }

    /// At the end of a turn: core and store say the same.
    pub fn audit_turn(&mut self, scheduler: usize) {
        if self.plan.large {
            if self.now >= self.next_audit {
                self.next_audit = self.now + SELDOM;
                self.audit_farm(scheduler);
                self.audit_ledger(scheduler);
            }
            return;
        }
        self.audit_rows(scheduler);
        if self.events.is_multiple_of(8) {
            self.audit_ledger(scheduler);
            self.audit_reasons(scheduler);
            if self.plan.flood {
                self.audit_hunger(scheduler);
            }
        }
    }

    fn audit_rows(&mut self, scheduler: usize) {
        let Some(lead) = &self.schedulers[scheduler].lead else { return };
        if lead.epoch.0 != self.store.epoch {
            return;
        }
        let mut wrong = None;
        for job in &self.store.live {
            let Some(row) = self.store.row(*job).filter(|row| !row.untold) else { continue };
            let known = match lead.farm.held(*job) {
                Some(Held::Queued) => row.state == JobState::Queued,
                Some(Held::Running(key)) => row.live.running.as_ref().is_some_and(|running| running.key == key),
                None => false,
            };
            if !known {
                wrong =
                    Some(format!("job {job} is {:?} in the store, {:?} in the core", row.state, lead.farm.held(*job)));
            }
        }
        let ended = lead.farm.live().find(|job| !self.store.live.contains(job));
        let wrong = wrong.or(ended.map(|job| format!("job {job} has ended, and the core has it")));
        if let Some(text) = wrong {
            self.fail("I6", text);
        }
    }

    fn audit_ledger(&mut self, scheduler: usize) {
        let Some(lead) = &self.schedulers[scheduler].lead else { return };
        if lead.epoch.0 != self.store.epoch {
            return;
        }
        let slack = 0.001 * self.store.ended as f64 + 0.01;
        for view in lead.farm.tenants() {
            let ledger = self.store.used(&view.tenant) as f64 / 1000.0;
            if (view.day - ledger).abs() > slack {
                let text =
                    format!("tenant {} has used {} s by the ledger, {} s by the core", view.tenant, ledger, view.day);
                return self.fail("I5", text);
            }
        }
    }

    fn audit_reasons(&mut self, scheduler: usize) {
        let Some(lead) = &self.schedulers[scheduler].lead else { return };
        let view = lead.farm.queue_view();
        let mut counted = std::collections::BTreeMap::new();
        let mut queued = 0;
        for reason in lead.farm.live().filter_map(|job| lead.farm.reason(job)) {
            queued += 1;
            *counted.entry(reason.code).or_insert(0) += 1;
        }
        let sum: u64 = view.waiting.values().sum();
        if sum != view.queued || queued != view.queued || counted != view.waiting {
            self.fail("I12", format!("{} jobs wait by {:?}, one by one by {counted:?}", view.queued, view.waiting));
        }
    }

    /// Nobody with a share waits for ever, whatever others submit.
    fn audit_hunger(&mut self, scheduler: usize) {
        let Some(lead) = &self.schedulers[scheduler].lead else { return };
        let mut hungry = std::collections::BTreeSet::new();
        for job in lead.farm.live() {
            let code = lead.farm.reason(job).map(|reason| reason.code);
            if matches!(
                code,
                Some(WaitCode::Share | WaitCode::Turn | WaitCode::Busy | WaitCode::Planning | WaitCode::Reserved)
            ) {
                hungry.extend(lead.farm.tenant_of(job).cloned());
            }
        }
        // Whoever floods the farm has to wait until others have used as much.
        hungry.retain(|tenant| lead.farm.tenant_view(tenant).is_some_and(|view| view.devices == 0));
        hungry.remove(&self.plan.tenants[0]);
        let bound = self.settle.patience(self.plan.tenants.len());
        self.hungry.retain(|tenant, _| hungry.contains(tenant));
        for tenant in hungry {
            let since = *self.hungry.entry(tenant.clone()).or_insert(self.now);
            if self.now - since > bound {
                return self.fail("I7", format!("tenant {tenant} has had no device for {} s", bound / 1000));
            }
        }
    }

    /// When all is over.
    pub fn audit_end(&mut self) {
        for row in &self.store.rows {
            let reason = row.reason.as_deref().unwrap_or_default();
            if row.state == JobState::Failed && reason.is_empty() {
                return self.fail("I6", format!("job {} has failed for no reason", row.live.job));
            }
        }
        let (ledger, attempts) = (self.store.ledger.values().sum::<u64>(), self.store.used_by_attempts());
        if ledger != attempts {
            return self.fail("I5", format!("the ledger has {ledger} ms, the attempts {attempts} ms"));
        }
        let numbers: Vec<u64> = self.store.rows.iter().map(|row| row.state as u64).collect();
        self.mix(&numbers);
    }

    fn mix_change(&mut self, change: &Change) {
        let (kind, job, more) = match change {
            Change::Started { start, node, .. } => {
                (1, Some(start.key.job), node.0.len() as u64 + 16 * start.devices.len() as u64)
            }
            Change::AttemptEnded { key, device_ms, .. } => (2, Some(key.job), *device_ms),
            Change::Done { job, .. } => (3, Some(*job), 0),
            Change::Requeued { job, .. } => (4, Some(*job), 0),
            Change::Counted { job, .. } => (5, Some(*job), 0),
            Change::Failed { job, .. } => (6, Some(*job), 0),
            Change::Cancelled { job } => (7, Some(*job), 0),
            Change::Retried { job } => (8, Some(*job), 0),
            Change::Paused { .. } => (9, None, 0),
            Change::Drained { .. } => (10, None, 0),
            Change::Tenant { .. } => (11, None, 0),
            Change::Audit { .. } => (12, None, 0),
            Change::Log { .. } => return,
        };
        self.mix(&[kind, job.map_or(0, |job| index_of(job) as u64), more]);
    }
}

/// Which invariant the core's own disagreement breaks.
fn invariant_of(text: &str) -> &'static str {
    if text.contains("tenant") {
        "I4"
    } else if text.contains("has devices") || text.contains("lends a device") {
        "I8"
    } else {
        "I6"
    }
}
