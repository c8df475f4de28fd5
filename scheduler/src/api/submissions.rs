//! A prompt file goes up in pages and is committed once.

use std::collections::{BTreeSet, HashMap};

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use farm_core::api::{
    CommitSubmission, LineError, MAX_SUBMISSION_BYTES, OpenSubmission, PAGE_BYTES, SubmissionOpened, SubmissionReply,
};
use farm_core::id::SubmissionId;
use farm_core::job::prompt::{PromptFile, PromptParser};
use farm_core::job::spec::{MAX_AFTER, MAX_PRIORITY};
use jiff::Timestamp;
use uuid::Uuid;

use super::draft::{Draft, Prepared};
use super::{Api, Failure, body, tenants};
use crate::actor::CallError;
use crate::queue::store::QueueError;

const MAX_PAGES: u32 = (MAX_SUBMISSION_BYTES / PAGE_BYTES) as u32;
const MAX_MODEL_NAME: usize = 128;

fn parse_id(text: &str) -> Result<SubmissionId, Failure> {
    text.parse().map(SubmissionId).map_err(|_| Failure::not_found(format!("{text:?} is not a submission id")))
}

fn unknown(id: SubmissionId) -> Failure {
    Failure::not_found(format!("there is no submission {id}; uploads that are not committed are kept for an hour"))
}

pub async fn open(State(api): State<Api>, body: Body) -> Result<(StatusCode, Json<SubmissionOpened>), Failure> {
    let open: OpenSubmission = body::read_json(body).await?;
    if let Some(name) = &open.model
        && (name.is_empty() || name.len() > MAX_MODEL_NAME)
    {
        return Err(Failure::bad_request(format!("model name has {} bytes, not 1..={MAX_MODEL_NAME}", name.len())));
    }
    if let Some(priority) = open.priority
        && !(0..=MAX_PRIORITY).contains(&priority)
    {
        return Err(Failure::refused(format!("priority {priority} is not in 0..={MAX_PRIORITY}")));
    }
    if open.after.len() > MAX_AFTER {
        let entries = open.after.len();
        return Err(Failure::refused(format!("\"after\" has {entries} entries, at most {MAX_AFTER} are allowed")));
    }
    let tenant = open.tenant.clone();
    if !api.scheduler()?.ask(move |farm| farm.knows_tenant(&tenant)).await? {
        return Err(tenants::unknown(&open.tenant));
    }
    let submission = SubmissionId(Uuid::now_v7());
    api.queue.open_submission(submission, open, Timestamp::now()).await?;
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

pub async fn commit(
    State(api): State<Api>,
    Path(id): Path<String>,
    body: Body,
) -> Result<Json<SubmissionReply>, Failure> {
    let id = parse_id(&id)?;
    let options: CommitSubmission = body::read_json(body).await?;
    let scheduler = api.scheduler()?;
    // Held to the end: a repeated commit waits for the first and then finds its reply.
    let _permit = api.commits.acquire().await.map_err(|_| Failure::from(CallError::Stopped))?;
    let submission = api.queue.submission(id).await?.ok_or_else(|| unknown(id))?;
    if let Some(reply) = submission.reply {
        return Ok(Json(reply));
    }
    let file = read_file(&api, id, options.bytes).await?;
    let models = scheduler.ask(|farm| farm.models()).await?;
    let draft = blocking(move || Draft::new(id, file, submission, &models, options)).await??;
    let prepared = draft.check(&api, &scheduler).await?;
    let Prepared { batch, named } = blocking(move || prepared.finish()).await??;
    let models: BTreeSet<Option<String>> = batch.jobs.iter().map(|job| job.model.clone()).collect();
    let committed = scheduler.commit(batch).await?.map_err(|error| match error {
        QueueError::Refused(reason) => refused(reason, &named),
        error => error.into(),
    })?;
    let reasons = scheduler.ask(move |farm| {
        let reasons = models.iter().filter_map(|model| farm.cannot_start(model.as_deref()));
        reasons.collect::<Vec<_>>()
    });
    let reasons = reasons.await?;
    let waiting = (!reasons.is_empty()).then(|| reasons.join("; "));
    Ok(Json(SubmissionReply { waiting, ..committed.reply }))
}

/// The store's refusal, with the line that names what it speaks of.
fn refused(reason: String, named: &HashMap<Uuid, u64>) -> Failure {
    match named.iter().find(|(id, _)| reason.contains(&id.simple().to_string())) {
        Some((_, &line)) => {
            let error = LineError { line, column: 1, reason };
            Failure::lines("1 line is bad, nothing was queued", vec![error], 1)
        }
        None => Failure::refused(format!("{reason}; nothing was queued")),
    }
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
