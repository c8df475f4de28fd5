//! Waits for jobs by asking again and again. A scheduler that restarts meanwhile, or hands over to another, is waited
//! for.

use std::collections::{HashSet, VecDeque};
use std::path::Path;
use std::time::Duration;

use farm_core::api::{JobView, MAX_LIST};
use farm_core::id::{JobId, SubmissionId};
use farm_core::job::state::JobState;
use tokio::time::{Instant, sleep, sleep_until};

use crate::board::Board;
use crate::client::{Client, JobQuery};
use crate::command::fetch;
use crate::error::{Error, Status};
use crate::output::{self, name};

const POLL: Duration = Duration::from_millis(250);
/// How long a scheduler may be away before waiting for it ends.
const PATIENCE: Duration = Duration::from_secs(60);
/// Running jobs shown at one time.
const SHOWN: u32 = 50;
/// Jobs looked at in one go; most of a poll's news is near the oldest unfinished job.
const SCAN: u32 = 200;
/// Names in the last summary; each was already printed when it happened.
const NAMED: usize = 20;

/// What came of the jobs that were waited for.
#[derive(Debug, Default)]
pub struct Outcome {
    done: u64,
    /// Name and fate of each job that left no clip.
    lost: Vec<String>,
}

impl Outcome {
    /// The last line for people, and the status that goes with it.
    pub fn report(&self, json: bool) -> Status {
        if self.lost.is_empty() {
            match self.done {
                _ if json => {}
                0 => eprintln!("nothing is queued or running"),
                done => eprintln!("{} done", output::plural(done, "clip")),
            }
            return Status::Ok;
        }
        let mut names = self.lost[..self.lost.len().min(NAMED)].join(", ");
        if self.lost.len() > NAMED {
            names += &format!(" and {} more", self.lost.len() - NAMED);
        }
        eprintln!("{} done, {} not: {names}", output::plural(self.done, "clip"), self.lost.len());
        Status::ClipFailed
    }

    /// Fetches the clip if `out` says where to, and shows the end of the job.
    async fn settle(
        &mut self,
        client: &Client,
        board: &mut Board,
        job: &JobView,
        out: Option<&Path>,
    ) -> Result<(), Error> {
        let fate = match (job.state, out) {
            (JobState::Done, Some(dir)) => {
                match patiently(board, async || fetch::fetch_clip(client, job, dir).await).await {
                    Ok(file) => {
                        self.done += 1;
                        return board.finished(job, Some(&file));
                    }
                    Err(error @ (Error::Unreachable { .. } | Error::NotAFarm { .. })) => return Err(error),
                    Err(error) => {
                        board.note(&format!("{:<9} {}  {error}", "not here", name(job)));
                        "not fetched"
                    }
                }
            }
            (JobState::Done, None) => {
                self.done += 1;
                return board.finished(job, None);
            }
            (state, _) => state.as_str(),
        };
        self.lost.push(format!("{} ({fate})", name(job)));
        board.finished(job, None)
    }
}

/// Follows the jobs of a submission until each has ended once.
pub async fn submission(
    client: &Client,
    submission: SubmissionId,
    board: &mut Board,
    out: Option<&Path>,
) -> Result<Outcome, Error> {
    let client = &client.impatient();
    let mut outcome = Outcome::default();
    let mut tracker = Tracker::default();
    let mut backlog = VecDeque::new();
    loop {
        let next_poll = Instant::now() + POLL;
        let batch = patiently(board, async || client.batch(&submission.to_string()).await).await?;
        let running = list(client, board, Some(submission), JobState::Running, SHOWN).await?;
        board.running(&running)?;
        let waiting = waiting_reason(client, board, Some(submission), &running).await?;
        board.totals(&batch.summary, waiting.as_deref());

        let total: u64 = batch.jobs.values().sum();
        let ended: u64 = batch.jobs.iter().filter(|(state, _)| state.is_terminal()).map(|(_, count)| count).sum();
        if backlog.is_empty() && tracker.ended < ended {
            backlog.extend(tracker.scan(client, board, submission, ended).await?);
        }
        let news = !backlog.is_empty();
        while let Some(job) = backlog.pop_front() {
            outcome.settle(client, board, &job, out).await?;
            if Instant::now() >= next_poll {
                break;
            }
        }
        if backlog.is_empty() && tracker.ended >= total {
            return Ok(outcome);
        }
        if !news || tracker.ended >= ended {
            sleep_until(next_poll).await;
        }
    }
}

/// Follows one job to its end.
pub async fn job(client: &Client, id: JobId, board: &mut Board) -> Result<Outcome, Error> {
    let client = &client.impatient();
    let mut outcome = Outcome::default();
    loop {
        let next_poll = Instant::now() + POLL;
        let job = patiently(board, async || client.job(&id.to_string()).await).await?.view;
        let running = job.state == JobState::Running;
        board.running(if running { std::slice::from_ref(&job) } else { &[] })?;
        let waiting = if job.state == JobState::Queued { job.reason.as_deref() } else { None };
        board.totals(&format!("1 {}", job.state.as_str()), waiting);
        if job.state.is_terminal() {
            outcome.settle(client, board, &job, None).await?;
            return Ok(outcome);
        }
        sleep_until(next_poll).await;
    }
}

/// A live view of the whole farm, until nothing is queued or running. It shows the end of every job that it saw
/// running.
pub async fn farm(client: &Client, board: &mut Board) -> Result<Outcome, Error> {
    let client = &client.impatient();
    let mut outcome = Outcome::default();
    let mut before: Vec<JobId> = Vec::new();
    loop {
        let next_poll = Instant::now() + POLL;
        let info = patiently(board, async || client.farm().await).await?;
        let running = list(client, board, None, JobState::Running, SHOWN).await?;
        board.running(&running)?;
        let waiting = waiting_reason(client, board, None, &running).await?;
        board.totals(&output::counts(&info.jobs), waiting.as_deref());
        for id in before.drain(..).filter(|id| !running.iter().any(|job| job.job == *id)) {
            let job = patiently(board, async || client.job(&id.to_string()).await).await?.view;
            if job.state.is_terminal() {
                outcome.settle(client, board, &job, None).await?;
            }
        }
        before.extend(running.iter().map(|job| job.job));
        let unfinished = |state| info.jobs.get(&state).copied().unwrap_or(0);
        if before.is_empty() && unfinished(JobState::Queued) + unfinished(JobState::Running) == 0 {
            return Ok(outcome);
        }
        sleep_until(next_poll).await;
    }
}

async fn list(
    client: &Client,
    board: &Board,
    submission: Option<SubmissionId>,
    state: JobState,
    limit: u32,
) -> Result<Vec<JobView>, Error> {
    let query = JobQuery { state: Some(state), submission, limit: Some(limit), ..JobQuery::default() };
    Ok(patiently(board, async || client.jobs(query).await).await?.jobs)
}

/// Why nothing runs: what the first queued job waits for.
async fn waiting_reason(
    client: &Client,
    board: &Board,
    submission: Option<SubmissionId>,
    running: &[JobView],
) -> Result<Option<String>, Error> {
    if !running.is_empty() {
        return Ok(None);
    }
    let queued = list(client, board, submission, JobState::Queued, 1).await?;
    Ok(queued.into_iter().next().and_then(|job| job.reason))
}

async fn patiently<T>(board: &Board, call: impl AsyncFn() -> Result<T, Error>) -> Result<T, Error> {
    persist(|text| board.note(text), call).await
}

/// Repeats a call of an impatient client while the scheduler is away, for [`PATIENCE`] at most.
pub async fn persist<T>(note: impl Fn(&str), call: impl AsyncFn() -> Result<T, Error>) -> Result<T, Error> {
    let mut deadline = None;
    loop {
        let error = match call().await {
            Err(error @ Error::Unreachable { .. }) => error,
            answer => return answer,
        };
        let deadline = *deadline.get_or_insert_with(|| {
            note(&format!("{error}; trying for {} s", PATIENCE.as_secs()));
            Instant::now() + PATIENCE
        });
        if Instant::now() >= deadline {
            return Err(error);
        }
        sleep(2 * POLL).await;
    }
}

/// Finds the jobs of a submission that have ended since the last look, without reading the whole list each time.
#[derive(Debug, Default)]
struct Tracker {
    /// Every job up to this one has ended. Listings begin after it.
    cursor: Option<JobId>,
    /// Ended jobs after the cursor.
    beyond: HashSet<JobId>,
    /// Jobs that have ended once. One that a user retries meanwhile stays counted.
    ended: u64,
}

impl Tracker {
    /// Looks through the list until it has found what ended, or enough for now.
    async fn scan(
        &mut self,
        client: &Client,
        board: &Board,
        submission: SubmissionId,
        ended: u64,
    ) -> Result<Vec<JobView>, Error> {
        let mut news = Vec::new();
        let mut query =
            JobQuery { submission: Some(submission), after: self.cursor, limit: Some(SCAN), ..JobQuery::default() };
        let mut contiguous = true;
        loop {
            let page = patiently(board, async || client.jobs(query).await).await?;
            self.take(page.jobs, &mut contiguous, &mut news);
            if page.next.is_none() || self.ended >= ended || news.len() >= SCAN as usize {
                return Ok(news);
            }
            query = JobQuery { after: page.next, limit: Some(MAX_LIST), ..query };
        }
    }

    /// `contiguous`: every job between the cursor and this page has ended.
    fn take(&mut self, page: Vec<JobView>, contiguous: &mut bool, news: &mut Vec<JobView>) {
        for job in page {
            let id = job.job;
            if job.state.is_terminal() && self.beyond.insert(id) {
                self.ended += 1;
                news.push(job);
            }
            if *contiguous && self.beyond.remove(&id) {
                self.cursor = Some(id);
            } else {
                *contiguous = false;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use farm_core::id::AttemptNo;
    use uuid::Uuid;

    fn view(number: u128, state: JobState) -> JobView {
        JobView {
            job: JobId(Uuid::from_u128(number)),
            id: None,
            state,
            prompt: String::new(),
            model: None,
            priority: 0,
            tenant: Default::default(),
            submitted: jiff::Timestamp::UNIX_EPOCH,
            finished: None,
            attempt: AttemptNo(1),
            node: None,
            progress: None,
            reason: None,
            clip: None,
            warnings: Vec::new(),
        }
    }

    /// The list after the cursor, as the scheduler would send it.
    fn look(tracker: &mut Tracker, states: &[JobState]) -> Vec<u128> {
        let cursor = tracker.cursor.map_or(0, |id| id.0.as_u128());
        let jobs = states.iter().zip(1..).map(|(state, number)| view(number, *state));
        let page = jobs.filter(|job| job.job.0.as_u128() > cursor).collect();
        let mut news = Vec::new();
        tracker.take(page, &mut true, &mut news);
        news.iter().map(|job| job.job.0.as_u128()).collect()
    }

    #[test]
    fn each_end_is_found_once_in_any_order() {
        use JobState::*;
        let mut tracker = Tracker::default();
        assert_eq!(look(&mut tracker, &[Running, Done, Queued, Queued]), [2]);
        assert_eq!(look(&mut tracker, &[Running, Done, Queued, Queued]), [0u128; 0]);
        assert_eq!(tracker.cursor, None);
        assert_eq!(look(&mut tracker, &[Done, Done, Running, Failed]), [1, 4]);
        assert_eq!((tracker.cursor.unwrap().0.as_u128(), tracker.ended), (2, 3));
        assert_eq!(look(&mut tracker, &[Done, Done, Cancelled, Failed]), [3]);
        assert_eq!((tracker.cursor.unwrap().0.as_u128(), tracker.ended, tracker.beyond.len()), (4, 4, 0));
    }

    #[test]
    fn a_job_retried_meanwhile_stays_counted() {
        use JobState::*;
        let mut tracker = Tracker::default();
        assert_eq!(look(&mut tracker, &[Queued, Failed]), [2]);
        assert_eq!(look(&mut tracker, &[Done, Running]), [1]);
        assert_eq!((tracker.ended, tracker.cursor.unwrap().0.as_u128()), (2, 2));
    }

    #[test]
    fn lost_clips_are_named_and_decide_the_status() {
        let lost = (0..NAMED + 2).map(|n| format!("clip-{n} (failed)")).collect();
        assert_eq!(Outcome { done: 3, lost }.report(false), Status::ClipFailed);
        assert_eq!(Outcome { done: 3, lost: vec![] }.report(true), Status::Ok);
    }
}
