//! All that the dashboard shows, at one moment: bodies of the HTTP API, and what is read off them.

use farm_core::api::{FarmInfo, JobPage, NodeList, QueueView, TenantList, WaitCode};
use farm_core::job::state::JobState;
use serde::Serialize;

use crate::client::{Client, JobQuery};
use crate::error::Error;
use crate::output;

/// Jobs of each kind that the dashboard knows; who wants them all asks `farmctl list`.
const JOBS: u32 = 200;

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Snapshot {
    /// Of the scheduler that leads.
    pub leader: String,
    pub farm: FarmInfo,
    pub queue: QueueView,
    pub nodes: NodeList,
    pub tenants: TenantList,
    /// The oldest that run.
    pub running: JobPage,
    /// The oldest that wait.
    pub waiting: JobPage,
}

pub async fn fetch(client: &Client) -> Result<Snapshot, Error> {
    let list = |state| client.jobs(JobQuery { state: Some(state), limit: Some(JOBS), ..JobQuery::default() });
    let farm = client.farm().await?;
    Ok(Snapshot {
        queue: client.queue().await?,
        nodes: client.nodes().await?,
        tenants: client.tenants().await?,
        running: list(JobState::Running).await?,
        waiting: list(JobState::Queued).await?,
        leader: client.address(),
        farm,
    })
}

impl Snapshot {
    /// Who leads, and what there is.
    pub fn headline(&self) -> String {
        let FarmInfo { version, epoch, nodes, devices, idle_devices, .. } = &self.farm;
        format!(
            "farm {version} at {}, epoch {epoch}: {}, {} of {} busy",
            self.leader,
            output::plural(*nodes, "node"),
            devices.saturating_sub(*idle_devices),
            output::plural(*devices, "device"),
        )
    }

    /// Jobs by state, how fast they get done, and when the queue will be empty.
    pub fn work(&self) -> String {
        let mut parts = vec![output::counts(&self.farm.jobs)];
        if parts[0].is_empty() {
            parts[0] = "no jobs".to_owned();
        }
        parts.push(format!("{}/h", output::plural(self.queue.clips_last_hour, "clip")));
        if let Some(seconds) = self.queue.eta_seconds
            && self.queue.queued > 0
        {
            parts.push(format!("queue empty in about {}", output::duration(seconds as f32)));
        }
        if self.queue.paused {
            parts.push("PAUSED".to_owned());
        }
        parts.join(" · ")
    }

    /// Why the queued jobs wait, the most frequent reason first.
    pub fn reasons(&self) -> Vec<(WaitCode, u64)> {
        let mut reasons: Vec<_> =
            self.queue.waiting.iter().filter(|(_, count)| **count > 0).map(|(code, count)| (*code, *count)).collect();
        reasons.sort_by_key(|(code, count)| (std::cmp::Reverse(*count), *code));
        reasons
    }
}

/// A reason to wait in a few words.
pub fn words(code: WaitCode) -> &'static str {
    match code {
        WaitCode::Paused => "paused",
        WaitCode::After => "after other jobs",
        WaitCode::Backoff => "just failed",
        WaitCode::Starting => "scheduler starts",
        WaitCode::Model => "no node has the model",
        WaitCode::Labels => "no node has the labels",
        WaitCode::Memory => "too little memory",
        WaitCode::Nodes => "nodes closed",
        WaitCode::QuotaDevices => "tenant's devices",
        WaitCode::QuotaSeconds => "tenant's device-seconds",
        WaitCode::Gang => "gathering devices",
        WaitCode::Reserved => "devices reserved",
        WaitCode::Share => "others have used less",
        WaitCode::Turn => "not their turn",
        WaitCode::Busy => "devices busy",
        WaitCode::Planning => "next tick",
    }
}
