//! What a schedule is about, drawn from its seed: the farm, its work, and which faults there are. Each schedule has some
//! kinds of faults and not others, so that rare ones are not hidden behind common ones.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use farm_core::id::TenantId;
use farm_core::job::spec::{GenerationDefaults, RenderRequest};
use farm_core::parallel::cost::{Candidate, ClipShape, DeviceRates, LinkRates, ModelShape, Site, predict};
use farm_core::wire::StopNo;
use farm_core::wire::to_scheduler::{DeviceInfo, ModelInfo, Registration, Roles};

use super::Ms;
use super::random::Random;
use crate::core::events::Ask;
use crate::core::farm::Limits;

/// Bytes that any clip fits into.
const PLENTY: f64 = 1e12;
pub const STORE: &str = "file:///results";
/// The wall clock at the beginning, in milliseconds since 1970: near the end of an hour of the ledger.
pub const WALL_MS: i64 = 1_800_000_000_000 + 3_540_000;

/// What is peculiar about a job, whatever node it is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trait {
    Plain,
    /// It kills the process that renders it.
    Poison,
    /// It fits no checkpoint.
    Bad,
    /// It runs out of memory on fewer devices than this.
    Large(u32),
    /// Its decode runs out of memory unless tiles are made smaller.
    LargeTiles,
}

/// What can go wrong by itself, at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    SchedulerKilled,
    /// A scheduler ends between two of its effects.
    CrashAtEffect,
    /// SIGSTOP, for longer than its session with the database may be silent, or shorter.
    LeaderStopped,
    /// The leader's machine stands still, its clocks too, and then they jump.
    LeaderMachinePaused,
    WallClockJump,
    DatabaseFailover,
    /// A scheduler and the database cannot reach each other.
    DatabaseCut,
    NodeKilled,
    /// The machine goes, and nobody says anything for a long time.
    MachineLost,
    /// It is to leave soon.
    SpotNotice,
    NodeFrozen,
    ConnectionBroken,
    /// A node and all schedulers cannot reach each other, and nobody is told.
    BlackHole,
    /// Only one direction is dead.
    HalfOpen,
    DeviceLost,
    DiskFull,
    BucketSlow,
    BucketFails,
    /// A burst of lost, late and doubled messages.
    Storm,
}

impl Fault {
    pub const ALL: [Self; 19] = [
        Self::SchedulerKilled,
        Self::CrashAtEffect,
        Self::LeaderStopped,
        Self::LeaderMachinePaused,
        Self::WallClockJump,
        Self::DatabaseFailover,
        Self::DatabaseCut,
        Self::NodeKilled,
        Self::MachineLost,
        Self::SpotNotice,
        Self::NodeFrozen,
        Self::ConnectionBroken,
        Self::BlackHole,
        Self::HalfOpen,
        Self::DeviceLost,
        Self::DiskFull,
        Self::BucketSlow,
        Self::BucketFails,
        Self::Storm,
    ];
}

/// How messages travel.
#[derive(Clone, Copy, Debug, Default)]
pub struct Net {
    pub delay: Ms,
    pub lost: f64,
    pub doubled: f64,
    /// Delayed by seconds, so that others overtake it.
    pub late: f64,
}

/// What attempts meet with, each with its probability.
#[derive(Clone, Copy, Debug, Default)]
pub struct Luck {
    pub device_fails: f64,
    pub hangs: f64,
    pub out_of_memory: f64,
    pub put_unanswered: f64,
}

#[derive(Clone, Debug)]
pub struct NodePlan {
    pub registration: Arc<Registration>,
    /// It is of another version until somebody upgrades it.
    pub skewed: bool,
    pub knows_yield: bool,
}

/// A kind of clip.
#[derive(Clone, Debug)]
pub struct Kind {
    pub request: Arc<RenderRequest>,
    pub ask: Ask,
    pub model: Option<String>,
    /// On one device.
    pub seconds: f64,
    pub steps: u32,
    pub tiles: u32,
}

pub struct Plan {
    pub large: bool,
    pub limits: Limits,
    pub nodes: Vec<NodePlan>,
    pub schedulers: usize,
    pub kinds: Vec<Kind>,
    pub tenants: Vec<TenantId>,
    pub net: Net,
    pub luck: Luck,
    pub faults: Vec<(Ms, Fault)>,
    /// Until then things go wrong and work comes in.
    pub active: Ms,
    /// Submissions and wishes: when.
    pub submissions: Vec<Ms>,
    pub wishes: Vec<Ms>,
    /// Lines of a submission, at most.
    pub lines: u64,
    /// Jobs that are not plain.
    pub odd: f64,
    pub commit_delay: Ms,
    /// The first tenant submits more than the farm can render, and nothing goes wrong: the others must not starve.
    pub flood: bool,
}

impl Plan {
    pub fn small(random: &mut Random) -> Self {
        let plan = Self::any(random);
        if random.chance(0.04) { plan.flooded(random) } else { plan }
    }

    fn flooded(self, random: &mut Random) -> Self {
        let active = 400_000;
        let (mut nodes, net) = (self.nodes, Net { delay: self.net.delay, ..Net::default() });
        nodes.truncate(3);
        nodes.iter_mut().for_each(|node| node.skewed = false);
        Self {
            nodes,
            net,
            luck: Luck::default(),
            faults: Vec::new(),
            wishes: Vec::new(),
            odd: 0.0,
            tenants: (0..random.between(2, 4)).map(tenant).collect(),
            submissions: (0..60).map(|i| i * active / 60).collect(),
            lines: 8,
            active,
            flood: true,
            ..self
        }
    }

    fn any(random: &mut Random) -> Self {
        let calm = random.chance(0.15);
        let some = |random: &mut Random, value: f64| if !calm && random.chance(0.5) { value } else { 0.0 };
        let active = random.between(30_000, 120_000);
        let most = if random.chance(0.3) { 20 } else { 7 };
        let count = random.between(2, most) as usize;
        let kinds = kinds(random);
        let net = Net {
            delay: random.pick(&[1, 5, 20, 80]),
            lost: some(random, 0.05),
            doubled: some(random, 0.05),
            late: some(random, 0.05),
        };
        let luck = Luck {
            device_fails: some(random, 0.1),
            hangs: some(random, 0.05),
            out_of_memory: some(random, 0.05),
            put_unanswered: some(random, 0.2),
        };
        let enabled: Vec<Fault> = Fault::ALL.into_iter().filter(|_| random.chance(0.3)).collect();
        let faults = if calm || enabled.is_empty() { 0 } else { random.between(1, 12) };
        let faults = (0..faults).map(|_| (random.below(active), random.pick(&enabled))).collect();
        let submissions = random.between(1, 6);
        let wishes = if random.chance(0.5) { random.below(12) } else { 0 };
        Self {
            large: false,
            limits: limits(random),
            nodes: nodes(random, count, &kinds),
            schedulers: random.pick(&[1, 2, 2, 3]),
            kinds,
            tenants: (0..random.between(1, 4)).map(tenant).collect(),
            net,
            luck,
            faults,
            active,
            submissions: (0..submissions).map(|i| if i == 0 { 100 } else { random.below(active) }).collect(),
            wishes: (0..wishes).map(|_| random.below(active)).collect(),
            lines: random.pick(&[3, 8, 20]),
            odd: some(random, 0.1),
            commit_delay: random.pick(&[0, 0, 2, 30]),
            flood: false,
        }
    }

    /// Ten thousand nodes of eight devices, or as many as are asked for.
    pub fn large(random: &mut Random, count: usize) -> Self {
        let active = 24_000;
        let per_node = |of: u64| (count as u64 / of).max(1);
        let mut faults = Vec::new();
        for (fault, times) in [
            (Fault::NodeKilled, per_node(100)),
            (Fault::MachineLost, per_node(200)),
            (Fault::SpotNotice, per_node(100)),
            (Fault::NodeFrozen, per_node(100)),
            (Fault::ConnectionBroken, per_node(50)),
            (Fault::BlackHole, per_node(200)),
            (Fault::HalfOpen, per_node(200)),
            (Fault::DeviceLost, per_node(100)),
            (random.pick(&Fault::ALL[..7]), 1),
        ] {
            faults.extend((0..times).map(|_| (random.between(8_000, active), fault)));
        }
        let registration = Arc::new(registration(random, 8, Roles::ALL, &["m"], Some(PLENTY), "h100"));
        let plan = NodePlan { registration, skewed: false, knows_yield: true };
        let luck = Luck { device_fails: 0.01, hangs: 0.0, out_of_memory: 0.01, put_unanswered: 0.05 };
        Self {
            large: true,
            limits: Limits { heartbeat: Duration::from_secs(2), ..limits(random) },
            nodes: vec![plan; count],
            schedulers: 2,
            kinds: kinds(random).into_iter().filter(|kind| kind.model.as_deref() != Some("n")).collect(),
            tenants: (0..4).map(tenant).collect(),
            net: Net { delay: 5, lost: 0.01, doubled: 0.01, late: 0.01 },
            luck,
            faults,
            active,
            submissions: (0..8).map(|i| i * 2_000 + 100).collect(),
            wishes: (0..20).map(|_| random.below(active)).collect(),
            lines: (count as u64 / 2).max(1),
            odd: 0.001,
            commit_delay: 2,
            flood: false,
        }
    }
}

/// The product's, but a group that hangs is found sooner.
fn limits(random: &mut Random) -> Limits {
    Limits { stuck: Duration::from_secs(random.pick(&[30, 60])), ..Limits::default() }
}

pub fn tenant(n: u64) -> TenantId {
    match n {
        0 => TenantId::default(),
        n => format!("t{n}").parse().unwrap_or_default(),
    }
}

/// A small network, so that predictions are cheap to make.
fn shape() -> ModelShape {
    ModelShape {
        layers: 2,
        heads: 24,
        head_dim: 16,
        hidden_x: 384,
        hidden_y: 192,
        ffn_x: 1024,
        ffn_y: 512,
        text_dim: 192,
        time_dim: 64,
        channels: 12,
    }
}

fn kinds(random: &mut Random) -> Vec<Kind> {
    let mut kinds = Vec::new();
    for i in 0..random.between(1, 4) {
        let steps = random.pick(&[4u32, 8, 16, 20]);
        let request = RenderRequest {
            prompt: "a".to_owned(),
            negative_prompt: None,
            width: Some(64),
            height: Some(64 + 16 * i as u32),
            num_frames: Some(random.pick(&[7u32, 13, 25])),
            num_inference_steps: Some(steps),
            guidance_scale: None,
            seed: None,
            id: None,
            priority: None,
            model: None,
            labels: BTreeMap::new(),
            after: Vec::new(),
            require: BTreeMap::new(),
        };
        let ask = Ask::of(&request);
        let model = random.pick(&[Some("m"), Some("m"), Some("n"), None]).map(str::to_owned);
        let seconds = base_seconds(ask) * random.pick(&[0.7, 1.0, 1.0, 2.0]);
        kinds.push(Kind { request: request.into(), ask, model, seconds, steps, tiles: random.pick(&[1u32, 2, 6]) });
    }
    // Some kind can be rendered wherever there is a renderer.
    kinds[0].model = Some("m".to_owned());
    kinds
}

/// What a device of [`rates`] is predicted to take.
fn base_seconds(ask: Ask) -> f64 {
    on_one(ask).map_or(10.0, |best| best.seconds)
}

fn on_one(ask: Ask) -> Option<Candidate> {
    let Ask { width, height, num_frames, num_inference_steps, text } = ask;
    let text = text.map(|tokens| tokens as usize);
    let clip = ClipShape::new(width?, height?, num_frames?, num_inference_steps?, text).ok()?;
    let site = Site::one_host(rates(PLENTY), LinkRates { bandwidth: 1e10, latency: 1e-6 });
    predict(&shape(), &clip, &site, 1)
}

/// Memory in which the largest kind fits on no single device, if there are several.
fn tight(kinds: &[Kind]) -> f64 {
    let needed = kinds.iter().filter_map(|kind| on_one(kind.ask)).map(|best| best.memory).max();
    needed.map_or(PLENTY, |bytes| 0.9 * bytes as f64)
}

fn rates(memory: f64) -> DeviceRates {
    DeviceRates { linear: 2e9, attention: 2e9, memory, bandwidth: 1e12, value_bytes: 2, shared_weights: false }
}

fn nodes(random: &mut Random, count: usize, kinds: &[Kind]) -> Vec<NodePlan> {
    let scarce = random.chance(0.3).then(|| tight(kinds));
    let rated = random.chance(0.8);
    let skews = random.chance(0.2);
    let mut nodes = Vec::new();
    for i in 0..count {
        let devices = random.pick(&[1usize, 2, 2, 4, 8]);
        // The first can do all.
        let roles = match random.below(8) {
            0 if i > 0 => Roles { denoise: false, decode: true },
            1 if i > 0 => Roles { denoise: true, decode: false },
            _ => Roles::ALL,
        };
        let models = if i == 0 { &["m", "n"][..] } else { random.pick(&[&["m"][..], &["m", "n"], &["n"]]) };
        let gpu = if i == 0 { "h100" } else { random.pick(&["h100", "a100"]) };
        // The first node has memory for anything only on all its devices together.
        let devices = if i == 0 && scarce.is_some() { devices.max(4) } else { devices };
        let memory = scarce.unwrap_or(PLENTY);
        let registration = registration(random, devices, roles, models, rated.then_some(memory), gpu).into();
        let skewed = i > 0 && skews && random.chance(0.3);
        nodes.push(NodePlan { registration, skewed, knows_yield: !random.chance(0.1) });
    }
    nodes
}

fn registration(
    random: &mut Random,
    devices: usize,
    roles: Roles,
    models: &[&str],
    memory: Option<f64>,
    gpu: &str,
) -> Registration {
    let link = LinkRates { bandwidth: random.pick(&[1e9, 1e10]), latency: 1e-6 };
    let site = memory.map(|memory| Site::one_host(rates(memory), link));
    let model = |name: &&str| ModelInfo {
        name: (*name).to_owned(),
        hash: format!("hash-of-{name}"),
        defaults_json: serde_json::to_string(&GenerationDefaults::default()).unwrap_or_default(),
        shape_json: serde_json::to_string(&shape()).unwrap_or_default(),
    };
    Registration {
        version: "simulated".to_owned(),
        devices: (0..devices).map(|_| DeviceInfo { name: gpu.to_owned() }).collect(),
        site_json: site.and_then(|site| serde_json::to_string(&site).ok()),
        models: models.iter().map(model).collect(),
        store: STORE.to_owned(),
        roles,
        labels: BTreeMap::from([("gpu".to_owned(), gpu.to_owned())]),
        crash: None,
        running: Vec::new(),
        helping: Vec::new(),
        heard: StopNo::default(),
    }
}
