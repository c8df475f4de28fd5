//! A group of processes on hosts of their own loses a rank in the middle: everybody is told who it was, and the clip
//! is finished by those who are left, with the same picture.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use farm_tests::dice::Dice;
use farm_tests::network::Network;
use farm_tests::{programs, repository, wait_until};
use sha2::{Digest, Sha256};

const RANKS: usize = 4;
/// Steps of the clip, and between two saved latents.
const STEPS: u32 = 24;
const SAVED_EVERY: u32 = 3;
/// Seconds that a rank may be silent.
const PATIENCE: u64 = 2;
/// On top of it, what a loaded machine takes to notice, say so and end.
const SLACK: Duration = Duration::from_secs(6);
/// In which no step is taken: the machine is stuck.
const STUCK: Duration = Duration::from_secs(60);

/// Faults of this run: `FARM_FAULTS`, or one of each kind.
fn faults() -> usize {
    std::env::var("FARM_FAULTS").map_or(3, |count| count.parse().expect("FARM_FAULTS is a number"))
}

#[derive(Clone, Copy, Debug)]
enum Fault {
    Kill,
    Freeze,
    CutLink,
}

/// One rank's process, its messages read as they come.
struct Rank {
    child: Child,
    lines: Receiver<String>,
    said: Vec<String>,
}

impl Rank {
    fn signal(&self, signal: libc::c_int) {
        // SAFETY: a signal to a child that has not been waited for.
        assert_eq!(unsafe { libc::kill(self.child.id() as libc::pid_t, signal) }, 0);
    }

    /// Waits for a line of which `wanted` makes something. None if the process closes its end first.
    fn wait_for<T>(&mut self, wanted: impl Fn(&str) -> Option<T>) -> Option<T> {
        loop {
            let line = self.lines.recv_timeout(STUCK).ok()?;
            let found = wanted(&line);
            self.said.push(line);
            if found.is_some() {
                return found;
            }
        }
    }

    fn end(&mut self, within: Duration) -> ExitStatus {
        let mut status = None;
        wait_until(within, "a rank ends", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        self.said.extend(self.lines.iter());
        status.unwrap()
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn step_of(line: &str) -> Option<u32> {
    line.strip_prefix("denoise ")?.split_once('/')?.0.parse().ok()
}

struct Scene<'a> {
    network: &'a Network,
    folder: &'a Path,
    seed: u64,
    port: u16,
}

impl Scene<'_> {
    fn out(&self) -> PathBuf {
        self.folder.join(format!("clip-{}.rgb", self.seed))
    }

    fn arguments(&self, command: &mut Command) {
        let model = repository().join("assets/mochi-tiny");
        command.args(["render", "--prompt", "a red ball moving left", "--steps", &STEPS.to_string()]);
        command.args(["--seed", &self.seed.to_string(), "--threads", "1", "--model"]).arg(model);
    }

    /// Starts one rank on each of `hosts`. No degree is a ring: that would change the picture, by rounding.
    fn start(&self, hosts: &[usize], cfg: usize) -> Vec<Rank> {
        let peers: Vec<_> = hosts.iter().map(|host| format!("{}:{}", self.network.address(*host), self.port)).collect();
        let rank = |(rank, host): (usize, &usize)| {
            let mut command = self.network.command(*host, &programs().join("farm-node"));
            self.arguments(&mut command);
            command.args(["--rank", &rank.to_string(), "--world", &hosts.len().to_string()]);
            command.args(["--peers", &peers.join(","), "--patience", &PATIENCE.to_string()]);
            command.args(["--cfg", &cfg.to_string(), "--ring", "1"]);
            if rank == 0 {
                command.arg("--out").arg(self.out()).arg("--checkpoints").arg(self.folder.join("saved"));
                command.args(["--checkpoint-steps", &SAVED_EVERY.to_string()]);
            }
            let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
            let (said, lines) = channel();
            let errors = BufReader::new(child.stderr.take().unwrap());
            std::thread::spawn(move || errors.lines().map_while(Result::ok).try_for_each(|line| said.send(line)));
            Rank { child, lines, said: Vec::new() }
        };
        hosts.iter().enumerate().map(rank).collect()
    }

    /// The same clip by one process.
    fn reference(&self) -> String {
        let mut command = Command::new(programs().join("farm-node"));
        self.arguments(&mut command);
        let out = self.folder.join("reference.rgb");
        let done = command.arg("--out").arg(&out).output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        sha256(&out)
    }
}

fn sha256(path: &Path) -> String {
    format!("{:x}", Sha256::digest(std::fs::read(path).unwrap()))
}

/// A cfg degree for so many ranks, now this, now that.
fn cfg_of(ranks: usize, dice: &mut Dice) -> usize {
    if ranks.is_multiple_of(2) { 1 + dice.roll(2) } else { 1 }
}

#[test]
fn a_group_that_loses_a_rank_names_it_and_the_rest_finish_the_same_clip() {
    let network = match Network::new(RANKS) {
        Ok(network) => network,
        Err(reason) => {
            println!("skipped, {} faults not tried: network namespaces take root and `ip` ({reason})", faults());
            return;
        }
    };
    let folder = tempfile::tempdir().unwrap();
    let mut dice = Dice::new(20);
    let (mut tried, mut clips, mut redone_most, mut told_latest) = (0, 0, 0, Duration::ZERO);
    while tried < faults() {
        let scene = Scene { network: &network, folder: folder.path(), seed: clips, port: 7800 };
        let expected = scene.reference();
        let mut hosts: Vec<usize> = (0..RANKS).collect();
        let mut reached = 0;
        // Two faults a clip leave two ranks.
        for _ in 0..2.min(faults() - tried) {
            let cfg = cfg_of(hosts.len(), &mut dice);
            let mut ranks = scene.start(&hosts, cfg);
            let victim = dice.roll(hosts.len());
            let at = reached + 1 + dice.roll((STEPS - reached - 2) as usize / 2) as u32;
            let fault = [Fault::Kill, Fault::Freeze, Fault::CutLink][tried % 3];
            let case = format!("fault {tried}: {fault:?} of rank {victim} of {} at step {at}", hosts.len());
            println!("{case}");

            redone_most = redone_most.max(resumed(&mut ranks[0], reached, &case));
            let seen = ranks[0].wait_for(|line| step_of(line).filter(|step| *step >= at));
            assert!(seen.is_some(), "{case}: {:?}", ranks[0].said);
            let broken = Instant::now();
            match fault {
                Fault::Kill => ranks[victim].signal(libc::SIGKILL),
                Fault::Freeze => ranks[victim].signal(libc::SIGSTOP),
                Fault::CutLink => network.set_link(hosts[victim], false),
            }
            for (rank, process) in ranks.iter_mut().enumerate().filter(|(rank, _)| *rank != victim) {
                let status = process.end(Duration::from_secs(PATIENCE) + SLACK);
                let last = process.said.last().cloned().unwrap_or_default();
                assert!(!status.success() && last.contains(&format!("rank {victim} ")), "{case}: rank {rank}: {last}");
            }
            told_latest = told_latest.max(broken.elapsed());
            match fault {
                Fault::CutLink => {
                    let status = ranks[victim].end(Duration::from_secs(PATIENCE) + SLACK);
                    assert!(!status.success(), "{case}: the rank that was cut off: {:?}", ranks[victim].said);
                    network.set_link(hosts[victim], true);
                }
                // Its last words count: how far it came, if it was the leader.
                Fault::Kill | Fault::Freeze => {
                    ranks[victim].signal(libc::SIGKILL);
                    ranks[victim].end(SLACK);
                }
            }
            reached = ranks[0].said.iter().filter_map(|line| step_of(line)).max().unwrap();
            hosts.remove(victim);
            tried += 1;
        }
        let cfg = cfg_of(hosts.len(), &mut dice);
        let mut ranks = scene.start(&hosts, cfg);
        redone_most = redone_most.max(resumed(&mut ranks[0], reached, "the last group"));
        for process in &mut ranks {
            let status = process.end(STUCK);
            assert!(status.success(), "{:?}", process.said);
        }
        assert_eq!(sha256(&scene.out()), expected, "clip {clips}");
        clips += 1;
    }
    println!(
        "{tried} faults, {clips} clips, all the same as by one rank; at most {redone_most} of {SAVED_EVERY} steps \
         redone; the last rank to know knew after {:.1} s",
        told_latest.as_secs_f64()
    );
}

/// The steps that are done again, at most as many as lie between two saved latents.
fn resumed(leader: &mut Rank, reached: u32, case: &str) -> u32 {
    if reached == 0 {
        return 0;
    }
    // The first step that is told of is the one it starts from.
    let first = leader.wait_for(step_of).unwrap_or_else(|| panic!("{case}: {:?}", leader.said));
    assert!(first <= reached && reached - first <= SAVED_EVERY, "{case}: goes on at {first} after {reached}");
    reached - first
}
