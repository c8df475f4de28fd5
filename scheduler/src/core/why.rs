//! Why queued jobs wait, in words, and what would change it. Every queued job has exactly one reason out of a closed list,
//! so the reasons of a queue add up to its length.
//!
//! Jobs of one tenant and one class that wait for devices have most reasons in common, so the reasons of a million jobs
//! are found by looking at a few.

use std::collections::BTreeMap;

use farm_core::api::{QueueView, WaitCode, WhyView};
use farm_core::id::{JobId, NodeId};
use farm_core::job::state::JobState;

use super::class::{Class, ClassIx};
use super::events::{Ask, Dependency};
use super::farm::{Farm, Job, Node, Phase};
use super::fit::Fit;
use super::plan::{Head, has_labels, head};
use super::planted::{Bug, planted};
use super::tenant::{Tenant, TenantIx};

/// Names that a reason lists.
const NAMED: usize = 4;

/// Why a job waits.
#[derive(Clone, Debug, PartialEq)]
pub struct Reason {
    pub code: WaitCode,
    pub words: String,
    /// What would change it.
    pub change: String,
}

fn because(code: WaitCode, words: impl Into<String>, change: impl Into<String>) -> Reason {
    Reason { code, words: words.into(), change: change.into() }
}

impl Farm {
    /// Why a queued job does not run; `None` if it runs or is not held here.
    pub fn reason(&self, id: JobId) -> Option<Reason> {
        let job = self.jobs.get(&id)?;
        match &job.phase {
            Phase::Running(_) => None,
            Phase::Picked(pick) => {
                Some(because(WaitCode::Planning, format!("starts now on node {}", pick.node), "nothing has to"))
            }
            Phase::Delayed { until, cause } => {
                let seconds = until.since(self.now).as_secs_f64().ceil() as u64;
                let words = format!("tries again in {seconds} s after a failure: {cause}");
                Some(because(WaitCode::Backoff, words, "it is tried again by itself"))
            }
            Phase::Held => Some(self.why_held(id, job)),
            Phase::Waiting => Some(self.why_waiting(id, job)),
        }
    }

    /// As [`Self::reason`], for a line of a table.
    pub fn wait_reason(&self, id: JobId) -> Option<String> {
        self.reason(id).map(|reason| reason.words)
    }

    /// All about a job's waiting and ending.
    pub fn why(&self, id: JobId) -> Option<WhyView> {
        let job = self.jobs.get(&id)?;
        if let Phase::Running(lease) = &job.phase {
            let left = self.expected_end(id).map(|end| end.since(self.now).as_secs_f64());
            let reason = format!("runs on node {} as attempt {}", lease.node, lease.key.attempt);
            let change =
                lease.yielding.as_ref().map(|yielding| format!("is about to be handed back: {}", yielding.reason));
            return Some(WhyView {
                job: id,
                state: JobState::Running,
                code: None,
                reason,
                change,
                starts_in_seconds: None,
                eta_seconds: left,
            });
        }
        let Reason { code, words, change } = self.reason(id)?;
        let forecast = self.forecast(id, job);
        Some(WhyView {
            job: id,
            state: JobState::Queued,
            code: Some(code),
            reason: words,
            change: Some(change),
            starts_in_seconds: forecast.map(|(start, _)| start),
            eta_seconds: forecast.map(|(start, run)| start + run),
        })
    }

    /// The queue at a glance.
    pub fn queue_view(&self) -> QueueView {
        let running = self.tenants.iter().map(|tenant| tenant.running).sum::<u64>() - self.picked.len() as u64;
        let queued = self.jobs.len() as u64 - running;
        let mut waiting: BTreeMap<WaitCode, u64> = BTreeMap::new();
        let mut count = |code: WaitCode, jobs: u64| {
            if jobs > 0 {
                *waiting.entry(code).or_default() += jobs;
            }
        };
        count(WaitCode::Planning, self.picked.len() as u64);
        count(WaitCode::Backoff, if planted(Bug::ReasonMissing) { 0 } else { self.delayed.len() as u64 });
        let in_line: u64 =
            self.tenants.iter().flat_map(|tenant| tenant.waiting.values()).map(|jobs| jobs.len() as u64).sum();
        let held = queued - self.picked.len() as u64 - self.delayed.len() as u64 - in_line;
        let after = self.dependencies.jobs() as u64;
        count(WaitCode::After, after);
        count(WaitCode::Paused, held - after);
        for (i, tenant) in self.tenants.iter().enumerate() {
            let ix = TenantIx(i as u32);
            let mut open = 0;
            for (class, jobs) in &tenant.waiting {
                match self.why_class(tenant, *class, &self.fit(*class)) {
                    Some(reason) => count(reason.code, jobs.len() as u64),
                    None => open += jobs.len() as u64,
                }
            }
            if open == 0 {
                continue;
            }
            let kept = |job: &JobId| {
                let of_tenant =
                    self.jobs.get(job).filter(|job| job.tenant == ix && matches!(job.phase, Phase::Waiting));
                of_tenant.is_some_and(|job| self.why_class(tenant, job.class, &self.fit(job.class)).is_none())
            };
            let kept: Vec<JobId> = self.reservations.iter().map(|(job, _)| job).filter(kept).collect();
            count(WaitCode::Gang, kept.len() as u64);
            open -= kept.len() as u64;
            if let Some(first) = self.first_of(tenant)
                && !kept.contains(&first.place.3)
            {
                count(self.why_first(tenant, first.class, &self.fit(first.class)).code, 1);
                open -= 1;
            }
            count(WaitCode::Turn, open);
        }
        let clips = self.finished.iter().map(|(_, clips)| clips).sum();
        let eta_seconds = self.queue_eta();
        QueueView { queued, running, waiting, paused: self.paused, eta_seconds, clips_last_hour: clips }
    }

    /// Why jobs that name this model cannot start at all, if they cannot.
    pub fn cannot_start(&self, named: Option<&str>) -> Option<String> {
        self.why_model(named).map(|reason| reason.words)
    }

    fn why_held(&self, id: JobId, job: &Job) -> Reason {
        let after = self.dependencies.of(id);
        if !after.is_empty() {
            let name = |dependency: &Dependency| match dependency {
                Dependency::Job(job) => format!("job {}", job.short()),
                Dependency::Batch(batch) => format!("batch {batch}"),
            };
            let words = format!("comes after {}, not done yet", listed(after.iter().map(name)));
            return because(WaitCode::After, words, "it starts when that is done, and fails if that fails");
        }
        if job.paused {
            return because(WaitCode::Paused, "it is paused", "farmctl resume it");
        }
        let paused = |batch: &&farm_core::id::SubmissionId| self.batches.get(*batch).is_some_and(|batch| batch.paused);
        match job.batches.iter().find(paused) {
            Some(batch) => because(WaitCode::Paused, format!("batch {batch} is paused"), "farmctl resume the batch"),
            None => because(WaitCode::Planning, "will be looked at in the next tick", "nothing has to"),
        }
    }

    fn why_waiting(&self, id: JobId, job: &Job) -> Reason {
        let tenant = &self.tenants[job.tenant.0 as usize];
        let fit = self.fit(job.class);
        if let Some(reason) = self.why_class(tenant, job.class, &fit) {
            return reason;
        }
        if let Some(kept) = self.reservations.get(id) {
            let words = match kept.devices {
                1 => format!("device of node {} is kept for it as soon as it is free", kept.node),
                n => format!("needs {n} devices of one node at once; those of node {} are kept for it", kept.node),
            };
            return because(WaitCode::Gang, words, "clips that run there end");
        }
        match self.first_of(tenant) {
            Some(first) if first.place.3 == id => self.why_first(tenant, job.class, &fit),
            _ => because(
                WaitCode::Turn,
                format!("devices are busy, and other jobs of tenant {} go first", tenant.id),
                "its turn comes; a higher priority brings it forward",
            ),
        }
    }

    /// What keeps every job of the class and tenant from starting, whatever their order.
    fn why_class(&self, tenant: &Tenant, ix: ClassIx, fit: &Fit) -> Option<Reason> {
        if self.paused {
            return Some(because(WaitCode::Paused, "the farm is paused", "farmctl resume --all"));
        }
        if tenant.paused {
            let words = format!("tenant {} is paused", tenant.id);
            return Some(because(WaitCode::Paused, words, format!("farmctl resume --tenant {}", tenant.id)));
        }
        if self.is_in_window() {
            let left = self.window_ends.since(self.now).as_secs_f64().ceil();
            let words = format!("the scheduler has just begun and waits at most {left} s for its nodes to come back");
            return Some(because(WaitCode::Starting, words, "the nodes register, or the wait ends"));
        }
        let class = self.classes.get(ix);
        let Some(model) = &fit.model else { return self.why_model(None) };
        if let Some(reason) = self.why_model(Some(model)) {
            return Some(reason);
        }
        if fit.choices.is_empty() {
            let words = format!("no node with model {model} has enough memory for it on all its devices together");
            return Some(because(
                WaitCode::Memory,
                words,
                "a node with more devices or more memory, or a smaller clip",
            ));
        }
        self.why_nodes(class, fit, model).or_else(|| self.why_quota(tenant, fit))
    }

    fn why_nodes(&self, class: &Class, fit: &Fit, model: &str) -> Option<Reason> {
        let groups = || fit.choices.iter().flat_map(|choice| self.stock.group(choice.group).nodes.iter());
        let nodes = || groups().filter_map(|id| Some((id, self.nodes.get(id)?)));
        let labelled = |node: &Node| has_labels(Some(node), class);
        if nodes().any(|(id, node)| labelled(node) && self.is_open(id, node)) {
            return None;
        }
        let fitting: Vec<(&NodeId, &Node)> = nodes().filter(|(_, node)| labelled(node)).take(NAMED + 1).collect();
        if fitting.is_empty() {
            let labels = listed(class.require.iter().map(|(name, value)| format!("{name}={value}")));
            let words = format!("no node with model {model} has {labels}");
            return Some(because(WaitCode::Labels, words, format!("farm-node join with --label {labels}")));
        }
        let away = fitting.into_iter().map(|(id, node)| {
            let why = self.closed(id, node).unwrap_or_else(|| "silent".to_owned());
            format!("{id} is {why}")
        });
        let words = format!("no node that could take it takes new work: {}", listed(away));
        Some(because(WaitCode::Nodes, words, "one of them comes back, or is undrained, or another joins"))
    }

    fn why_quota(&self, tenant: &Tenant, fit: &Fit) -> Option<Reason> {
        let (id, quota) = (&tenant.id, tenant.quota());
        if let Some(most) = quota.devices.filter(|_| !tenant.may_have(1)) {
            let words = format!("tenant {id} has {} of the {most} devices that its quota allows", tenant.devices);
            let change = format!("a clip of the tenant ends, or farmctl quota {id} --devices N");
            return Some(because(WaitCode::QuotaDevices, words, change));
        }
        let most = quota.device_seconds.filter(|_| !tenant.may_use(fit.work, self.hour()))?;
        let used = tenant.usage.day_seconds(self.hour());
        let words = format!(
            "tenant {id} may use {most} device-seconds in 24 hours: {used:.0} are used, running clips and this one go beyond"
        );
        let change = format!("hours pass, or farmctl quota {id} --device-seconds N");
        Some(because(WaitCode::QuotaSeconds, words, change))
    }

    /// Why jobs that name this model, or none, cannot start anywhere.
    fn why_model(&self, named: Option<&str>) -> Option<Reason> {
        let rendered: Vec<&str> =
            self.models.iter().filter(|(_, known)| known.renderers > 0).map(|(name, _)| name.as_ref()).collect();
        let names = || listed(rendered.iter().map(|name| name.to_string()));
        let (words, change) = match named {
            Some(name) if rendered.contains(&name) => return None,
            Some(name) => {
                let names = if rendered.is_empty() { "none".to_owned() } else { names() };
                let words = format!("no node has registered model {name} (registered: {names})");
                (words, format!("farm-node join with --model {name}=DIR"))
            }
            None => match rendered.len() {
                0 => {
                    ("no node has registered a model yet".to_owned(), "farm-node join with --model NAME=DIR".to_owned())
                }
                1 => return None,
                _ => {
                    let words = format!("several models are registered ({}) and the job names none", names());
                    (words, "cancel it and submit it with a model".to_owned())
                }
            },
        };
        Some(because(WaitCode::Model, words, change))
    }

    /// Why the first job of a tenant, with nothing else in its way, has no devices.
    fn why_first(&self, tenant: &Tenant, ix: ClassIx, fit: &Fit) -> Reason {
        let class = self.classes.get(ix);
        let nodes = || {
            let ids = fit.choices.iter().flat_map(|choice| self.stock.group(choice.group).nodes.iter());
            ids.filter_map(|id| Some((id, self.nodes.get(id)?))).filter(|(_, node)| has_labels(Some(node), class))
        };
        if fit.choices.iter().any(|choice| self.stock.group(choice.group).most_free() > 0) {
            return because(WaitCode::Planning, "will be looked at in the next tick", "nothing has to");
        }
        let is_free = |(id, node): &(&NodeId, &Node)| self.is_open(id, node) && node.free_devices().next().is_some();
        if let Some(holder) = nodes().filter(is_free).find_map(|(id, _)| self.reservations.holder(id)) {
            let words = format!("free devices are kept for job {}, and this one would not end in time", holder.short());
            return because(WaitCode::Reserved, words, "that job starts");
        }
        let before = |other: &&Tenant| !other.paused && !other.waiting.is_empty() && other.key() < tenant.key();
        let others = self.tenants.iter().filter(before).count();
        if others > 0 {
            let who = if others == 1 { "1 tenant has".to_owned() } else { format!("{others} tenants have") };
            let words = format!("devices are busy, and {who} used less of the farm for its share");
            return because(WaitCode::Share, words, "others have used as much, or more devices join");
        }
        let (mut devices, mut silent) = (0, 0);
        for (_, node) in nodes() {
            devices += node.devices.len();
            silent += if self.is_alive(node) { 0 } else { node.devices.len() };
        }
        let model = fit.model.as_deref().unwrap_or_default();
        let words = match silent {
            0 => format!("all {devices} devices with model {model} are busy"),
            _ => format!("all {devices} devices with model {model} are busy or silent ({silent} silent)"),
        };
        because(WaitCode::Busy, words, "a clip ends, or more devices join")
    }

    /// The job that the tenant's next devices go to.
    pub(super) fn first_of(&self, tenant: &Tenant) -> Option<Head> {
        let heads = tenant.waiting.iter().filter_map(|(class, jobs)| {
            let fit = self.fit(*class);
            let open = self.why_class(tenant, *class, &fit).is_none();
            open.then(|| jobs.first().map(|place| head(*place, *class, fit.work))).flatten()
        });
        heads.max()
    }

    /// Why such a job of the tenant could never start, whatever ends and whoever joins of what is known here.
    pub fn never(
        &self,
        tenant: &farm_core::id::TenantId,
        ask: Ask,
        model: Option<&str>,
        require: &BTreeMap<String, String>,
    ) -> Option<String> {
        let quota = self.tenants[self.tenant_ix.get(tenant)?.0 as usize].quota();
        if let Some(0) = quota.devices {
            return Some(format!("the quota of tenant {tenant} allows no device"));
        }
        let class = Class { model: model.map(|name| self.intern(name)), ask, require: require.clone().into() };
        let fit = self.fit_of(&class);
        let sizes = fit.choices.iter().filter_map(|choice| {
            let sizes = 1..=self.stock.group(choice.group).spec.devices;
            sizes.into_iter().find(|size| !choice.sizes.rated || choice.seconds_on(*size).is_some())
        });
        if let (Some(least), Some(most)) = (sizes.min(), quota.devices)
            && least > most as usize
        {
            return Some(format!("it needs {least} devices at once, and the quota of tenant {tenant} allows {most}"));
        }
        let most = quota.device_seconds.filter(|most| fit.work > *most as f64)?;
        Some(format!(
            "it takes about {:.0} device-seconds, and the quota of tenant {tenant} allows {most} in 24 hours",
            fit.work
        ))
    }
}

/// `a, b, c, d and more`
fn listed(names: impl Iterator<Item = String>) -> String {
    let mut names: Vec<String> = names.take(NAMED + 1).collect();
    let more = names.len() > NAMED;
    names.truncate(NAMED);
    format!("{}{}", names.join(", "), if more { " and more" } else { "" })
}
