//! The ranks that render a clip: threads of this process, or this process among others.

use std::io;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use farm_core::comm::{Patience, local, tcp};
use farm_core::job::spec::RenderSpec;
use farm_core::job::state::Progress;
use farm_core::model::ModelError;
use farm_core::model::config::DitConfig;
use farm_core::model::pipeline::{RenderObserver, Start};
use farm_core::parallel::cost::{self, ClipShape};
use farm_core::parallel::group::RankGroup;
use farm_core::parallel::topology::Topology;

use crate::command::plan::Degrees;
use crate::devices::{Compute, Devices, Placing};
use crate::engine::DeviceEngine;
use crate::models::Copies;

/// What a group waits for its last member to be started.
const FORMING: Duration = Duration::from_secs(120);

#[derive(clap::Args)]
// Derived from the name `Args`, the group would clash with that of the whole command.
#[group(skip)]
#[command(next_help_heading = "Several devices")]
pub struct GroupArgs {
    /// Devices that render the clip together, as ranks of this process: cpu:K or, for GPUs, cuda:K
    #[arg(long, value_name = "cpu:K|cuda:K", default_value = "cpu:1")]
    pub devices: Devices,
    #[command(flatten)]
    degrees: Degrees,
    /// Rates that `farm-node calibrate` has measured here, to choose degrees by [default: typical ones]
    #[arg(long, value_name = "FILE")]
    devices_file: Option<PathBuf>,
    /// This process is one rank, with one device, of a group of processes, and the first of them writes the clip
    #[arg(long, value_name = "R", requires_all = ["world", "peers"])]
    pub rank: Option<usize>,
    /// Processes of the group
    #[arg(long, value_name = "W", requires = "rank")]
    world: Option<usize>,
    /// host:port of every process, in rank order; each listens on its own port
    #[arg(long, value_name = "ADDR,…", value_delimiter = ',', requires = "rank")]
    peers: Vec<String>,
    /// How long a process of the group may give no sign of life
    #[arg(long, value_name = "SECONDS", default_value_t = 30.0, value_parser = parse_patience)]
    patience: f64,
    /// Certificate of this rank (PEM); with the next two, connections are encrypted and both ends authenticated
    #[arg(long, value_name = "FILE", requires_all = ["tls_key", "tls_ca", "rank"])]
    tls_cert: Option<PathBuf>,
    /// Its key
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// The authority that signs the ranks' certificates
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_ca: Option<PathBuf>,
}

fn parse_patience(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.1..=86_400.0).contains(&seconds) => Ok(seconds),
        _ => Err("write seconds, from 0.1 to 86400".into()),
    }
}

impl GroupArgs {
    /// Rank of this process among processes; 0 for a group of threads.
    pub fn rank(&self) -> usize {
        self.rank.unwrap_or(0)
    }

    /// The degrees asked for, the rest by the cost model; and whether weights are dealt out. Reads no weight.
    pub fn plan(&self, model: &DitConfig, spec: &RenderSpec, compute: &Compute) -> anyhow::Result<(Topology, bool)> {
        let world = self.world.unwrap_or(self.devices.count);
        if let Some(rank) = self.rank {
            ensure!(rank < world, "--rank {rank} of --world {world}; ranks count from 0");
            let devices = self.devices;
            ensure!(
                devices.count == 1,
                "--rank {rank} with --devices {devices}: a rank has one, the group as many as ranks"
            );
            let peers = self.peers.len();
            ensure!(peers == world, "--peers lists {peers} addresses for --world {world}; every rank has one");
        }
        let clip = ClipShape::new(
            spec.width,
            spec.height,
            spec.num_frames,
            spec.num_inference_steps,
            [&spec.prompt, &spec.negative_prompt].map(|text| if text.is_empty() { 0 } else { TYPICAL_TEXT }),
        )?;
        let placing = if self.rank.is_some() { Placing::Processes } else { Placing::Threads };
        let site = compute.site(self.devices.count, placing, self.devices_file.as_deref())?;
        let all = cost::candidates(&model.shape(), &clip, &site, world, self.degrees.into())?;
        let best = cost::choose(&all).context("no way to spread the clip")?;
        Ok((best.topology, best.shard))
    }

    fn patience(&self) -> Patience {
        Patience { silence: Duration::from_secs_f64(self.patience), ..Patience::default() }
    }
}

/// Text tokens of a prompt, near enough to choose degrees.
const TYPICAL_TEXT: usize = 48;

/// What a group renders.
pub struct Clip<'a> {
    pub networks: &'a Copies,
    pub topology: Topology,
    pub spec: &'a RenderSpec,
    /// Says what has to be the same on every rank of a group of processes.
    pub identity: String,
    pub compute: &'a Compute,
    pub stop: &'a Arc<AtomicBool>,
}

impl Clip<'_> {
    /// Runs `lead` as the leader of the group, and the other ranks beside it; or, if this process is another rank, runs
    /// that one.
    pub fn run(
        &self,
        args: &GroupArgs,
        lead: impl FnOnce(&DeviceEngine, &RankGroup<DeviceEngine>) -> Result<(), ModelError>,
        follower: &mut dyn RenderObserver,
    ) -> anyhow::Result<Result<(), ModelError>> {
        let Some(rank) = args.rank else { return self.run_threads(args, lead) };
        let engine = Arc::new(self.compute.engine(0)?);
        self.compute.settle(0)?;
        let tls = match (&args.tls_cert, &args.tls_key, &args.tls_ca) {
            (Some(certificate), Some(key), Some(ca)) => {
                Some(tcp::TlsFiles { certificate: certificate.clone(), key: key.clone(), ca: ca.clone() })
            }
            _ => None,
        };
        let options = tcp::TcpOptions {
            rank,
            peers: args.peers.clone(),
            listen: None,
            group: format!("{}; {}", self.topology, self.identity),
            patience: args.patience(),
            connect_within: FORMING,
            tls,
            cancel: self.stop.clone(),
        };
        let end = match tcp::connect(engine.clone(), options) {
            Ok(end) => end,
            Err(_) if self.stop.load(Ordering::Relaxed) => return Ok(Err(ModelError::Stopped)),
            Err(error) => bail!("the group did not form: {error}"),
        };
        let group = RankGroup::new(self.topology, Arc::new(end))?;
        Ok(match rank {
            0 => lead(&engine, &group),
            _ => self.networks.first().denoise(&engine, &group, self.spec, &Start::Seed, follower).map(drop),
        })
    }

    fn run_threads(
        &self,
        args: &GroupArgs,
        lead: impl FnOnce(&DeviceEngine, &RankGroup<DeviceEngine>) -> Result<(), ModelError>,
    ) -> anyhow::Result<Result<(), ModelError>> {
        let engines =
            (0..self.topology.world()).map(|rank| self.compute.engine(rank)).collect::<Result<Vec<_>, _>>()?;
        let ends = local::ranks(self.topology.world(), args.patience());
        let mut ranks = engines.iter().zip(ends);
        let (first, end) = ranks.next().context("a group without ranks")?;
        self.compute.settle(0)?;
        let outcomes = thread::scope(|scope| {
            let others: Vec<_> = ranks
                .enumerate()
                .map(|(i, (engine, end))| {
                    scope.spawn(move || {
                        self.compute.settle(i + 1).map_err(|error| ModelError::Input(format!("{error:#}")))?;
                        let group = RankGroup::new(self.topology, Arc::new(end))?;
                        let mut follower = Follower { stop: self.stop.clone() };
                        let pipeline = self.networks.of(self.compute, i + 1);
                        pipeline.denoise(engine, &group, self.spec, &Start::Seed, &mut follower).map(drop)
                    })
                })
                .collect();
            let led = RankGroup::new(self.topology, Arc::new(end))
                .map_err(ModelError::from)
                .and_then(|group| lead(first, &group));
            let followed = others.into_iter().map(|rank| {
                rank.join().unwrap_or_else(|_| Err(ModelError::Input("a rank of the group panicked".into())))
            });
            [led].into_iter().chain(followed).collect::<Vec<_>>()
        });
        Ok(first_cause(outcomes))
    }
}

/// Of what the ranks say, the error that the others' errors follow from.
fn first_cause(outcomes: Vec<Result<(), ModelError>>) -> Result<(), ModelError> {
    let mut errors: Vec<ModelError> = outcomes.into_iter().filter_map(Result::err).collect();
    match errors.iter().position(|error| !matches!(error, ModelError::Comm(_))) {
        Some(cause) => Err(errors.swap_remove(cause)),
        None => errors.into_iter().next().map_or(Ok(()), Err),
    }
}

/// A rank that is not the leader has nothing to show; it only stops when told to.
pub struct Follower {
    pub stop: Arc<AtomicBool>,
}

impl RenderObserver for Follower {
    fn progress(&mut self, _progress: Progress) -> ControlFlow<()> {
        if self.stop.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    fn warning(&mut self, _message: &str) {}

    fn frames(&mut self, _rgb24: &[u8], _count: usize) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use farm_core::comm::CommError;

    use super::*;

    #[test]
    fn the_cause_is_told_and_not_what_followed_from_it() {
        let lost = || Err(ModelError::Comm(CommError::Lost { rank: 2, why: "gone".into() }));
        let outcome = first_cause(vec![lost(), Ok(()), Err(ModelError::Stopped), lost()]);
        assert!(matches!(outcome, Err(ModelError::Stopped)));
        assert!(matches!(first_cause(vec![Ok(()), lost()]), Err(ModelError::Comm(_))));
        assert!(first_cause(vec![Ok(()), Ok(())]).is_ok());
    }

    #[test]
    fn patience_is_some_seconds() {
        assert_eq!(parse_patience("2.5"), Ok(2.5));
        for bad in ["0", "-1", "nan", "inf", "x", "1e9"] {
            assert!(parse_patience(bad).is_err(), "{bad}");
        }
    }
}
