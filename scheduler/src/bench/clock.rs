//! Time and memory of this process. Processor time is that of one thread: other work on the machine hardly counts.

use std::ops::{AddAssign, Sub};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

#[derive(Clone, Copy, Debug, Default)]
pub struct Span {
    pub wall: Duration,
    /// Of the thread that measures.
    pub cpu: Duration,
}

impl AddAssign for Span {
    fn add_assign(&mut self, other: Self) {
        self.wall += other.wall;
        self.cpu += other.cpu;
    }
}

impl Sub for Span {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        Self { wall: self.wall.saturating_sub(other.wall), cpu: self.cpu.saturating_sub(other.cpu) }
    }
}

/// What `work` gives, and what it took.
pub fn timed<T>(work: impl FnOnce() -> T) -> (T, Span) {
    let (wall, cpu) = (Instant::now(), thread_time());
    let given = work();
    let span = Span { cpu: thread_time().saturating_sub(cpu), wall: wall.elapsed() };
    (given, span)
}

fn thread_time() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs() as u32)
}

/// Resident memory of a process, this one if none is named, in MiB: now, and at most so far. None where the system does
/// not say.
pub fn memory_mib(process: Option<u32>) -> Option<(f64, f64)> {
    let process = process.map_or("self".to_owned(), |id| id.to_string());
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let kib = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim_start_matches(':').trim().trim_end_matches("kB").trim().parse::<f64>().ok()
    };
    Some((kib("VmRSS")? / 1024.0, kib("VmHWM")? / 1024.0))
}
