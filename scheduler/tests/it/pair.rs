//! Two schedulers on one Postgres queue: one leads, the other stands by and takes over.

use std::process::Command;
use std::time::{Duration, Instant};

use farm_core::api::{ApiError, FarmInfo, JobPage, OpenSubmission};
use farm_core::id::Epoch;
use farm_core::wire::cluster::{BOOT_HEADER, UPGRADE_PATH, UPGRADE_PROTOCOL};
use farm_scheduler::queue::store::LEADER_TTL;
use farm_scheduler::queue::testing::{Postgres, Setup};
use reqwest::{Method, StatusCode};

use crate::support::*;

/// A takeover takes no longer, once the leader is known to be gone.
const TAKES: Duration = Duration::from_secs(2);

struct Pair {
    url: String,
    folder: tempfile::TempDir,
    /// Last, so that it outlives the schedulers' connections.
    _postgres: Postgres,
}

impl Pair {
    fn new() -> Self {
        let postgres = Postgres::start(&Setup::default());
        Self { url: postgres.database(), folder: tempfile::tempdir().unwrap(), _postgres: postgres }
    }

    fn start(&self) -> Process {
        let mut command = Command::new(env!("CARGO_BIN_EXE_farm-scheduler"));
        command.args(["--queue", &self.url, "--listen", "127.0.0.1:0", "--store"]).arg(self.folder.path());
        Process::start(command)
    }
}

async fn info(process: &Process) -> Option<FarmInfo> {
    let response = process.http.request(Method::GET, "/v1/farm").send().await.unwrap();
    if response.status() == StatusCode::OK { Some(response.json().await.unwrap()) } else { None }
}

/// Waits until it leads.
async fn leads(process: &Process) -> Epoch {
    let info = until("a takeover", async || info(process).await).await;
    info.epoch
}

async fn stands_by(process: &Process, method: Method, path: &str) -> ApiError {
    let boot = uuid::Uuid::new_v4().to_string();
    let request = process.http.request(method, path).header("upgrade", UPGRADE_PROTOCOL);
    refused(request.header("connection", "upgrade").header(BOOT_HEADER, boot), StatusCode::SERVICE_UNAVAILABLE).await
}

/// Waits until it names this leader.
async fn follows(process: &Process, leader: &Process) {
    let address = leader.http.address.to_string();
    until("the leader's address", async || {
        let response = process.http.request(Method::GET, "/v1/jobs").send().await.unwrap();
        let error: ApiError = match response.status() {
            StatusCode::SERVICE_UNAVAILABLE => response.json().await.unwrap(),
            _ => return None,
        };
        (error.leader.as_deref() == Some(address.as_str())).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_standby_says_who_leads_and_takes_over_when_that_one_ends() {
    let pair = Pair::new();
    let mut first = pair.start();
    let second = pair.start();
    assert_eq!(leads(&first).await, Epoch(1));
    follows(&second, &first).await;
    for (method, path) in [
        (Method::GET, "/v1/farm"),
        (Method::POST, "/v1/submissions"),
        (Method::POST, UPGRADE_PATH),
        (Method::GET, "/v1/nothing"),
    ] {
        let error = stands_by(&second, method, path).await;
        assert_eq!(error.leader, Some(first.http.address.to_string()));
    }
    first.http.submit(OpenSubmission::default(), r#"{"prompt":"a"}"#).await;

    // It is told to stop, and resigns.
    let told = Instant::now();
    first.send(libc::SIGTERM);
    assert_eq!(leads(&second).await, Epoch(2));
    let resigned = told.elapsed();
    assert_eq!(first.ended(), Some(0));
    let page: JobPage = second.http.get("/v1/jobs").await;
    assert_eq!(page.jobs.len(), 1);

    // It is killed.
    let third = pair.start();
    follows(&third, &second).await;
    let told = Instant::now();
    second.send(libc::SIGKILL);
    assert_eq!(leads(&third).await, Epoch(3));
    let killed = told.elapsed();
    println!("took over {resigned:?} after a SIGTERM, {killed:?} after a SIGKILL");
    assert!(resigned < TAKES && killed < TAKES, "{resigned:?}, {killed:?}");
}

#[tokio::test]
async fn a_frozen_leader_is_deposed_and_stands_by_when_it_wakes() {
    let pair = Pair::new();
    let first = pair.start();
    let second = pair.start();
    leads(&first).await;
    follows(&second, &first).await;
    let told = Instant::now();
    first.send(libc::SIGSTOP);
    assert_eq!(leads(&second).await, Epoch(2));
    let frozen = told.elapsed();
    println!("took over {frozen:?} after a SIGSTOP");
    assert!(frozen < LEADER_TTL + TAKES, "{frozen:?}");
    second.http.submit(OpenSubmission::default(), r#"{"prompt":"a"}"#).await;
    first.send(libc::SIGCONT);
    follows(&first, &second).await;
    assert_eq!(leads(&second).await, Epoch(2));
}
