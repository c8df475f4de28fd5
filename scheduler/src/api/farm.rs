//! The farm as a whole.

use axum::Json;
use axum::extract::State;
use farm_core::api::{FarmInfo, NodeList};

use super::{Api, Failure};

pub async fn info(State(api): State<Api>) -> Result<Json<FarmInfo>, Failure> {
    let jobs = api.queue.counts().await?;
    let info = api
        .scheduler
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
    let nodes = api.scheduler.ask(|farm| farm.nodes()).await?;
    Ok(Json(NodeList { nodes }))
}
