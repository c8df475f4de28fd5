//! The public HTTP API: routes and bodies as `farm_core::api` lists them.

mod auth;
mod body;
mod failure;
mod farm;
mod jobs;
mod session;
mod submissions;

use std::sync::Arc;

use axum::Router;
use axum::http::StatusCode;
use axum::middleware::from_fn_with_state;
use axum::routing::{get, post, put};
use farm_core::store::artifact::ArtifactStore;
use farm_core::wire::cluster::UPGRADE_PATH;
use tokio::sync::Semaphore;

pub use self::auth::Secret;
use self::failure::Failure;
use crate::actor::Scheduler;
use crate::link::NodeLink;
use crate::queue::store::QueueStore;

/// What the handlers need. Cloning shares it.
#[derive(Clone)]
pub struct Api {
    pub scheduler: Scheduler,
    pub queue: Arc<dyn QueueStore>,
    pub artifacts: ArtifactStore,
    pub link: Arc<dyn NodeLink>,
    /// Wanted from everybody, if there is one.
    pub secret: Option<Secret>,
    /// Parsed files are big, so one commit at a time.
    commits: Arc<Semaphore>,
}

impl Api {
    pub fn new(
        scheduler: Scheduler,
        queue: Arc<dyn QueueStore>,
        artifacts: ArtifactStore,
        link: Arc<dyn NodeLink>,
        secret: Option<Secret>,
    ) -> Self {
        Self { scheduler, queue, artifacts, link, secret, commits: Arc::new(Semaphore::new(1)) }
    }
}

pub fn router(api: Api) -> Router {
    Router::new()
        .route("/v1/farm", get(farm::info))
        .route("/v1/nodes", get(farm::nodes))
        .route("/v1/submissions", post(submissions::open))
        .route("/v1/submissions/{id}", get(submissions::status))
        .route("/v1/submissions/{id}/pages/{page}", put(submissions::put_page))
        .route("/v1/submissions/{id}/commit", post(submissions::commit))
        .route("/v1/jobs", get(jobs::list))
        .route("/v1/jobs/{job}", get(jobs::show))
        .route("/v1/jobs/{job}/log", get(jobs::log))
        .route("/v1/jobs/{job}/cancel", post(jobs::cancel))
        .route("/v1/jobs/{job}/retry", post(jobs::retry))
        .route("/v1/jobs/{job}/clip", get(jobs::clip))
        .route(UPGRADE_PATH, post(session::join))
        .fallback(async || Failure::new(StatusCode::NOT_FOUND, "no such path; the API is below /v1"))
        .method_not_allowed_fallback(async || {
            Failure::new(StatusCode::METHOD_NOT_ALLOWED, "this path takes another method")
        })
        // Outermost: nothing is said to a stranger, not even which paths exist.
        .layer(from_fn_with_state(api.clone(), auth::check))
        .with_state(api)
}
