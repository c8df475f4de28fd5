//! Every route, and what bad calls are told.

use farm_core::VERSION;
use farm_core::api::{BatchView, FarmInfo, JobDetail, JobPage, JobView, LogPage, NodeList, OpenSubmission};
use farm_core::job::state::{FailureKind, JobState, Progress, Stage};
use farm_core::wire::PROTOCOL;
use farm_core::wire::cluster::{PROTOCOL_HEADER, VERSION_HEADER};
use farm_core::wire::to_node::ToNode;
use farm_core::wire::to_scheduler::{AttemptOutcome, RunningAttempt, ToScheduler};
use reqwest::{Method, StatusCode};

use crate::support::*;

fn options() -> OpenSubmission {
    OpenSubmission::default()
}

async fn only_job(http: &Http) -> JobView {
    let page: JobPage = http.get("/v1/jobs").await;
    assert_eq!(page.jobs.len(), 1);
    page.jobs.into_iter().next().unwrap()
}

#[tokio::test]
async fn a_job_can_be_followed_from_submission_to_clip() {
    let rig = Rig::start().await;
    let http = &rig.http;
    let reply = http.submit(options(), r#"{"prompt":"a red ball","id":"ball","num_inference_steps":3}"#).await;
    assert_eq!((reply.new, reply.waiting.as_deref()), (1, Some("no node has registered a model yet")));
    let job = only_job(http).await;
    assert_eq!((job.state, job.reason.as_deref()), (JobState::Queued, Some("no node has registered a model yet")));

    let node = rig.node("a", 2, &["tiny"]).await;
    let start = node.hear_start().await;
    assert_eq!(start.key.job, job.job);
    let progress = Progress { stage: Stage::Denoise, done: 1, total: 3, eta_seconds: Some(1.5) };
    node.beat(vec![RunningAttempt { key: start.key, progress, devices: start.devices.clone() }]).await;
    let job: JobDetail = http.get(&format!("/v1/jobs/{}", job.job)).await;
    assert_eq!(
        (job.view.state, job.view.progress, job.view.node),
        (JobState::Running, Some(progress), Some(node.node.clone()))
    );
    assert_eq!((job.view.model.as_deref(), job.attempts[0].outcome.as_str()), (Some("tiny"), "running"));
    let nodes: NodeList = http.get("/v1/nodes").await;
    assert_eq!((nodes.nodes[0].devices[0].job, nodes.nodes[0].devices[1].job), (Some(job.view.job), None));
    assert!(nodes.nodes[0].alive);
    let info: FarmInfo = http.get("/v1/farm").await;
    assert_eq!((info.nodes, info.devices, info.idle_devices), (1, 2, 1));
    assert_eq!((info.models[0].hash.as_str(), info.store.as_str()), ("hash-of-tiny", rig.artifacts.url()));
    assert_eq!(info.jobs[&JobState::Running], 1);

    node.say(ToScheduler::Log { key: start.key, line: "hello".to_owned() }).await;
    let clip = b"not really an mp4".repeat(10_000);
    node.complete(&start, &clip).await;
    let short = job.view.job.short();
    let done: JobDetail = http.get(&format!("/v1/jobs/{short}")).await;
    assert_eq!((done.view.state, done.view.warnings), (JobState::Done, vec!["cut".to_owned()]));
    assert!(done.view.clip.unwrap().ends_with(&done.result.unwrap().clip));
    let log: LogPage = http.get(&format!("/v1/jobs/{short}/log")).await;
    let lines: Vec<&str> = log.lines.iter().map(|line| line.line.as_str()).collect();
    assert_eq!(lines, ["started on node a, device 0", "hello", "warning: cut", "done"]);
    let rest: LogPage = http.get(&format!("/v1/jobs/{short}/log?after={}", log.next)).await;
    assert!(rest.lines.is_empty());
    let fetched = http.request(Method::GET, &format!("/v1/jobs/{short}/clip")).send().await.unwrap();
    assert_eq!(fetched.headers()["content-type"], "video/mp4");
    assert_eq!(fetched.headers()["content-length"], clip.len().to_string().as_str());
    assert_eq!(fetched.headers()["x-content-sha256"], "ab".repeat(32).as_str());
    assert_eq!(fetched.bytes().await.unwrap(), clip);
    let batch: BatchView = http.get(&format!("/v1/submissions/{}", reply.submission)).await;
    assert_eq!((batch.jobs[&JobState::Done], batch.summary.as_str()), (1, "1 of 1 done"));
}

#[tokio::test]
async fn cancel_and_retry_follow_the_jobs_state() {
    let rig = Rig::start().await;
    let http = &rig.http;
    let node = rig.node("a", 1, &["tiny"]).await;
    http.submit(options(), r#"{"prompt":"a"}"#).await;
    let start = node.hear_start().await;
    let path = format!("/v1/jobs/{}", start.key.job);
    let post = |action: &str| http.request(Method::POST, &format!("{path}/{action}"));
    let error = refused(post("retry"), StatusCode::CONFLICT).await;
    assert!(error.error.ends_with("is running"), "{error:?}");
    let cancelled: JobView = http.post(&format!("{path}/cancel")).await;
    assert_eq!(cancelled.state, JobState::Cancelled);
    node.hear("an abort", |message| matches!(message, ToNode::Abort { key, .. } if *key == start.key)).await;
    refused(post("cancel"), StatusCode::CONFLICT).await;
    refused(http.request(Method::GET, &format!("{path}/clip")), StatusCode::CONFLICT).await;
    node.beat(Vec::new()).await;
    let _: JobView = http.post(&format!("{path}/retry")).await;
    let start = node.hear_start().await;
    let outcome = AttemptOutcome::Failed { kind: FailureKind::Input, message: "no such word".to_owned() };
    node.report(start.key, outcome).await;
    let job: JobDetail = http.get(&path).await;
    assert_eq!((job.view.state, job.view.reason.as_deref()), (JobState::Failed, Some("no such word")));
    let outcomes: Vec<&str> = job.attempts.iter().map(|attempt| attempt.outcome.as_str()).collect();
    assert_eq!(outcomes, ["aborted", "input"]);
    let unknown = "/v1/jobs/00000000000000000000000000000000/cancel";
    refused(http.request(Method::POST, unknown), StatusCode::NOT_FOUND).await;
}

#[tokio::test]
async fn a_clip_that_the_store_lost_is_an_error_not_an_empty_file() {
    let rig = Rig::start().await;
    let node = rig.node("a", 1, &["tiny"]).await;
    rig.http.submit(options(), r#"{"prompt":"a"}"#).await;
    let start = node.hear_start().await;
    node.report(start.key, completed(&start, 5)).await;
    let clip = format!("/v1/jobs/{}/clip", start.key.job);
    refused(rig.http.request(Method::GET, &clip), StatusCode::NOT_FOUND).await;
    let path = farm_core::store::key::clip(start.key.job, start.key.attempt);
    rig.artifacts.put(&path, b"four"[..].to_vec().into()).await.unwrap();
    let error = refused(rig.http.request(Method::GET, &clip), StatusCode::BAD_GATEWAY).await;
    assert!(error.error.contains("4 bytes in the store, but its result says 5"), "{error:?}");
}

#[tokio::test]
async fn a_job_is_named_by_the_end_of_its_id() {
    let rig = Rig::start().await;
    let file: String = (0..300).map(|n| format!("{{\"prompt\":\"{n}\"}}\n")).collect();
    rig.http.submit(options(), &file).await;
    let page: JobPage = rig.http.get("/v1/jobs").await;
    let id = page.jobs[17].job.to_string();
    let found: JobDetail = rig.http.get(&format!("/v1/jobs/{}", &id[20..])).await;
    assert_eq!(found.view, page.jobs[17]);
    let found: JobDetail = rig.http.get(&format!("/v1/jobs/{}", id.to_uppercase())).await;
    assert_eq!(found.view.job, page.jobs[17].job);
    let get = |text: &str| rig.http.request(Method::GET, &format!("/v1/jobs/{text}"));
    let error = refused(get("abc"), StatusCode::BAD_REQUEST).await;
    assert!(error.error.contains("at least the last 4"), "{error:?}");
    refused(get("wxyz"), StatusCode::BAD_REQUEST).await;
    refused(get("ffffffffffff00000"), StatusCode::NOT_FOUND).await;
}

#[tokio::test]
async fn lists_come_in_pages() {
    let rig = Rig::start().await;
    let file: String = (0..5).map(|n| format!("{{\"prompt\":\"{n}\"}}\n")).collect();
    let reply = rig.http.submit(options(), &file).await;
    let mut seen = Vec::new();
    let mut path = format!("/v1/jobs?limit=2&state=queued&submission={}", reply.submission);
    loop {
        let page: JobPage = rig.http.get(&path).await;
        seen.extend(page.jobs.into_iter().map(|job| job.prompt));
        let Some(next) = page.next else { break };
        path = format!("/v1/jobs?limit=2&after={next}");
    }
    assert_eq!(seen, ["0", "1", "2", "3", "4"]);
    for bad in ["state=lost", "limit=0", "limit=1001", "limit=x", "colour=red", "submission=1", "after=zz"] {
        refused(rig.http.request(Method::GET, &format!("/v1/jobs?{bad}")), StatusCode::BAD_REQUEST).await;
    }
}

#[tokio::test]
async fn every_failure_is_an_api_error() {
    let rig = Rig::start().await;
    let call = |method: Method, path: &str| rig.http.request(method, path);
    refused(call(Method::GET, "/"), StatusCode::NOT_FOUND).await;
    refused(call(Method::GET, "/v1/nothing"), StatusCode::NOT_FOUND).await;
    refused(call(Method::DELETE, "/v1/farm"), StatusCode::METHOD_NOT_ALLOWED).await;
    refused(call(Method::POST, "/v1/submissions").body("{"), StatusCode::BAD_REQUEST).await;
    refused(call(Method::POST, "/v1/submissions").body(r#"{"priority":"high"}"#), StatusCode::BAD_REQUEST).await;
    refused(call(Method::POST, "/v1/submissions").body(" ".repeat(100_000)), StatusCode::PAYLOAD_TOO_LARGE).await;
    refused(call(Method::POST, "/v1/cluster"), StatusCode::UPGRADE_REQUIRED).await;
    let join = || call(Method::POST, "/v1/cluster").header("upgrade", "mochi-farm").header("connection", "upgrade");
    refused(join(), StatusCode::CONFLICT).await;
    let of_this_version = join().header(PROTOCOL_HEADER, PROTOCOL.to_string()).header(VERSION_HEADER, VERSION);
    refused(of_this_version, StatusCode::BAD_REQUEST).await;
}

#[tokio::test]
async fn without_the_secret_no_path_says_anything() {
    let secret = "0123456789abcdef";
    let rig = Rig::with_secret(Some(secret)).await;
    let _: FarmInfo = rig.http.get("/v1/farm").await;
    for token in [None, Some("0123456789abcdee".to_owned())] {
        let stranger = Http::new(rig.http.address, token);
        for (method, path) in [
            (Method::GET, "/v1/farm"),
            (Method::GET, "/v1/nothing"),
            (Method::DELETE, "/v1/jobs"),
            (Method::POST, "/v1/cluster"),
        ] {
            let error = refused(stranger.request(method, path), StatusCode::UNAUTHORIZED).await;
            assert!(error.error.contains("--secret-file"), "{error:?}");
        }
    }
}
