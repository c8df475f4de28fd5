//! Batches: all the jobs of one submission.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::Uri;
use farm_core::api::{BatchList, BatchView, MAX_LIST};
use farm_core::id::SubmissionId;
use farm_core::job::state::JobState;
use serde::Deserialize;

use super::jobs::MIN_ENDING;
use super::{Api, By, Failure, body};
use crate::core::events::{Scope, Wish};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ListQuery {
    limit: Option<u32>,
}

pub async fn list(State(api): State<Api>, uri: Uri) -> Result<Json<BatchList>, Failure> {
    let ListQuery { limit } = body::query(&uri)?;
    let limit = body::limit(limit)?;
    let batches = api.queue.batches(limit).await?;
    Ok(Json(BatchList { batches: finish(&api, batches).await? }))
}

pub async fn show(State(api): State<Api>, Path(id): Path<String>) -> Result<Json<BatchView>, Failure> {
    view(&api, find(&api, &id).await?).await
}

pub async fn cancel(State(api): State<Api>, Path(id): Path<String>, by: By) -> Result<Json<BatchView>, Failure> {
    change(&api, &id, Wish::CancelBatch, by).await
}

pub async fn pause(State(api): State<Api>, Path(id): Path<String>, by: By) -> Result<Json<BatchView>, Failure> {
    change(&api, &id, |id| Wish::Pause(Scope::Batch(id)), by).await
}

pub async fn resume(State(api): State<Api>, Path(id): Path<String>, by: By) -> Result<Json<BatchView>, Failure> {
    change(&api, &id, |id| Wish::Resume(Scope::Batch(id)), by).await
}

/// A batch that has ended is left as it is.
async fn change(
    api: &Api,
    id: &str,
    wish: impl FnOnce(SubmissionId) -> Wish,
    by: By,
) -> Result<Json<BatchView>, Failure> {
    let id = find(api, id).await?;
    _ = view(api, id).await?;
    api.wish(wish(id), by).await?;
    view(api, id).await
}

async fn view(api: &Api, id: SubmissionId) -> Result<Json<BatchView>, Failure> {
    let batch = api.queue.batch(id).await?.ok_or_else(|| unknown(id))?;
    let mut views = finish(api, vec![batch]).await?;
    views.pop().map(Json).ok_or_else(|| unknown(id))
}

fn unknown(id: SubmissionId) -> Failure {
    Failure::not_found(format!("there is no batch {id}"))
}

/// The batch with this id, or the one of the newest whose id ends so.
pub async fn find(api: &Api, text: &str) -> Result<SubmissionId, Failure> {
    if let Ok(id) = text.parse() {
        return Ok(SubmissionId(id));
    }
    let ending = text.to_ascii_lowercase();
    if !(MIN_ENDING..32).contains(&ending.len()) || !ending.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(Failure::not_found(format!(
            "{text:?} is not a batch id; give all 32 digits or at least the last {MIN_ENDING}"
        )));
    }
    let newest = api.queue.batches(MAX_LIST).await?;
    let found: Vec<_> =
        newest.iter().map(|batch| batch.submission).filter(|id| id.to_string().ends_with(&ending)).collect();
    match found.as_slice() {
        [] => Err(Failure::not_found(format!("no id of the newest {MAX_LIST} batches ends in {ending}"))),
        [id] => Ok(*id),
        several => {
            let ids = several.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            Err(Failure::conflict(format!("several batches' ids end in {ending}: {ids}")))
        }
    }
}

/// Adds what only the running farm knows.
async fn finish(api: &Api, batches: Vec<BatchView>) -> Result<Vec<BatchView>, Failure> {
    let scheduler = api.scheduler()?;
    let finished = scheduler.ask(move |farm| {
        let finish = |batch: BatchView| {
            let eta_seconds = farm.batch_eta(batch.submission);
            let summary = summary(&batch.jobs, batch.paused, eta_seconds);
            BatchView { eta_seconds, summary, ..batch }
        };
        batches.into_iter().map(finish).collect()
    });
    Ok(finished.await?)
}

/// One line for people.
fn summary(jobs: &BTreeMap<JobState, u64>, paused: bool, eta_seconds: Option<f64>) -> String {
    let of = |state| jobs.get(&state).copied().unwrap_or(0);
    let all: u64 = jobs.values().sum();
    let mut parts = vec![format!("{} of {all} done", of(JobState::Done))];
    let others = [JobState::Running, JobState::Queued, JobState::Failed, JobState::Cancelled];
    let others = others.into_iter().filter(|state| of(*state) > 0);
    parts.extend(others.map(|state| format!("{} {}", of(state), state.as_str())));
    if paused {
        parts.push("paused".to_owned());
    } else if let Some(seconds) = eta_seconds {
        parts.push(format!("about {} left", span(seconds)));
    }
    parts.join(", ")
}

/// As exact as a prediction is.
fn span(seconds: f64) -> String {
    match seconds.ceil().max(0.0) as u64 {
        seconds @ 0..120 => format!("{seconds} s"),
        seconds @ 120..7200 => format!("{} min", seconds.div_ceil(60)),
        seconds => format!("{} h", seconds.div_ceil(3600)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_is_told_in_one_line() {
        let jobs = |states: &[(JobState, u64)]| states.iter().copied().collect();
        let busy = jobs(&[(JobState::Done, 7), (JobState::Running, 4), (JobState::Queued, 1)]);
        assert_eq!(summary(&busy, false, Some(39.2)), "7 of 12 done, 4 running, 1 queued, about 40 s left");
        assert_eq!(summary(&busy, false, Some(4000.0)), "7 of 12 done, 4 running, 1 queued, about 67 min left");
        assert_eq!(summary(&busy, true, Some(40.0)), "7 of 12 done, 4 running, 1 queued, paused");
        let ended = jobs(&[(JobState::Done, 1), (JobState::Failed, 2), (JobState::Cancelled, 3)]);
        assert_eq!(summary(&ended, false, None), "1 of 6 done, 2 failed, 3 cancelled");
        assert_eq!(summary(&busy, false, Some(100_000.0)), "7 of 12 done, 4 running, 1 queued, about 28 h left");
    }
}
