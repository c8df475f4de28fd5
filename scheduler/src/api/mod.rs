//! The public HTTP API: routes and bodies as `farm_core::api` lists them.

mod after;
mod auth;
mod batches;
mod body;
mod draft;
mod failure;
mod farm;
mod jobs;
mod ledger;
mod session;
mod submissions;
mod tenants;

use std::sync::Arc;

use axum::Router;
use axum::extract::{FromRequestParts, Request, State};
use axum::http::StatusCode;
use axum::http::request::Parts;
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use farm_core::store::artifact::ArtifactStore;
use farm_core::wire::cluster::UPGRADE_PATH;
use tokio::sync::{Semaphore, watch};

pub use self::auth::Secret;
use self::failure::Failure;
use crate::actor::Scheduler;
use crate::config::Prices;
use crate::core::events::Wish;
use crate::gc::Gc;
use crate::lead::Standing;
use crate::link::NodeLink;
use crate::queue::store::QueueStore;

/// What the handlers need. Cloning shares it.
#[derive(Clone)]
pub struct Api {
    standing: watch::Receiver<Standing>,
    queue: Arc<dyn QueueStore>,
    artifacts: ArtifactStore,
    link: Arc<dyn NodeLink>,
    /// Wanted from everybody, if there is one.
    secret: Option<Secret>,
    gc: Gc,
    prices: Arc<Prices>,
    /// Parsed files are big, so one commit at a time.
    commits: Arc<Semaphore>,
}

impl Api {
    pub fn new(
        standing: watch::Receiver<Standing>,
        queue: Arc<dyn QueueStore>,
        artifacts: ArtifactStore,
        link: Arc<dyn NodeLink>,
        secret: Option<Secret>,
        gc: Gc,
        prices: Prices,
    ) -> Self {
        let (prices, commits) = (Arc::new(prices), Arc::new(Semaphore::new(1)));
        Self { standing, queue, artifacts, link, secret, gc, prices, commits }
    }

    /// The farm, if it is this process that leads it.
    fn scheduler(&self) -> Result<Scheduler, Failure> {
        match &*self.standing.borrow() {
            Standing::Leads(scheduler) => Ok(scheduler.clone()),
            Standing::StandsBy(leader) => Err(Failure::stands_by(leader.clone())),
        }
    }

    async fn wish(&self, wish: Wish, by: By) -> Result<(), Failure> {
        Ok(self.scheduler()?.wish(wish, by.0).await??)
    }
}

/// Who asks, as they call themselves.
struct By(String);

impl By {
    const HEADER: &str = "x-farm-user";
    const MAX_BYTES: usize = 64;
    const NOBODY: &str = "anonymous";
}

impl<S: Sync> FromRequestParts<S> for By {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Failure> {
        let Some(value) = parts.headers.get(Self::HEADER) else { return Ok(Self(Self::NOBODY.to_owned())) };
        let name = value.to_str().ok().map(str::trim).filter(|name| (1..=Self::MAX_BYTES).contains(&name.len()));
        let name = name.ok_or_else(|| {
            Failure::bad_request(format!("{} is not 1..={} printable characters", Self::HEADER, Self::MAX_BYTES))
        })?;
        Ok(Self(name.to_owned()))
    }
}

pub fn router(api: Api) -> Router {
    Router::new()
        .route("/v1/farm", get(farm::info))
        .route("/v1/nodes", get(farm::nodes))
        .route("/v1/nodes/{node}/drain", post(farm::drain))
        .route("/v1/nodes/{node}/undrain", post(farm::undrain))
        .route("/v1/queue", get(farm::queue))
        .route("/v1/queue/pause", post(farm::pause))
        .route("/v1/queue/resume", post(farm::resume))
        .route("/v1/submissions", get(batches::list).post(submissions::open))
        .route("/v1/submissions/{id}", get(batches::show))
        .route("/v1/submissions/{id}/pages/{page}", put(submissions::put_page))
        .route("/v1/submissions/{id}/commit", post(submissions::commit))
        .route("/v1/submissions/{id}/cancel", post(batches::cancel))
        .route("/v1/submissions/{id}/pause", post(batches::pause))
        .route("/v1/submissions/{id}/resume", post(batches::resume))
        .route("/v1/jobs", get(jobs::list))
        .route("/v1/jobs/{job}", get(jobs::show))
        .route("/v1/jobs/{job}/log", get(jobs::log))
        .route("/v1/jobs/{job}/why", get(jobs::why))
        .route("/v1/jobs/{job}/cancel", post(jobs::cancel))
        .route("/v1/jobs/{job}/retry", post(jobs::retry))
        .route("/v1/jobs/{job}/pause", post(jobs::pause))
        .route("/v1/jobs/{job}/resume", post(jobs::resume))
        .route("/v1/jobs/{job}/clip", get(jobs::clip))
        .route("/v1/tenants", get(tenants::list))
        .route("/v1/tenants/{tenant}", put(tenants::set))
        .route("/v1/tenants/{tenant}/pause", post(tenants::pause))
        .route("/v1/tenants/{tenant}/resume", post(tenants::resume))
        .route("/v1/usage", get(ledger::usage))
        .route("/v1/audit", get(ledger::audit))
        .route("/v1/gc", post(ledger::gc))
        .route(UPGRADE_PATH, post(session::join))
        .fallback(async || Failure::new(StatusCode::NOT_FOUND, "no such path; the API is below /v1"))
        .method_not_allowed_fallback(async || {
            Failure::new(StatusCode::METHOD_NOT_ALLOWED, "this path takes another method")
        })
        .layer(from_fn_with_state(api.clone(), leads))
        // Outermost: nothing is said to a stranger, not even which paths exist.
        .layer(from_fn_with_state(api.clone(), auth::check))
        .with_state(api)
}

/// One that stands by answers nothing, but says who leads.
async fn leads(State(api): State<Api>, request: Request, next: Next) -> Response {
    match api.scheduler() {
        Ok(_) => next.run(request).await,
        Err(failure) => failure.into_response(),
    }
}
