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
    order(&api, NodeId(node), Wish::Drain, by).await
}

pub async fn undrain(State(api): State<Api>, Path(node): Path<String>, by: By) -> Result<Json<NodeView>, Failure> {
    order(&api, NodeId(node), Wish::Undrain, by).await
}

/// Also of a node that is not there: it may have been drained and left.
async fn order(api: &Api, node: NodeId, wish: fn(NodeId) -> Wish, by: By) -> Result<Json<NodeView>, Failure> {
    let name = node.clone();
    if !api.scheduler()?.ask(move |farm| farm.knows_node(&name)).await? {
        // A slip of the pen.
        let unknown = format!("no node {node} has joined, and none of that name is drained; farmctl nodes lists them");
        return Err(Failure::not_found(unknown));
    }
    api.wish(wish(node.clone()), by).await?;
    Ok(Json(api.scheduler()?.ask(move |farm| farm.node_view(&node)).await?))
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
