//! How devices of other nodes join the decode of a clip: each node serves HTTP/2, apart from the actors.
//!
//! | request | what it does |
//! |---|---|
//! | `GET /v1/decodes/ID/latent` | the latent, with its length and `content-sha256` |
//! | `POST /v1/decodes/ID/hands/HAND` | a hand joins, or goes on after a broken stream: the request's body is what it says, the answer's what it hears, both at once |
//!
//! Both bear the decode's token. With TLS both ends show a certificate of the farm's authority; without, everybody on
//! the network reads along.
//!
//! | module | subject |
//! |---|---|
//! | `frame` | what goes over a stream, and its checksums |
//! | `window` | which messages are under way |
//! | `channel` | a conversation over as many streams as it takes |
//! | `server` | who may join what; limits |
//! | `client` | connections to others, and the latent |
//! | `args` | the command line |

mod args;
mod channel;
mod client;
mod counters;
mod frame;
mod server;
#[cfg(test)]
mod tests;
mod window;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use axum::body::Body;
use bytes::Bytes;
use farm_core::comm::tcp::TlsFiles;
use farm_core::tiles::message::{FromHand, ToHand};
use http_body_util::StreamBody;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tokio_util::sync::{CancellationToken, DropGuard};

pub use self::args::DataPlaneArgs;
pub use self::client::{JoinError, LatentError};
pub use self::counters::Counters;
pub use self::server::OpenDecode;
use crate::link::Link;

/// Messages between a channel and its application, each way. What a link holds beside is bounded in bytes; these are not.
const DEPTH: usize = 2;
/// Bytes on their way that the reader has not asked for: of a stream, and of a connection.
const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 8 << 20;
/// Longest head of a request.
const MAX_HEAD: u32 = 16 << 10;
/// A request that is not a channel is answered in whole by then.
const CALL_TIME: Duration = Duration::from_secs(60);
/// Set by a hand that has joined before.
const RESUMES: &str = "x-farm-resumes";
/// What a hand calls itself.
const HAND_NAME: &str = "x-farm-hand";
const CONTENT_SHA256: &str = "content-sha256";

#[derive(Clone, Debug)]
pub struct Options {
    /// Port 0 takes any.
    pub listen: SocketAddr,
    /// A name or address that other nodes reach this one by, without a port [default: the address listened on].
    pub host: Option<String>,
    /// The certificate names `host`.
    pub tls: Option<TlsFiles>,
    pub patience: Patience,
}

/// How long things may take.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// For a connection to be there, with TLS, and for a request to be answered.
    pub connect: Duration,
    /// Between two signs of life on an open stream.
    pub keep_alive: Duration,
    /// Without a sign of life, after which a stream is given up.
    pub silence: Duration,
    /// Without a working stream, after which a channel is lost.
    pub grace: Duration,
    /// For the other end to take the last messages of an application that has dropped its link.
    pub leave: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(5),
            keep_alive: Duration::from_secs(1),
            silence: Duration::from_secs(5),
            grace: Duration::from_secs(5),
            leave: Duration::from_secs(30),
        }
    }
}

/// This node on the data plane. The server ends when the last clone is dropped; so do the channels of hands that have
/// joined here, after a while.
#[derive(Clone)]
pub struct DataPlane {
    shared: Arc<server::Shared>,
    client: Arc<client::Client>,
    _serving: Arc<DropGuard>,
}

/// Seen from the decode: a hand of another node.
pub struct Joined {
    /// What it calls itself; the address that it has come from, if that is no name.
    pub name: String,
    pub link: Link<ToHand, FromHand>,
}

/// Seen from the hand: a decode on another node.
pub struct Hand {
    /// An error leaves the copy in the store.
    pub latent: Result<Bytes, LatentError>,
    pub link: Link<FromHand, ToHand>,
}

impl DataPlane {
    /// Errors if the address cannot be listened on, or the files of TLS cannot be used.
    pub async fn start(options: Options) -> anyhow::Result<Self> {
        let Options { listen, host, tls, patience } = options;
        let tls = tls.map(|files| files.load()).transpose()?;
        let tls = tls.map(|(mut server, mut client)| {
            server.alpn_protocols = vec![b"h2".to_vec()];
            client.alpn_protocols = vec![b"h2".to_vec()];
            (TlsAcceptor::from(Arc::new(server)), TlsConnector::from(Arc::new(client)))
        });
        let listener =
            TcpListener::bind(listen).await.with_context(|| format!("cannot listen on {listen} for other nodes"))?;
        let address = listener.local_addr()?;
        let host = host.unwrap_or_else(|| address.ip().to_string());
        let host = if host.contains(':') { format!("[{host}]") } else { host };
        let base = format!("{}://{host}:{}", if tls.is_some() { "https" } else { "http" }, address.port());
        let (acceptor, connector) = tls.unzip();
        let counting = Arc::default();
        let shared = Arc::new(server::Shared::new(base, patience, Arc::clone(&counting)));
        let client = Arc::new(client::Client { tls: connector, patience, counting });
        let stop = CancellationToken::new();
        tokio::spawn(server::serve(listener, acceptor, shared.clone(), stop.clone()));
        Ok(Self { shared, client, _serving: Arc::new(stop.drop_guard()) })
    }

    /// `http://HOST:PORT` that others find this node at.
    pub fn base(&self) -> &str {
        self.shared.base()
    }

    /// Lets hands join a decode. Messages of them may have `max_message` bytes; no more than `max_hands` join at a time.
    pub fn open(&self, latent: Bytes, max_message: usize, max_hands: usize) -> OpenDecode {
        server::open(&self.shared, latent, max_message, max_hands)
    }

    /// Joins the decode at `url`, of [`OpenDecode`], under a name for people, with a latent of up to `max_latent` bytes and
    /// messages from it of up to `max_message`.
    pub async fn join(
        &self,
        url: &str,
        token: &str,
        name: &str,
        max_latent: usize,
        max_message: usize,
    ) -> Result<Hand, JoinError> {
        client::join(&self.client, url, token, name, max_latent, max_message).await
    }

    pub fn counters(&self) -> Counters {
        self.client.counting.counters()
    }
}

#[cfg(test)]
impl DataPlane {
    /// Decodes that are open or have hands.
    fn decodes(&self) -> usize {
        self.shared.held().0
    }

    fn hands(&self) -> usize {
        self.shared.held().1
    }

    fn forget_hands(&self) {
        self.shared.forget_hands();
    }
}

/// What comes out of `pieces`, as a body for HTTP.
fn body(mut pieces: mpsc::Receiver<Bytes>) -> Body {
    let pieces = futures::stream::poll_fn(move |cx| pieces.poll_recv(cx));
    Body::new(StreamBody::new(futures::StreamExt::map(pieces, |piece| {
        Ok::<_, Infallible>(hyper::body::Frame::data(piece))
    })))
}

/// An error and what it came from, in one line: those of HTTP name only themselves.
fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    let mut line: Vec<String> = causes.map(ToString::to_string).collect();
    line.dedup();
    line.join(": ")
}
