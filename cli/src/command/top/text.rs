//! A snapshot as text, for pipes.

use super::snapshot::{Snapshot, words};
use crate::output::{self, clean, name};

pub fn lines(snapshot: &Snapshot) -> Vec<String> {
    let mut lines = vec![clean(&snapshot.headline()).into_owned(), clean(&snapshot.work()).into_owned()];
    let mut section = |table: String| lines.extend([String::new(), table]);
    let devices = snapshot.nodes.nodes.iter().flat_map(|node| {
        node.devices.iter().map(|device| {
            let progress = device.progress.as_ref().map(output::progress).unwrap_or_default();
            let state = match (node.alive, &node.closed) {
                (false, _) => format!("silent {}", output::duration(node.last_heartbeat_seconds)),
                (true, closed) => closed.clone().unwrap_or_default(),
            };
            [node.node.to_string(), device.name.clone(), output::device_job(device), progress, state]
        })
    });
    section(output::table(["node", "device", "job", "progress", "state"], devices));
    let reasons = snapshot.reasons();
    if !reasons.is_empty() {
        let reasons = reasons.into_iter().map(|(code, count)| [words(code).to_owned(), count.to_string()]);
        section(output::table(["waiting", "jobs"], reasons));
    }
    if !snapshot.running.jobs.is_empty() {
        let running = snapshot.running.jobs.iter().map(|job| {
            let node = job.node.as_ref().map(ToString::to_string).unwrap_or_default();
            [name(job), job.tenant.to_string(), node, job.progress.as_ref().map(output::progress).unwrap_or_default()]
        });
        section(output::table(["running", "tenant", "node", "progress"], running));
    }
    let tenants = snapshot.tenants.tenants.iter().map(|view| {
        [
            view.tenant.to_string(),
            view.spec.share.to_string(),
            format!("{:.0}", view.usage),
            view.devices.to_string(),
            view.queued.to_string(),
            view.running.to_string(),
            format!("{:.0}", view.day),
        ]
    });
    section(output::table(
        ["tenant", "share", "usage", "devices", "queued", "running", "device-seconds in 24 h"],
        tenants,
    ));
    lines
}
