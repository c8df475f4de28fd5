//! The dialling end: how a hand gets to a decode on another node, and back to it.

use std::error::Error;
use std::sync::Arc;

use axum::body::Body;
use axum::http::header::{AUTHORIZATION, CONTENT_LENGTH};
use axum::http::{HeaderMap, Method, Request, Response, StatusCode, Uri};
use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder, Retryable};
use bytes::{Bytes, BytesMut};
use farm_core::wire::cluster::tune_socket;
use futures::FutureExt;
use futures::future::BoxFuture;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;
use uuid::Uuid;

use super::channel::{Channel, Hold, Lost, Source, Stream};
use super::counters::{Count, Counting};
use super::server::hex;
use super::{
    CALL_TIME, CONNECTION_WINDOW, CONTENT_SHA256, DEPTH, HAND_NAME, Hand, MAX_HEAD, Patience, RESUMES, STREAM_WINDOW,
    with_causes,
};
use crate::link;

/// What is read of a server's reason to refuse.
const MAX_REASON: usize = 512;
/// Times that a first request is made again.
const RETRIES: usize = 2;
/// A hand that is refused this often in a row when it comes back has no place any more. Once may be a request that was
/// damaged on its way.
const MAX_REFUSALS: u32 = 3;

/// Why a decode was not joined. Nothing is left of the attempt.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JoinError {
    #[error("{url:?} is no decode: {reason}")]
    Url { url: String, reason: String },
    #[error("{peer} cannot be reached: {reason}")]
    Unreachable { peer: String, reason: String },
    #[error("{peer} refused the token")]
    Token { peer: String },
    #[error("{peer} has no such decode (any more): {reason}")]
    Gone { peer: String, reason: String },
    #[error("{peer} takes no more hands: {reason}")]
    Full { peer: String, reason: String },
    #[error("{peer} answered {status}: {reason}")]
    Refused { peer: String, status: u16, reason: String },
}

/// Why a latent was not fetched from its node.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LatentError {
    #[error("the latent: {0}")]
    Refused(#[from] JoinError),
    #[error("{peer} broke off after {got} of {length} bytes of the latent: {reason}")]
    Broken { peer: String, got: usize, length: usize, reason: String },
    #[error("{peer} has a latent of {length} bytes, and {max} are allowed")]
    TooLong { peer: String, length: usize, max: usize },
    #[error("{peer} does not say how long the latent is, or what its hash is")]
    Unannounced { peer: String },
    #[error("{peer} announced a latent of {length} bytes and sent another length")]
    LyingLength { peer: String, length: usize },
    #[error("the latent from {peer} is not the one that was announced: its hash is {got}, not {announced}")]
    WrongHash { peer: String, announced: String, got: String },
}

impl JoinError {
    fn may_pass(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Refused { .. })
    }
}

impl LatentError {
    fn may_pass(&self) -> bool {
        match self {
            Self::Refused(error) => error.may_pass(),
            // Damaged on the way, as far as one can tell.
            Self::Broken { .. } | Self::WrongHash { .. } => true,
            Self::TooLong { .. } | Self::Unannounced { .. } | Self::LyingLength { .. } => false,
        }
    }
}

pub(super) struct Client {
    pub(super) tls: Option<TlsConnector>,
    pub(super) patience: Patience,
    pub(super) counting: Arc<Counting>,
}

/// A decode, as it is asked for.
#[derive(Clone)]
struct Target {
    /// Without a slash at its end.
    url: String,
    host: String,
    port: u16,
    /// `host:port`, for people.
    peer: String,
    token: String,
    /// Of the hand.
    name: String,
}

impl Target {
    fn new(url: &str, token: &str, name: &str, tls: bool) -> Result<Self, JoinError> {
        let wrong = |reason: String| JoinError::Url { url: url.to_owned(), reason };
        let uri: Uri = url.parse().map_err(|error: axum::http::uri::InvalidUri| wrong(error.to_string()))?;
        match (uri.scheme_str(), tls) {
            (Some("https"), true) | (Some("http"), false) => {}
            (Some("https"), false) => return Err(wrong("it takes tls, which this node has no certificate for".into())),
            (Some("http"), true) => return Err(wrong("it does without tls, which this node insists on".into())),
            _ => return Err(wrong("it starts with neither http:// nor https://".into())),
        }
        let host = uri.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
        let port = uri.port_u16().filter(|&port| port > 0).ok_or_else(|| wrong("it has no port".into()))?;
        if host.is_empty() || uri.query().is_some() {
            return Err(wrong("write scheme://host:port/path".into()));
        }
        let peer = uri.authority().map(ToString::to_string).unwrap_or_default();
        Ok(Self {
            url: url.trim_end_matches('/').to_owned(),
            host,
            port,
            peer,
            token: token.to_owned(),
            name: name.to_owned(),
        })
    }

    fn request(&self, method: Method, path: &str, resumes: bool, body: Body) -> Result<Request<Body>, JoinError> {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.url))
            .header(AUTHORIZATION, format!("Bearer {}", self.token))
            .header(HAND_NAME, &self.name);
        if resumes {
            request = request.header(RESUMES, "1");
        }
        request.body(body).map_err(|error| JoinError::Url { url: self.url.clone(), reason: error.to_string() })
    }

    fn unreachable(&self, reason: impl ToString) -> JoinError {
        JoinError::Unreachable { peer: self.peer.clone(), reason: reason.to_string() }
    }
}

/// A connection of its own for every call: one channel's bytes never wait for another's, and dropping it ends the call.
struct Connection {
    requests: SendRequest<Body>,
    driver: JoinSet<()>,
}

impl Client {
    async fn connect(&self, target: &Target) -> Result<Connection, JoinError> {
        let connecting = async {
            let stream = TcpStream::connect((target.host.as_str(), target.port)).await;
            let stream = stream.map_err(|error| target.unreachable(error))?;
            tune_socket(&stream).map_err(|error| target.unreachable(error))?;
            match &self.tls {
                None => handshake(stream, target).await,
                Some(tls) => {
                    let name = ServerName::try_from(target.host.clone()).map_err(|error| target.unreachable(error))?;
                    let stream = tls.connect(name, stream).await;
                    handshake(stream.map_err(|error| target.unreachable(format!("tls: {error}")))?, target).await
                }
            }
        };
        let late = |_| target.unreachable(format!("it did not answer within {:?}", self.patience.connect));
        timeout(self.patience.connect, connecting).await.map_err(late)?
    }

    /// The head of a good answer; what is in others is in the error.
    async fn ask(
        &self,
        target: &Target,
        requests: &mut SendRequest<Body>,
        request: Request<Body>,
    ) -> Result<Response<Incoming>, JoinError> {
        let answering = async {
            let answer = requests.send_request(request).await;
            let answer = answer.map_err(|error| target.unreachable(with_causes(&error)))?;
            let status = answer.status();
            if status == StatusCode::OK {
                return Ok(answer);
            }
            let mut body = answer.into_body();
            let mut reason = BytesMut::new();
            while let Some(Ok(frame)) = body.frame().await {
                let data = frame.into_data().unwrap_or_default();
                reason.extend_from_slice(&data[..data.len().min(MAX_REASON - reason.len())]);
                if reason.len() == MAX_REASON {
                    break;
                }
            }
            let (peer, reason) = (target.peer.clone(), String::from_utf8_lossy(&reason).into_owned());
            Err(match status {
                StatusCode::UNAUTHORIZED => JoinError::Token { peer },
                StatusCode::NOT_FOUND | StatusCode::GONE => JoinError::Gone { peer, reason },
                StatusCode::TOO_MANY_REQUESTS => JoinError::Full { peer, reason },
                _ => JoinError::Refused { peer, status: status.as_u16(), reason },
            })
        };
        let late = |_| target.unreachable(format!("it did not answer within {:?}", self.patience.connect));
        timeout(self.patience.connect, answering).await.map_err(late)?
    }

    async fn stream(&self, target: &Target, hand: Uuid, resumes: bool) -> Result<Stream, JoinError> {
        let Connection { mut requests, driver } = self.connect(target).await?;
        let (outgoing, body) = Stream::outgoing();
        let request = target.request(Method::POST, &format!("/hands/{hand}"), resumes, body)?;
        let answer = self.ask(target, &mut requests, request).await?;
        Ok(Stream::new(Body::new(answer.into_body()), outgoing, Hold::Client { _connection: driver }))
    }

    async fn latent(&self, target: &Target, max: usize) -> Result<Bytes, LatentError> {
        let Connection { mut requests, driver: _driver } = self.connect(target).await?;
        let request = target.request(Method::GET, "/latent", false, Body::empty())?;
        let answer = self.ask(target, &mut requests, request).await?;
        let peer = || target.peer.clone();
        let header = |name: &str| text(answer.headers(), name);
        let length = header(CONTENT_LENGTH.as_str()).and_then(|length| length.parse::<usize>().ok());
        let (Some(length), Some(announced)) = (length, header(CONTENT_SHA256)) else {
            return Err(LatentError::Unannounced { peer: peer() });
        };
        if length > max {
            self.counting.add(Count::OverLimit);
            return Err(LatentError::TooLong { peer: peer(), length, max });
        }
        let lying = || {
            self.counting.add(Count::LyingLength);
            LatentError::LyingLength { peer: peer(), length }
        };
        let mut body = answer.into_body();
        // It grows with what comes, not with what is promised.
        let mut latent = BytesMut::new();
        let broken = |got, reason| LatentError::Broken { peer: peer(), got, length, reason };
        loop {
            match timeout(self.patience.silence, body.frame()).await {
                Err(_) => return Err(broken(latent.len(), "silence".to_owned())),
                Ok(None) => break,
                Ok(Some(Err(error))) if breaks_protocol(&error) => return Err(lying()),
                Ok(Some(Err(error))) => return Err(broken(latent.len(), with_causes(&error))),
                Ok(Some(Ok(frame))) => latent.extend_from_slice(&frame.into_data().unwrap_or_default()),
            }
            if latent.len() > length {
                return Err(lying());
            }
        }
        if latent.len() != length {
            return Err(lying());
        }
        let got = hex(&Sha256::digest(&latent));
        if got != announced {
            self.counting.add(Count::WrongHash);
            return Err(LatentError::WrongHash { peer: peer(), announced, got });
        }
        Ok(latent.freeze())
    }
}

async fn handshake<T>(stream: T, target: &Target) -> Result<Connection, JoinError>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (requests, connection) = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_header_list_size(MAX_HEAD)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|error| target.unreachable(with_causes(&error)))?;
    let mut driver = JoinSet::new();
    driver.spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(error = with_causes(&error), "a connection ended");
        }
    });
    Ok(Connection { requests, driver })
}

fn text(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned)
}

/// HTTP/2 itself notices when a body is not as long as its head said.
fn breaks_protocol(error: &hyper::Error) -> bool {
    std::iter::successors(Some(error as &(dyn Error + 'static)), |error| (*error).source())
        .filter_map(|cause| cause.downcast_ref::<h2::Error>())
        .any(|error| error.reason() == Some(h2::Reason::PROTOCOL_ERROR))
}

fn backoff() -> ExponentialBuilder {
    ExponentialBuilder::default()
        .with_min_delay(std::time::Duration::from_millis(20))
        .with_max_delay(std::time::Duration::from_millis(500))
        .with_jitter()
}

pub(super) async fn join(
    client: &Arc<Client>,
    url: &str,
    token: &str,
    name: &str,
    max_latent: usize,
    max_message: usize,
) -> Result<Hand, JoinError> {
    let target = Target::new(url, token, name, client.tls.is_some())?;
    let hand = Uuid::new_v4();
    let first = || client.stream(&target, hand, false);
    let stream = first.retry(backoff().with_max_times(RETRIES)).when(JoinError::may_pass).await?;
    let (link, ends) = link::pair(DEPTH);
    let redial = Redial::new(client.clone(), target.clone(), hand, stream);
    let source = Source::Dialled(Box::new(redial));
    let (patience, counting) = (client.patience, client.counting.clone());
    tokio::spawn(Channel::new(target.peer.clone(), ends, source, max_message, patience, counting).run());

    let fetch = || client.latent(&target, max_latent);
    let fetched = fetch.retry(backoff().with_max_times(RETRIES)).when(LatentError::may_pass);
    let latent = timeout(CALL_TIME, fetched).await.unwrap_or_else(|_| {
        Err(LatentError::Broken {
            peer: target.peer.clone(),
            got: 0,
            length: max_latent,
            reason: format!("it took more than {CALL_TIME:?}"),
        })
    });
    if let Err(error) = &latent {
        client.counting.add(Count::MissedLatent);
        tracing::warn!(%error, "a latent was not fetched from its node");
    }
    Ok(Hand { latent, link })
}

/// Makes the streams of a hand, one after the other.
pub(super) struct Redial {
    client: Arc<Client>,
    target: Target,
    hand: Uuid,
    backoff: ExponentialBackoff,
    /// Kept between calls of [`Self::next`], which may be dropped at any time.
    dialling: Option<BoxFuture<'static, Result<Stream, JoinError>>>,
    refusals: u32,
}

impl Redial {
    fn new(client: Arc<Client>, target: Target, hand: Uuid, first: Stream) -> Self {
        let dialling = Some(async { Ok(first) }.boxed());
        Self { client, target, hand, backoff: backoff().without_max_times().build(), dialling, refusals: 0 }
    }

    /// Messages come through: the next break is not a consequence of the last.
    pub(super) fn calm(&mut self) {
        self.backoff = backoff().without_max_times().build();
    }

    /// The next stream, as long as that may take. An error if there can be none.
    pub(super) async fn next(&mut self) -> Result<Stream, Lost> {
        loop {
            let dialling = match &mut self.dialling {
                Some(dialling) => dialling,
                None => {
                    let dialling = self.dial();
                    self.dialling.insert(dialling)
                }
            };
            let dialled = dialling.await;
            self.dialling = None;
            match dialled {
                Ok(stream) => {
                    self.refusals = 0;
                    return Ok(stream);
                }
                Err(JoinError::Unreachable { reason, .. }) => {
                    tracing::debug!(peer = %self.target.peer, reason, "a hand does not get back to its decode yet");
                }
                Err(error) => {
                    self.refusals += 1;
                    if self.refusals == MAX_REFUSALS {
                        return Err(Lost(error.to_string()));
                    }
                }
            }
        }
    }

    fn dial(&mut self) -> BoxFuture<'static, Result<Stream, JoinError>> {
        let delay = self.backoff.next().unwrap_or_default();
        let (client, target, hand) = (self.client.clone(), self.target.clone(), self.hand);
        async move {
            tokio::time::sleep(delay).await;
            client.stream(&target, hand, true).await
        }
        .boxed()
    }
}
