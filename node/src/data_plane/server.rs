//! The serving end: which decodes are open here, and who may join them.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::extract::{Extension, Path, Request, State};
use axum::http::header::{AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Router, body::Body};
use bytes::Bytes;
use farm_core::wire::cluster::tune_socket;
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, interval, sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::channel::{Channel, Hold, Source, Stream};
use super::counters::{Count, Counting};
use super::{
    CALL_TIME, CONNECTION_WINDOW, CONTENT_SHA256, DEPTH, HAND_NAME, Joined, MAX_HEAD, Patience, RESUMES, STREAM_WINDOW,
};
use crate::link;

/// Connections at a time, of all peers and of one address. A hand has one for its channel, and for a moment one more.
const MAX_CONNECTIONS: usize = 1024;
const MAX_CONNECTIONS_OF_PEER: usize = 128;
/// Requests at a time on one connection.
const MAX_STREAMS: u32 = 8;
/// Streams that a channel has not looked at yet.
const OFFERS: usize = 2;
/// Bytes of a hand's name. A result has one for each of its hands.
const MAX_HAND_NAME: usize = 128;
/// A connection whose channel has ended is closed after this, if its peer does not.
const AFTER_CHANNEL: Duration = Duration::from_secs(5);

pub(super) struct Shared {
    base: String,
    patience: Patience,
    counting: Arc<Counting>,
    decodes: Mutex<HashMap<Uuid, Decode>>,
    connections: Mutex<HashMap<IpAddr, usize>>,
}

struct Decode {
    token: String,
    max_message: usize,
    max_hands: usize,
    /// Gone when the decode is closed: then only hands that have joined come back.
    open: Option<Open>,
    /// Streams of a hand go to its channel.
    hands: HashMap<Uuid, mpsc::Sender<Stream>>,
}

struct Open {
    latent: Bytes,
    sha256: String,
    joined: mpsc::Sender<Joined>,
}

/// A decode that hands can join. Dropped, it takes no more; those that have joined keep their links.
pub struct OpenDecode {
    pub url: String,
    /// Who bears it may join.
    pub token: String,
    pub joined: mpsc::Receiver<Joined>,
    _close: Close,
}

struct Close {
    shared: Arc<Shared>,
    id: Uuid,
}

impl Drop for Close {
    fn drop(&mut self) {
        let mut decodes = self.shared.decodes();
        if let Some(decode) = decodes.get_mut(&self.id) {
            decode.open = None;
            if decode.hands.is_empty() {
                decodes.remove(&self.id);
            }
        }
    }
}

impl Shared {
    pub(super) fn new(base: String, patience: Patience, counting: Arc<Counting>) -> Self {
        Self { base, patience, counting, decodes: Mutex::default(), connections: Mutex::default() }
    }

    pub(super) fn base(&self) -> &str {
        &self.base
    }

    fn decodes(&self) -> MutexGuard<'_, HashMap<Uuid, Decode>> {
        self.decodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn connections(&self) -> MutexGuard<'_, HashMap<IpAddr, usize>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
impl Shared {
    /// Decodes, and hands of all of them.
    pub(super) fn held(&self) -> (usize, usize) {
        let decodes = self.decodes();
        (decodes.len(), decodes.values().map(|decode| decode.hands.len()).sum())
    }

    pub(super) fn forget_hands(&self) {
        self.decodes().values_mut().for_each(|decode| decode.hands.clear());
    }
}

pub(super) fn open(shared: &Arc<Shared>, latent: Bytes, max_message: usize, max_hands: usize) -> OpenDecode {
    let id = Uuid::new_v4();
    let token = hex(&rand::random::<[u8; 32]>());
    let (joined, receiver) = mpsc::channel(max_hands.max(1));
    let sha256 = hex(&Sha256::digest(&latent));
    let open = Some(Open { latent, sha256, joined });
    let decode = Decode { token: token.clone(), max_message, max_hands, open, hands: HashMap::new() };
    shared.decodes().insert(id, decode);
    let url = format!("{}/v1/decodes/{id}", shared.base);
    OpenDecode { url, token, joined: receiver, _close: Close { shared: shared.clone(), id } }
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Known of a connection when a request comes in on it.
#[derive(Clone)]
struct Caller {
    peer: SocketAddr,
    /// A clone for every channel on the connection.
    in_use: Arc<()>,
}

/// Why a request is not answered as it wants to be.
enum Refusal {
    Token,
    Unknown,
    Closed,
    Full { max_hands: usize },
    Busy,
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let (status, reason) = match self {
            Self::Token => (StatusCode::UNAUTHORIZED, "wrong token".into()),
            Self::Unknown => (StatusCode::NOT_FOUND, "no such decode".into()),
            Self::Closed => (StatusCode::GONE, "the decode, or the hand's part in it, has ended".into()),
            Self::Full { max_hands } => {
                (StatusCode::TOO_MANY_REQUESTS, format!("{max_hands} hands work on it, which is enough"))
            }
            Self::Busy => (StatusCode::SERVICE_UNAVAILABLE, "the hand's last stream is not dealt with yet".to_owned()),
        };
        (status, reason).into_response()
    }
}

fn admit(shared: &Shared, decode: &Decode, peer: SocketAddr, headers: &HeaderMap) -> Result<(), Refusal> {
    let token = headers.get(AUTHORIZATION).and_then(|value| value.as_bytes().strip_prefix(b"Bearer "));
    if token.is_some_and(|token| bool::from(token.ct_eq(decode.token.as_bytes()))) {
        return Ok(());
    }
    shared.counting.add(Count::RefusedToken);
    tracing::warn!(%peer, "a request for a decode has the wrong token");
    Err(Refusal::Token)
}

async fn latent(
    State(shared): State<Arc<Shared>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<Uuid>,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    let decodes = shared.decodes();
    let decode = decodes.get(&id).ok_or(Refusal::Unknown)?;
    admit(&shared, decode, caller.peer, &headers)?;
    let Open { latent, sha256, .. } = decode.open.as_ref().ok_or(Refusal::Closed)?;
    let headers = [
        (CONTENT_TYPE.as_str(), "application/octet-stream".to_owned()),
        (CONTENT_LENGTH.as_str(), latent.len().to_string()),
        (CONTENT_SHA256, sha256.clone()),
    ];
    Ok((headers, Body::from(latent.clone())).into_response())
}

async fn hand(
    State(shared): State<Arc<Shared>>,
    Extension(caller): Extension<Caller>,
    Path((id, hand)): Path<(Uuid, Uuid)>,
    request: Request,
) -> Result<Response, Refusal> {
    let mut decodes = shared.decodes();
    let decode = decodes.get_mut(&id).ok_or(Refusal::Unknown)?;
    admit(&shared, decode, caller.peer, request.headers())?;
    let resumes = request.headers().contains_key(RESUMES);
    let hold = Hold::Server { _in_use: caller.in_use };
    let (outgoing, body) = Stream::outgoing();
    let name = name(request.headers());
    let stream = Stream::new(request.into_body(), outgoing, hold);
    if let Some(offers) = decode.hands.get(&hand) {
        return match offers.try_send(stream) {
            Ok(()) => Ok(body.into_response()),
            Err(mpsc::error::TrySendError::Full(_)) => Err(Refusal::Busy),
            Err(mpsc::error::TrySendError::Closed(_)) => Err(Refusal::Closed),
        };
    }
    let Some(open) = decode.open.as_ref().filter(|_| !resumes) else { return Err(Refusal::Closed) };
    let full = Refusal::Full { max_hands: decode.max_hands };
    let room = match open.joined.try_reserve() {
        Ok(room) if decode.hands.len() < decode.max_hands => room,
        Err(mpsc::error::TrySendError::Closed(())) => return Err(Refusal::Closed),
        _ => {
            shared.counting.add(Count::OverLimit);
            tracing::warn!(peer = %caller.peer, max_hands = decode.max_hands, "a hand is refused: there are enough");
            return Err(full);
        }
    };
    let (offers, offered) = mpsc::channel(OFFERS);
    // Just made, it has room.
    let _ = offers.try_send(stream);
    let (link, ends) = link::pair(DEPTH);
    let peer = caller.peer.to_string();
    let channel = Channel::new(
        peer.clone(),
        ends,
        Source::Offered(offered),
        decode.max_message,
        shared.patience,
        shared.counting.clone(),
    );
    room.send(Joined { name: name.unwrap_or(peer), link });
    decode.hands.insert(hand, offers);
    let seat = Seat { shared: shared.clone(), id, hand };
    tokio::spawn(async move {
        let _seat = seat;
        channel.run().await;
    });
    Ok(body.into_response())
}

/// A device of a node, as results name it: `node-b 0`.
fn name(headers: &HeaderMap) -> Option<String> {
    let name = headers.get(HAND_NAME)?.to_str().ok()?;
    (1..=MAX_HAND_NAME).contains(&name.len()).then(|| name.to_owned())
}

/// A hand's place in a decode; free when its channel ends, however that is.
struct Seat {
    shared: Arc<Shared>,
    id: Uuid,
    hand: Uuid,
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut decodes = self.shared.decodes();
        if let Some(decode) = decodes.get_mut(&self.id) {
            decode.hands.remove(&self.hand);
            if decode.hands.is_empty() && decode.open.is_none() {
                decodes.remove(&self.id);
            }
        }
    }
}

/// Serves until `stop`, then cuts every connection.
pub(super) async fn serve(
    listener: TcpListener,
    acceptor: Option<TlsAcceptor>,
    shared: Arc<Shared>,
    stop: CancellationToken,
) {
    let router = Router::new()
        .route("/v1/decodes/{id}/latent", get(latent))
        .route("/v1/decodes/{id}/hands/{hand}", post(hand))
        .with_state(shared.clone());
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
            // Forgets connections that have ended.
            Some(_) = connections.join_next() => continue,
        };
        match accepted {
            Ok((stream, peer)) => match Place::take(&shared, peer.ip(), connections.len()) {
                Some(place) => {
                    let served = connection(stream, acceptor.clone(), peer, router.clone(), shared.patience);
                    connections.spawn(async move {
                        let _place = place;
                        if let Err(error) = served.await {
                            tracing::debug!(%peer, error, "a connection ended");
                        }
                    });
                }
                None => {
                    shared.counting.add(Count::OverLimit);
                    tracing::warn!(%peer, "a connection is refused: there are too many");
                }
            },
            Err(error) => {
                // Out of file descriptors, or the peer left early. Trying on at once would spin.
                tracing::warn!(%error, "cannot accept a connection");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// One of the connections that a peer may have.
struct Place {
    shared: Arc<Shared>,
    peer: IpAddr,
}

impl Place {
    fn take(shared: &Arc<Shared>, peer: IpAddr, taken: usize) -> Option<Self> {
        let mut connections = shared.connections();
        let of_peer = connections.entry(peer).or_default();
        if *of_peer >= MAX_CONNECTIONS_OF_PEER || taken >= MAX_CONNECTIONS {
            return None;
        }
        *of_peer += 1;
        Some(Self { shared: shared.clone(), peer })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut connections = self.shared.connections();
        if let Some(of_peer) = connections.get_mut(&self.peer) {
            *of_peer -= 1;
            if *of_peer == 0 {
                connections.remove(&self.peer);
            }
        }
    }
}

async fn connection(
    stream: TcpStream,
    acceptor: Option<TlsAcceptor>,
    peer: SocketAddr,
    router: Router,
    patience: Patience,
) -> Result<(), String> {
    tune_socket(&stream).map_err(|error| error.to_string())?;
    match acceptor {
        None => http(stream, peer, router, patience).await,
        Some(acceptor) => {
            let accepted = timeout(patience.connect, acceptor.accept(stream)).await;
            match accepted.map_err(|_| "tls took too long".to_owned()).and_then(|done| done.map_err(|e| e.to_string()))
            {
                Ok(stream) => http(stream, peer, router, patience).await,
                Err(error) => {
                    tracing::warn!(%peer, error, "a connection is refused: no tls with a certificate of the farm");
                    Err(error)
                }
            }
        }
    }
}

async fn http<T: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    stream: T,
    peer: SocketAddr,
    router: Router,
    patience: Patience,
) -> Result<(), String> {
    let in_use = Arc::new(());
    let asked = Arc::new(AtomicBool::new(false));
    let routed = TowerToHyperService::new(router);
    let caller = Caller { peer, in_use: in_use.clone() };
    let asks = asked.clone();
    let service = service_fn(move |mut request: hyper::Request<Incoming>| {
        asks.store(true, Ordering::Relaxed);
        request.extensions_mut().insert(caller.clone());
        routed.call(request)
    });
    // The service has a caller to clone.
    let idle = Arc::strong_count(&in_use);
    let connection = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(MAX_HEAD)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let began = Instant::now();
    let mut closes_at = began + CALL_TIME;
    let mut tick = interval((patience.connect / 2).min(Duration::from_secs(1)));
    loop {
        tokio::select! {
            ended = connection.as_mut() => return ended.map_err(|error| super::with_causes(&error)),
            _ = tick.tick() => {}
        }
        let now = Instant::now();
        if Arc::strong_count(&in_use) > idle {
            closes_at = closes_at.max(now + AFTER_CHANNEL);
        }
        if !asked.load(Ordering::Relaxed) && now >= began + patience.connect {
            return Err("nothing was asked for".into());
        }
        if now >= closes_at {
            return Err("it has been open for long enough without a channel".into());
        }
    }
}
