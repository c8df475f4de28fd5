//! What is refused at submission, with the reason and the line.

use farm_core::api::{BatchView, CommitSubmission, FarmInfo, JobPage, OpenSubmission, SubmissionReply};
use farm_core::job::state::JobState;
use reqwest::{Method, StatusCode};

use crate::support::*;

fn of_tenant(tenant: &str) -> OpenSubmission {
    OpenSubmission { tenant: tenant.parse().unwrap(), ..OpenSubmission::default() }
}

/// Number and reason of each bad line.
async fn bad_lines(rig: &Rig, options: OpenSubmission, file: &str) -> Vec<(u64, String)> {
    let submission = rig.http.upload(options, file.as_bytes()).await;
    let error = refused(rig.http.commit(submission, &commit(file)), StatusCode::UNPROCESSABLE_ENTITY).await;
    let info: FarmInfo = rig.http.get("/v1/farm").await;
    assert_eq!(info.jobs.get(&JobState::Queued).copied().unwrap_or(0), 0);
    error.lines.into_iter().map(|line| (line.line, line.reason)).collect()
}

#[tokio::test]
async fn only_tenants_that_an_operator_has_made_submit() {
    let rig = Rig::start().await;
    let open =
        |tenant: &str| rig.http.request(Method::POST, "/v1/submissions").body(format!(r#"{{"tenant":"{tenant}"}}"#));
    let error = refused(open("films"), StatusCode::NOT_FOUND).await;
    assert!(
        error.error.contains("no tenant films; an operator makes one with `farmctl quota films --share 1`"),
        "{error:?}"
    );
    refused(open("Films!"), StatusCode::BAD_REQUEST).await;
    rig.http.set_tenant("films", r#"{"share":2}"#).await;
    let reply = rig.http.submit(of_tenant("films"), r#"{"prompt":"a"}"#).await;
    assert_eq!(reply.new, 1);
    // The same line of another tenant is another job.
    assert_eq!(rig.http.submit(of_tenant("default"), r#"{"prompt":"a"}"#).await.new, 1);
    let page: JobPage = rig.http.get("/v1/jobs").await;
    assert_eq!(page.jobs.iter().map(|job| job.tenant.as_str()).collect::<Vec<_>>(), ["films", "default"]);
}

#[tokio::test]
async fn priorities_are_not_negative() {
    let rig = Rig::start().await;
    let open = rig.http.request(Method::POST, "/v1/submissions").body(r#"{"priority":-1}"#);
    let error = refused(open, StatusCode::UNPROCESSABLE_ENTITY).await;
    assert!(error.error.contains("priority -1 is not in 0..=1000"), "{error:?}");
    let lines = bad_lines(&rig, OpenSubmission::default(), "{\"prompt\":\"a\",\"priority\":-1}\n").await;
    assert!(lines[0].1.contains("priority"), "{lines:?}");
}

#[tokio::test]
async fn circles_and_unknown_names_are_told_with_their_lines() {
    let rig = Rig::start().await;
    let file = r#"{"prompt":"a","id":"a","after":"c"}
        {"prompt":"b","id":"b","after":["a"]}
        {"prompt":"c","id":"c","after":["b"]}
        {"prompt":"d","after":"nowhere"}
        {"prompt":"e","after":"0123abcd"}
        {"prompt":"f"}
    "#;
    let lines = bad_lines(&rig, OpenSubmission::default(), file).await;
    assert_eq!(lines.iter().map(|(line, _)| *line).collect::<Vec<_>>(), [1, 2, 3, 4, 5]);
    assert!(lines[0].1.contains("lines 1, 3, 2 come after each other in a circle"), "{lines:?}");
    assert!(lines[3].1.contains("no line, job or batch is called \"nowhere\""), "{lines:?}");
    let unknown = "00000000000000000000000000000001";
    let file = format!("{{\"prompt\":\"a\"}}\n{{\"prompt\":\"b\",\"after\":\"{unknown}\"}}\n");
    let lines = bad_lines(&rig, OpenSubmission::default(), &file).await;
    assert_eq!(lines.len(), 1);
    assert!(lines[0].0 == 2 && lines[0].1.contains(unknown), "{lines:?}");
    let options = OpenSubmission { after: vec![unknown.to_owned()], ..OpenSubmission::default() };
    let submission = rig.http.upload(options, b"{\"prompt\":\"a\"}").await;
    let error =
        refused(rig.http.commit(submission, &commit("{\"prompt\":\"a\"}")), StatusCode::UNPROCESSABLE_ENTITY).await;
    assert!(error.error.contains(unknown), "{error:?}");
}

#[tokio::test]
async fn lines_come_after_lines_jobs_and_batches() {
    let rig = Rig::start().await;
    let node = rig.node("a", 4, &["tiny"]).await;
    let first = rig.http.submit(OpenSubmission::default(), r#"{"prompt":"first"}"#).await;
    let start = node.hear_start().await;
    let job = start.key.job;
    let file = format!(
        "{{\"prompt\":\"b\",\"id\":\"b\",\"after\":\"{}\"}}\n{{\"prompt\":\"c\",\"after\":[\"b\",\"{}\"]}}\n",
        job.short(),
        first.submission
    );
    rig.http.submit(OpenSubmission::default(), &file).await;
    let page: JobPage = rig.http.get("/v1/jobs?state=queued").await;
    assert_eq!(page.jobs.len(), 2);
    let why: farm_core::api::WhyView = rig.http.get(&format!("/v1/jobs/{}/why", page.jobs[0].job)).await;
    assert_eq!(why.code, Some(farm_core::api::WaitCode::After), "{why:?}");
    node.complete(&start, b"clip").await;
    let second = node.hear_start().await;
    assert_eq!(second.key.job, page.jobs[0].job);
    node.complete(&second, b"clip").await;
    assert_eq!(node.hear_start().await.key.job, page.jobs[1].job);
}

#[tokio::test]
async fn good_lines_are_queued_without_those_that_come_after_bad_ones() {
    let rig = Rig::start().await;
    let file = r#"{"prompt":"a","id":"a","after":"a"}
        {"prompt":"b","after":"a"}
        {"prompt":"c","id":"c"}
        {"prompt":"d","after":"c"}
    "#;
    let submission = rig.http.upload(OpenSubmission::default(), file.as_bytes()).await;
    let options = CommitSubmission { skip_invalid: true, ..commit(file) };
    let reply: SubmissionReply = ok(rig.http.commit(submission, &options)).await;
    assert_eq!((reply.new, reply.bad_lines), (2, 2));
    let is_told = reply.lines.iter().all(|line| line.reason.contains("line 1 comes after itself"));
    assert!(is_told, "{reply:?}");
    let batch: BatchView = rig.http.get(&format!("/v1/submissions/{}", &submission.to_string()[20..])).await;
    assert_eq!((batch.submission, batch.jobs[&JobState::Queued]), (submission, 2));
}

#[tokio::test]
async fn a_quota_that_nobody_can_meet_is_refused_with_the_reason() {
    let rig = Rig::start().await;
    rig.http.set_tenant("none", r#"{"quota":{"devices":0}}"#).await;
    rig.http.set_tenant("few", r#"{"quota":{"queued":1}}"#).await;
    let lines = bad_lines(&rig, of_tenant("none"), r#"{"prompt":"a"}"#).await;
    assert!(lines[0].1.contains("allows no device"), "{lines:?}");
    let file = "{\"prompt\":\"a\"}\n{\"prompt\":\"b\"}\n";
    let submission = rig.http.upload(of_tenant("few"), file.as_bytes()).await;
    let error = refused(rig.http.commit(submission, &commit(file)), StatusCode::UNPROCESSABLE_ENTITY).await;
    assert!(error.error.contains("few") && error.error.contains("nothing was queued"), "{error:?}");
    rig.http.submit(of_tenant("few"), r#"{"prompt":"a"}"#).await;
}
