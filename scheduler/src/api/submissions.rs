//! A prompt file goes up in pages and is committed once.

use std::collections::BTreeSet;

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use farm_core::api::{
    CommitSubmission, LineError, MAX_SUBMISSION_BYTES, OpenSubmission, PAGE_BYTES, SubmissionOpened, SubmissionReply,
    SubmissionStatus,
};
use farm_core::id::{JobId, SubmissionId};
use farm_core::job::prompt::{MAX_LINE_ERRORS, PromptFile, PromptParser};
use jiff::Timestamp;
use uuid::Uuid;

use super::{Api, Failure, body};
use crate::core::resolve::{Keys, Models};
use crate::queue::store::{Batch, NewJob, Submission};

const MAX_PAGES: u32 = (MAX_SUBMISSION_BYTES / PAGE_BYTES) as u32;
const MAX_MODEL_NAME: usize = 128;

fn parse_id(text: &str) -> Result<SubmissionId, Failure> {
    text.parse().map(SubmissionId).map_err(|_| Failure::not_found(format!("{text:?} is not a submission id")))
}

fn unknown(id: SubmissionId) -> Failure {
    Failure::not_found(format!("there is no submission {id}; uploads that are not committed are kept for an hour"))
}

pub async fn open(State(api): State<Api>, body: Body) -> Result<(StatusCode, Json<SubmissionOpened>), Failure> {
    let OpenSubmission { model, priority } = body::read_json(body).await?;
    if let Some(name) = &model
        && (name.is_empty() || name.len() > MAX_MODEL_NAME)
    {
        return Err(Failure::bad_request(format!("model name has {} bytes, not 1..={MAX_MODEL_NAME}", name.len())));
    }
    let submission = SubmissionId(Uuid::now_v7());
    api.queue.open_submission(submission, model, priority, Timestamp::now()).await?;
    Ok((StatusCode::CREATED, Json(SubmissionOpened { submission })))
}

pub async fn put_page(
    State(api): State<Api>,
    Path((id, page)): Path<(String, String)>,
    body: Body,
) -> Result<StatusCode, Failure> {
    let id = parse_id(&id)?;
    let number: u32 = page.parse().ok().filter(|page| *page < MAX_PAGES).ok_or_else(|| {
        Failure::bad_request(format!("page {page:?} is not in 0..{MAX_PAGES}; a prompt file has at most 256 MiB"))
    })?;
    let bytes = body::read(body, PAGE_BYTES).await?;
    if api.queue.put_page(id, number, bytes.into()).await? {
        return Ok(StatusCode::NO_CONTENT);
    }
    match api.queue.submission(id).await? {
        Some(_) => Err(Failure::conflict(format!("submission {id} is already committed"))),
        None => Err(unknown(id)),
    }
}

pub async fn status(State(api): State<Api>, Path(id): Path<String>) -> Result<Json<SubmissionStatus>, Failure> {
    let submission = parse_id(&id)?;
    api.queue.submission(submission).await?.ok_or_else(|| unknown(submission))?;
    let jobs = api.queue.submission_counts(submission).await?;
    Ok(Json(SubmissionStatus { submission, jobs }))
}

pub async fn commit(
    State(api): State<Api>,
    Path(id): Path<String>,
    body: Body,
) -> Result<Json<SubmissionReply>, Failure> {
    let id = parse_id(&id)?;
    let options: CommitSubmission = body::read_json(body).await?;
    // Held to the end: a repeated commit waits for the first and then finds its reply.
    let _permit = api.commits.acquire().await.map_err(|_| Failure::from(crate::actor::CallError::Stopped))?;
    let submission = api.queue.submission(id).await?.ok_or_else(|| unknown(id))?;
    if let Some(reply) = submission.reply {
        return Ok(Json(reply));
    }
    let file = read_file(&api, id, options.bytes).await?;
    let models = api.scheduler.ask(|farm| farm.models()).await?;
    let prepared = blocking(move || prepare(id, file, submission, &models, &options)).await??;
    let models: BTreeSet<Option<String>> = prepared.jobs.iter().map(|job| job.model.clone()).collect();
    let committed = api.scheduler.commit(prepared).await?;
    let reasons = api
        .scheduler
        .ask(move |farm| {
            let reasons = models.iter().filter_map(|model| farm.cannot_start(model.as_deref()));
            reasons.map(|reason| reason.to_string()).collect::<Vec<_>>()
        })
        .await?;
    let waiting = (!reasons.is_empty()).then(|| reasons.join("; "));
    Ok(Json(SubmissionReply { waiting, ..committed.reply }))
}

/// Reads the pages in order, one in memory at a time.
async fn read_file(api: &Api, id: SubmissionId, bytes: u64) -> Result<PromptFile, Failure> {
    let pages = api.queue.pages(id).await?;
    let arrived: u64 = pages.iter().map(|(_, length)| length).sum();
    let missing = pages.iter().zip(0..).find(|((page, _), expected)| page != expected).map(|(_, expected)| expected);
    if let Some(page) = missing {
        return Err(Failure::conflict(format!("page {page} of submission {id} did not arrive; send it again")));
    }
    if arrived != bytes {
        return Err(Failure::conflict(format!(
            "submission {id} has {arrived} bytes in {} pages, but the file has {bytes}; send the missing pages again",
            pages.len()
        )));
    }
    let mut parser = PromptParser::new();
    for (page, _) in pages {
        let bytes = api.queue.page(id, page).await?.ok_or_else(|| unknown(id))?;
        parser = blocking(move || {
            parser.push(&bytes);
            parser
        })
        .await?;
    }
    blocking(|| parser.finish()).await
}

/// Work that would hold up the other calls.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Failure> {
    tokio::task::spawn_blocking(work).await.map_err(|error| {
        tracing::error!(%error, "reading a prompt file failed");
        Failure::new(StatusCode::INTERNAL_SERVER_ERROR, "reading the prompt file failed; see the scheduler's log")
    })
}

/// Lines become jobs, or the file is refused.
fn prepare(
    id: SubmissionId,
    file: PromptFile,
    submission: Submission,
    models: &Models,
    options: &CommitSubmission,
) -> Result<Batch, Failure> {
    let PromptFile { requests, mut errors, mut bad_lines } = file;
    let mut keys = Keys::new(options.again.then_some(id));
    let mut jobs = Vec::with_capacity(requests.len());
    for (line, request) in requests {
        let named = request.model.as_ref().or(submission.model.as_ref());
        let model = models
            .choose(named.map(String::as_str))
            .map_err(|error| Failure::new(StatusCode::UNPROCESSABLE_ENTITY, format!("line {line}: {error}")))?;
        if let Err(reason) = models.check(&request, model.as_deref()) {
            bad_lines += 1;
            errors.push(LineError { line, column: 1, reason });
            continue;
        }
        let key = keys
            .key(&request, named.map(String::as_str))
            .map_err(|error| Failure::bad_request(format!("line {line}: {error}")))?;
        // 32 bits: enough for any number of seeds, and short enough to type.
        let seed = request.seed.unwrap_or_else(|| rand::random::<u32>().into());
        let priority = request.priority.or(submission.priority).unwrap_or(0);
        jobs.push(NewJob { job: JobId::new(), key, request, seed, priority, model });
    }
    errors.sort_by_key(|error| error.line);
    errors.truncate(MAX_LINE_ERRORS);
    if bad_lines > 0 && !options.skip_invalid {
        let lines = if bad_lines == 1 { "1 line is".to_owned() } else { format!("{bad_lines} lines are") };
        return Err(Failure::lines(format!("{lines} bad, nothing was queued"), errors, bad_lines));
    }
    if jobs.is_empty() {
        return Err(Failure::lines("no good line, nothing was queued", errors, bad_lines));
    }
    let reply =
        SubmissionReply { submission: id, new: 0, existing: 0, requeued: 0, lines: errors, bad_lines, waiting: None };
    Ok(Batch { submission: id, jobs, reply })
}
