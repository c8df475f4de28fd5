//! The scheduler's HTTP API, call by call.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use farm_core::api::{
    ApiError, CommitSubmission, FarmInfo, JobDetail, JobPage, JobView, LogPage, NodeList, OpenSubmission,
    SubmissionOpened, SubmissionReply, SubmissionStatus,
};
use farm_core::id::{JobId, SubmissionId};
use farm_core::job::state::JobState;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use reqwest::{Method, RequestBuilder, Response, StatusCode, Url};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use crate::error::Error;
use crate::output::clean;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const CALL_TIMEOUT: Duration = Duration::from_secs(60);
/// Reading and queueing the largest file.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(600);
/// A clip of any size; each piece of it has [`CALL_TIMEOUT`].
const CLIP_TIMEOUT: Duration = Duration::from_secs(3600);
/// Largest JSON answer: a page of jobs with the longest prompts is below it.
const MAX_ANSWER_BYTES: usize = 256 << 20;
const MAX_SECRET_BYTES: usize = 4096;

#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    base: Url,
    /// As the user wrote it.
    address: String,
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
#[derive(Clone, Copy, Debug)]
pub enum Change {
    Cancel,
    Retry,
}

/// A clip on its way: its checksum, then its bytes.
pub struct Clip {
    /// Lowercase hex, as the scheduler has it from the result.
    pub sha256: String,
    response: Response,
    address: String,
}

impl Client {
    pub fn new(address: &str, secret_file: Option<&Path>) -> Result<Self, Error> {
        let bad = |why: &str| {
            Error::with_help(
                format!("{address:?} is no scheduler address: {why}"),
                "write HOST:PORT, as in 127.0.0.1:7070",
            )
        };
        let base = if address.contains("://") { address.to_owned() } else { format!("http://{address}") };
        let base = Url::parse(&base).map_err(|error| bad(&error.to_string()))?;
        if base.scheme() != "http" {
            return Err(bad("only http is spoken"));
        }
        let mut headers = HeaderMap::new();
        if let Some(path) = secret_file {
            headers.insert(AUTHORIZATION, authorization(path)?);
        }
        let http = reqwest::Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .default_headers(headers)
            // A farm lives in a private network, and often on this machine.
            .no_proxy()
            // No TLS is spoken; otherwise the client would fail on a machine without certificates.
            .tls_certs_only([])
            .build()
            .map_err(|error| bad(&causes(&error)))?;
        Ok(Self { http, base, address: address.to_owned() })
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    pub async fn farm(&self) -> Result<FarmInfo, Error> {
        self.get(&["farm"], &[]).await
    }

    pub async fn nodes(&self) -> Result<NodeList, Error> {
        self.get(&["nodes"], &[]).await
    }

    pub async fn open_submission(&self, body: &OpenSubmission) -> Result<SubmissionOpened, Error> {
        self.post(&["submissions"], body).await
    }

    /// Page `number` of the file, from 0.
    pub async fn put_page(&self, submission: SubmissionId, number: u64, page: Bytes) -> Result<(), Error> {
        let path = ["submissions", &submission.to_string(), "pages", &number.to_string()];
        self.send(self.request(Method::PUT, &path, &[]).body(page)).await?;
        Ok(())
    }

    pub async fn commit(&self, submission: SubmissionId, body: &CommitSubmission) -> Result<SubmissionReply, Error> {
        let path = ["submissions", &submission.to_string(), "commit"];
        let request = self.request(Method::POST, &path, &[]).json(body).timeout(COMMIT_TIMEOUT);
        self.answer(self.send(request).await?).await
    }

    pub async fn submission(&self, submission: SubmissionId) -> Result<SubmissionStatus, Error> {
        self.get(&["submissions", &submission.to_string()], &[]).await
    }

    pub async fn jobs(&self, query: JobQuery) -> Result<JobPage, Error> {
        let query = [
            ("state", query.state.map(|state| state.as_str().to_owned())),
            ("submission", query.submission.map(|id| id.to_string())),
            ("after", query.after.map(|id| id.to_string())),
            ("limit", query.limit.map(|limit| limit.to_string())),
        ];
        self.get(&["jobs"], &query).await
    }

    /// The job with this id or unique ending of an id.
    pub async fn job(&self, id: &str) -> Result<JobDetail, Error> {
        let id = job_id_text(id)?;
        self.get(&["jobs", &id], &[]).await
    }

    pub async fn log(&self, job: JobId, after: u64) -> Result<LogPage, Error> {
        self.get(&["jobs", &job.to_string(), "log"], &[("after", Some(after.to_string()))]).await
    }

    pub async fn change(&self, job: JobId, change: Change) -> Result<JobView, Error> {
        let verb = match change {
            Change::Cancel => "cancel",
            Change::Retry => "retry",
        };
        self.post(&["jobs", &job.to_string(), verb], &BTreeMap::<(), ()>::new()).await
    }

    pub async fn clip(&self, job: JobId) -> Result<Clip, Error> {
        let request = self.request(Method::GET, &["jobs", &job.to_string(), "clip"], &[]);
        let response = self.send(request.timeout(CLIP_TIMEOUT)).await?;
        let sha256 = response.headers().get("x-content-sha256").and_then(|value| value.to_str().ok());
        let Some(sha256) = sha256.filter(|text| text.len() == 64).map(str::to_ascii_lowercase) else {
            return Err(self.not_a_farm("the clip came without its sha-256"));
        };
        Ok(Clip { sha256, response, address: self.address.clone() })
    }

    async fn get<T: DeserializeOwned>(&self, path: &[&str], query: &[(&str, Option<String>)]) -> Result<T, Error> {
        self.answer(self.send(self.request(Method::GET, path, query)).await?).await
    }

    async fn post<T: DeserializeOwned>(&self, path: &[&str], body: &impl Serialize) -> Result<T, Error> {
        self.answer(self.send(self.request(Method::POST, path, &[]).json(body)).await?).await
    }

    fn request(&self, method: Method, path: &[&str], query: &[(&str, Option<String>)]) -> RequestBuilder {
        let mut url = self.base.clone();
        // Cannot fail: `new` refused addresses that cannot carry a path.
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().push("v1").extend(path);
        }
        for (key, value) in query {
            if let Some(value) = value {
                url.query_pairs_mut().append_pair(key, value);
            }
        }
        self.http.request(method, url).timeout(CALL_TIMEOUT)
    }

    async fn send(&self, request: RequestBuilder) -> Result<Response, Error> {
        let response = request.send().await.map_err(|error| self.unreachable(&error))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let body = self.body(response).await?;
        let Ok(answer) = serde_json::from_slice::<ApiError>(&body) else {
            return Err(self.not_a_farm(format!("http status {status}")));
        };
        let hint = match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                Some("give the farm's secret with --secret-file FILE or FARM_SECRET_FILE".to_owned())
            }
            _ => None,
        };
        Err(Error::Refused { status: status.as_u16(), answer, hint })
    }

    async fn answer<T: DeserializeOwned>(&self, response: Response) -> Result<T, Error> {
        let body = self.body(response).await?;
        serde_json::from_slice(&body).map_err(|error| self.not_a_farm(error.to_string()))
    }

    async fn body(&self, mut response: Response) -> Result<Vec<u8>, Error> {
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|error| self.unreachable(&error))? {
            if body.len() + chunk.len() > MAX_ANSWER_BYTES {
                return Err(self.not_a_farm("an answer without end"));
            }
            body.extend_from_slice(&chunk);
        }
        Ok(body)
    }

    fn unreachable(&self, error: &reqwest::Error) -> Error {
        Error::Unreachable { address: self.address.clone(), cause: causes(error) }
    }

    fn not_a_farm(&self, cause: impl AsRef<str>) -> Error {
        Error::NotAFarm { address: self.address.clone(), cause: clean(cause.as_ref()).into_owned() }
    }
}

impl Clip {
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, Error> {
        let cause = match timeout(CALL_TIMEOUT, self.response.chunk()).await {
            Ok(Ok(chunk)) => return Ok(chunk),
            Ok(Err(error)) => causes(&error),
            Err(_) => format!("nothing came for {} s", CALL_TIMEOUT.as_secs()),
        };
        Err(Error::Unreachable { address: self.address.clone(), cause })
    }
}

/// The innermost cause is the one that says something: `connection refused`, not `error sending request`.
fn causes(error: &reqwest::Error) -> String {
    let mut innermost: &dyn std::error::Error = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    plain_words(&innermost.to_string())
}

/// `Connection refused (os error 111)` without the number, which says nothing to people.
pub fn plain_words(error: &str) -> String {
    error.split(" (os error ").next().unwrap_or_default().to_lowercase()
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

/// The hex digits of a whole job id or of its ending; dashes are for the eye only.
fn job_id_text(id: &str) -> Result<String, Error> {
    let digits: String = id.chars().filter(|c| *c != '-').collect();
    if (4..=32).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Ok(digits.to_ascii_lowercase());
    }
    Err(Error::with_help(
        format!("{:?} is no job id", clean(id)),
        "give an id as in `farmctl list`, or at least its last 4 digits",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_whole_or_endings_with_or_without_dashes() {
        assert_eq!(job_id_text("1A2b").unwrap(), "1a2b");
        assert_eq!(job_id_text("01890a5d-ac96-774b-bcce-b302099a8057").unwrap(), "01890a5dac96774bbcceb302099a8057");
        for bad in ["", "abc", "../farm", "xyzw", "01890a5dac96774bbcceb302099a80570"] {
            assert!(job_id_text(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn addresses_are_checked_before_anything_is_sent() {
        for good in ["127.0.0.1:7070", "[::1]:7070", "http://farm:7070/", "http://farm/prefix"] {
            Client::new(good, None).unwrap();
        }
        for bad in ["", "http://", "https://farm", "a b:1"] {
            assert!(Client::new(bad, None).is_err(), "{bad}");
        }
    }

    #[test]
    fn paths_keep_a_prefix_and_queries_are_escaped() {
        let client = Client::new("http://farm:1/prefix/", None).unwrap();
        let request = client.request(Method::GET, &["jobs", "a/b"], &[("after", Some("x&y".into())), ("limit", None)]);
        assert_eq!(request.build().unwrap().url().as_str(), "http://farm:1/prefix/v1/jobs/a%2Fb?after=x%26y");
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
}
