//! Carries wire messages between processes over ractor_cluster.
//!
//! There is one port in a farm: the scheduler's HTTP port. A node asks for `POST /v1/cluster` with
//! `Upgrade: mochi-farm`, its boot id and the farm's secret; after the 101 reply both ends hand the raw stream to
//! ractor_cluster as an external connection. So ractor only ever sees peers that HTTP has authenticated (it keeps
//! silent strangers for ever), its accept loop is not used, and socket timeouts are ours: keepalive and
//! `TCP_USER_TIMEOUT` end a dead link in about 10 s, which ractor_cluster itself never notices.
//!
//! ractor_cluster carries hints, never truth: a message may be lost, late or doubled. Each process has one remotable
//! actor, the gateway, which passes frames on as bytes; decoding happens where the peer can be named.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::{AUTHORIZATION, CONNECTION, HOST, UPGRADE};
use hyper::{HeaderMap, Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use ractor::{Actor, ActorId, ActorProcessingErr, ActorRef, pg};
use ractor_cluster::node::{NodeConnectionMode, NodeServerSessionInformation};
use ractor_cluster::{
    BoxRead, BoxWrite, ClusterBidiStream, NodeEventSubscription, NodeServer, NodeServerMessage, NodeSessionMessage,
    RactorClusterMessage,
};
use sha2::{Digest, Sha256};
use tokio::net::TcpStream;
use tokio::sync::mpsc;

use super::{MAX_ENVELOPE_BYTES, PROTOCOL};
use crate::api::ApiError;
use crate::id::BootId;

/// Path of the upgrade request.
pub const UPGRADE_PATH: &str = "/v1/cluster";
/// Protocol name in the `Upgrade` header.
pub const UPGRADE_PROTOCOL: &str = "mochi-farm";
/// Header with the boot id of the node that dials.
pub const BOOT_HEADER: &str = "x-farm-boot";
/// Header with the [`PROTOCOL`] of either end, in the request and in the answer.
pub const PROTOCOL_HEADER: &str = "x-farm-protocol";
/// Header with the program's version of either end. Another version of the same protocol is no obstacle.
pub const VERSION_HEADER: &str = "x-farm-version";

/// Time for connecting, for the HTTP upgrade, and for ractor's own handshake; each.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Unacknowledged bytes end a connection after this.
const USER_TIMEOUT: Duration = Duration::from_secs(10);
/// Frames that wait for the process to read them. A full queue drops the frame: its sender repeats what matters.
const INBOUND_QUEUE: usize = 4096;
/// Bytes of an answer that refuses a node.
const MAX_REFUSAL: usize = 16 << 10;
const SCHEDULER_GROUP: &str = "farm-scheduler";

#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    #[error("cannot start the cluster gateway: {0}")]
    Start(String),
    #[error("no session with {0}")]
    NoSession(String),
    #[error("frame of {bytes} bytes is over the limit of {MAX_ENVELOPE_BYTES}")]
    TooLarge { bytes: usize },
    #[error("cannot connect to scheduler {addr}: {source}")]
    Connect { addr: String, source: std::io::Error },
    #[error("scheduler {addr} did not answer within {} s", HANDSHAKE_TIMEOUT.as_secs())]
    Timeout { addr: String },
    #[error("{addr} does not speak HTTP: {source}")]
    Http { addr: String, source: hyper::Error },
    #[error("scheduler {addr} refused the connection: {status}; {reason}")]
    Refused { addr: String, status: StatusCode, reason: String },
    /// It waits for the leader to go; `leader` is that one's address, if it is known.
    #[error("scheduler {addr} stands by{}", leader.as_ref().map(|leader| format!(", {leader} leads")).unwrap_or_default())]
    Standby { addr: String, leader: Option<String> },
}

/// Whether a node whose upgrade request has these headers speaks as we do; if not, what to tell it.
pub fn check_protocol(headers: &HeaderMap) -> Result<(), String> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or("unknown");
    let (protocol, version, ours) = (text(PROTOCOL_HEADER), text(VERSION_HEADER), crate::VERSION);
    if protocol == PROTOCOL.to_string() {
        return Ok(());
    }
    Err(format!(
        "the node is of version {version:.40} and speaks protocol {protocol:.10}, the scheduler is of version {ours} and \
         speaks protocol {PROTOCOL}; run the same version on both"
    ))
}

/// What the process learns from its peers.
#[derive(Debug, PartialEq, Eq)]
pub enum ClusterEvent {
    /// A session is open both ways. `peer` is a node's boot id, or the scheduler's own for a node.
    Ready { peer: BootId },
    /// An encoded envelope. Its own header says who sent it.
    Frame(Vec<u8>),
    /// The session is gone; what was sent on it may be lost.
    Closed { peer: BootId },
}

/// The only message that crosses processes. Bytes, because ractor drops what it cannot decode without a word.
#[derive(RactorClusterMessage)]
enum GatewayMessage {
    Frame(Vec<u8>),
}

struct Gateway;

impl Actor for Gateway {
    type Msg = GatewayMessage;
    type State = mpsc::Sender<ClusterEvent>;
    type Arguments = mpsc::Sender<ClusterEvent>;

    async fn pre_start(
        &self,
        _: ActorRef<Self::Msg>,
        events: Self::Arguments,
    ) -> Result<Self::State, ActorProcessingErr> {
        Ok(events)
    }

    async fn handle(
        &self,
        _: ActorRef<Self::Msg>,
        message: GatewayMessage,
        events: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        let GatewayMessage::Frame(bytes) = message;
        if bytes.len() > MAX_ENVELOPE_BYTES {
            tracing::warn!(bytes = bytes.len(), "dropped an oversize frame");
        } else if events.try_send(ClusterEvent::Frame(bytes)).is_err() {
            tracing::warn!("dropped a frame: the inbound queue is full");
        }
        Ok(())
    }
}

type Sessions = Arc<Mutex<HashMap<ActorId, (BootId, ActorRef<NodeSessionMessage>)>>>;

/// ractor's session events, turned into ours.
struct Subscription {
    events: mpsc::Sender<ClusterEvent>,
    sessions: Sessions,
}

/// Our ractor node names are `{boot}@farm`; see [`Cluster::start`].
fn boot_of(session: &NodeServerSessionInformation) -> Option<BootId> {
    let name = &session.peer_name.as_ref()?.name;
    name.split('@').next()?.parse().ok().map(BootId)
}

impl Subscription {
    fn emit(&self, event: ClusterEvent) {
        // Called on ractor's session manager, which must not block. Losing `Closed` only delays what a missing
        // heartbeat finds anyway.
        if let Err(error) = self.events.try_send(event) {
            tracing::warn!(%error, "dropped a session event");
        }
    }
}

impl NodeEventSubscription for Subscription {
    fn node_session_opened(&self, _: NodeServerSessionInformation) {}
    fn node_session_authenticated(&self, _: NodeServerSessionInformation) {}

    fn node_session_ready(&self, session: NodeServerSessionInformation) {
        if let Some(peer) = boot_of(&session) {
            lock(&self.sessions).insert(session.actor.get_id(), (peer, session.actor.clone()));
            self.emit(ClusterEvent::Ready { peer });
        }
    }

    fn node_session_disconnected(&self, session: NodeServerSessionInformation) {
        let removed = lock(&self.sessions).remove(&session.actor.get_id());
        if let Some((peer, _)) = removed {
            self.emit(ClusterEvent::Closed { peer });
        }
    }
}

/// The map is plain data; a panic elsewhere cannot leave it half written.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Which end of the star this process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Scheduler,
    Node,
}

/// This process's place in the cluster. Cloning shares it.
#[derive(Clone)]
pub struct Cluster {
    boot: BootId,
    server: ActorRef<NodeServerMessage>,
    sessions: Sessions,
}

impl Cluster {
    /// Starts the gateway and ractor's session manager. One per process: ractor's registries are process-global.
    ///
    /// `secret` is the farm's shared secret; without one the farm is confined to loopback.
    pub async fn start(
        role: Role,
        boot: BootId,
        secret: Option<&str>,
    ) -> Result<(Self, mpsc::Receiver<ClusterEvent>), ClusterError> {
        let start_error = |error: &dyn std::fmt::Display| ClusterError::Start(error.to_string());
        let (events, inbound) = mpsc::channel(INBOUND_QUEUE);
        let (gateway, _) = Actor::spawn(None, Gateway, events.clone()).await.map_err(|error| start_error(&error))?;
        pg::join(group(role, boot), vec![gateway.get_cell()]);

        // ractor insists on a listener of its own. It gets an ephemeral loopback port that nobody is told about, and
        // a cookie made from the secret. The host part only has to differ between processes: ractor takes peers with
        // equal "host:port" for itself.
        let server = NodeServer::new(
            0,
            cookie(secret),
            boot.to_string(),
            "farm".to_owned(),
            None,
            Some(NodeConnectionMode::Isolated),
        )
        .with_listen_addr(IpAddr::V4(Ipv4Addr::LOCALHOST))
        // ractor's own envelope around ours is about 100 bytes.
        .with_max_inbound_frame_size(2 * MAX_ENVELOPE_BYTES as u64);
        let (server, _) = Actor::spawn(None, server, ()).await.map_err(|error| start_error(&error))?;
        let sessions = Sessions::default();
        let subscription = Box::new(Subscription { events, sessions: sessions.clone() });
        server
            .cast(NodeServerMessage::SubscribeToEvents { id: "farm".to_owned(), subscription })
            .map_err(|error| start_error(&error))?;
        Ok((Self { boot, server, sessions }, inbound))
    }

    /// Takes over a connection that HTTP has authenticated and upgraded; `peer` is from its [`BOOT_HEADER`].
    pub fn accept(&self, upgraded: hyper::upgrade::Upgraded, peer: BootId) -> Result<(), ClusterError> {
        // A node that dials again has given its old session up. Left alone, ractor would keep either of the two.
        self.disconnect(peer);
        self.open(upgraded, peer.to_string(), true)
    }

    /// Connects this node to the scheduler at `addr` (`host:port`). Returns once the upgrade succeeded; the session
    /// is usable at [`ClusterEvent::Ready`].
    pub async fn dial(&self, addr: &str, secret: Option<&str>) -> Result<(), ClusterError> {
        let timeout = |_| ClusterError::Timeout { addr: addr.to_owned() };
        let stream = tokio::time::timeout(HANDSHAKE_TIMEOUT, TcpStream::connect(addr))
            .await
            .map_err(timeout)?
            .and_then(|stream| tune_socket(&stream).map(|()| stream))
            .map_err(|source| ClusterError::Connect { addr: addr.to_owned(), source })?;
        let upgraded = tokio::time::timeout(HANDSHAKE_TIMEOUT, upgrade(stream, addr, self.boot, secret))
            .await
            .map_err(timeout)??;
        self.open(upgraded, addr.to_owned(), false)
    }

    /// Queues an encoded envelope for a node. `Ok` means queued on a live session, not delivered.
    pub fn send_to_node(&self, node: BootId, frame: Vec<u8>) -> Result<(), ClusterError> {
        send(group(Role::Node, node), frame)
    }

    /// Queues an encoded envelope for the scheduler. `Ok` means queued on a live session, not delivered.
    pub fn send_to_scheduler(&self, frame: Vec<u8>) -> Result<(), ClusterError> {
        send(SCHEDULER_GROUP.to_owned(), frame)
    }

    /// Ends every session with `peer`. [`ClusterEvent::Closed`] follows for each.
    pub fn disconnect(&self, peer: BootId) {
        for (boot, session) in lock(&self.sessions).values() {
            if *boot == peer {
                session.stop(Some("disconnected by us".to_owned()));
            }
        }
    }

    /// Ends every session. [`ClusterEvent::Closed`] follows for each.
    pub fn disconnect_all(&self) {
        for (_, session) in lock(&self.sessions).values() {
            session.stop(Some("disconnected by us".to_owned()));
        }
    }

    fn open(&self, upgraded: hyper::upgrade::Upgraded, label: String, is_server: bool) -> Result<(), ClusterError> {
        let stream = Box::new(UpgradedStream { io: TokioIo::new(upgraded), label });
        self.server
            .cast(NodeServerMessage::ConnectionOpenedExternal { stream, is_server })
            .map_err(|error| ClusterError::Start(error.to_string()))
    }
}

/// The process group of a gateway. Groups are how ractor_cluster lets remote actors be found.
fn group(role: Role, boot: BootId) -> String {
    match role {
        Role::Scheduler => SCHEDULER_GROUP.to_owned(),
        Role::Node => format!("farm-node-{boot}"),
    }
}

fn cookie(secret: Option<&str>) -> String {
    let mut hash = Sha256::new();
    hash.update(b"mochi-farm cluster cookie\0");
    hash.update(secret.unwrap_or_default());
    format!("{:x}", hash.finalize())
}

fn send(group: String, frame: Vec<u8>) -> Result<(), ClusterError> {
    if frame.len() > MAX_ENVELOPE_BYTES {
        return Err(ClusterError::TooLarge { bytes: frame.len() });
    }
    let remote = pg::get_members(&group).into_iter().find(|actor| !actor.get_id().is_local());
    let Some(remote) = remote else { return Err(ClusterError::NoSession(group)) };
    let gateway: ActorRef<GatewayMessage> = remote.into();
    gateway.cast(GatewayMessage::Frame(frame)).map_err(|_| ClusterError::NoSession(group))
}

async fn upgrade(
    stream: TcpStream,
    addr: &str,
    boot: BootId,
    secret: Option<&str>,
) -> Result<hyper::upgrade::Upgraded, ClusterError> {
    let http = |source| ClusterError::Http { addr: addr.to_owned(), source };
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(http)?;
    tokio::spawn(async move {
        // Its errors surface on the request and on the upgraded stream.
        let _ = connection.with_upgrades().await;
    });
    let mut request = Request::builder()
        .method(Method::POST)
        .uri(UPGRADE_PATH)
        .header(HOST, addr)
        .header(CONNECTION, "upgrade")
        .header(UPGRADE, UPGRADE_PROTOCOL)
        .header(BOOT_HEADER, boot.to_string())
        .header(PROTOCOL_HEADER, PROTOCOL.to_string())
        .header(VERSION_HEADER, crate::VERSION);
    if let Some(secret) = secret {
        request = request.header(AUTHORIZATION, format!("Bearer {secret}"));
    }
    let request = request.body(Empty::<Bytes>::new()).map_err(|_| ClusterError::Refused {
        addr: addr.to_owned(),
        status: StatusCode::BAD_REQUEST,
        reason: "the address or the secret has characters that HTTP forbids".to_owned(),
    })?;
    let response = sender.send_request(request).await.map_err(http)?;
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        return Err(refusal(addr, response).await);
    }
    if let Some(theirs) = response.headers().get(VERSION_HEADER).and_then(|version| version.to_str().ok())
        && theirs != crate::VERSION
    {
        tracing::warn!(scheduler = addr, theirs, ours = crate::VERSION, "the scheduler is of another version");
    }
    hyper::upgrade::on(response).await.map_err(http)
}

/// Why a node is not let in, as far as the answer says it.
async fn refusal(addr: &str, response: Response<Incoming>) -> ClusterError {
    let (addr, status) = (addr.to_owned(), response.status());
    let body = Limited::new(response.into_body(), MAX_REFUSAL).collect().await;
    let error = body.ok().and_then(|body| serde_json::from_slice::<ApiError>(&body.to_bytes()).ok());
    let said = error.as_ref().map(|error| error.error.clone());
    match status {
        // Also where a proxy says so: the next scheduler may do.
        StatusCode::SERVICE_UNAVAILABLE => ClusterError::Standby { addr, leader: error.and_then(|error| error.leader) },
        StatusCode::UNAUTHORIZED => {
            ClusterError::Refused { addr, status, reason: "pass the scheduler's secret with --secret-file".to_owned() }
        }
        _ => {
            let reason = said.unwrap_or_else(|| "is this a farm-scheduler of the same version?".to_owned());
            ClusterError::Refused { addr, status, reason }
        }
    }
}

/// Settings of every socket that carries a session: no Nagle delay, and a dead link ends by itself in about 10 s.
pub fn tune_socket(stream: &TcpStream) -> std::io::Result<()> {
    let socket = socket2::SockRef::from(stream);
    socket.set_tcp_nodelay(true)?;
    let keepalive = socket2::TcpKeepalive::new()
        .with_time(Duration::from_secs(5))
        .with_interval(Duration::from_secs(2))
        .with_retries(3);
    socket.set_tcp_keepalive(&keepalive)?;
    #[cfg(target_os = "linux")]
    socket.set_tcp_user_timeout(Some(USER_TIMEOUT))?;
    Ok(())
}

struct UpgradedStream {
    io: TokioIo<hyper::upgrade::Upgraded>,
    label: String,
}

impl ClusterBidiStream for UpgradedStream {
    fn split(self: Box<Self>) -> (BoxRead, BoxWrite) {
        let (read, write) = tokio::io::split(self.io);
        (Box::new(read), Box::new(write))
    }

    fn peer_label(&self) -> Option<String> {
        Some(self.label.clone())
    }
}
