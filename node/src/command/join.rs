//! `farm-node join`: lend this machine's devices to a farm.

use std::io::IsTerminal;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use farm_core::id::{BootId, DeviceIndex, NodeId};
use farm_core::store::artifact::ArtifactStore;
use farm_core::wire::cluster::{Cluster, Role};
use farm_core::wire::to_scheduler::{DeviceInfo, Roles};
use ractor::{Actor, ActorRef};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;
use tracing_subscriber::EnvFilter;
use uuid::Uuid;

use crate::attempt::{HandsWanted, Workshop};
use crate::cpu_device::CpuDevice;
use crate::data_plane::{DataPlane, DataPlaneArgs};
use crate::device_thread::DeviceHandle;
use crate::devices::{Devices, Placing};
use crate::encode;
use crate::models::ModelShelf;
use crate::root::{self, Root, RootMessage};
use crate::scratch::Scratch;
use crate::session::actor::{self as session, Scheduler};
use crate::session::messages::SessionMessage;
use crate::session::state::Offer;

/// What a node that was told to stop has to leave the farm; then it ends anyway.
const STOP_PATIENCE: Duration = Duration::from_millis(900);

/// What a decode waits for the scheduler to say who does it.
const ALONE_AFTER: Duration = Duration::from_secs(5);

#[derive(clap::Args)]
pub struct Args {
    /// Where the scheduler listens
    #[arg(long, value_name = "HOST:PORT", value_parser = parse_address)]
    pub scheduler: String,
    /// Devices to lend: cpu:K makes K of this machine's processor
    #[arg(long, value_name = "cpu:K")]
    pub devices: Devices,
    /// A checkpoint folder and the name that jobs call it by; may be repeated
    #[arg(long = "model", value_name = "NAME=DIR", required = true)]
    pub models: Vec<NamedModel>,
    /// Where clips go, the same as the scheduler's: file:///folder, a folder, or s3://bucket/prefix (with AWS_… variables)
    #[arg(long, value_name = "URL")]
    pub store: String,
    /// This node's name, unique in the farm [default: the host's name]
    #[arg(long, value_parser = parse_name)]
    pub name: Option<String>,
    /// What the devices are for: denoise, decode, or both; may be repeated
    #[arg(long = "role", value_name = "ROLE", value_delimiter = ',', default_values = ["denoise", "decode"])]
    pub roles: Vec<DeviceRole>,
    /// File with the farm's shared secret
    #[arg(long, value_name = "FILE")]
    pub secret_file: Option<PathBuf>,
    /// Compute threads of each device [default: the processor's cores divided among the devices]
    #[arg(long, value_name = "N")]
    pub threads: Option<NonZeroUsize>,
    /// Steps between two checkpoints of a latent, from which another node goes on if this one is lost; 0 for none
    #[arg(long, value_name = "K", default_value_t = 8)]
    pub checkpoint_steps: u32,
    /// Rates that `farm-node calibrate` has measured here: they decide on how many devices a clip is rendered
    /// [default: typical ones]
    #[arg(long, value_name = "FILE")]
    pub devices_file: Option<PathBuf>,
    #[command(flatten)]
    pub data_plane: DataPlaneArgs,
    /// Folder for clips on their way to the store [default: one in the system's temporary folder]
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum DeviceRole {
    /// Clips are started here
    Denoise,
    /// Tiles of any node's clips are decoded here
    Decode,
}

/// `NAME=DIR`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedModel {
    name: String,
    dir: PathBuf,
}

impl FromStr for NamedModel {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((name, dir)) if !dir.is_empty() => Ok(Self { name: parse_name(name)?, dir: dir.into() }),
            _ => Err("write NAME=DIR, for example mochi-tiny=assets/mochi-tiny".into()),
        }
    }
}

/// Names travel in messages, logs and file names.
fn parse_name(text: &str) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if (1..=64).contains(&text.len()) && text.chars().all(plain) && !text.starts_with('.') {
        Ok(text.to_owned())
    } else {
        Err(format!("{text:?} is no name: 1 to 64 letters, digits, '.', '_' or '-', not starting with '.'"))
    }
}

fn parse_address(text: &str) -> Result<String, String> {
    match text.rsplit_once(':') {
        Some((host, port)) if !host.is_empty() && !text.contains('/') && port.parse::<u16>().is_ok_and(|p| p > 0) => {
            Ok(text.to_owned())
        }
        _ => Err("write host:port, without a scheme".into()),
    }
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let filter =
        EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info,ractor=warn,ractor_cluster=warn"));
    let colour = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colour).with_writer(std::io::stderr).init();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let ended = runtime.block_on(join(args));
    // Device threads may be in the middle of a step; they end with the process.
    runtime.shutdown_background();
    ended
}

async fn join(args: Args) -> anyhow::Result<ExitCode> {
    // Heard from here on, so that Ctrl-C during the checks is a clean end too.
    let mut signals = Signals::new()?;
    let prepared = tokio::select! {
        prepared = prepare(args) => prepared?,
        () = signals.next() => return Ok(ExitCode::SUCCESS),
    };
    let Prepared { name, scheduler, store, scratch, shelf, devices, checkpoint_steps, data_plane, offer } = prepared;

    let boot = BootId(Uuid::new_v4());
    let (cluster, events) = Cluster::start(Role::Node, boot, scheduler.secret.as_deref()).await?;
    tracing::info!(node = %name, %boot, scheduler = %scheduler.address, store = store.url(), data_plane = data_plane.base(), devices = devices.len(), "node starts");
    let models = shelf.offered();
    let workshop = {
        let (node, scratch) = (name.clone(), scratch.clone());
        move |session: ActorRef<SessionMessage>| Workshop {
            node,
            store,
            scratch,
            devices,
            models,
            checkpoint_steps,
            alone_after: ALONE_AFTER,
            data: data_plane,
            // These fail only when the process ends.
            log: {
                let session = session.clone();
                Box::new(move |key, line| drop(session.cast(SessionMessage::Log { key, line })))
            },
            want_hands: Box::new(move |key, HandsWanted { round, tiles, url, token }| {
                drop(session.cast(SessionMessage::WantHands { key, round, tiles, url, token }));
            }),
        }
    };
    let session = session::Arguments { cluster, scheduler: Arc::new(scheduler), node: name, boot, offer };
    let (ended, mut end) = oneshot::channel();
    let arguments = root::Arguments { session, events, workshop: Box::new(workshop), ended };
    let (root, _) = Actor::spawn(None, Root, arguments).await.context("cannot start the node's actors")?;

    let end = tokio::select! {
        end = &mut end => end.unwrap_or_else(|_| Err("the root actor went away".into())),
        () = signals.next() => {
            tracing::info!("leaving the farm");
            // If it fails, the root has just ended, which is what was wanted.
            let _ = root.cast(RootMessage::Stop);
            tokio::select! {
                _ = tokio::time::timeout(STOP_PATIENCE, &mut end) => Ok(()),
                () = signals.next() => return Ok(ExitCode::from(130)),
            }
        }
    };
    scratch.clear()?;
    match end {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(reason) => bail!("the node ended: {reason}"),
    }
}

/// SIGINT and SIGTERM.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

struct Prepared {
    name: NodeId,
    scheduler: Scheduler,
    store: ArtifactStore,
    scratch: Arc<Scratch>,
    shelf: Arc<ModelShelf>,
    devices: Vec<DeviceHandle>,
    checkpoint_steps: u32,
    data_plane: DataPlane,
    offer: Offer,
}

/// Everything that can be wrong with this machine or this command line is found here, before the farm sees the node.
async fn prepare(args: Args) -> anyhow::Result<Prepared> {
    let name = args.name.map_or_else(host_name, Ok)?;
    let secret = args.secret_file.as_deref().map(read_secret).transpose()?;
    encode::check().context("this node cannot encode mp4")?;
    ensure!(
        args.store != "memory:",
        "--store memory: is seen by one process only; give a folder or s3://bucket/prefix"
    );
    let store = ArtifactStore::open(&args.store)?;
    store.probe().await?;

    let data = args.data.unwrap_or_else(|| std::env::temp_dir().join(format!("farm-node-{name}")));
    let scratch = Arc::new(Scratch::open(&data)?);
    let threads = args.devices.threads(args.threads);
    let mut site = args.devices.site(threads, Placing::Threads, args.devices_file.as_deref())?;
    // The weights are in memory when the node joins, and a clip that has no room beside them has none on any number of
    // these devices.
    site.device.memory = f64::MAX;
    let models: Vec<_> = args.models.into_iter().map(|model| (model.name, model.dir)).collect();
    // Beside the runtime: it reads every byte of every checkpoint.
    let shelf = tokio::task::spawn_blocking(move || ModelShelf::open(models, threads)).await??;
    let shelf = Arc::new(shelf);

    let mut devices = Vec::new();
    let mut infos = Vec::new();
    for index in (0..args.devices.cpus as u32).map(DeviceIndex) {
        let device = CpuDevice::new(threads, shelf.clone())?;
        infos.push(DeviceInfo { name: device.name() });
        devices.push(DeviceHandle::spawn(index, device).context("cannot start a device thread")?);
    }
    let site_json = Some(serde_json::to_string(&site)?);
    let roles =
        Roles { denoise: args.roles.contains(&DeviceRole::Denoise), decode: args.roles.contains(&DeviceRole::Decode) };
    let offer = Offer { devices: infos, site_json, models: shelf.infos(), store: store.url().to_owned(), roles };
    let data_plane = DataPlane::start(args.data_plane.options(&args.scheduler).await?).await?;
    let scheduler = Scheduler { address: args.scheduler, secret };
    let checkpoint_steps = args.checkpoint_steps;
    let name = NodeId(name);
    Ok(Prepared { name, scheduler, store, scratch, shelf, devices, checkpoint_steps, data_plane, offer })
}

fn read_secret(path: &Path) -> anyhow::Result<String> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read secret file {}", path.display()))?;
    let secret = text.trim();
    ensure!(!secret.is_empty(), "secret file {} is empty", path.display());
    Ok(secret.to_owned())
}

fn host_name() -> anyhow::Result<String> {
    let raw =
        std::fs::read_to_string("/proc/sys/kernel/hostname").context("cannot read the host's name; give --name")?;
    parse_name(raw.trim()).map_err(|e| anyhow::anyhow!("the host's name does not do: {e}; give --name"))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[test]
    fn models_are_read_as_documented_and_nothing_else() {
        let model = NamedModel { name: "tiny".into(), dir: "a=b/c".into() };
        assert_eq!("tiny=a=b/c".parse(), Ok(model));
        for bad in ["", "tiny", "tiny=", "=dir", "a b=dir", "../x=dir"] {
            assert!(bad.parse::<NamedModel>().is_err(), "{bad}");
        }
    }

    #[test]
    fn roles_are_both_unless_some_are_named() {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            args: Args,
        }
        let roles = |more: &[&str]| {
            let line = "node --scheduler h:1 --devices cpu:1 --model m=d --store s";
            Line::try_parse_from(line.split(' ').chain(more.iter().copied())).map(|line| line.args.roles)
        };
        assert_eq!(roles(&[]).unwrap(), [DeviceRole::Denoise, DeviceRole::Decode]);
        assert_eq!(roles(&["--role", "decode"]).unwrap(), [DeviceRole::Decode]);
        assert_eq!(roles(&["--role", "denoise,decode"]).unwrap(), roles(&[]).unwrap());
        assert_eq!(roles(&["--role", "denoise", "--role", "decode"]).unwrap(), roles(&[]).unwrap());
        assert!(roles(&["--role", "upload"]).is_err());
    }

    #[test]
    fn a_scheduler_is_an_address_not_a_url() {
        for good in ["127.0.0.1:7070", "farm.example:80", "[::1]:7070"] {
            assert!(parse_address(good).is_ok(), "{good}");
        }
        for bad in ["", "localhost", ":7070", "localhost:0", "localhost:99999", "http://localhost:7070"] {
            assert!(parse_address(bad).is_err(), "{bad}");
        }
    }
}
