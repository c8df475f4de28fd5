//! The farm as a whole, and its nodes.

use axum::Json;
use axum::extract::{Path, State};
use farm_core::api::{FarmInfo, NodeList, NodeView, QueueView};
use farm_core::id::NodeId;

use super::{Api, By, Failure};
use crate::core::events::{Scope, Wish};

pub async fn info(State(api): State<Api>) -> Result<Json<FarmInfo>, Failure> {
    let scheduler = api.scheduler()?;
    let jobs = api.queue.counts().await?;
    let info = scheduler
        .ask(move |farm| {
            let (nodes, devices, idle_devices) = farm.sizes();
            FarmInfo {
                version: farm_core::VERSION.to_owned(),
                epoch: farm.epoch(),
                store: farm.store().to_owned(),
                models: farm.models().views(),
                jobs,
                nodes,
                devices,
                idle_devices,
            }
        })
        .await?;
    Ok(Json(info))
}

pub async fn nodes(State(api): State<Api>) -> Result<Json<NodeList>, Failure> {
    let nodes = api.scheduler()?.ask(|farm| farm.nodes()).await?;
    Ok(Json(NodeList { nodes }))
}

pub async fn drain(State(api): State<Api>, Path(node): Path<String>, by: By) -> Result<Json<NodeView>, Failure> {
    let node = NodeId(node);
    // A name that nobody has is a slip of the pen.
    _ = view(&api, node.clone()).await?;
    api.wish(Wish::Drain(node.clone()), by).await?;
    view(&api, node).await
}

/// Also of a node that is not joined: it may have been drained and left.
pub async fn undrain(State(api): State<Api>, Path(node): Path<String>, by: By) -> Result<Json<NodeView>, Failure> {
    let node = NodeId(node);
    api.wish(Wish::Undrain(node.clone()), by).await?;
    view(&api, node).await
}

async fn view(api: &Api, node: NodeId) -> Result<Json<NodeView>, Failure> {
    let name = node.clone();
    let view = api.scheduler()?.ask(move |farm| farm.node_view(&node)).await?;
    view.map(Json).ok_or_else(|| Failure::not_found(format!("no node {name} has joined")))
}

pub async fn queue(State(api): State<Api>) -> Result<Json<QueueView>, Failure> {
    Ok(Json(api.scheduler()?.ask(|farm| farm.queue_view()).await?))
}

pub async fn pause(State(api): State<Api>, by: By) -> Result<Json<QueueView>, Failure> {
    api.wish(Wish::Pause(Scope::Farm), by).await?;
    queue(State(api)).await
}

pub async fn resume(State(api): State<Api>, by: By) -> Result<Json<QueueView>, Failure> {
    api.wish(Wish::Resume(Scope::Farm), by).await?;
    queue(State(api)).await
}
