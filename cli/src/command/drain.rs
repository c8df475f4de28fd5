//! `farmctl drain` and `farmctl undrain`

use std::time::Duration;

use farm_core::api::{JobView, MAX_LIST, NodeView};
use farm_core::id::NodeId;
use farm_core::job::state::JobState;
use tokio::time::sleep;

use crate::args::{Drain, Undrain};
use crate::client::{Client, JobQuery};
use crate::error::{Error, Status};
use crate::follow::persist;
use crate::output::{self, clean, plural};

const POLL: Duration = Duration::from_millis(500);

pub async fn drain(client: &Client, args: Drain) -> Result<Status, Error> {
    let json = args.output.json;
    let node = NodeId(args.node);
    let view = client.drain(&node, true).await?;
    if !args.wait {
        return shown(&view, json);
    }
    let emptied = tokio::select! {
        emptied = until_empty(client, &node) => Some(emptied?),
        _ = tokio::signal::ctrl_c() => None,
    };
    match emptied {
        // It may have left meanwhile: then what it was is all there is to show.
        Some(last) => shown(last.as_ref().unwrap_or(&view), json),
        None => {
            eprintln!("stopped waiting; the node stays drained until `farmctl undrain {}`", clean(&node.0));
            Ok(Status::Interrupted)
        }
    }
}

pub async fn undrain(client: &Client, args: Undrain) -> Result<Status, Error> {
    shown(&client.drain(&NodeId(args.node), false).await?, args.output.json)
}

fn shown(node: &NodeView, json: bool) -> Result<Status, Error> {
    if json {
        output::json(node)?;
    } else {
        output::line(&format!("{}: {}", clean(&node.node.0), clean(node.closed.as_deref().unwrap_or("takes work"))))?;
    }
    Ok(Status::Ok)
}

/// Waits until nothing runs on the node: no device is taken, and no attempt still uploads, which needs no device.
async fn until_empty(client: &Client, node: &NodeId) -> Result<Option<NodeView>, Error> {
    let client = &client.impatient();
    let note = |text: &str| eprintln!("{text}");
    let mut said = None;
    loop {
        let view =
            persist(note, async || client.nodes().await).await?.nodes.into_iter().find(|view| view.node == *node);
        let running = persist(note, async || running_on(client, node).await).await?;
        let devices = view.as_ref().map_or(0, taken);
        if devices == 0 && running == 0 {
            return Ok(view);
        }
        if said.replace((running, devices)) != Some((running, devices)) {
            eprintln!("waiting   {}, {} taken", plural(running, "attempt"), plural(devices, "device"));
        }
        sleep(POLL).await;
    }
}

fn taken(node: &NodeView) -> u64 {
    node.devices.iter().filter(|device| device.job.is_some()).count() as u64
}

async fn running_on(client: &Client, node: &NodeId) -> Result<u64, Error> {
    let here = |job: &JobView| job.node.as_ref() == Some(node);
    let mut query = JobQuery { state: Some(JobState::Running), limit: Some(MAX_LIST), ..JobQuery::default() };
    let mut count = 0;
    loop {
        let page = client.jobs(query).await?;
        count += page.jobs.iter().filter(|job| here(job)).count() as u64;
        match page.next {
            Some(next) => query.after = Some(next),
            None => return Ok(count),
        }
    }
}
