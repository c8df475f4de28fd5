//! The end of a schedule: nothing goes wrong any more, and all that was begun has to end, in a bounded time.

use farm_core::api::{TenantSpec, WaitCode};
use farm_core::id::{JobId, NodeId, SubmissionId, TenantId};

use super::Ms;
use super::plan::{Luck, Net, Plan};
use super::store::{Row, index_of};
use super::world::{Due, World};
use crate::core::events::{Scope, Wish};

/// Between two looks.
const LOOK: Ms = 2_000;
/// A drain has to be through by then, and what hangs given up.
const DRAIN: Ms = 300_000;
/// What is left has to be done by then, however little it is, but for what hangs.
const REST: Ms = 900_000;
/// So many jobs are looked at one by one.
const FEW: usize = 1_000;
/// After this, jobs that no node of the farm can render are given up by their users.
const PATIENCE: Ms = 30_000;

#[derive(Debug)]
enum Phase {
    Active,
    /// What is drained has to become empty.
    Draining {
        until: Ms,
    },
    /// All has to end.
    Ending {
        since: Ms,
        until: Ms,
        asked: Ms,
    },
    Over,
}

#[derive(Debug)]
pub struct Settle {
    phase: Phase,
    /// How long the work of a job may take, on all devices together.
    per_job: Ms,
    /// An attempt that hangs is given up after so long, which is ten times what it is expected to take, by what was measured
    /// of others at worst: the clock may have jumped.
    hang: Ms,
}

impl Settle {
    pub fn new(plan: &Plan) -> Self {
        let longest = plan.kinds.iter().map(|kind| kind.seconds).fold(1.0, f64::max);
        Self {
            phase: Phase::Active,
            per_job: (30_000.0 + 8_000.0 * longest) as Ms,
            hang: (4_000_000.0 + 60_000.0 * longest) as Ms,
        }
    }

    /// How long one of so many tenants may be without any device: what runs is handed back after a minute, or ends.
    pub fn patience(&self, tenants: usize) -> Ms {
        120_000 + tenants as Ms * self.per_job
    }

    pub fn has_begun(&self) -> bool {
        !matches!(self.phase, Phase::Active)
    }

    pub fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Over)
    }
}

impl World {
    pub fn settle(&mut self) {
        match self.settle.phase {
            Phase::Active => self.heal(),
            Phase::Draining { until } => self.look_at_drains(until),
            Phase::Ending { since, until, asked } => self.look_at_the_rest(since, until, asked),
            Phase::Over => return,
        }
        if !self.settle.is_over() {
            self.after(LOOK, Due::Settle);
        }
    }

    /// Whatever was wrong is right again.
    fn heal(&mut self) {
        let now = self.now;
        self.note(|| "nothing goes wrong any more".to_owned());
        self.plan.net = Net { delay: self.plan.net.delay, ..Net::default() };
        self.plan.luck = Luck::default();
        (self.storm, self.database_down, self.bucket.slow, self.bucket.fails) = (0, 0, 0, 0);
        for scheduler in 0..self.schedulers.len() {
            let this = &mut self.schedulers[scheduler];
            (this.cut, this.effects_left) = (0, None);
            this.stopped = this.stopped.min(now + 1);
        }
        for n in 0..self.nodes.len() {
            let node = &mut self.nodes[n];
            (node.cut_up, node.cut_down, node.disk_full) = (0, 0, 0);
            node.frozen = node.frozen.min(now + 1);
            node.devices.broken.fill(0);
            if std::mem::take(&mut node.skewed) {
                self.kill_node(n, None, 1_000);
            }
            if !self.nodes[n].up {
                let boots = self.nodes[n].boots;
                self.after(1_000, Due::NodeUp { node: n, boots });
            }
        }
        self.settle.phase = Phase::Draining { until: now + DRAIN + self.settle.hang };
    }

    fn look_at_drains(&mut self, until: Ms) {
        let Some(lead) = self.reached().and_then(|scheduler| self.schedulers[scheduler].lead.as_ref()) else { return };
        let is_drained = |id: &&NodeId| {
            let node = self.nodes.iter().find(|node| node.id == **id);
            lead.farm.leases_on(id) > 0 || node.is_some_and(|node| !node.running.is_empty())
        };
        let busy = self.store.drained.iter().find(is_drained).cloned();
        match busy {
            Some(node) if self.now >= until => {
                self.fail(
                    "I10",
                    format!("node {node} is drained and still busy after {} s", (DRAIN + self.settle.hang) / 1000),
                );
            }
            Some(_) => {}
            None => self.open_up(),
        }
    }

    /// Nobody is paused, drained or limited any more.
    fn open_up(&mut self) {
        let now = self.now;
        self.note(|| "all is resumed and undrained".to_owned());
        let jobs = self.store.live.len() as Ms;
        let slots: usize = self.nodes.iter().map(|node| node.devices.holds.len()).sum();
        let work = self.settle.per_job * jobs / (slots as Ms / 4).max(1);
        self.settle.phase = Phase::Ending { since: now, until: now + REST + self.settle.hang + work, asked: now };
        self.ask_for_all();
    }

    fn ask_for_all(&mut self) {
        let tenants: Vec<TenantId> = self.plan.tenants.clone();
        for tenant in tenants {
            let share = self.store.tenants.get(&tenant).map_or(1.0, |(spec, _)| spec.share);
            self.wish_for(Wish::SetTenant(tenant.clone(), TenantSpec { share, ..TenantSpec::default() }), 0);
            self.wish_for(Wish::Resume(Scope::Tenant(tenant)), 0);
        }
        self.wish_for(Wish::Resume(Scope::Farm), 0);
        let batches: Vec<SubmissionId> =
            self.store.batches.iter().filter(|(_, batch)| batch.paused).map(|(id, _)| *id).collect();
        batches.into_iter().for_each(|batch| self.wish_for(Wish::Resume(Scope::Batch(batch)), 0));
        let row = |job: &JobId| self.store.rows.get(index_of(*job));
        let paused: Vec<JobId> =
            self.store.live.iter().copied().filter(|job| row(job).is_some_and(|row| row.live.paused)).collect();
        paused.into_iter().for_each(|job| self.wish_for(Wish::Resume(Scope::Job(job)), 0));
        // Also of nodes that are in quarantine.
        let nodes: Vec<NodeId> = match self.plan.large {
            false => self.nodes.iter().map(|node| node.id.clone()).collect(),
            true => self.store.drained.iter().cloned().collect(),
        };
        nodes.into_iter().for_each(|node| self.wish_for(Wish::Undrain(node), 0));
    }

    fn look_at_the_rest(&mut self, since: Ms, until: Ms, asked: Ms) {
        let now = self.now;
        if self.store.live.is_empty() && self.clients.open.is_empty() && self.is_idle() {
            self.audit_end();
            self.settle.phase = Phase::Over;
            return;
        }
        if now >= until {
            let left = self.left();
            return self.fail(
                "I6",
                format!("{} jobs are left after {} s: {left}", self.store.live.len(), (now - since) / 1000),
            );
        }
        if now >= since + PATIENCE {
            self.give_up_hopeless();
        }
        if now >= asked + 60_000 {
            self.settle.phase = Phase::Ending { since, until, asked: now };
            self.ask_for_all();
        }
    }

    /// Nobody has a device, by what really is and by what the leader thinks.
    fn is_idle(&self) -> bool {
        let Some(lead) = self.reached().and_then(|scheduler| self.schedulers[scheduler].lead.as_ref()) else {
            return false;
        };
        let (nodes, devices, idle) = lead.farm.sizes();
        let free = self.nodes.iter().all(|node| node.devices.is_idle() && node.reports.is_empty());
        free && nodes as usize == self.nodes.len() && devices == idle
    }

    fn give_up_hopeless(&mut self) {
        let Some(lead) = self.reached().and_then(|scheduler| self.schedulers[scheduler].lead.as_ref()) else { return };
        let hopeless = |job: &JobId| {
            let code = lead.farm.reason(*job).map(|reason| reason.code);
            matches!(code, Some(WaitCode::Model | WaitCode::Labels | WaitCode::Memory))
        };
        // Of a large farm, when all others are through: it takes long to ask for all.
        if self.store.live.len() > FEW {
            return;
        }
        let jobs: Vec<JobId> = self.store.live.iter().copied().filter(hopeless).collect();
        jobs.into_iter().for_each(|job| self.give_up(job));
    }

    /// What does not end, for people.
    fn left(&self) -> String {
        let lead = self.reached().and_then(|scheduler| self.schedulers[scheduler].lead.as_ref());
        let said = |job: &JobId| {
            let state = self.store.row(*job).map(|row: &Row| row.state);
            let reason = lead.and_then(|lead| lead.farm.reason(*job)).map(|reason| reason.words);
            format!("{job} {state:?} {reason:?}")
        };
        let mut left: Vec<String> = self.store.live.iter().take(5).map(said).collect();
        if left.is_empty() {
            let busy = |node: &&super::node::Node| !node.devices.is_idle() || !node.reports.is_empty();
            left.extend(self.nodes.iter().filter(busy).map(|node| format!("{} is busy", node.id)));
            left.extend(lead.map(|lead| format!("the leader counts {:?}", lead.farm.sizes())));
            left.push(format!("{} submissions unanswered", self.clients.open.len()));
        }
        left.join("; ")
    }
}
