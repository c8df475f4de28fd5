//! Prompt files: all or nothing, once, and big ones.

use std::time::{Duration, Instant};

use farm_core::api::{CommitSubmission, FarmInfo, JobDetail, JobPage, OpenSubmission, PAGE_BYTES, SubmissionReply};
use farm_core::job::state::{JobState, Progress, Stage};
use farm_core::wire::to_scheduler::RunningAttempt;
use reqwest::{Method, StatusCode};

use crate::support::*;

fn options() -> OpenSubmission {
    OpenSubmission::default()
}

async fn queued(http: &Http) -> u64 {
    let info: FarmInfo = http.get("/v1/farm").await;
    info.jobs.get(&JobState::Queued).copied().unwrap_or(0)
}

#[tokio::test]
async fn a_file_with_a_bad_line_is_refused_as_a_whole() {
    let rig = Rig::start().await;
    let file = "{\"prompt\":\"a\"}\n{\"prompt\":\"b\",\"width\":17}\n{\"promt\":\"c\"}\n";
    let submission = rig.http.upload(options(), file.as_bytes()).await;
    let error = refused(rig.http.commit(submission, &commit(file)), StatusCode::UNPROCESSABLE_ENTITY).await;
    assert_eq!((error.bad_lines, error.lines.iter().map(|line| line.line).collect::<Vec<_>>()), (2, vec![2, 3]));
    assert_eq!(queued(&rig.http).await, 0);
    // The same upload, with the good lines only.
    let skip = CommitSubmission { skip_invalid: true, ..commit(file) };
    let reply: SubmissionReply = ok(rig.http.commit(submission, &skip)).await;
    assert_eq!((reply.new, reply.bad_lines, reply.lines.len()), (1, 2, 2));
}

#[tokio::test]
async fn a_line_that_does_not_fit_its_registered_model_is_a_bad_line() {
    let rig = Rig::start().await;
    rig.node("a", 1, &["tiny"]).await;
    // The model's default is 24 steps.
    let file = "{\"prompt\":\"a\"}\n{\"prompt\":\"b\",\"guidance_scale\":[1,2,3]}\n";
    let submission = rig.http.upload(options(), file.as_bytes()).await;
    let error = refused(rig.http.commit(submission, &commit(file)), StatusCode::UNPROCESSABLE_ENTITY).await;
    assert_eq!((error.lines[0].line, error.lines[0].reason.as_str()), (2, "guidance_scale has 3 values for 24 steps"));
}

#[tokio::test]
async fn with_several_models_one_has_to_be_named() {
    let rig = Rig::start().await;
    rig.node("a", 1, &["big", "tiny"]).await;
    let file = r#"{"prompt":"a"}"#;
    let submission = rig.http.upload(options(), file.as_bytes()).await;
    let error = refused(rig.http.commit(submission, &commit(file)), StatusCode::UNPROCESSABLE_ENTITY).await;
    assert!(error.error.contains("several models are registered (big, tiny)"), "{error:?}");
    let named = OpenSubmission { model: Some("tiny".to_owned()), ..options() };
    assert_eq!(rig.http.submit(named, file).await.waiting, None);
    let unknown = OpenSubmission { model: Some("huge".to_owned()), ..options() };
    let waiting = rig.http.submit(unknown, file).await.waiting.unwrap();
    assert_eq!(waiting, "no node has registered model huge (registered: big, tiny)");
}

#[tokio::test]
async fn the_same_file_is_the_same_jobs_and_again_makes_new_ones() {
    let rig = Rig::start().await;
    let file = "{\"prompt\":\"a\"}\n{\"prompt\":\"a\"}\n{\"prompt\":\"b\",\"priority\":3}\n";
    let first = rig.http.submit(options(), file).await;
    assert_eq!((first.new, first.existing), (3, 0));
    let second = rig.http.submit(OpenSubmission { priority: Some(9), ..options() }, file).await;
    assert_eq!((second.new, second.existing), (0, 3));
    let again = CommitSubmission { again: true, ..commit(file) };
    let submission = rig.http.upload(options(), file.as_bytes()).await;
    let third: SubmissionReply = ok(rig.http.commit(submission, &again)).await;
    assert_eq!((third.new, third.existing), (3, 0));
    let repeated: SubmissionReply = ok(rig.http.commit(submission, &again)).await;
    assert_eq!(repeated, SubmissionReply { waiting: None, ..third });
    assert_eq!(queued(&rig.http).await, 6);
}

#[tokio::test]
async fn a_cancelled_job_is_queued_again_by_its_file_with_its_seed() {
    let rig = Rig::start().await;
    let file = r#"{"prompt":"a"}"#;
    rig.http.submit(options(), file).await;
    let page: JobPage = rig.http.get("/v1/jobs").await;
    let path = format!("/v1/jobs/{}", page.jobs[0].job);
    let before: JobDetail = rig.http.get(&path).await;
    let _: farm_core::api::JobView = rig.http.post(&format!("{path}/cancel")).await;
    assert_eq!(rig.http.submit(options(), file).await.requeued, 1);
    let after: JobDetail = rig.http.get(&path).await;
    assert_eq!((after.view.state, after.seed), (JobState::Queued, before.seed));
}

#[tokio::test]
async fn priorities_come_from_the_line_then_from_the_submission() {
    let rig = Rig::start().await;
    let file = "{\"prompt\":\"a\"}\n{\"prompt\":\"b\",\"priority\":2}\n";
    rig.http.submit(OpenSubmission { priority: Some(5), ..options() }, file).await;
    let page: JobPage = rig.http.get("/v1/jobs").await;
    assert_eq!(page.jobs.iter().map(|job| job.priority).collect::<Vec<_>>(), [5, 2]);
}

#[tokio::test]
async fn a_lost_page_is_noticed() {
    let rig = Rig::start().await;
    let line = format!("{{\"prompt\":\"{}\"}}\n", "x".repeat(1000));
    let file = line.repeat(3 * PAGE_BYTES / line.len());
    let submission = rig.http.upload(options(), &file.as_bytes()[..PAGE_BYTES]).await;
    let error = refused(rig.http.commit(submission, &commit(&file)), StatusCode::CONFLICT).await;
    assert!(error.error.contains("1048576 bytes in 1 pages"), "{error:?}");
    let page = |n: u32, bytes: &[u8]| {
        rig.http.request(Method::PUT, &format!("/v1/submissions/{submission}/pages/{n}")).body(bytes.to_vec())
    };
    page(2, &file.as_bytes()[2 * PAGE_BYTES..]).send().await.unwrap();
    let error = refused(rig.http.commit(submission, &commit(&file)), StatusCode::CONFLICT).await;
    assert!(error.error.starts_with("page 1 of"), "{error:?}");
    page(1, &file.as_bytes()[PAGE_BYTES..2 * PAGE_BYTES]).send().await.unwrap();
    let reply: SubmissionReply = ok(rig.http.commit(submission, &commit(&file))).await;
    assert_eq!(reply.new as usize, 3 * PAGE_BYTES / line.len());
    refused(page(0, b"late"), StatusCode::CONFLICT).await;
}

#[tokio::test]
async fn senseless_uploads_are_refused() {
    let rig = Rig::start().await;
    let submission = rig.http.upload(options(), b"").await;
    let error = refused(rig.http.commit(submission, &commit("")), StatusCode::UNPROCESSABLE_ENTITY).await;
    assert_eq!(error.bad_lines, 1);
    let put = |path: &str, bytes: usize| rig.http.request(Method::PUT, path).body(vec![b' '; bytes]);
    let path = format!("/v1/submissions/{submission}/pages");
    refused(put(&format!("{path}/0"), PAGE_BYTES + 1), StatusCode::PAYLOAD_TOO_LARGE).await;
    refused(put(&format!("{path}/256"), 1), StatusCode::BAD_REQUEST).await;
    refused(put(&format!("{path}/-1"), 1), StatusCode::BAD_REQUEST).await;
    refused(put("/v1/submissions/0/pages/0", 1), StatusCode::NOT_FOUND).await;
    let unknown = "/v1/submissions/00000000000000000000000000000000";
    refused(put(&format!("{unknown}/pages/0"), 1), StatusCode::NOT_FOUND).await;
    refused(rig.http.request(Method::GET, unknown), StatusCode::NOT_FOUND).await;
    refused(rig.http.request(Method::POST, &format!("{unknown}/commit")), StatusCode::NOT_FOUND).await;
}

#[tokio::test]
async fn a_hundred_thousand_lines_go_in_at_once() {
    let rig = Rig::start().await;
    let node = rig.node("a", 1, &["tiny"]).await;
    let file: String = (0..100_000)
        .map(|n| format!("{{\"prompt\":\"a red ball moving right, number {n}\",\"seed\":{n}}}\n"))
        .collect();
    let mut slowest = Duration::ZERO;
    let mut running = Vec::new();
    let mut took = Vec::new();
    for expected in [(100_000, 0), (0, 100_000)] {
        let begun = Instant::now();
        // Nobody waits for the file: heartbeats are answered meanwhile.
        let beats = async {
            loop {
                let asked = Instant::now();
                node.beat(running.clone()).await;
                slowest = slowest.max(asked.elapsed());
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        let reply = tokio::select! {
            reply = rig.http.submit(options(), &file) => reply,
            () = beats => unreachable!("beats do not end"),
        };
        took.push(begun.elapsed());
        assert_eq!((reply.new, reply.existing), expected);
        if running.is_empty() {
            let start = node.hear_start().await;
            let progress = Progress { stage: Stage::Denoise, done: 0, total: 1, eta_seconds: None };
            running.push(RunningAttempt { key: start.key, progress, devices: start.devices });
        }
    }
    println!("100,000 lines: {:?}, the same again: {:?}; slowest heartbeat {slowest:?}", took[0], took[1]);
    // Generous, because test machines are busy and unoptimised.
    assert!(slowest.as_secs() < 4, "{slowest:?}");
    assert!(took[0].as_secs() < 30, "{took:?}");
}
