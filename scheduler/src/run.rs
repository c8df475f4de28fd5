//! Starts a scheduler, runs it until it is told to stop, and stops it.

use std::fs::{File, TryLockError};
use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail, ensure};
use farm_core::id::BootId;
use farm_core::store::artifact::ArtifactStore;
use farm_core::tiles::plan::Tiling;
use farm_core::wire::cluster::{Cluster, ClusterEvent, Role};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::actor::{CallError, Scheduler};
use crate::api::{self, Api, Secret};
use crate::core::farm::Limits;
use crate::link::NodeLink;
use crate::listen;
use crate::queue::sqlite::SqliteQueue;
use crate::queue::store::QueueStore;

/// What a scheduler is started with.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `host:port`; port 0 takes any free one.
    pub listen: String,
    /// Folder of the queue; made if it is absent.
    pub data: PathBuf,
    /// URL for results.
    pub store: String,
    /// How clips are decoded.
    pub tiling: Tiling,
    pub secret_file: Option<PathBuf>,
}

/// Runs until SIGINT or SIGTERM. Ends with an error if the queue store fails.
pub async fn run(settings: Settings) -> anyhow::Result<()> {
    let secret = settings.secret_file.as_deref().map(Secret::read).transpose()?;
    let addresses = resolve(&settings.listen, secret.is_some()).await?;
    let _lock = lock(&settings.data)?;
    let artifacts = ArtifactStore::open(&settings.store)?;
    let file = settings.data.join("queue.sqlite");
    let queue = SqliteQueue::open(&file).await.with_context(|| format!("cannot open queue {}", file.display()))?;
    let queue: Arc<dyn QueueStore> = Arc::new(queue);

    let boot = BootId(Uuid::new_v4());
    let (cluster, events) = Cluster::start(Role::Scheduler, boot, secret.as_ref().map(Secret::as_str)).await?;
    let link: Arc<dyn NodeLink> = Arc::new(cluster);
    let (scheduler, mut actor) =
        Scheduler::start(Limits::default(), queue.clone(), artifacts.url().to_owned(), settings.tiling, link.clone())
            .await?;
    let pump = tokio::spawn(pump(events, scheduler.clone()));

    // Signals are caught before the address is out: whoever reads it may stop us at once.
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let listener = TcpListener::bind(addresses.as_slice())
        .await
        .with_context(|| format!("cannot listen on {}", settings.listen))?;
    let address = listener.local_addr()?;
    let stop = CancellationToken::new();
    let router = api::router(Api::new(scheduler.clone(), queue, artifacts, link, secret));
    let server = tokio::spawn(listen::serve(listener, router, stop.clone()));
    announce(address)?;

    let failed = tokio::select! {
        _ = &mut actor => true,
        _ = interrupt.recv() => false,
        _ = terminate.recv() => false,
    };
    tracing::info!("stopping");
    stop.cancel();
    if let Err(error) = server.await {
        tracing::warn!(%error, "the HTTP server ended badly");
    }
    pump.abort();
    if failed {
        bail!("the scheduler's actor ended; start again, the queue is as it was last committed");
    }
    scheduler.stop();
    actor.await.context("the scheduler's actor ended badly")
}

/// One line on standard output tells programs where we are.
fn announce(address: SocketAddr) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "listening on http://{address}").and_then(|()| out.flush()).context("cannot write the address")
}

/// Brings what the nodes say to the actor.
async fn pump(mut events: mpsc::Receiver<ClusterEvent>, scheduler: Scheduler) -> Result<(), CallError> {
    while let Some(event) = events.recv().await {
        match event {
            ClusterEvent::Frame(bytes) => scheduler.frame(bytes).await?,
            ClusterEvent::Closed { peer } => scheduler.session_closed(peer)?,
            ClusterEvent::Ready { peer } => tracing::debug!(boot = %peer, "session open"),
        }
    }
    Ok(())
}

/// Without a secret, the farm is confined to this machine.
async fn resolve(listen: &str, has_secret: bool) -> anyhow::Result<Vec<SocketAddr>> {
    let addresses: Vec<SocketAddr> = tokio::net::lookup_host(listen)
        .await
        .with_context(|| {
            format!("cannot resolve listen address {listen:?}; write HOST:PORT, for example 127.0.0.1:7070")
        })?
        .collect();
    ensure!(!addresses.is_empty(), "listen address {listen:?} has no address");
    let open = addresses.iter().find(|address| !address.ip().is_loopback());
    if let Some(address) = open
        && !has_secret
    {
        bail!(
            "{address} can be reached from other machines, so the farm needs a secret: make one with \
             `(umask 077; head -c 24 /dev/urandom | base64 > farm.secret)` and pass --secret-file farm.secret to \
             the scheduler, the nodes and farmctl"
        );
    }
    Ok(addresses)
}

/// Keeps other schedulers off the data folder. The lock ends with the process, however it ends.
fn lock(data: &Path) -> anyhow::Result<File> {
    std::fs::create_dir_all(data).with_context(|| format!("cannot make data folder {}", data.display()))?;
    let path = data.join("lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            bail!("data folder {} is in use by another farm-scheduler", data.display())
        }
        Err(TryLockError::Error(error)) => Err(error).with_context(|| format!("cannot lock {}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_address_that_others_can_reach_needs_a_secret() {
        assert!(resolve("127.0.0.1:0", false).await.is_ok());
        assert!(resolve("[::1]:0", false).await.is_ok());
        let refused = resolve("0.0.0.0:0", false).await.unwrap_err().to_string();
        assert!(refused.contains("--secret-file"), "{refused}");
        assert!(resolve("0.0.0.0:0", true).await.is_ok());
        assert!(resolve("7070", true).await.unwrap_err().to_string().contains("HOST:PORT"));
    }

    #[test]
    fn two_schedulers_never_share_a_data_folder() {
        let data = tempfile::tempdir().unwrap();
        let first = lock(data.path()).unwrap();
        assert!(lock(data.path()).unwrap_err().to_string().contains("in use"));
        drop(first);
        lock(data.path()).unwrap();
    }
}
