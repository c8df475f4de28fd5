//! Clips are decoded by several nodes at once while these are killed, paused, cut off, slowed down, and lied to by their
//! network. Every clip comes out once and right, nothing that was denoised is denoised again, and everybody is idle
//! afterwards.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::Write;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use farm_tests::dice::Dice;
use farm_tests::farm::{Farm, Setup};
use farm_tests::network::Network;
use farm_tests::proxy::{Proxy, Weather};
use farm_tests::{programs, repository, wait_until};
use jiff::Timestamp;
use serde_json::Value;
use sha2::{Digest, Sha256};

const NODES: usize = 3;
const PORT: u16 = 7900;
const TILES: &str = "shared:4x4+2";
/// Clips that are not the same, of this size.
const SPECS: usize = 4;
const SIZE: [u32; 2] = [128, 64];
const FRAMES: u32 = 31;
const STEPS: u32 = 4;
/// Of every process, at any time. Idle nodes have about 60 MiB, most of it weights.
const MEMORY: u64 = 400 << 20;
/// No clip is finished for so long: something is stuck for good.
const STUCK: Duration = Duration::from_secs(120);
/// Once all clips are done and nothing is broken any more.
const IDLE: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(400);
/// A slow node stands still for this part of the time.
const STOPPED_OF_10: u128 = 8;

/// Clips of this run: `FARM_DECODE_CLIPS`, or a few.
fn clips() -> usize {
    std::env::var("FARM_DECODE_CLIPS").map_or(4, |count| count.parse().expect("FARM_DECODE_CLIPS is a number"))
}

/// `FARM_SEED`, or one of the clock.
fn seed() -> u64 {
    let clock = || std::time::UNIX_EPOCH.elapsed().unwrap().as_millis() as u64 % 1_000_000;
    std::env::var("FARM_SEED").map_or_else(|_| clock(), |seed| seed.parse().expect("FARM_SEED is a number"))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    Kill,
    Pause,
    CutLink,
    Slow,
    Spoil(Spoiled),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Spoiled {
    Corrupt,
    Repeat,
    Hangup,
}

impl Fault {
    const ALL: [Self; 7] = [
        Self::Kill,
        Self::Pause,
        Self::CutLink,
        Self::Slow,
        Self::Spoil(Spoiled::Corrupt),
        Self::Spoil(Spoiled::Repeat),
        Self::Spoil(Spoiled::Hangup),
    ];

    /// How long it lasts, in milliseconds: at least, and up to so much more.
    fn span(self) -> (usize, usize) {
        match self {
            Self::Kill => (500, 2500),
            Self::Pause | Self::CutLink => (1000, 7000),
            Self::Slow | Self::Spoil(_) => (2000, 4000),
        }
    }
}

/// The farm, and what is wrong with its nodes at the moment.
struct Scene {
    farm: Farm,
    network: Arc<Network>,
    proxies: Vec<Proxy>,
    dice: Dice,
    broken: [Option<(Fault, Instant)>; NODES],
    next_fault: Instant,
    faults: BTreeMap<Fault, usize>,
    /// Faults of nodes that were decoding.
    in_decode: usize,
    /// By process.
    memory: BTreeMap<String, u64>,
}

fn name(node: usize) -> String {
    format!("node-{node}")
}

impl Scene {
    fn new(network: Network, seed: u64) -> Self {
        let network = Arc::new(network);
        // The counters of the data plane are only told to those who look closely.
        let log = "info,ractor=warn,ractor_cluster=warn,farm_node::attempt::decode=debug";
        let farm = Farm::set_up(Setup {
            environment: vec![("RUST_LOG".into(), log.into())],
            scheduler: vec!["--tiles".into(), TILES.into()],
            network: Some(network.clone()),
            ..Setup::default()
        });
        let proxies = (0..NODES).map(|node| Proxy::start(&network, node, PORT, seed ^ node as u64)).collect();
        let mut scene = Self {
            farm,
            network,
            proxies,
            dice: Dice::new(seed),
            broken: [None; NODES],
            next_fault: Instant::now(),
            faults: BTreeMap::new(),
            in_decode: 0,
            memory: BTreeMap::new(),
        };
        (0..NODES).for_each(|node| scene.start_node(node));
        wait_until(Duration::from_secs(60), "all nodes have joined", || {
            scene.farm.json(&["nodes"])["nodes"].as_array().is_some_and(|nodes| nodes.len() == NODES)
        });
        scene
    }

    fn start_node(&mut self, node: usize) {
        let listen = format!("{}:{PORT}", self.network.address(node));
        let host = self.network.second_address(node).to_string();
        let mut more = vec!["--data-listen", &listen, "--data-host", &host];
        // Two that do all, and one that only helps.
        if node == NODES - 1 {
            more.extend(["--role", "decode"]);
        }
        self.farm.spawn_node(&name(node), Some(node), 1, &more);
    }

    /// Breaks what is due, heals what was broken for long enough.
    fn faults(&mut self) {
        let now = Instant::now();
        for node in 0..NODES {
            match self.broken[node] {
                Some((fault, until)) if until <= now => self.heal(node, fault),
                Some((Fault::Slow, _)) => self.slow(node),
                _ => {}
            }
        }
        let well: Vec<usize> = (0..NODES).filter(|node| self.broken[*node].is_none()).collect();
        if now < self.next_fault || well.is_empty() {
            return;
        }
        let decoding = self.decoding();
        // Mostly where it hurts.
        let aimed: Vec<usize> = well.iter().copied().filter(|node| decoding[*node]).collect();
        let of = if aimed.is_empty() || self.dice.roll(4) == 0 { &well } else { &aimed };
        let node = of[self.dice.roll(of.len())];
        self.in_decode += usize::from(decoding[node]);
        let fault = Fault::ALL[self.dice.roll(Fault::ALL.len())];
        let (least, more) = fault.span();
        let until = now + Duration::from_millis((least + self.dice.roll(more)) as u64);
        self.next_fault = now + Duration::from_millis(1500 + self.dice.roll(1500) as u64);
        self.broken[node] = Some((fault, until));
        *self.faults.entry(fault).or_default() += 1;
        match fault {
            Fault::Kill => {
                self.note_memory();
                self.farm.kill_node(&name(node));
            }
            Fault::Pause => self.farm.signal(&name(node), libc::SIGSTOP),
            Fault::CutLink => self.network.set_link(node, false),
            Fault::Slow => self.slow(node),
            Fault::Spoil(Spoiled::Corrupt) => self.proxies[node].set(Weather::Corrupt),
            Fault::Spoil(Spoiled::Repeat) => self.proxies[node].set(Weather::Repeat),
            Fault::Spoil(Spoiled::Hangup) => self.proxies[node].set(Weather::Hangup),
        }
    }

    /// Which nodes decode at the moment, as far as the scheduler knows.
    fn decoding(&self) -> [bool; NODES] {
        let nodes = self.farm.json(&["nodes"]);
        let decodes = |device: &Value| device["helps"] == true || device["progress"]["stage"] == "decode";
        let all = nodes["nodes"].as_array().into_iter().flatten();
        let decoding: HashSet<_> = all.filter(|node| decodes(&node["devices"][0])).map(|node| &node["node"]).collect();
        std::array::from_fn(|node| decoding.contains(&Value::from(name(node))))
    }

    fn slow(&self, node: usize) {
        let tenth = std::time::UNIX_EPOCH.elapsed().unwrap().as_millis() / 30 % 10;
        let signal = if tenth < STOPPED_OF_10 { libc::SIGSTOP } else { libc::SIGCONT };
        self.farm.signal(&name(node), signal);
    }

    fn heal(&mut self, node: usize, fault: Fault) {
        self.broken[node] = None;
        match fault {
            Fault::Kill => self.start_node(node),
            Fault::Pause | Fault::Slow => self.farm.signal(&name(node), libc::SIGCONT),
            Fault::CutLink => self.network.set_link(node, true),
            Fault::Spoil(_) => self.proxies[node].set(Weather::Calm),
        }
    }

    fn heal_all(&mut self) {
        for node in 0..NODES {
            if let Some((fault, _)) = self.broken[node] {
                self.heal(node, fault);
            }
        }
    }

    fn note_memory(&mut self) {
        for (name, bytes) in self.farm.peak_memory() {
            let most = self.memory.entry(name.to_owned()).or_default();
            *most = bytes.max(*most);
        }
    }

    fn submit(&self, clips: std::ops::Range<usize>) {
        let mut lines = String::new();
        for clip in clips {
            let (mut line, _) = request(clip % SPECS);
            line["id"] = format!("clip-{clip}").into();
            writeln!(lines, "{line}").unwrap();
        }
        let file = self.farm.file("prompts.jsonl", &lines);
        let output = self.farm.farmctl(&["submit", file.to_str().unwrap()]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    fn jobs(&self) -> Vec<Value> {
        self.farm.json(&["list"])["jobs"].as_array().cloned().unwrap_or_default()
    }

    /// Everything that may help whoever reads of a failure.
    fn logs(&self) -> String {
        let mut logs = String::new();
        for name in (0..NODES).map(name).chain(["scheduler".to_owned()]) {
            let log = self.farm.log(&name);
            let lines: Vec<&str> = log.lines().collect();
            let last = &lines[lines.len().saturating_sub(60)..];
            write!(logs, "---- {name}\n{}\n", last.join("\n")).unwrap();
        }
        logs
    }
}

/// One of the clips that are not the same: as a prompt's line, and as arguments of `farm-node render`.
fn request(spec: usize) -> (Value, Vec<String>) {
    let prompt = ["a red ball moving left", "a green ball moving up", "a blue ball growing", "a yellow triangle"][spec];
    let ([width, height], seed) = (SIZE, 7 + spec as u64);
    let line = serde_json::json!({
        "prompt": prompt, "width": width, "height": height, "num_frames": FRAMES, "num_inference_steps": STEPS, "seed": seed
    });
    let arguments = format!("--width {width} --height {height} --num-frames {FRAMES} --steps {STEPS} --seed {seed}");
    let mut arguments: Vec<String> = arguments.split(' ').map(str::to_owned).collect();
    arguments.extend(["--prompt".to_owned(), prompt.to_owned()]);
    (line, arguments)
}

/// The sha-256 of the clip that one process makes.
fn reference(spec: usize, folder: &Path) -> String {
    let out = folder.join("reference.mp4");
    let mut command = Command::new(programs().join("farm-node"));
    command.args(["render", "--tiles", TILES, "--threads", "1"]).args(request(spec).1);
    command.arg("--model").arg(repository().join("assets/mochi-tiny")).arg("--out").arg(&out);
    let done = command.output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    format!("{:x}", Sha256::digest(std::fs::read(&out).unwrap()))
}

#[test]
fn clips_are_decoded_once_and_right_whatever_happens_to_nodes_and_network() {
    let network = match Network::new(NODES + 1) {
        Ok(network) => network,
        Err(reason) => {
            println!("skipped, {} clips not tried: network namespaces take root and `ip` ({reason})", clips());
            return;
        }
    };
    let (clips, seed) = (clips(), seed());
    println!("FARM_SEED={seed}");
    let folder = tempfile::tempdir().unwrap();
    let expected: Vec<String> = (0..SPECS).map(|spec| reference(spec, folder.path())).collect();
    let distinct: HashSet<&String> = expected.iter().collect();
    assert_eq!(distinct.len(), SPECS, "clips that look the same prove little");

    let mut scene = Scene::new(network, seed);
    let began = Instant::now();
    let (mut submitted, mut done, mut looked) = (0, 0, Instant::now());
    let mut last_done = Instant::now();
    while done < clips {
        scene.faults();
        std::thread::park_timeout(Duration::from_millis(10));
        if looked.elapsed() < LOOK {
            continue;
        }
        looked = Instant::now();
        scene.note_memory();
        let jobs = scene.jobs();
        let failed: Vec<_> = jobs.iter().filter(|job| job["state"] == "failed").collect();
        assert!(failed.is_empty(), "{failed:#?}\n{}", scene.logs());
        let now_done = jobs.iter().filter(|job| job["state"] == "done").count();
        if now_done > done {
            (done, last_done) = (now_done, Instant::now());
        }
        assert!(last_done.elapsed() < STUCK, "stuck after {done} clips\n{jobs:#?}\n{}", scene.logs());
        // Now there is a queue, now there are devices with nothing to do but to help.
        if submitted - done.min(submitted) <= 1 && submitted < clips {
            let more = [1, 1, 1, 3][scene.dice.roll(4)].min(clips - submitted);
            scene.submit(submitted..submitted + more);
            submitted += more;
        }
    }
    let wall = began.elapsed();

    scene.heal_all();
    wait_until(IDLE, "all nodes are there and all devices are idle", || {
        let nodes = scene.farm.json(&["nodes"]);
        let Some(nodes) = nodes["nodes"].as_array() else { return false };
        nodes.len() == NODES && nodes.iter().all(|node| node["alive"] == true && node["devices"][0]["job"].is_null())
    });
    assert_eq!(scene.farm.ended(), [""; 0], "nobody has killed them\n{}", scene.logs());
    scene.note_memory();
    for (name, bytes) in &scene.memory {
        assert!(*bytes <= MEMORY, "{name} has had {} MiB", bytes >> 20);
    }

    let jobs = scene.jobs();
    assert_eq!(jobs.len(), clips);
    let mut longest = (0.0, String::new());
    let (mut attempts, mut helped, mut several, mut orphans) = (0, 0, 0, 0);
    for job in &jobs {
        let id = job["job"].as_str().unwrap();
        let detail = scene.farm.json(&["show", id]);
        let tries = detail["attempts"].as_array().unwrap();
        let completed = tries.iter().filter(|attempt| attempt["outcome"] == "completed").count();
        assert_eq!((completed, &detail["state"]), (1, &Value::from("done")), "{detail:#}");
        attempts += tries.len();
        let result = &detail["result"];
        let spec = result["spec"]["seed"].as_u64().unwrap() as usize - 7;
        assert_eq!(result["clip_sha256"], *expected[spec], "{id} is not the clip that it should be: {detail:#}");
        orphans += check_store(&scene.farm, id, result, tries);
        check_denoised_once(&scene.farm, id, tries);

        let hands = result["decode"]["hands"].as_array().unwrap();
        let own = format!("{} ", result["node"].as_str().unwrap());
        helped += usize::from(hands.iter().any(|hand| !hand.as_str().unwrap().starts_with(&own)));
        several += usize::from(hands.len() > 1);
        let seconds = result["seconds"]["total"].as_f64().unwrap();
        if seconds > longest.0 {
            longest = (seconds, id.to_owned());
        }
    }
    wait_until(IDLE, "nobody keeps a clip that is not worked on", || {
        let kept = |node| std::fs::read_dir(scene.farm.folder().join(name(node)).join("clips")).unwrap().count();
        (0..NODES).all(|node| kept(node) == 0)
    });
    println!("the longest attempt:");
    for line in scene.farm.json(&["logs", &longest.1])["lines"].as_array().unwrap() {
        println!("  {} {} {}", line["at"].as_str().unwrap(), line["attempt"], line["line"].as_str().unwrap());
    }
    let told = Told::by(&scene.farm);
    let memory = scene.memory.values().max().unwrap() >> 20;
    let spoiled = |weather| scene.proxies.iter().map(|proxy| proxy.struck(weather)).sum::<u64>();
    println!(
        "{clips} clips in {:.0} s, {attempts} attempts, {helped} with help, {several} by several hands; faults {:?}, \
         {} of them on nodes that decoded; pieces damaged {}, repeated {}, hung up on {}; {told}; {orphans} clips of lost nodes left; longest attempt {:.1} s, most memory {memory} MiB",
        wall.as_secs_f64(),
        scene.faults,
        scene.in_decode,
        spoiled(Weather::Corrupt),
        spoiled(Weather::Repeat),
        spoiled(Weather::Hangup),
        longest.0,
    );
}

/// What the store has of a job: its result and the result's clip, and no latents. Returns how many attempts that were lost
/// with their node, before they could delete what they had uploaded, have left that behind.
fn check_store(farm: &Farm, id: &str, result: &Value, attempts: &[Value]) -> usize {
    let store = farm.folder().join("store");
    let folder = store.join("jobs").join(id);
    let manifest: Value = serde_json::from_slice(&std::fs::read(folder.join("result.json")).unwrap()).unwrap();
    assert_eq!(manifest, *result, "{id}");
    let clip = std::fs::read(store.join(result["clip"].as_str().unwrap())).unwrap();
    assert_eq!(format!("{:x}", Sha256::digest(clip)), result["clip_sha256"].as_str().unwrap(), "{id}");
    let names = |folder: &Path| -> Vec<String> {
        let entries = std::fs::read_dir(folder).into_iter().flatten();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    };
    let latents = names(&folder.join("latent"));
    assert!(latents.is_empty(), "{id} is done and keeps {latents:?}: {:#}", farm.json(&["logs", id]));
    let uploaded =
        names(&folder.join("attempt")).into_iter().filter(|n| !names(&folder.join("attempt").join(n)).is_empty());
    let accepted = result["attempt"].to_string();
    let others: Vec<String> = uploaded.filter(|number| *number != accepted).collect();
    for number in &others {
        let lost = |a: &Value| a["attempt"].as_u64() == number.parse().ok() && a["outcome"] == "node_lost";
        assert!(attempts.iter().any(lost), "{id}: attempt {number} was not lost and left a clip: {attempts:#?}");
    }
    others.len()
}

/// No attempt denoises that was started after the decode of an earlier one began.
fn check_denoised_once(farm: &Farm, id: &str, attempts: &[Value]) {
    let time = |value: &Value| value.as_str().unwrap().parse::<Timestamp>().unwrap();
    let number = |value: &Value| value["attempt"].as_u64().unwrap();
    let started: HashMap<u64, Timestamp> = attempts.iter().map(|a| (number(a), time(&a["started"]))).collect();
    let log = farm.json(&["logs", id]);
    let lines = log["lines"].as_array().unwrap();
    let said = |text: &'static str| lines.iter().filter(move |line| line["line"] == text);
    // All are the scheduler's times.
    let Some(finished) = said("decode begins").map(|line| time(&line["at"])).min() else {
        panic!("{id} was never decoded: {log:#}");
    };
    for attempt in said("denoise begins").map(number) {
        assert!(started[&attempt] < finished, "{id} is denoised again by attempt {attempt}: {log:#}");
    }
}

/// What the nodes' logs count.
#[derive(Default)]
struct Told {
    hands_lost: usize,
    hedges: usize,
    /// Of the data plane, as far as it was still told before a node was killed.
    network: BTreeMap<String, u64>,
}

impl Told {
    fn by(farm: &Farm) -> Self {
        let mut told = Self::default();
        for node in 0..NODES {
            let mut latest = HashMap::new();
            for line in farm.log(&name(node)).lines() {
                told.hands_lost += usize::from(line.contains("decode: hand ") && line.contains(" is lost, "));
                told.hedges += usize::from(line.contains("decode: tile ") && line.contains(" is late; "));
                if line.contains("node starts") {
                    told.add(std::mem::take(&mut latest));
                }
                if let Some((_, counters)) = line.split_once("Counters { ") {
                    let counters = counters.split_once(" }").map_or(counters, |(counters, _)| counters);
                    let pairs = counters.split(", ").filter_map(|pair| pair.split_once(": "));
                    latest = pairs.filter_map(|(name, n)| Some((name.to_owned(), n.parse().ok()?))).collect();
                }
            }
            told.add(latest);
        }
        told
    }

    fn add(&mut self, counters: HashMap<String, u64>) {
        for (name, count) in counters {
            *self.network.entry(name).or_default() += count;
        }
    }
}

impl std::fmt::Display for Told {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} hands lost, {} hedges", self.hands_lost, self.hedges)?;
        self.network.iter().try_for_each(|(name, count)| write!(f, ", {} {count}", name.replace('_', " ")))
    }
}
