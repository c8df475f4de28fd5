//! `farm-node join`: lend this machine's devices to a farm.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use farm_core::id::{BootId, DeviceIndex, NodeId};
use farm_core::job::spec::{MAX_LABEL_BYTES, MAX_LABELS};
use farm_core::parallel::cost::Site;
use farm_core::precision::Precision;
use farm_core::store::artifact::ArtifactStore;
use farm_core::wire::PROTOCOL;
use farm_core::wire::cluster::{Cluster, Role};
use farm_core::wire::to_scheduler::{DeviceInfo, Roles};
use ractor::{Actor, ActorRef};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;
use tracing_subscriber::EnvFilter;
use uuid::Uuid;

use crate::attempt::{HandsWanted, Workshop};
use crate::data_plane::{DataPlane, DataPlaneArgs};
use crate::device_thread::DeviceHandle;
use crate::devices::{Devices, Placing, ThreadArgs, parse_bytes};
use crate::encode;
use crate::engine_device::EngineDevice;
use crate::evidence::Evidence;
use crate::models::ModelShelf;
use crate::outbox::OutboxFile;
use crate::root::{self, Root, RootMessage};
use crate::scratch::Scratch;
use crate::session::actor::{self as session, Schedulers};
use crate::session::events::Offer;
use crate::session::messages::SessionMessage;

/// A node that leaves and does not end by itself when its time is up is ended so much later.
const STUCK: Duration = Duration::from_secs(1);
/// How often the file of --spot-notice-file is looked for.
const SPOT_POLL: Duration = Duration::from_secs(1);

/// What a decode waits for the scheduler to say who does it.
const ALONE_AFTER: Duration = Duration::from_secs(5);

#[derive(clap::Args)]
pub struct Args {
    /// Where the farm's scheduler listens, or each of them, whichever leads; may be repeated
    #[arg(long = "scheduler", value_name = "HOST:PORT,…", value_delimiter = ',', value_parser = parse_address, required = true)]
    pub schedulers: Vec<String>,
    /// Devices to lend: cpu:K makes K of this machine's processor, cuda:K are its first K GPUs
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
    #[command(flatten)]
    pub threads: ThreadArgs,
    /// Steps between two checkpoints of a latent, from which another node goes on if this one is lost; 0 for none
    #[arg(long, value_name = "K", default_value_t = 8)]
    pub checkpoint_steps: u32,
    /// Rates that `farm-node calibrate` has measured here: they decide on how many devices a clip is rendered
    /// [default: typical ones]
    #[arg(long, value_name = "FILE")]
    pub devices_file: Option<PathBuf>,
    /// What jobs may require of the node that renders them, for example gpu=h100; may be repeated
    #[arg(long = "label", value_name = "NAME=VALUE")]
    pub labels: Vec<Label>,
    /// Memory of each device, for example 16GiB: clips that are predicted to need more are not rendered here
    /// [default: no limit]
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    pub memory: Option<f64>,
    /// Seconds that a node has to hand its work back when it is told to leave, by SIGTERM, Ctrl-C or a spot notice. Less
    /// than whoever stops it waits before it kills
    #[arg(long, value_name = "SECONDS", default_value_t = 25, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub leave_patience: u64,
    /// The node leaves when this file appears: for a program that watches for the cloud's notice to a spot machine
    #[arg(long, value_name = "FILE")]
    pub spot_notice_file: Option<PathBuf>,
    #[command(flatten)]
    pub data_plane: DataPlaneArgs,
    /// Folder for clips on their way to the store, reports that the scheduler has not acknowledged, and what the node runs,
    /// in case it dies. The same at every start of the node, and no other node's
    /// [default: farm-node-NAME in the system's temporary folder]
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

/// `NAME=VALUE`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Label(String, String);

impl FromStr for Label {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let (name, value) = text.split_once('=').ok_or("write NAME=VALUE, for example gpu=h100")?;
        if name.is_empty() {
            return Err("a label has a name".into());
        }
        for part in [name, value] {
            if part.len() > MAX_LABEL_BYTES || part.chars().any(char::is_control) {
                return Err(format!("name and value have at most {MAX_LABEL_BYTES} bytes and no control characters"));
            }
        }
        Ok(Self(name.to_owned(), value.to_owned()))
    }
}

fn labels(all: Vec<Label>) -> anyhow::Result<BTreeMap<String, String>> {
    let mut labels = BTreeMap::new();
    for Label(name, value) in all {
        ensure!(labels.insert(name.clone(), value).is_none(), "--label names {name} twice");
    }
    ensure!(labels.len() <= MAX_LABELS, "{} labels; a node has at most {MAX_LABELS}", labels.len());
    Ok(labels)
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
    let (patience, spot_notice_file) = (Duration::from_secs(args.leave_patience), args.spot_notice_file.clone());
    let prepared = tokio::select! {
        prepared = prepare(args) => prepared?,
        () = signals.next() => return Ok(ExitCode::SUCCESS),
    };
    let Prepared {
        name,
        schedulers,
        store,
        folder,
        shelf,
        devices,
        checkpoint_steps,
        memory,
        precision,
        data_plane,
        offer,
    } = prepared;
    let Folder { scratch, outbox, evidence } = folder;
    let _guard = evidence.panic_guard();
    evidence.watch().context("cannot handle signals")?;

    let boot = BootId(Uuid::new_v4());
    let (cluster, events) = Cluster::start(Role::Node, boot, schedulers.secret.as_deref()).await?;
    let addresses = schedulers.addresses.join(", ");
    tracing::info!(node = %name, %boot, version = farm_core::VERSION, protocol = PROTOCOL, schedulers = addresses, store = store.url(), data_plane = data_plane.base(), devices = devices.len(), "node starts");
    let models = shelf.offered();
    let workshop = {
        let (node, scratch, evidence) = (name.clone(), scratch.clone(), evidence.clone());
        move |session: ActorRef<SessionMessage>| Workshop {
            node,
            store,
            scratch,
            devices,
            models,
            checkpoint_steps,
            memory,
            precision,
            alone_after: ALONE_AFTER,
            data: data_plane,
            // These fail only when the process ends.
            log: {
                let session = session.clone();
                Box::new(move |key, line| drop(session.cast(SessionMessage::Log { key, line })))
            },
            holding: Box::new(move |attempts| evidence.holding(attempts)),
            want_hands: Box::new(move |key, HandsWanted { round, tiles, url, token }| {
                drop(session.cast(SessionMessage::WantHands { key, round, tiles, url, token }));
            }),
        }
    };
    let schedulers = Arc::new(schedulers);
    let session =
        session::Arguments { cluster, schedulers, node: name, boot, offer, outbox, evidence: evidence.clone() };
    let (ended, mut end) = oneshot::channel();
    let arguments = root::Arguments { session, events, workshop: Box::new(workshop), ended };
    let (root, _) = Actor::spawn(None, Root, arguments).await.context("cannot start the node's actors")?;

    let ended = |end: Result<_, _>| end.unwrap_or_else(|_| Err("the root actor went away".to_owned()));
    // A signal is repeated by those who are in a hurry.
    let mut signalled = false;
    let reason = tokio::select! {
        end = &mut end => Err(ended(end)),
        () = signals.next() => {
            signalled = true;
            Ok("it was told to stop")
        }
        () = spot_notice(spot_notice_file.as_deref()) => Ok("its machine is about to be taken away"),
    };
    let end = match reason {
        Err(end) => end,
        Ok(reason) => {
            tracing::info!(reason, seconds = patience.as_secs(), "leaving the farm");
            // If it fails, the root has just ended, which is what was wanted.
            let _ = root.cast(RootMessage::Leave { reason: reason.to_owned(), patience });
            let stuck = tokio::time::sleep(patience + STUCK);
            tokio::pin!(stuck);
            loop {
                tokio::select! {
                    end = &mut end => break ended(end),
                    () = &mut stuck => break Ok(()),
                    () = signals.next() => {
                        if std::mem::replace(&mut signalled, true) {
                            evidence.end();
                            return Ok(ExitCode::from(130));
                        }
                    }
                }
            }
        }
    };
    match &end {
        Ok(()) => evidence.end(),
        Err(reason) => evidence.dies_of(&format!("the node's program failed: {reason}")),
    }
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

/// Ends when the file is there; never without one.
async fn spot_notice(file: Option<&Path>) {
    let Some(file) = file else { return std::future::pending().await };
    let mut ticks = tokio::time::interval(SPOT_POLL);
    loop {
        ticks.tick().await;
        if tokio::fs::try_exists(file).await.unwrap_or(false) {
            return;
        }
    }
}

struct Prepared {
    name: NodeId,
    schedulers: Schedulers,
    store: ArtifactStore,
    folder: Folder,
    shelf: Arc<ModelShelf>,
    devices: Vec<DeviceHandle>,
    checkpoint_steps: u32,
    memory: Option<Site>,
    precision: Precision,
    data_plane: DataPlane,
    offer: Offer,
}

/// What the node has on its own disk.
struct Folder {
    scratch: Arc<Scratch>,
    outbox: OutboxFile,
    evidence: Arc<Evidence>,
}

impl Folder {
    fn open(data: &Path) -> anyhow::Result<Self> {
        // First: it takes the folder for this process.
        let scratch = Arc::new(Scratch::open(data)?);
        Ok(Self { scratch, outbox: OutboxFile::open(data)?, evidence: Arc::new(Evidence::open(data)?) })
    }
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
    let folder = Folder::open(&data)?;
    let (compute, count) = (args.threads.compute_within(args.devices, args.memory)?, args.devices.count);
    let mut site = compute.site(count, Placing::Threads, args.devices_file.as_deref())?;
    // Without a limit nobody knows of one: the weights are in memory when the node joins, and a clip that has no room
    // beside them has none on any number of these devices.
    site.device.memory = args.memory.unwrap_or(f64::MAX);
    let memory = args.memory.map(|_| site);
    let models: Vec<_> = args.models.into_iter().map(|model| (model.name, model.dir)).collect();
    // Beside the runtime: it reads every byte of every checkpoint.
    let of = compute.clone();
    let shelf = tokio::task::spawn_blocking(move || ModelShelf::open(models, &of)).await??;
    let shelf = Arc::new(shelf);

    let device = |index| EngineDevice::new(&compute, index, shelf.clone());
    let devices = (0..count).map(device).collect::<anyhow::Result<Vec<_>>>()?;
    let precision = devices[0].precision();
    let infos = devices.iter().map(|device| DeviceInfo { name: device.name() }).collect();
    let thread =
        |(index, device)| DeviceHandle::spawn(DeviceIndex(index), device).context("cannot start a device thread");
    let devices = (0..).zip(devices).map(thread).collect::<anyhow::Result<Vec<_>>>()?;
    let site_json = Some(serde_json::to_string(&site)?);
    let roles =
        Roles { denoise: args.roles.contains(&DeviceRole::Denoise), decode: args.roles.contains(&DeviceRole::Decode) };
    let (labels, crash) = (labels(args.labels)?, folder.evidence.crash());
    let (models, store_url) = (shelf.infos(), store.url().to_owned());
    let offer = Offer { devices: infos, site_json, models, store: store_url, roles, labels, crash };
    let towards = args.schedulers.first().context("no scheduler")?;
    let data_plane = DataPlane::start(args.data_plane.options(towards).await?).await?;
    let schedulers = Schedulers { addresses: args.schedulers, secret };
    let checkpoint_steps = args.checkpoint_steps;
    let name = NodeId(name);
    Ok(Prepared {
        name,
        schedulers,
        store,
        folder,
        shelf,
        devices,
        checkpoint_steps,
        memory,
        precision,
        data_plane,
        offer,
    })
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
    fn labels_and_bytes_are_read_as_documented_and_nothing_else() {
        let label = |text: &str| text.parse::<Label>();
        assert_eq!(label("gpu=h=100"), Ok(Label("gpu".into(), "h=100".into())));
        let long = "x".repeat(MAX_LABEL_BYTES + 1);
        for bad in ["", "gpu", "=h100", "a\nb=c", "a=\u{7f}", &format!("{long}=a"), &format!("a={long}")] {
            assert!(label(bad).is_err(), "{bad}");
        }
        let count = |count: usize| labels((0..count).map(|i| label(&format!("l{i}=")).unwrap()).collect());
        assert_eq!(count(MAX_LABELS).unwrap().len(), MAX_LABELS);
        assert!(count(MAX_LABELS + 1).is_err() && labels(vec![label("a=b").unwrap(); 2]).is_err());

        for (text, bytes) in [("1024", 1024.0), ("16GiB", 16.0 * 1024.0 * 1024.0 * 1024.0), ("0.5 KiB", 512.0)] {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
        for bad in ["", "GiB", "16GB", "-1", "0", "nan", "inf", "1e99TiB"] {
            assert!(parse_bytes(bad).is_err(), "{bad}");
        }
    }

    #[tokio::test]
    async fn a_node_hears_of_a_spot_notice_when_its_file_appears() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("notice");
        let notice = spot_notice(Some(&file));
        tokio::pin!(notice);
        assert!(futures::poll!(&mut notice).is_pending());
        std::fs::write(&file, "").unwrap();
        tokio::time::timeout(Duration::from_secs(20), notice).await.unwrap();
    }

    #[test]
    fn roles_are_both_unless_some_are_named_and_schedulers_as_many_as_are_named() {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            args: Args,
        }
        let line = |more: &[&str]| {
            let line = "node --scheduler h:1 --devices cpu:1 --model m=d --store s";
            Line::try_parse_from(line.split(' ').chain(more.iter().copied())).map(|line| line.args)
        };
        let schedulers = |more: &[&str]| line(more).map(|args| args.schedulers);
        assert_eq!(schedulers(&["--scheduler", "i:2,j:3"]).unwrap(), ["h:1", "i:2", "j:3"]);
        assert!(schedulers(&["--scheduler", "i:2,j"]).is_err());
        let roles = |more: &[&str]| line(more).map(|args| args.roles);
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
