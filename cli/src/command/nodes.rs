//! `farmctl nodes`

use farm_core::api::NodeView;

use crate::args::Output;
use crate::client::Client;
use crate::error::{Error, Status};
use crate::output;

pub async fn run(client: &Client, args: Output) -> Result<Status, Error> {
    let list = client.nodes().await?;
    if args.json {
        output::json(&list)?;
        return Ok(Status::Ok);
    }
    let header = ["node", "roles", "device", "job", "progress", "models", "labels", "heartbeat", "closed"];
    output::line(&output::table(header, list.nodes.iter().flat_map(rows)))?;
    Ok(Status::Ok)
}

/// A row for each device, so that a machine of eight can be read.
fn rows(node: &NodeView) -> Vec<[String; 9]> {
    let models: Vec<_> = node.models.iter().map(|model| model.name.as_str()).collect();
    let labels: Vec<_> = node.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    let heartbeat = match node.alive {
        true => format!("{:.1} s ago", node.last_heartbeat_seconds),
        false => format!("silent for {}", output::duration(node.last_heartbeat_seconds)),
    };
    let row = |device: String, job: String, progress: String| {
        [
            node.node.to_string(),
            node.roles.join(" "),
            device,
            job,
            progress,
            models.join(" "),
            labels.join(" "),
            heartbeat.clone(),
            node.closed.clone().unwrap_or_default(),
        ]
    };
    if node.devices.is_empty() {
        return vec![row("none".into(), String::new(), String::new())];
    }
    node.devices
        .iter()
        .map(|device| {
            row(
                device.name.clone(),
                output::device_job(device),
                device.progress.as_ref().map(output::progress).unwrap_or_default(),
            )
        })
        .collect()
}
