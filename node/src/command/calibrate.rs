//! `farm-node calibrate`: how fast this machine is, as entries for `farm-node plan --devices-file`.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail, ensure};
use farm_core::comm::tcp::{self, TcpOptions};
use farm_core::comm::{Collective, Patience, local};
use farm_core::engine::{Engine, Over, SequenceOps};
use farm_core::job::spec::GenerationDefaults;
use farm_core::model::weights::checkpoint::Checkpoint;
use farm_core::parallel::cost::devices::{DeviceEntry, Devices as Rates, LinkEntry};
use farm_core::parallel::cost::{ClipShape, ModelShape};

use crate::devices::{CALIBRATED_CPU, CALIBRATED_LOCAL, CALIBRATED_TCP, Compute, Devices, Kind, ThreadArgs};
use crate::engine::DeviceEngine;

/// Rows of a product, and rows of keys, at most: as fast per value as more of them, and quick.
const MAX_ROWS: usize = 256;
const MAX_KEYS: usize = 2048;
/// For each quantity, after a first run that does not count.
const BUDGET: Duration = Duration::from_secs(1);
const MIN_RUNS: usize = 3;
const MAX_RUNS: usize = 200;
/// A message of a large clip; the largest caches do not hold a few of them.
const LARGE_BYTES: usize = 16 << 20;
const LARGE_RUNS: usize = 20;
/// A message of one value, for the latency.
const SMALL_RUNS: usize = 500;
/// A peer on this machine that says nothing for so long is broken.
const PATIENCE: Patience = Patience { silence: Duration::from_secs(10), stall: Duration::from_secs(10) };

#[derive(clap::Args)]
pub struct Args {
    /// Devices that compute at the same time
    #[arg(long, value_name = "cpu:K", default_value = "cpu:1")]
    pub devices: Devices,
    #[command(flatten)]
    pub threads: ThreadArgs,
    /// Measure at the sizes of this checkpoint [default: those of the published model]
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Where the entries go [default: standard output]
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    ensure!(args.devices.kind == Kind::Cpu, "this measures processors; rates of GPUs are known by their names");
    let (devices, compute) = (args.devices.count, args.threads.compute(args.devices)?);
    let threads = compute.threads();
    let (model, tokens, sizes) = sizes(args.model.as_deref())?;
    let source = format!("farm-node calibrate: {devices} at once, {threads} threads each, sizes of {sizes}");
    eprintln!("measuring {devices} devices of {threads} threads, about 5 seconds");

    let engines = (0..devices).map(|device| compute.engine(device).map(Arc::new)).collect::<Result<Vec<_>, _>>()?;
    let work = Work::new(&engines[0], &model, tokens)?;
    let linear = work.linear_flops / median_of_all(&engines, &compute, |engine| work.linear(engine))?;
    let attention = work.attention_flops / median_of_all(&engines, &compute, |engine| work.attention(engine))?;
    let bandwidth = work.elementwise_bytes / median_of_all(&engines, &compute, |engine| work.elementwise(engine))?;
    let device = DeviceEntry {
        peak: None,
        efficiency: None,
        linear: Some(rounded(linear)),
        attention: Some(rounded(attention)),
        memory: rounded(memory_bytes()? / devices as f64),
        bandwidth: rounded(bandwidth),
        value_bytes: 4,
        shared_weights: true,
        source,
    };
    let link = |(bandwidth, latency): (f64, f64), what: &str| LinkEntry {
        bandwidth: rounded(bandwidth),
        latency: rounded(latency),
        source: format!("farm-node calibrate: {what}"),
    };
    let local = link(local_link(&engines[0])?, "two ranks of one process, which pass handles on tensors");
    let tcp = link(
        tcp_link(&engines[0])?,
        "two ranks over loopback, as between processes, tensors to bytes and back included",
    );
    let rates = Rates {
        defaults: None,
        device: BTreeMap::from([(CALIBRATED_CPU.into(), device)]),
        link: BTreeMap::from([(CALIBRATED_LOCAL.into(), local), (CALIBRATED_TCP.into(), tcp)]),
    };
    let text = toml::to_string(&rates)?;
    match &args.out {
        Some(path) => std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?,
        None => io::stdout().write_all(text.as_bytes())?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Sizes to measure at, visual tokens of the checkpoint's own clip, and whose sizes they are.
fn sizes(model: Option<&Path>) -> anyhow::Result<(ModelShape, usize, String)> {
    let (shape, defaults, name) = match model {
        None => (ModelShape::mochi1(), GenerationDefaults::default(), "the published model".into()),
        Some(dir) => {
            let checkpoint = Checkpoint::open(dir)?;
            let dit = checkpoint.dit().with_context(|| format!("{} has no transformer", dir.display()))?;
            (dit.config().shape(), checkpoint.generation_defaults().clone(), dir.display().to_string())
        }
    };
    let GenerationDefaults { width, height, num_frames, .. } = defaults;
    Ok((shape, ClipShape::new(width, height, num_frames, 1, [0, 0])?.tokens, name))
}

type Tensor = <DeviceEngine as SequenceOps>::Tensor;

/// Operations of one block on a part of its rows. The devices share the weights, as in a render.
struct Work {
    x: Tensor,
    hidden: Tensor,
    vector: Tensor,
    qkv: <DeviceEngine as Engine>::Matrix,
    down: <DeviceEngine as Engine>::Matrix,
    queries: Tensor,
    keys: Tensor,
    linear_flops: f64,
    attention_flops: f64,
    elementwise_bytes: f64,
}

impl Work {
    fn new(engine: &DeviceEngine, model: &ModelShape, tokens: usize) -> anyhow::Result<Self> {
        let (rows, keys) = (tokens.min(MAX_ROWS), tokens.min(MAX_KEYS));
        let (d, f) = (model.hidden_x, model.ffn_x);
        let tensor = |shape: &[usize]| {
            // Any values that are not all alike.
            let values: Vec<f32> = (0..shape.iter().product()).map(|i: usize| (i % 61) as f32 / 61.0 - 0.5).collect();
            engine.upload(&values, shape)
        };
        Ok(Self {
            x: tensor(&[rows, d])?,
            hidden: tensor(&[rows, f])?,
            vector: tensor(&[d])?,
            qkv: engine.matrix(&tensor(&[3 * d, d])?, Over::Tokens)?,
            down: engine.matrix(&tensor(&[d, f])?, Over::Tokens)?,
            queries: tensor(&[rows, model.heads, model.head_dim])?,
            keys: tensor(&[keys, model.heads, model.head_dim])?,
            linear_flops: (2 * rows * (3 * d * d + d * f)) as f64,
            attention_flops: model.attention_flops(rows, keys, model.heads),
            elementwise_bytes: (4 * rows * (2 * d + 3 * d)) as f64,
        })
    }

    /// A wide product and a deep one.
    fn linear(&self, engine: &DeviceEngine) -> anyhow::Result<()> {
        engine.linear(&self.x, &self.qkv, None)?;
        engine.linear(&self.hidden, &self.down, None)?;
        Ok(())
    }

    fn attention(&self, engine: &DeviceEngine) -> anyhow::Result<()> {
        engine.attention(&self.queries, &[&self.keys], &[&self.keys])?;
        Ok(())
    }

    /// A norm and a gated residual: what stands between the products.
    fn elementwise(&self, engine: &DeviceEngine) -> anyhow::Result<()> {
        engine.modulated_rms_norm(&self.x, &self.vector)?;
        engine.gated_residual(&self.x, &self.x, &self.vector)?;
        Ok(())
    }
}

/// Median seconds of `work` on a device while all devices do the same.
fn median_of_all(
    engines: &[Arc<DeviceEngine>],
    compute: &Compute,
    work: impl Fn(&DeviceEngine) -> anyhow::Result<()> + Sync,
) -> anyhow::Result<f64> {
    let runs = runs_in_budget(&engines[0], engines.len(), &work)?;
    let samples = thread::scope(|scope| {
        let devices: Vec<_> = engines
            .iter()
            .enumerate()
            .map(|(device, engine)| {
                let work = &work;
                scope.spawn(move || {
                    compute.settle(device)?;
                    (0..runs)
                        .map(|_| {
                            let started = Instant::now();
                            work(engine).map(|()| started.elapsed().as_secs_f64())
                        })
                        .collect::<anyhow::Result<Vec<_>>>()
                })
            })
            .collect();
        devices
            .into_iter()
            .map(|device| device.join().map_err(|_| anyhow!("a device's thread panicked"))?)
            .collect::<anyhow::Result<Vec<_>>>()
    });
    Ok(median(samples?.into_iter().flatten().collect()))
}

/// As many runs as the budget has room for, from one on an idle machine.
fn runs_in_budget(
    engine: &DeviceEngine,
    devices: usize,
    work: &impl Fn(&DeviceEngine) -> anyhow::Result<()>,
) -> anyhow::Result<usize> {
    work(engine)?;
    let started = Instant::now();
    work(engine)?;
    // At worst the devices take turns.
    let one = started.elapsed().as_secs_f64().max(1e-9) * devices as f64;
    Ok(((BUDGET.as_secs_f64() / one) as usize).clamp(MIN_RUNS, MAX_RUNS))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Three digits: the next ones differ with every run.
fn rounded(value: f64) -> f64 {
    if value <= 0.0 || !value.is_finite() {
        return value;
    }
    let digit = 10f64.powi(value.log10().floor() as i32 - 2);
    // Division by a whole number is exact in decimal, multiplication by a fraction is not.
    if digit < 1.0 { (value / digit).round() / (1.0 / digit).round() } else { (value / digit).round() * digit }
}

pub(super) fn memory_bytes() -> anyhow::Result<f64> {
    let text = std::fs::read_to_string("/proc/meminfo").context("the size of the memory is read from /proc")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:")).context("/proc/meminfo has no MemTotal")?;
    let kib: f64 = line.trim().trim_end_matches(" kB").parse().with_context(|| format!("MemTotal is {line:?}"))?;
    Ok(1024.0 * kib)
}

/// Bytes/s and seconds of latency of exchanges between two ranks of a group.
fn link_rates(ranks: [&dyn Collective<Tensor>; 2], engine: &DeviceEngine) -> anyhow::Result<(f64, f64)> {
    let message = |values: usize| engine.upload(&vec![1.0; values], &[values]);
    let (small, large) = (message(1)?, message(LARGE_BYTES / 4)?);
    // Both ranks do the same in step, and both send and receive.
    let median_exchange = |rank: &dyn Collective<Tensor>, message: &Tensor, runs: usize| -> anyhow::Result<f64> {
        let peer = 1 - rank.rank();
        let mut samples = Vec::with_capacity(runs);
        for _ in 0..=runs {
            let started = Instant::now();
            rank.start(vec![(peer, message.clone())], vec![(peer, engine.shape(message))])?.wait()?;
            samples.push(started.elapsed().as_secs_f64());
        }
        // The first one finds everything asleep.
        Ok(median(samples.split_off(1)))
    };
    let both =
        |rank| anyhow::Ok([median_exchange(rank, &small, SMALL_RUNS)?, median_exchange(rank, &large, LARGE_RUNS)?]);
    thread::scope(|scope| {
        let [mine, other] = ranks;
        let peer = scope.spawn(move || both(other));
        let [latency, seconds] = both(mine)?;
        peer.join().map_err(|_| anyhow!("the peer's thread panicked"))??;
        Ok((LARGE_BYTES as f64 / seconds, latency))
    })
}

fn local_link(engine: &DeviceEngine) -> anyhow::Result<(f64, f64)> {
    let ranks = local::ranks(2, PATIENCE);
    let [mine, other] = &ranks[..] else { bail!("a group of two has {} ranks", ranks.len()) };
    link_rates([mine, other], engine)
}

fn tcp_link(engine: &Arc<DeviceEngine>) -> anyhow::Result<(f64, f64)> {
    let listen = || TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("cannot listen on loopback");
    let listeners = [listen()?, listen()?];
    let peers = listeners.iter().map(|listener| Ok(listener.local_addr()?.to_string()));
    let peers = peers.collect::<anyhow::Result<Vec<_>>>()?;
    let connect = |(rank, listener)| {
        let group = "calibrate".into();
        let (peers, cancel) = (peers.clone(), Arc::default());
        let options = TcpOptions {
            rank,
            peers,
            listen: None,
            group,
            patience: PATIENCE,
            connect_within: PATIENCE.stall,
            tls: None,
            cancel,
        };
        tcp::connect_on(engine.clone(), options, Some(listener))
    };
    let ranks = thread::scope(|scope| {
        let connecting: Vec<_> =
            listeners.into_iter().enumerate().map(|rank| scope.spawn(move || connect(rank))).collect();
        let join = |rank: thread::ScopedJoinHandle<_>| rank.join().map_err(|_| anyhow!("a rank's thread panicked"));
        connecting.into_iter().map(|rank| Ok(join(rank)??)).collect::<anyhow::Result<Vec<_>>>()
    })?;
    let [mine, other] = &ranks[..] else { bail!("a group of two has {} ranks", ranks.len()) };
    link_rates([mine, other], engine)
}

#[cfg(test)]
mod tests {
    use farm_core::engine::cpu::CpuEngine;

    use super::*;

    #[test]
    fn figures_have_three_digits_and_read_well() {
        assert_eq!([rounded(33_456_789_012.0), rounded(123.4)], [33_500_000_000.0, 123.0]);
        assert_eq!(rounded(0.000_016_149).to_string(), "0.0000161");
        assert_eq!(rounded(0.0), 0.0);
    }

    #[test]
    fn half_of_the_runs_took_longer_than_the_median() {
        assert_eq!(median(vec![9.0, 1.0, 2.0]), 2.0);
    }

    #[test]
    fn both_kinds_of_link_are_measured() {
        let engine = Arc::new(DeviceEngine::Cpu(CpuEngine::new(1).unwrap()));
        for (bandwidth, latency) in [local_link(&engine).unwrap(), tcp_link(&engine).unwrap()] {
            assert!(bandwidth > 0.0 && bandwidth.is_finite() && latency > 0.0 && latency < 1.0);
        }
    }
}
