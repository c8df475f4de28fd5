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
use farm_core::wire::cluster::{Cluster, Role};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::api::{self, Api, Secret};
use crate::config::Config;
use crate::core::farm::Limits;
use crate::gc::Gc;
use crate::lead::{self, Candidate, Standing};
use crate::link::NodeLink;
use crate::listen;
use crate::queue::{self, location::Location};

/// What a scheduler is started with.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `host:port`; port 0 takes any free one.
    pub listen: String,
    /// How farmctl, nodes and other schedulers reach it; the address it listens on, if absent.
    pub advertise: Option<String>,
    pub queue: Location,
    /// URL for results.
    pub store: String,
    /// How clips are decoded.
    pub tiling: Tiling,
    pub secret_file: Option<PathBuf>,
    pub config: Option<PathBuf>,
}

/// Runs until SIGINT or SIGTERM. Ends with an error if a queue fails that no other scheduler can take over.
pub async fn run(settings: Settings) -> anyhow::Result<()> {
    let secret = settings.secret_file.as_deref().map(Secret::read).transpose()?;
    let config = settings.config.as_deref().map(Config::read).transpose()?.unwrap_or_default();
    let addresses = resolve(&settings.listen, secret.is_some()).await?;
    let artifacts = ArtifactStore::open(&settings.store)?;
    // Before anything that others see: whoever starts us may stop us at once.
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let (is_shared, _lock) = match &settings.queue {
        Location::Postgres(_) => (true, None),
        Location::File(file) => (false, Some(lock(file.parent().unwrap_or(Path::new(".")))?)),
    };
    let queue = queue::open(&settings.queue).await?;

    let boot = BootId(Uuid::new_v4());
    let (cluster, events) = Cluster::start(Role::Scheduler, boot, secret.as_ref().map(Secret::as_str)).await?;
    let link: Arc<dyn NodeLink> = Arc::new(cluster);
    let listener = TcpListener::bind(addresses.as_slice())
        .await
        .with_context(|| format!("cannot listen on {}", settings.listen))?;
    let address = listener.local_addr()?;
    let candidate = Candidate {
        store: queue.clone(),
        is_shared,
        link: link.clone(),
        address: advertised(settings.advertise, address, is_shared)?,
        limits: Limits::default(),
        results: artifacts.url().to_owned(),
        tiling: settings.tiling,
    };

    let (standing, mut stands) = watch::channel(Standing::StandsBy(None));
    let stop = CancellationToken::new();
    let pump = tokio::spawn(lead::pump(events, stands.clone(), link.clone()));
    let gc = Gc::new(artifacts.clone(), queue.clone(), config.keep.0);
    let cleaning = tokio::spawn(gc.clone().run(stands.clone()));
    let router = api::router(Api::new(stands.clone(), queue, artifacts, link, secret, gc, config.prices));
    let server = tokio::spawn(listen::serve(listener, router, stop.clone()));
    let mut leading = tokio::spawn(candidate.run(standing, stop.clone()));

    // The address is out once it is known who leads: whoever reads it may ask at once.
    let known = async {
        if stands.changed().await.is_ok() {
            announce(address)?;
        }
        // Its end is that of the process, which is noticed elsewhere.
        std::future::pending::<anyhow::Result<()>>().await
    };
    let ended = tokio::select! {
        ended = &mut leading => Some(ended),
        Err(error) = known => return Err(error),
        _ = interrupt.recv() => None,
        _ = terminate.recv() => None,
    };
    tracing::info!("stopping");
    stop.cancel();
    // Leadership first, so that another takes over while calls end.
    let ended = match ended {
        Some(ended) => ended,
        None => leading.await,
    };
    pump.abort();
    cleaning.abort();
    if let Err(error) = server.await {
        tracing::warn!(%error, "the HTTP server ended badly");
    }
    ended.context("the scheduler ended badly")?
}

/// What the other schedulers' clients are told.
fn advertised(named: Option<String>, listens: SocketAddr, is_shared: bool) -> anyhow::Result<String> {
    if let Some(named) = named {
        let port =
            named.rsplit_once(':').and_then(|(host, port)| port.parse::<u16>().ok().filter(|_| !host.is_empty()));
        ensure!(port.is_some(), "--advertise {named:?} is not HOST:PORT");
        return Ok(named);
    }
    ensure!(
        !is_shared || !listens.ip().is_unspecified(),
        "{listens} is no address that others can dial: say how they reach this scheduler with --advertise HOST:PORT"
    );
    Ok(listens.to_string())
}

/// One line on standard output tells programs where we are.
fn announce(address: SocketAddr) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "listening on http://{address}").and_then(|()| out.flush()).context("cannot write the address")
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
    fn an_address_that_nobody_can_dial_is_not_told_to_others() {
        let address = |text: &str| text.parse().unwrap();
        assert_eq!(advertised(None, address("10.0.0.1:7070"), true).unwrap(), "10.0.0.1:7070");
        assert_eq!(advertised(Some("farm-a:7070".to_owned()), address("0.0.0.0:7070"), true).unwrap(), "farm-a:7070");
        assert!(advertised(None, address("0.0.0.0:7070"), true).unwrap_err().to_string().contains("--advertise"));
        assert!(advertised(None, address("0.0.0.0:7070"), false).is_ok());
        for bad in ["farm-a", ":7070", "farm-a:port"] {
            assert!(advertised(Some(bad.to_owned()), address("10.0.0.1:7070"), true).is_err(), "{bad}");
        }
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
