//! Finds the scheduler that leads, and finds it again when another takes over.
//!
//! Every call of the API may be made twice without harm, so a call whose answer is lost goes to the next address. A
//! scheduler that stands by says so, and names the leader if it knows it. One that is frozen keeps its connections and
//! says nothing: when a call takes long, it is asked for a sign of life, and if there is none, the others are asked
//! whether one of them leads.

use std::collections::VecDeque;
use std::future::pending;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use farm_core::api::ApiError;
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue};
use reqwest::{Method, RequestBuilder, Response, StatusCode, Url};
use tokio::time::{Instant, sleep};

use crate::error::Error;
use crate::output::clean;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// With other addresses to try.
const SHORT_CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a farm may be without a leader: standbys take over within 7 s.
const PATIENCE: Duration = Duration::from_secs(15);
/// Between two rounds over all addresses, growing.
const ROUND_WAITS: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(1));
/// A call that takes longer makes us look whether the scheduler is alive.
const SUSPICION: Duration = Duration::from_secs(3);
const SIGN_OF_LIFE: Duration = Duration::from_secs(2);
/// Addresses in one round that are not the user's, but named by schedulers that stand by.
const MAX_HINTS: usize = 4;
const MAX_ADDRESSES: usize = 16;
/// Largest JSON answer: a page of jobs with the longest prompts is below it.
const MAX_ANSWER_BYTES: usize = 256 << 20;

/// Where a scheduler may be.
#[derive(Clone, Debug, PartialEq)]
pub struct Address {
    /// As the user, or a scheduler, wrote it.
    pub text: String,
    base: Url,
}

/// One call, ready to be made any number of times.
#[derive(Clone, Debug)]
pub struct Ask {
    method: Method,
    /// Below `/v1`.
    path: Vec<String>,
    query: Vec<(&'static str, String)>,
    body: Option<Bytes>,
    json: bool,
    timeout: Duration,
}

/// What came back, and from where.
#[derive(Debug)]
pub struct Answer<T> {
    pub value: T,
    pub from: Address,
}

/// A call that did not succeed. `repeated`: an earlier try may have done what was asked.
#[derive(Debug)]
pub struct Failed {
    pub error: Error,
    pub repeated: bool,
}

#[derive(Clone)]
pub struct Reach {
    http: reqwest::Client,
    addresses: Arc<[Address]>,
    /// Where the last answer came from.
    leader: Arc<Mutex<Option<Address>>>,
    patience: Duration,
}

/// Why one address gave no answer.
enum Trouble {
    /// Nothing came, or not all of it. `sent`: the scheduler may have got the call.
    Silent { cause: String, sent: bool },
    /// It does not lead, or not yet.
    StandsBy { words: String, leader: Option<Address> },
    /// It is frozen or cut off, and this one leads.
    Superseded(Address),
    /// An answer that no other scheduler would change.
    Final(Error),
}

impl Address {
    pub fn parse(text: &str) -> Result<Self, Error> {
        let bad = |why: &str| {
            Error::with_help(
                format!("{text:?} is no scheduler address: {why}"),
                "write HOST:PORT, as in 127.0.0.1:7070",
            )
        };
        let base = if text.contains("://") { text.to_owned() } else { format!("http://{text}") };
        let base = Url::parse(&base).map_err(|error| bad(&error.to_string()))?;
        if base.scheme() != "http" {
            return Err(bad("only http is spoken"));
        }
        Ok(Self { text: text.to_owned(), base })
    }
}

impl Ask {
    pub fn new(method: Method, path: &[&str], timeout: Duration) -> Self {
        let path = path.iter().map(|part| (*part).to_owned()).collect();
        Self { method, path, query: Vec::new(), body: None, json: false, timeout }
    }

    pub fn query(mut self, key: &'static str, value: Option<impl ToString>) -> Self {
        self.query.extend(value.map(|value| (key, value.to_string())));
        self
    }

    pub fn json(mut self, body: Vec<u8>) -> Self {
        self.body = Some(body.into());
        self.json = true;
        self
    }

    pub fn bytes(mut self, body: Bytes) -> Self {
        self.body = Some(body);
        self
    }
}

impl Reach {
    /// `addresses`: HOST:PORT or URLs, separated by commas.
    pub fn new(addresses: &str, secret: Option<HeaderValue>, user: HeaderValue) -> Result<Self, Error> {
        let list: Vec<Address> =
            addresses.split(',').map(|text| Address::parse(text.trim())).collect::<Result<_, _>>()?;
        if list.len() > MAX_ADDRESSES {
            return Err(Error::usage(format!("{} scheduler addresses, at most {MAX_ADDRESSES} are asked", list.len())));
        }
        let mut headers = HeaderMap::from_iter([("x-farm-user".parse().expect("a header name"), user)]);
        headers.extend(secret.map(|secret| (AUTHORIZATION, secret)));
        let http = reqwest::Client::builder()
            .connect_timeout(if list.len() > 1 { SHORT_CONNECT_TIMEOUT } else { CONNECT_TIMEOUT })
            .default_headers(headers)
            // A farm lives in a private network, and often on this machine.
            .no_proxy()
            // No TLS is spoken; otherwise the client would fail on a machine without certificates.
            .tls_certs_only([])
            .build()
            .map_err(|error| Error::usage(format!("cannot make an http client: {}", causes(&error))))?;
        Ok(Self { http, addresses: list.into(), leader: Arc::default(), patience: PATIENCE })
    }

    /// Goes over the addresses once and no more, for callers that ask again themselves.
    pub fn impatient(&self) -> Self {
        Self { patience: Duration::ZERO, ..self.clone() }
    }

    /// Where the last answer came from; before the first, what the user wrote.
    pub fn address(&self) -> String {
        match self.known_leader() {
            Some(leader) => leader.text,
            None => self.addresses.iter().map(|address| address.text.as_str()).collect::<Vec<_>>().join(","),
        }
    }

    /// A call whose answer is read to its end.
    pub async fn whole(&self, ask: &Ask) -> Result<Answer<Vec<u8>>, Failed> {
        self.reach(ask, async |from, response| body(from, response).await).await
    }

    /// A call whose answer is read by the caller.
    pub async fn stream(&self, ask: &Ask) -> Result<Answer<Response>, Failed> {
        self.reach(ask, async |_, response| Ok(response)).await
    }

    async fn reach<T>(
        &self,
        ask: &Ask,
        read: impl AsyncFn(&Address, Response) -> Result<T, Trouble>,
    ) -> Result<Answer<T>, Failed> {
        let mut repeated = false;
        // A single address that never said anything is a wrong one more often than one that is away.
        let mut patient = self.addresses.len() > 1 || self.known_leader().is_some();
        let mut trouble_since = None;
        let mut wait = ROUND_WAITS.0;
        loop {
            let mut next: VecDeque<Address> = self.known_leader().into_iter().collect();
            next.extend(self.addresses.iter().cloned());
            let mut tried: Vec<(Address, String)> = Vec::new();
            while let Some(address) = next.pop_front() {
                if tried.iter().any(|(earlier, _)| *earlier == address)
                    || tried.len() >= self.addresses.len() + MAX_HINTS
                {
                    continue;
                }
                let cause = match self.attempt(&address, ask, &read).await {
                    Ok(value) => {
                        *self.leader.lock().unwrap_or_else(PoisonError::into_inner) = Some(address.clone());
                        return Ok(Answer { value, from: address });
                    }
                    Err(Trouble::Final(error)) => return Err(Failed { error, repeated }),
                    Err(Trouble::Silent { cause, sent }) => {
                        repeated |= sent;
                        cause
                    }
                    Err(Trouble::StandsBy { words, leader }) => {
                        patient = true;
                        leader.into_iter().for_each(|leader| next.push_front(leader));
                        words
                    }
                    Err(Trouble::Superseded(leader)) => {
                        repeated = true;
                        next.push_front(leader);
                        "no answer, and another leads".to_owned()
                    }
                };
                tried.push((address, cause));
            }
            let since = *trouble_since.get_or_insert_with(Instant::now);
            if !patient || since.elapsed() + wait > self.patience {
                let tried = tried.iter().map(|(address, cause)| format!("{} ({cause})", address.text));
                let tried = clean(&tried.collect::<Vec<_>>().join(", ")).into_owned();
                return Err(Failed { error: Error::Unreachable { tried }, repeated });
            }
            sleep(wait).await;
            wait = (2 * wait).min(ROUND_WAITS.1);
        }
    }

    async fn attempt<T>(
        &self,
        address: &Address,
        ask: &Ask,
        read: impl AsyncFn(&Address, Response) -> Result<T, Trouble>,
    ) -> Result<T, Trouble> {
        let once = async {
            let response = self.request(address, ask).send().await.map_err(|error| silent(&error))?;
            if response.status().is_success() {
                return read(address, response).await;
            }
            Err(refusal(address, response).await)
        };
        tokio::select! {
            outcome = once => outcome,
            leader = self.superseded(address) => Err(Trouble::Superseded(leader)),
        }
    }

    /// Ends when `address` gives no sign of life and another one leads.
    async fn superseded(&self, address: &Address) -> Address {
        if self.addresses.iter().all(|other| other == address) {
            return pending().await;
        }
        loop {
            sleep(SUSPICION).await;
            if self.leads(address).await {
                continue;
            }
            for other in self.addresses.iter().filter(|other| *other != address) {
                if self.leads(other).await {
                    return other.clone();
                }
            }
        }
    }

    async fn leads(&self, address: &Address) -> bool {
        let ask = Ask::new(Method::GET, &["farm"], SIGN_OF_LIFE);
        self.request(address, &ask).send().await.is_ok_and(|response| response.status().is_success())
    }

    fn request(&self, address: &Address, ask: &Ask) -> RequestBuilder {
        let mut url = address.base.clone();
        // Cannot fail: an http URL can carry a path.
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().push("v1").extend(&ask.path);
        }
        for (key, value) in &ask.query {
            url.query_pairs_mut().append_pair(key, value);
        }
        let mut request = self.http.request(ask.method.clone(), url).timeout(ask.timeout);
        if ask.json {
            request = request.header(CONTENT_TYPE, "application/json");
        }
        match &ask.body {
            Some(body) => request.body(body.clone()),
            None => request,
        }
    }

    fn known_leader(&self) -> Option<Address> {
        self.leader.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

async fn body(from: &Address, mut response: Response) -> Result<Vec<u8>, Trouble> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(|error| silent(&error))? {
        if body.len() + chunk.len() > MAX_ANSWER_BYTES {
            return Err(Trouble::Final(not_a_farm(from, "an answer without end")));
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

/// What an answer other than success means.
async fn refusal(from: &Address, response: Response) -> Trouble {
    let status = response.status();
    let body = match body(from, response).await {
        Ok(body) => body,
        Err(trouble) => return trouble,
    };
    let Ok(answer) = serde_json::from_slice::<ApiError>(&body) else {
        return Trouble::Final(not_a_farm(from, format!("http status {status}")));
    };
    let hint = match status {
        // A scheduler that stands by, starts or stops says so in this way.
        StatusCode::BAD_GATEWAY | StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT => {
            // An address that cannot be read helps as little as none.
            let leader = answer.leader.as_deref().and_then(|leader| Address::parse(leader).ok());
            return Trouble::StandsBy { words: answer.error, leader };
        }
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            Some("give the farm's secret with --secret-file FILE or FARM_SECRET_FILE".to_owned())
        }
        _ => None,
    };
    Trouble::Final(Error::Refused { status: status.as_u16(), answer, hint })
}

pub fn not_a_farm(from: &Address, cause: impl AsRef<str>) -> Error {
    Error::NotAFarm { address: from.text.clone(), cause: clean(cause.as_ref()).into_owned() }
}

fn silent(error: &reqwest::Error) -> Trouble {
    Trouble::Silent { cause: causes(error), sent: !error.is_connect() }
}

/// The innermost cause is the one that says something: `connection refused`, not `error sending request`.
pub fn causes(error: &reqwest::Error) -> String {
    let mut innermost: &dyn std::error::Error = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    plain_words(&innermost.to_string())
}

/// `Connection refused (os error 111)` without the number, which says nothing to people.
fn plain_words(error: &str) -> String {
    error.split(" (os error ").next().unwrap_or_default().to_lowercase()
}

#[cfg(test)]
mod tests;
