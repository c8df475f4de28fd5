//! The scheduler's HTTP API, call by call.

mod reach;

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use farm_core::api::{
    AuditPage, BatchList, BatchView, CommitSubmission, FarmInfo, GcReport, GcRequest, JobDetail, JobPage, JobView,
    LogPage, NodeList, NodeView, OpenSubmission, QueueView, SubmissionOpened, SubmissionReply, TenantList, TenantSpec,
    TenantView, UsageList, WhyView,
};
use farm_core::id::{JobId, NodeId, SubmissionId, TenantId};
use farm_core::job::state::JobState;
use jiff::Timestamp;
use reqwest::header::HeaderValue;
use reqwest::{Method, Response};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use self::reach::{Address, Ask, Failed, Reach, causes, not_a_farm};
use crate::error::Error;
use crate::output::clean;

const CALL_TIMEOUT: Duration = Duration::from_secs(60);
/// Reading and queueing the largest file; removing what years have left.
const LONG_TIMEOUT: Duration = Duration::from_secs(600);
/// A clip of any size; each piece of it has [`CALL_TIMEOUT`].
const CLIP_TIMEOUT: Duration = Duration::from_secs(3600);
const MAX_SECRET_BYTES: usize = 4096;
/// More is refused.
const MAX_USER_BYTES: usize = 64;

#[derive(Clone)]
pub struct Client {
    reach: Reach,
}

/// Which jobs to list.
#[derive(Clone, Copy, Debug, Default)]
pub struct JobQuery {
    pub state: Option<JobState>,
    pub submission: Option<SubmissionId>,
    /// Only jobs after this one.
    pub after: Option<JobId>,
    pub limit: Option<u32>,
}

/// What to do with a job.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Change {
    Cancel,
    Retry,
    Pause,
    Resume,
}

/// What a person means by an id.
#[derive(Clone, Debug)]
pub enum Named {
    Job(Box<JobDetail>),
    Batch(BatchView),
}

/// A clip on its way: its checksum, then its bytes.
pub struct Clip {
    /// Lowercase hex, as the scheduler has it from the result.
    pub sha256: String,
    response: Response,
    from: Address,
}

impl Change {
    fn verb(self) -> &'static str {
        match self {
            Self::Cancel => "cancel",
            Self::Retry => "retry",
            Self::Pause => "pause",
            Self::Resume => "resume",
        }
    }

    /// A job that this has been done to looks so.
    fn is_done(self, state: JobState) -> bool {
        match self {
            Self::Cancel => state == JobState::Cancelled,
            Self::Retry => matches!(state, JobState::Queued | JobState::Running),
            // Both may be asked for any number of times.
            Self::Pause | Self::Resume => false,
        }
    }
}

impl Client {
    /// `addresses`: where schedulers of one farm may be, separated by commas.
    pub fn new(addresses: &str, secret_file: Option<&Path>) -> Result<Self, Error> {
        let secret = secret_file.map(authorization).transpose()?;
        Ok(Self { reach: Reach::new(addresses, secret, user())? })
    }

    /// Does not wait for a scheduler that is away, for callers that ask again themselves.
    pub fn impatient(&self) -> Self {
        Self { reach: self.reach.impatient() }
    }

    /// Of the scheduler that answered last.
    pub fn address(&self) -> String {
        self.reach.address()
    }

    pub async fn farm(&self) -> Result<FarmInfo, Error> {
        self.get(&["farm"]).await
    }

    pub async fn nodes(&self) -> Result<NodeList, Error> {
        self.get(&["nodes"]).await
    }

    pub async fn drain(&self, node: &NodeId, drain: bool) -> Result<NodeView, Error> {
        self.post(&["nodes", &node.0, if drain { "drain" } else { "undrain" }], &Nothing {}).await
    }

    /// Opening twice is harmless: one that gets no pages is forgotten.
    pub async fn open_submission(&self, body: &OpenSubmission) -> Result<SubmissionOpened, Error> {
        self.post(&["submissions"], body).await
    }

    /// Page `number` of the file, from 0.
    pub async fn put_page(&self, submission: SubmissionId, number: u64, page: Bytes) -> Result<(), Error> {
        let path = ["submissions", &submission.to_string(), "pages", &number.to_string()];
        let ask = Ask::new(Method::PUT, &path, CALL_TIMEOUT).bytes(page);
        self.reach.whole(&ask).await.map(drop).map_err(|failed| failed.error)
    }

    pub async fn commit(&self, submission: SubmissionId, body: &CommitSubmission) -> Result<SubmissionReply, Error> {
        let path = ["submissions", &submission.to_string(), "commit"];
        self.answer(&Ask::new(Method::POST, &path, LONG_TIMEOUT).json(encode(body)?)).await
    }

    pub async fn batches(&self) -> Result<BatchList, Error> {
        self.get(&["submissions"]).await
    }

    /// The batch with this id or unique ending of an id.
    pub async fn batch(&self, id: &str) -> Result<BatchView, Error> {
        self.get(&["submissions", &id_digits(id)?]).await
    }

    pub async fn change_batch(&self, submission: SubmissionId, change: Change) -> Result<BatchView, Error> {
        self.post(&["submissions", &submission.to_string(), change.verb()], &Nothing {}).await
    }

    pub async fn jobs(&self, query: JobQuery) -> Result<JobPage, Error> {
        let ask = Ask::new(Method::GET, &["jobs"], CALL_TIMEOUT)
            .query("state", query.state.map(JobState::as_str))
            .query("submission", query.submission)
            .query("after", query.after)
            .query("limit", query.limit);
        self.answer(&ask).await
    }

    /// The job with this id or unique ending of an id.
    pub async fn job(&self, id: &str) -> Result<JobDetail, Error> {
        self.get(&["jobs", &id_digits(id)?]).await
    }

    /// The job or the batch with this id or unique ending of an id.
    pub async fn find(&self, id: &str) -> Result<Named, Error> {
        let digits = id_digits(id)?;
        let job = known(self.get(&["jobs", &digits]).await)?;
        let batch = known(self.get(&["submissions", &digits]).await)?;
        match (job, batch) {
            (Some(job), None) => Ok(Named::Job(job)),
            (None, Some(batch)) => Ok(Named::Batch(batch)),
            (Some(_), Some(_)) => {
                let message = format!("{} is the end of a job's id and of a batch's", clean(id));
                Err(Error::with_help(message, "give more digits of it"))
            }
            (None, None) => {
                let message = format!("there is no job and no batch {}", clean(id));
                Err(Error::with_help(message, "`farmctl list` and `farmctl batches` name them"))
            }
        }
    }

    pub async fn log(&self, job: JobId, after: u64) -> Result<LogPage, Error> {
        let path = ["jobs", &job.to_string(), "log"];
        self.answer(&Ask::new(Method::GET, &path, CALL_TIMEOUT).query("after", Some(after))).await
    }

    pub async fn change(&self, job: JobId, change: Change) -> Result<JobView, Error> {
        let path = ["jobs", &job.to_string(), change.verb()];
        let ask = Ask::new(Method::POST, &path, CALL_TIMEOUT).json(encode(&Nothing {})?);
        match self.exchange(&ask).await {
            // The answer to the first try was lost, and the second finds that there is nothing to do any more.
            Err(Failed { error: error @ Error::Refused { status: 409, .. }, repeated: true }) => {
                let now = self.job(&job.to_string()).await?.view;
                if change.is_done(now.state) { Ok(now) } else { Err(error) }
            }
            outcome => outcome.map_err(|failed| failed.error),
        }
    }

    pub async fn why(&self, job: JobId) -> Result<WhyView, Error> {
        self.get(&["jobs", &job.to_string(), "why"]).await
    }

    pub async fn clip(&self, job: JobId) -> Result<Clip, Error> {
        let ask = Ask::new(Method::GET, &["jobs", &job.to_string(), "clip"], CLIP_TIMEOUT);
        let answer = self.reach.stream(&ask).await.map_err(|failed| failed.error)?;
        let sha256 = answer.value.headers().get("x-content-sha256").and_then(|value| value.to_str().ok());
        let Some(sha256) = sha256.filter(|text| text.len() == 64).map(str::to_ascii_lowercase) else {
            return Err(not_a_farm(&answer.from, "the clip came without its sha-256"));
        };
        Ok(Clip { sha256, response: answer.value, from: answer.from })
    }

    pub async fn queue(&self) -> Result<QueueView, Error> {
        self.get(&["queue"]).await
    }

    /// Pauses or resumes the whole farm.
    pub async fn change_farm(&self, change: Change) -> Result<QueueView, Error> {
        self.post(&["queue", change.verb()], &Nothing {}).await
    }

    pub async fn tenants(&self) -> Result<TenantList, Error> {
        self.get(&["tenants"]).await
    }

    pub async fn set_tenant(&self, tenant: &TenantId, spec: &TenantSpec) -> Result<TenantView, Error> {
        let ask = Ask::new(Method::PUT, &["tenants", tenant.as_str()], CALL_TIMEOUT).json(encode(spec)?);
        self.answer(&ask).await
    }

    pub async fn change_tenant(&self, tenant: &TenantId, change: Change) -> Result<TenantView, Error> {
        self.post(&["tenants", tenant.as_str(), change.verb()], &Nothing {}).await
    }

    pub async fn usage(
        &self,
        by: &str,
        since: Option<Timestamp>,
        until: Option<Timestamp>,
    ) -> Result<UsageList, Error> {
        let ask = Ask::new(Method::GET, &["usage"], CALL_TIMEOUT)
            .query("by", Some(by))
            .query("since", since)
            .query("until", until);
        self.answer(&ask).await
    }

    pub async fn audit(&self, after: u64) -> Result<AuditPage, Error> {
        self.answer(&Ask::new(Method::GET, &["audit"], CALL_TIMEOUT).query("after", Some(after))).await
    }

    pub async fn gc(&self, request: &GcRequest) -> Result<GcReport, Error> {
        self.answer(&Ask::new(Method::POST, &["gc"], LONG_TIMEOUT).json(encode(request)?)).await
    }

    async fn get<T: DeserializeOwned>(&self, path: &[&str]) -> Result<T, Error> {
        self.answer(&Ask::new(Method::GET, path, CALL_TIMEOUT)).await
    }

    async fn post<T: DeserializeOwned>(&self, path: &[&str], body: &impl Serialize) -> Result<T, Error> {
        self.answer(&Ask::new(Method::POST, path, CALL_TIMEOUT).json(encode(body)?)).await
    }

    async fn answer<T: DeserializeOwned>(&self, ask: &Ask) -> Result<T, Error> {
        self.exchange(ask).await.map_err(|failed| failed.error)
    }

    async fn exchange<T: DeserializeOwned>(&self, ask: &Ask) -> Result<T, Failed> {
        let answer = self.reach.whole(ask).await?;
        serde_json::from_slice(&answer.value)
            .map_err(|error| Failed { error: not_a_farm(&answer.from, error.to_string()), repeated: false })
    }
}

impl Clip {
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, Error> {
        let cause = match timeout(CALL_TIMEOUT, self.response.chunk()).await {
            Ok(Ok(chunk)) => return Ok(chunk),
            Ok(Err(error)) => causes(&error),
            Err(_) => format!("nothing came for {} s", CALL_TIMEOUT.as_secs()),
        };
        Err(Error::Unreachable { tried: format!("{} ({cause})", self.from.text) })
    }
}

/// The body of calls that say all in their path.
#[derive(Serialize)]
struct Nothing {}

fn encode(body: &impl Serialize) -> Result<Vec<u8>, Error> {
    serde_json::to_vec(body).map_err(|error| Error::usage(format!("cannot be written as json: {error}")))
}

/// `None` if there is none of that name.
fn known<T>(outcome: Result<T, Error>) -> Result<Option<T>, Error> {
    match outcome {
        Err(Error::Refused { status: 404, .. }) => Ok(None),
        outcome => outcome.map(Some),
    }
}

/// Who asks, for the audit trail: `FARM_USER`, else USER@HOST.
fn user() -> HeaderValue {
    let name = std::env::var("FARM_USER").ok().filter(|name| !name.trim().is_empty()).unwrap_or_else(|| {
        let user = std::env::var("USER").or_else(|_| std::env::var("LOGNAME")).unwrap_or_else(|_| "somebody".into());
        match std::fs::read_to_string("/proc/sys/kernel/hostname") {
            Ok(host) => format!("{user}@{}", host.trim()),
            Err(_) => user,
        }
    });
    user_header(&name)
}

/// What a header cannot carry becomes `?`.
fn user_header(name: &str) -> HeaderValue {
    let plain = |c: char| if c.is_ascii_graphic() || c == ' ' { c } else { '?' };
    let name: String = name.trim().chars().map(plain).take(MAX_USER_BYTES).collect();
    HeaderValue::from_str(&name).unwrap_or_else(|_| HeaderValue::from_static("somebody"))
}

fn authorization(path: &Path) -> Result<HeaderValue, Error> {
    let text = std::fs::read_to_string(path).map_err(Error::file("read the secret file", path))?;
    let secret = text.trim();
    if secret.is_empty() || secret.len() > MAX_SECRET_BYTES {
        let message = format!("the secret in {} has to have 1 to {MAX_SECRET_BYTES} characters", path.display());
        return Err(Error::usage(message));
    }
    let mut value = HeaderValue::from_str(&format!("Bearer {secret}"))
        .map_err(|_| Error::usage(format!("the secret in {} is not one line of plain characters", path.display())))?;
    value.set_sensitive(true);
    Ok(value)
}

/// The hex digits of a whole id or of its ending; dashes are for the eye only.
fn id_digits(id: &str) -> Result<String, Error> {
    let digits: String = id.chars().filter(|c| *c != '-').collect();
    if (4..=32).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Ok(digits.to_ascii_lowercase());
    }
    Err(Error::with_help(
        format!("{:?} is no id", clean(id)),
        "give an id as in `farmctl list` or `farmctl batches`, or at least its last 4 digits",
    ))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use serde_json::json;

    use super::*;
    use crate::pretended::{Pretended, Reply, pretend};

    #[test]
    fn ids_are_whole_or_endings_with_or_without_dashes() {
        assert_eq!(id_digits("1A2b").unwrap(), "1a2b");
        assert_eq!(id_digits("01890a5d-ac96-774b-bcce-b302099a8057").unwrap(), "01890a5dac96774bbcceb302099a8057");
        for bad in ["", "abc", "../farm", "xyzw", "01890a5dac96774bbcceb302099a80570"] {
            assert!(id_digits(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn addresses_are_checked_before_anything_is_sent() {
        for good in ["127.0.0.1:7070", "[::1]:7070", "http://farm:7070/", "http://farm/prefix"] {
            Client::new(good, None).unwrap();
        }
        for good in ["a:1,b:2", " a:1, http://b:2/ "] {
            Client::new(good, None).unwrap();
        }
        for bad in ["", "http://", "https://farm", "a b:1", "a:1,", ","] {
            assert!(Client::new(bad, None).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_user_of_any_name_fits_into_a_header() {
        assert_eq!(user_header(" ada@lab ").to_str().unwrap(), "ada@lab");
        assert_eq!(user_header("Zoë\r\nx: y").to_str().unwrap(), "Zo???x: y");
        assert_eq!(user_header(&"x".repeat(500)).len(), MAX_USER_BYTES);
    }

    #[test]
    fn a_secret_never_shows_in_debug_output() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret");
        std::fs::write(&path, "hunter2\n").unwrap();
        let value = authorization(&path).unwrap();
        assert_eq!((value.to_str().unwrap(), format!("{value:?}").as_str()), ("Bearer hunter2", "Sensitive"));
        std::fs::write(&path, " \n").unwrap();
        assert!(authorization(&path).is_err());
    }

    /// A scheduler that does what it is asked once, and whose answer to that is lost.
    async fn forgetful(change: &'static str, state: &'static str) -> Pretended {
        let done = Arc::new(AtomicBool::new(false));
        let job = json!({
            "job": JobId(uuid::Uuid::nil()), "id": null, "state": state, "prompt": "", "model": null, "priority": 0,
            "submitted": "2026-11-27T08:00:00Z", "finished": null, "attempt": 1, "node": null, "progress": null,
            "reason": null, "clip": null, "request": {"prompt": ""}, "seed": 1, "attempts": [], "result": null
        });
        pretend(move |call, _| match call.ends_with(change) {
            true if done.swap(true, Ordering::SeqCst) => Reply::Json(409, json!({"error": "cannot be done"})),
            true => Reply::Broken,
            false => Reply::Json(200, job.clone()),
        })
        .await
    }

    #[tokio::test]
    async fn a_change_whose_answer_was_lost_has_happened() {
        for (change, state, known) in [
            (Change::Cancel, "cancelled", true),
            (Change::Retry, "queued", true),
            // It was done before: the refusal is the answer.
            (Change::Cancel, "done", false),
        ] {
            let scheduler = forgetful(change.verb(), state).await;
            let client = Client::new(&scheduler.address, None).unwrap();
            let job = client.job("00000000").await.unwrap().view.job;
            let outcome = client.change(job, change).await;
            assert_eq!(outcome.is_ok(), known, "{change:?} {state}: {outcome:?}");
        }
    }

    #[tokio::test]
    async fn an_id_names_a_job_or_a_batch() {
        let batch = json!({
            "submission": SubmissionId(uuid::Uuid::nil()), "tenant": "default", "submitted": "2026-11-27T08:00:00Z",
            "jobs": {"queued": 2}, "max_failures": null, "paused": false, "eta_seconds": null, "summary": "2 queued"
        });
        let scheduler = pretend(move |call, _| match call {
            "GET /v1/submissions/0000" => Reply::Json(200, batch.clone()),
            "GET /v1/jobs/abcd" => Reply::Json(409, json!({"error": "abcd ends several ids"})),
            _ => Reply::Json(404, json!({"error": "there is none"})),
        })
        .await;
        let client = Client::new(&scheduler.address, None).unwrap();
        assert!(matches!(client.find("0000").await, Ok(Named::Batch(batch)) if batch.summary == "2 queued"));
        assert_eq!(client.find("abcd").await.unwrap_err().to_string(), "abcd ends several ids");
        assert_eq!(client.find("ffff").await.unwrap_err().to_string(), "there is no job and no batch ffff");
    }
}
