//! The one port: accepts connections and serves HTTP on them, with every wait bounded.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use farm_core::wire::cluster::tune_socket;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Connections at a time; more wait in the kernel's queue. Nodes' sessions do not count, they have left HTTP.
const MAX_CONNECTIONS: usize = 1024;
/// A connection that has not sent a whole request head by then is closed, also one kept open between requests.
const HEADER_TIMEOUT: Duration = Duration::from_secs(20);
/// Calls under way when the process is told to stop.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// Serves until `stop` is cancelled, then lets the calls under way end.
pub async fn serve(listener: TcpListener, router: Router, stop: CancellationToken) {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = accept(&listener, &permits) => accepted,
            // Forgets connections that have ended.
            Some(_) = connections.join_next() => continue,
        };
        match accepted {
            Ok((stream, peer, permit)) => {
                let served = connection(stream, peer, router.clone(), stop.clone(), HEADER_TIMEOUT);
                connections.spawn(async move {
                    served.await;
                    drop(permit);
                });
            }
            Err(error) => {
                // Out of file descriptors, or the peer left early. Trying on at once would spin.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
    let drained = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(DRAIN_TIMEOUT, drained).await.is_err() {
        tracing::warn!("calls were cut off");
    }
}

async fn accept(
    listener: &TcpListener,
    permits: &Arc<Semaphore>,
) -> std::io::Result<(TcpStream, SocketAddr, OwnedSemaphorePermit)> {
    let permit = permits.clone().acquire_owned().await.map_err(std::io::Error::other)?;
    let (stream, peer) = listener.accept().await?;
    Ok((stream, peer, permit))
}

async fn connection(
    stream: TcpStream,
    peer: SocketAddr,
    router: Router,
    stop: CancellationToken,
    header_timeout: Duration,
) {
    if let Err(error) = tune_socket(&stream) {
        tracing::debug!(%peer, %error, "cannot set socket options");
    }
    let service = TowerToHyperService::new(router);
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(header_timeout)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    let mut connection = std::pin::pin!(connection);
    let ended: Result<(), hyper::Error> = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%peer, %error, "connection ended");
    }
}

#[cfg(test)]
mod tests {
    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// What a client that sends `bytes` and then nothing reads until the server closes.
    async fn answer_to(bytes: &[u8]) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (stream, peer) = listener.accept().await.unwrap();
        let router = Router::new().route("/", get(async || "here"));
        let served = connection(stream, peer, router, CancellationToken::new(), Duration::from_millis(50));
        let talked = async {
            client.write_all(bytes).await.unwrap();
            let mut answer = String::new();
            client.read_to_string(&mut answer).await.unwrap();
            answer
        };
        tokio::time::timeout(Duration::from_secs(30), async { tokio::join!(served, talked).1 }).await.unwrap()
    }

    #[tokio::test]
    async fn a_client_that_says_nothing_or_half_of_it_is_hung_up_on() {
        assert!(!answer_to(b"").await.contains("here"));
        assert!(!answer_to(b"GET / HT").await.contains("here"));
        assert!(answer_to(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.contains("here"));
    }
}
