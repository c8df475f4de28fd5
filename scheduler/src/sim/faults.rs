//! What goes wrong, when its time comes.

use farm_core::id::AttemptKey;
use farm_core::job::state::{FailureKind, Stage};
use farm_core::wire::to_scheduler::AttemptOutcome;

use super::Ms;
use super::hardware::Holder;
use super::plan::Fault;
use super::world::World;

impl Fault {
    pub fn name(self) -> &'static str {
        match self {
            Self::SchedulerKilled => "scheduler killed",
            Self::CrashAtEffect => "crash at an effect armed",
            Self::LeaderStopped => "leader stopped",
            Self::LeaderMachinePaused => "leader's machine paused",
            Self::WallClockJump => "wall clock jump",
            Self::DatabaseFailover => "database failover",
            Self::DatabaseCut => "scheduler cut off the database",
            Self::NodeKilled => "node killed",
            Self::MachineLost => "machine lost",
            Self::SpotNotice => "spot notice",
            Self::NodeFrozen => "node frozen",
            Self::ConnectionBroken => "connection broken",
            Self::BlackHole => "black hole",
            Self::HalfOpen => "half-open connection",
            Self::DeviceLost => "device lost",
            Self::DiskFull => "disk full",
            Self::BucketSlow => "bucket slow",
            Self::BucketFails => "bucket fails",
            Self::Storm => "storm of messages",
        }
    }
}

impl World {
    fn some_scheduler(&mut self) -> usize {
        let leader = self.store.seat.map(|seat| seat.scheduler).filter(|_| self.random.chance(0.8));
        leader.unwrap_or(self.random.below(self.schedulers.len() as u64) as usize)
    }

    pub fn inject(&mut self, fault: Fault) {
        if self.settle.has_begun() {
            return;
        }
        let (now, n) = (self.now, self.random.below(self.nodes.len() as u64) as usize);
        let s = self.some_scheduler();
        self.count(fault.name());
        self.note(|| format!("fault: {} (node n{n}, scheduler {s})", fault.name()));
        self.mix(&[6, fault as u64, n as u64]);
        match fault {
            Fault::SchedulerKilled => {
                if self.schedulers[s].up {
                    self.crash_scheduler(s);
                }
            }
            Fault::CrashAtEffect => {
                let after = self.random.below(30);
                self.schedulers[s].effects_left = Some(after);
            }
            Fault::LeaderStopped => {
                let span = self.random.between(500, 20_000);
                self.schedulers[s].stopped = now + span;
            }
            Fault::LeaderMachinePaused => {
                let span = self.random.between(500, 20_000);
                self.schedulers[s].stopped = now + span;
                // What it thinks has passed is more or less than what has.
                self.schedulers[s].jumped += self.random.pick(&[0, 1_000, 60_000, 300_000]);
            }
            Fault::WallClockJump => {
                let span = self.random.between(1_000, 300_000) as i64;
                self.schedulers[s].wall_error += if self.random.chance(0.5) { span } else { -span };
            }
            Fault::DatabaseFailover => {
                self.database_down = now + self.random.between(200, 10_000);
                self.store.seat = None;
                for scheduler in 0..self.schedulers.len() {
                    // Whoever waits for the database learns of it there, the others at their next beat.
                    if self.schedulers[scheduler].lead.is_some() && self.random.chance(0.3) {
                        self.end_reign(scheduler);
                    }
                }
            }
            Fault::DatabaseCut => {
                let span = self.random.between(500, 15_000);
                self.schedulers[s].cut = now + span;
            }
            Fault::NodeKilled => {
                let down = self.random.between(200, 10_000);
                self.kill_node(n, Some(false), down);
            }
            Fault::MachineLost => {
                let down = self.random.between(10_000, 90_000);
                if self.nodes[n].up {
                    // Nobody closes the connection.
                    (self.nodes[n].cut_up, self.nodes[n].cut_down) = (now + down, now + down);
                    self.kill_node(n, None, down);
                }
            }
            Fault::SpotNotice => {
                let patience = self.random.between(1_000, 60_000);
                self.notice(n, patience);
            }
            Fault::NodeFrozen => {
                let span = self.random.between(1_000, 40_000);
                self.disturb(n);
                self.nodes[n].frozen = now + span;
            }
            Fault::ConnectionBroken => {
                if self.nodes[n].connection().is_some() {
                    self.hang_up(n);
                    self.lose_link(n);
                }
            }
            Fault::BlackHole => {
                let until = now + self.random.pick(&[3_000, 12_000, 30_000, 150_000]);
                (self.nodes[n].cut_up, self.nodes[n].cut_down) = (until, until);
            }
            Fault::HalfOpen => {
                let until = now + self.random.between(2_000, 40_000);
                if self.random.chance(0.5) {
                    self.nodes[n].cut_up = until;
                } else {
                    self.nodes[n].cut_down = until;
                }
            }
            Fault::DeviceLost => self.lose_device(n),
            Fault::DiskFull => self.nodes[n].disk_full = now + self.random.between(5_000, 60_000),
            Fault::BucketSlow => self.bucket.slow = now + self.random.between(5_000, 40_000),
            Fault::BucketFails => self.bucket.fails = now + self.random.between(1_000, 20_000),
            Fault::Storm => self.storm = now + self.random.between(1_000, 15_000),
        }
    }

    /// What is on the node now has a bill that is an estimate.
    fn disturb(&mut self, n: usize) {
        let keys: Vec<AttemptKey> = self.nodes[n].running.iter().map(|run| run.key).collect();
        let helped: Vec<AttemptKey> = self.nodes[n].helps.iter().map(|help| help.key).collect();
        for key in keys.into_iter().chain(helped) {
            self.truth.entry(key).or_default().disturbed = true;
        }
    }

    /// A device falls off the bus; what is on it fails, and what comes to it, for a while.
    fn lose_device(&mut self, n: usize) {
        let device = self.random.below(self.nodes[n].devices.holds.len() as u64) as usize;
        self.nodes[n].devices.broken[device] = self.now + self.random.between(5_000, 60_000) as Ms;
        let hold = self.nodes[n].devices.holds[device];
        match hold.filter(|hold| !hold.stopping).map(|hold| hold.holder) {
            Some(Holder::Attempt(key)) => {
                let denoises =
                    self.nodes[n].run(key).is_some_and(|run| matches!(run.stage, Stage::Denoise | Stage::Decode));
                if denoises {
                    self.checkpoint(n, key);
                    let message = "Xid 79".to_owned();
                    self.end(n, key, AttemptOutcome::Failed { kind: FailureKind::Device, message });
                }
            }
            Some(Holder::Help(key, device)) => self.let_go(n, Holder::Help(key, device), &[]),
            None => {}
        }
    }
}
