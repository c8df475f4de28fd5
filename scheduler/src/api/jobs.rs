//! Single jobs and lists of them: the store's rows, with what only the running farm knows.

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderValue, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use farm_core::api::{JobDetail, JobPage, JobView, LogPage, MAX_LIST, WhyView};
use farm_core::id::{JobId, NodeId, SubmissionId};
use farm_core::job::state::{JobState, Progress};
use serde::Deserialize;

use super::{Api, By, Failure, body};
use crate::core::events::{Scope, Wish};
use crate::queue::store::{JobFilter, JobRecord};

/// Shortest ending of an id that names a job.
pub const MIN_ENDING: usize = 4;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ListQuery {
    state: Option<String>,
    submission: Option<String>,
    after: Option<String>,
    limit: Option<u32>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogQuery {
    #[serde(default)]
    after: u64,
}

pub async fn list(State(api): State<Api>, uri: Uri) -> Result<Json<JobPage>, Failure> {
    let query: ListQuery = body::query(&uri)?;
    let state = query.state.map(|state| state.parse().map_err(Failure::bad_request)).transpose()?;
    let submission = query.submission.map(|id| id.parse().map(SubmissionId)).transpose();
    let submission = submission.map_err(|_| Failure::bad_request("submission is not a submission id"))?;
    let after = match query.after {
        Some(after) => Some(find(&api, &after).await?),
        None => None,
    };
    let limit = body::limit(query.limit)?;
    // One more than asked for tells whether there is another page.
    let mut records = api.queue.jobs(JobFilter { state, submission, after, limit: limit + 1 }).await?;
    let more = records.len() > limit as usize;
    records.truncate(limit as usize);
    let next = if more { records.last().map(|record| record.job) } else { None };
    let jobs = views(&api, records).await?;
    Ok(Json(JobPage { jobs, next }))
}

pub async fn show(State(api): State<Api>, Path(job): Path<String>) -> Result<Json<JobDetail>, Failure> {
    let record = record(&api, find(&api, &job).await?).await?;
    let attempts = api.queue.attempts(record.job).await?;
    let (request, seed, result) = (record.request.clone(), record.seed, record.result.clone());
    let view = view(&api, record).await?;
    Ok(Json(JobDetail { view, request, seed, attempts, result }))
}

pub async fn log(State(api): State<Api>, Path(job): Path<String>, uri: Uri) -> Result<Json<LogPage>, Failure> {
    let LogQuery { after } = body::query(&uri)?;
    let job = find(&api, &job).await?;
    Ok(Json(api.queue.log(job, after, MAX_LIST).await?))
}

pub async fn why(State(api): State<Api>, Path(job): Path<String>) -> Result<Json<WhyView>, Failure> {
    let record = record(&api, find(&api, &job).await?).await?;
    let (job, state) = (record.job, record.state);
    if !state.is_terminal()
        && let Some(why) = api.scheduler()?.ask(move |farm| farm.why(job)).await?
    {
        return Ok(Json(why));
    }
    let reason = record.reason.unwrap_or_else(|| match state {
        JobState::Queued | JobState::Running => "its state is just changing; ask again".to_owned(),
        ended => format!("it is {}", ended.as_str()),
    });
    Ok(Json(WhyView { job, state, code: None, reason, change: None, starts_in_seconds: None, eta_seconds: None }))
}

pub async fn cancel(State(api): State<Api>, Path(job): Path<String>, by: By) -> Result<Json<JobView>, Failure> {
    change(&api, &job, Wish::Cancel, by).await
}

pub async fn pause(State(api): State<Api>, Path(job): Path<String>, by: By) -> Result<Json<JobView>, Failure> {
    change(&api, &job, |job| Wish::Pause(Scope::Job(job)), by).await
}

pub async fn resume(State(api): State<Api>, Path(job): Path<String>, by: By) -> Result<Json<JobView>, Failure> {
    change(&api, &job, |job| Wish::Resume(Scope::Job(job)), by).await
}

pub async fn retry(State(api): State<Api>, Path(job): Path<String>, by: By) -> Result<Json<JobView>, Failure> {
    let job = find(&api, &job).await?;
    api.scheduler()?.retry(job, by.0).await??;
    Ok(Json(view(&api, record(&api, job).await?).await?))
}

async fn change(api: &Api, job: &str, wish: impl FnOnce(JobId) -> Wish, by: By) -> Result<Json<JobView>, Failure> {
    let job = find(api, job).await?;
    api.wish(wish(job), by).await?;
    Ok(Json(view(api, record(api, job).await?).await?))
}

pub async fn clip(State(api): State<Api>, Path(job): Path<String>) -> Result<Response, Failure> {
    let record = record(&api, find(&api, &job).await?).await?;
    let Some(result) = record.result else {
        let (job, state) = (record.job.short(), record.state.as_str());
        return Err(Failure::conflict(format!("job {job} is {state} and has no clip")));
    };
    let (length, bytes) = api.artifacts.get_stream(&result.clip).await?;
    if length != result.clip_bytes {
        return Err(Failure::new(
            StatusCode::BAD_GATEWAY,
            format!("clip {} has {length} bytes in the store, but its result says {}", result.clip, result.clip_bytes),
        ));
    }
    let sha256 = HeaderValue::try_from(&result.clip_sha256)
        .map_err(|_| Failure::new(StatusCode::BAD_GATEWAY, "the result's sha-256 is not hex"))?;
    let mut response = Body::from_stream(bytes).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("video/mp4"));
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    headers.insert("x-content-sha256", sha256);
    Ok(response)
}

/// The job with this id, or the one whose id ends so.
pub async fn find(api: &Api, text: &str) -> Result<JobId, Failure> {
    let ending = text.to_ascii_lowercase();
    let is_hex = ending.bytes().all(|byte| byte.is_ascii_hexdigit());
    if let Ok(job) = ending.parse::<JobId>() {
        return Ok(job);
    }
    if !is_hex || !(MIN_ENDING..32).contains(&ending.len()) {
        return Err(Failure::bad_request(format!(
            "{text:?} is not a job id; give all 32 digits or at least the last {MIN_ENDING}"
        )));
    }
    let jobs = api.queue.jobs_ending_in(&ending).await?;
    match jobs.as_slice() {
        [] => Err(Failure::not_found(format!("no job's id ends in {ending}"))),
        [job] => Ok(*job),
        several => {
            let ids = several.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            Err(Failure::conflict(format!("several jobs' ids end in {ending}: {ids}")))
        }
    }
}

async fn record(api: &Api, job: JobId) -> Result<JobRecord, Failure> {
    api.queue.job(job).await?.ok_or_else(|| Failure::not_found(format!("there is no job {job}")))
}

async fn view(api: &Api, record: JobRecord) -> Result<JobView, Failure> {
    let job = record.job;
    let mut views = views(api, vec![record]).await?;
    views.pop().ok_or_else(|| Failure::not_found(format!("there is no job {job}")))
}

/// What the farm knows of a live job.
struct Live {
    running: Option<(NodeId, Option<Progress>)>,
    reason: Option<String>,
}

async fn views(api: &Api, records: Vec<JobRecord>) -> Result<Vec<JobView>, Failure> {
    let jobs: Vec<(JobId, bool)> = records.iter().map(|record| (record.job, record.state.is_terminal())).collect();
    let live = api
        .scheduler()?
        .ask(move |farm| {
            let look = |(job, ended): (JobId, bool)| {
                (!ended).then(|| Live { running: farm.running(job), reason: farm.wait_reason(job) })
            };
            jobs.into_iter().map(look).collect::<Vec<_>>()
        })
        .await?;
    Ok(records.into_iter().zip(live).map(|(record, live)| merge(api, record, live)).collect())
}

/// The row was read a moment before the farm was asked, so they may differ by one step. The row decides.
fn merge(api: &Api, record: JobRecord, live: Option<Live>) -> JobView {
    let Live { running, reason } = live.unwrap_or(Live { running: None, reason: None });
    let (node, progress) = match (record.state, running) {
        (JobState::Running, Some((node, progress))) => (Some(node), progress),
        (JobState::Queued, _) => (None, None),
        _ => (record.node, None),
    };
    let reason = match record.state {
        JobState::Queued => Some(reason.unwrap_or_else(|| "starting".to_owned())),
        _ => record.reason,
    };
    JobView {
        job: record.job,
        id: record.request.id,
        state: record.state,
        prompt: record.request.prompt,
        model: record.model,
        priority: record.priority,
        tenant: record.tenant,
        submitted: record.submitted,
        finished: record.finished,
        attempt: record.attempt,
        node,
        progress,
        reason,
        clip: record.result.map(|result| api.artifacts.url_of(&result.clip)),
        warnings: record.warnings,
    }
}
