//! What people ask for besides clips: pauses, drains, quotas; what they ask about; and what is not kept.

use farm_core::api::{
    AuditPage, BatchList, BatchView, GcReport, JobView, NodeView, OpenSubmission, QueueView, TenantList, UsageList,
    WaitCode, WhyView,
};
use farm_core::id::AttemptNo;
use farm_core::job::state::JobState;
use farm_core::store::key;
use farm_core::wire::to_node::ToNode;
use reqwest::{Method, StatusCode};

use crate::support::*;

const FILE: &str = r#"{"prompt":"a"}"#;

fn post(rig: &Rig, path: &str) -> reqwest::RequestBuilder {
    rig.http.request(Method::POST, path)
}

#[tokio::test]
async fn a_pause_of_anything_holds_a_job_until_it_is_resumed() {
    let rig = Rig::start().await;
    let _: QueueView = rig.http.post("/v1/queue/pause").await;
    let reply = rig.http.submit(OpenSubmission::default(), FILE).await;
    let page: farm_core::api::JobPage = rig.http.get("/v1/jobs").await;
    let job = page.jobs[0].job;
    let (job_path, batch_path) = (format!("/v1/jobs/{job}"), format!("/v1/submissions/{}", reply.submission));
    let _: JobView = rig.http.post(&format!("{job_path}/pause")).await;
    let batch: BatchView = rig.http.post(&format!("{batch_path}/pause")).await;
    assert!(batch.paused && batch.summary.ends_with("paused"), "{batch:?}");
    let tenant: farm_core::api::TenantView = rig.http.post("/v1/tenants/default/pause").await;
    assert!(tenant.paused);
    let node = rig.node("a", 1, &["tiny"]).await;
    for path in ["/v1/queue", job_path.as_str(), batch_path.as_str(), "/v1/tenants/default"] {
        let why: WhyView = rig.http.get(&format!("{job_path}/why")).await;
        assert_eq!(why.code, Some(WaitCode::Paused), "{why:?}");
        let queue: QueueView = rig.http.get("/v1/queue").await;
        assert_eq!((queue.queued, queue.waiting.values().sum::<u64>()), (1, 1));
        let _: serde_json::Value = rig.http.post(&format!("{path}/resume")).await;
    }
    let start = node.hear_start().await;
    assert_eq!(start.key.job, job);
    // What runs is handed back.
    let _: JobView = rig.http.post(&format!("{job_path}/pause")).await;
    node.hear("a yield", |message| matches!(message, ToNode::Yield { key, .. } if *key == start.key)).await;
    for path in ["jobs/00000000000000000000000000000000", "submissions/00000000000000000000000000000000", "tenants/x"] {
        refused(post(&rig, &format!("/v1/{path}/pause")), StatusCode::NOT_FOUND).await;
    }
}

#[tokio::test]
async fn a_batch_is_cancelled_at_once_and_listed_with_the_newest_first() {
    let rig = Rig::start().await;
    let first = rig.http.submit(OpenSubmission::default(), "{\"prompt\":\"a\"}\n{\"prompt\":\"b\"}\n").await;
    let second = rig.http.submit(OpenSubmission::default(), r#"{"prompt":"c"}"#).await;
    let batch: BatchView = rig.http.post(&format!("/v1/submissions/{}/cancel", first.submission)).await;
    assert_eq!((batch.jobs[&JobState::Cancelled], batch.summary.as_str()), (2, "0 of 2 done, 2 cancelled"));
    let list: BatchList = rig.http.get("/v1/submissions?limit=5").await;
    let ids: Vec<_> = list.batches.iter().map(|batch| batch.submission).collect();
    assert_eq!(ids, [second.submission, first.submission]);
    let page: farm_core::api::JobPage = rig.http.get("/v1/jobs?state=cancelled").await;
    let path = format!("/v1/jobs/{}", page.jobs[0].job);
    let why: WhyView = rig.http.get(&format!("{path}/why")).await;
    assert_eq!((why.state, why.code), (JobState::Cancelled, None));
    refused(post(&rig, &format!("{path}/pause")), StatusCode::CONFLICT).await;
}

#[tokio::test]
async fn a_drained_node_hands_its_work_back_and_gets_none() {
    let rig = Rig::start().await;
    let node = rig.node("a", 1, &["tiny"]).await;
    rig.http.submit(OpenSubmission::default(), FILE).await;
    let start = node.hear_start().await;
    let view: NodeView = rig.http.post("/v1/nodes/a/drain").await;
    assert_eq!(view.closed.as_deref(), Some("drained"));
    node.hear("a yield", |message| matches!(message, ToNode::Yield { key, .. } if *key == start.key)).await;
    let view: NodeView = rig.http.post("/v1/nodes/a/undrain").await;
    assert_eq!(view.closed, None);
    for order in ["drain", "undrain"] {
        let unknown = refused(post(&rig, &format!("/v1/nodes/b/{order}")), StatusCode::NOT_FOUND).await;
        assert!(unknown.error.contains("no node b has joined"), "{unknown:?}");
    }
}

#[tokio::test]
async fn a_node_that_was_drained_and_has_left_is_known_by_its_name() {
    let rig = Rig::start().await;
    rig.node("a", 1, &["tiny"]).await;
    let _: NodeView = rig.http.post("/v1/nodes/a/drain").await;
    let rig = rig.restart().await;
    let closed = async |order: &str| {
        let view: NodeView = rig.http.post(&format!("/v1/nodes/a/{order}")).await;
        assert!(!view.alive);
        view.closed
    };
    assert_eq!(closed("drain").await.as_deref(), Some("drained; not joined"));
    assert_eq!(closed("undrain").await.as_deref(), Some("not joined"));
    refused(post(&rig, "/v1/nodes/a/undrain"), StatusCode::NOT_FOUND).await;
}

#[tokio::test]
async fn the_audit_trail_says_who_did_what() {
    let rig = Rig::start().await;
    rig.http.set_tenant("films", r#"{"share":2,"quota":{"devices":3}}"#).await;
    rig.http.submit(OpenSubmission::default(), FILE).await;
    let page: farm_core::api::JobPage = rig.http.get("/v1/jobs").await;
    let job = page.jobs[0].job;
    let _: JobView = rig.http.post(&format!("/v1/jobs/{job}/cancel")).await;
    let _: JobView = ok(post(&rig, &format!("/v1/jobs/{job}/retry"))).await;
    let audit: AuditPage = rig.http.get("/v1/audit").await;
    let entries: Vec<_> =
        audit.entries.iter().map(|entry| (entry.by.as_str(), entry.action.as_str(), entry.subject.as_str())).collect();
    let id = job.to_string();
    assert_eq!(
        entries,
        [("ada", "quota", "films"), ("ada", "cancel", id.as_str()), ("anonymous", "retry", id.as_str())]
    );
    let rest: AuditPage = rig.http.get(&format!("/v1/audit?after={}", audit.entries[1].number)).await;
    assert_eq!(rest.entries, audit.entries[2..]);
    let long = post(&rig, "/v1/queue/pause").header("x-farm-user", "x".repeat(65));
    refused(long, StatusCode::BAD_REQUEST).await;
}

#[tokio::test]
async fn tenants_have_shares_and_quotas() {
    let rig = Rig::start().await;
    let view = rig.http.set_tenant("films", r#"{"share":2.5,"quota":{"devices":3}}"#).await;
    assert_eq!((view.spec.share, view.spec.quota.devices, view.spec.quota.queued), (2.5, Some(3), None));
    let list: TenantList = rig.http.get("/v1/tenants").await;
    let names: Vec<_> = list.tenants.iter().map(|tenant| tenant.tenant.as_str()).collect();
    assert_eq!(names, ["default", "films"]);
    let put =
        |tenant: &str, body: &'static str| rig.http.request(Method::PUT, &format!("/v1/tenants/{tenant}")).body(body);
    refused(put("films", r#"{"share":0}"#), StatusCode::UNPROCESSABLE_ENTITY).await;
    refused(put("films", r#"{"shares":1}"#), StatusCode::BAD_REQUEST).await;
    refused(put("Films", "{}"), StatusCode::BAD_REQUEST).await;
    refused(post(&rig, "/v1/tenants/others/pause"), StatusCode::NOT_FOUND).await;
}

#[tokio::test]
async fn usage_is_summed_by_tenant_day_and_label() {
    let rig = Rig::start().await;
    let node = rig.node("a", 1, &["tiny"]).await;
    rig.http.submit(OpenSubmission::default(), r#"{"prompt":"a","labels":{"shot":"12"}}"#).await;
    let start = node.hear_start().await;
    node.complete(&start, b"clip").await;
    for (by, name) in [("tenant", Some("default")), ("label:shot", Some("12")), ("day", None)] {
        let usage: UsageList = rig.http.get(&format!("/v1/usage?by={by}")).await;
        let row = &usage.rows[0];
        assert_eq!((usage.by.as_str(), usage.rows.len(), row.attempts, row.clips), (by, 1, 1, 1));
        assert!(name.is_none_or(|name| row.name == name) && row.cost.is_none(), "{row:?}");
    }
    for bad in ["by=node", "by=label:", "since=yesterday", "since=2026-01-02T00:00:00Z&until=2026-01-01T00:00:00Z"] {
        refused(rig.http.request(Method::GET, &format!("/v1/usage?{bad}")), StatusCode::BAD_REQUEST).await;
    }
}

#[tokio::test]
async fn gc_removes_what_nobody_needs_and_nothing_else() {
    let rig = Rig::forgetful().await;
    let node = rig.node("a", 2, &["tiny"]).await;
    rig.http.submit(OpenSubmission::default(), "{\"prompt\":\"a\"}\n{\"prompt\":\"b\"}\n").await;
    let (done, live) = (node.hear_start().await, node.hear_start().await);
    let put = async |key: &str| rig.artifacts.put(key, b"12345"[..].to_vec().into()).await.unwrap();
    let job = done.key.job;
    node.complete(&done, b"clip").await;
    let kept = [key::clip(job, AttemptNo(1)), key::result(job), format!("{}/notes.txt", key::job(job))];
    // As if an attempt had been lost before this one, which cannot be told from the keys.
    let lost = [key::clip(job, AttemptNo(0)), key::latent(&key::latents(job), 8)];
    let running = [key::clip(live.key.job, AttemptNo(1)), key::latent(&key::latents(live.key.job), 8)];
    for key in kept[1..].iter().chain(&lost).chain(&running) {
        put(key).await;
    }
    let count = GcReport { clips: 1, clip_bytes: 5, latents: 1, latent_bytes: 5, ..GcReport::default() };
    let objects = |report: GcReport| GcReport { log_rows: 0, job_rows: 0, audit_rows: 0, more: false, ..report };
    let looked: GcReport = ok(post(&rig, "/v1/gc").body(r#"{"dry_run":true}"#)).await;
    assert!(!looked.more, "all is counted at once");
    assert_eq!(objects(looked), GcReport { dry_run: true, ..count });
    for key in kept.iter().chain(&lost).chain(&running) {
        assert!(rig.artifacts.head(key).await.unwrap().is_some(), "{key}");
    }
    let cleaned: GcReport = rig.http.post("/v1/gc").await;
    assert_eq!(objects(cleaned), count);
    for key in kept.iter().chain(&running) {
        assert!(rig.artifacts.head(key).await.unwrap().is_some(), "{key}");
    }
    for key in &lost {
        assert!(rig.artifacts.head(key).await.unwrap().is_none(), "{key}");
    }
    let again: GcReport = rig.http.post("/v1/gc").await;
    assert_eq!(objects(again), GcReport::default());
    assert_eq!(again.more, again.log_rows + again.job_rows + again.audit_rows > 0);
}
