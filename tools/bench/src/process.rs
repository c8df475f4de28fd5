//! One process from its start to its end: time, memory, and what else the machine was doing.

use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus, Stdio};
use std::time::Instant;

use anyhow::{Context, ensure};
use serde::de::DeserializeOwned;

pub struct Finished {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
    /// From its start to its end.
    pub seconds: f64,
    /// The most memory that the process itself had, without its children.
    pub peak_mib: f64,
    /// Cores that others used meanwhile, on average. A quiet machine has next to none.
    pub others: f64,
}

/// Runs `command` and waits for it.
pub fn run(command: &mut Command) -> anyhow::Result<Finished> {
    let program = command.get_program().to_string_lossy().into_owned();
    let (busy, own) = (busy_seconds()?, children_seconds());
    let began = Instant::now();
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = child.with_context(|| format!("cannot start {program}"))?;
    let mut stderr = child.stderr.take().context("no stderr")?;
    let errors = std::thread::spawn(move || {
        let mut text = Vec::new();
        stderr.read_to_end(&mut text).map(|_| text)
    });
    let mut stdout = Vec::new();
    child.stdout.take().context("no stdout")?.read_to_end(&mut stdout)?;
    let (mut status, mut usage) = (0, zeroed_usage());
    // SAFETY: both are valid for writing. The child is waited for here and nowhere else: `Child` does not wait when it is
    // dropped.
    let waited = unsafe { libc::wait4(child.id() as libc::pid_t, &mut status, 0, &mut usage) };
    ensure!(waited >= 0, "cannot wait for {program}: {}", std::io::Error::last_os_error());
    let seconds = began.elapsed().as_secs_f64();
    let stderr = errors.join().map_err(|_| anyhow::anyhow!("the reader of {program}'s errors panicked"))??;
    let (busy, own) = (busy_seconds()? - busy, children_seconds() - own);
    Ok(Finished {
        status: ExitStatus::from_raw(status),
        stdout: String::from_utf8_lossy(&stdout).into_owned(),
        stderr: String::from_utf8_lossy(&stderr).into_owned(),
        seconds,
        peak_mib: usage.ru_maxrss as f64 / 1024.0,
        others: ((busy - own) / seconds).max(0.0),
    })
}

impl Finished {
    /// Errors with what it said if it has failed.
    pub fn checked(self, command: &Command) -> anyhow::Result<Self> {
        let said = self.stderr.lines().rev().take(20).collect::<Vec<_>>().into_iter().rev().collect::<Vec<_>>();
        ensure!(self.status.success(), "{command:?}: {}\n{}", self.status, said.join("\n"));
        Ok(self)
    }

    /// Its output, which is one JSON value.
    pub fn json<T: DeserializeOwned>(&self) -> anyhow::Result<T> {
        serde_json::from_str(&self.stdout).with_context(|| format!("not the JSON that is expected: {}", self.stdout))
    }
}

/// Processor seconds of the whole machine since its start, idle ones excepted; those that a host has taken away count.
fn busy_seconds() -> anyhow::Result<f64> {
    let text = std::fs::read_to_string("/proc/stat").context("/proc/stat")?;
    let numbers = text.lines().next().unwrap_or_default().split_whitespace().skip(1);
    // user nice system idle iowait irq softirq steal; what guests use is in the first two.
    let ticks: f64 = numbers
        .take(8)
        .enumerate()
        .filter(|(column, _)| ![3, 4].contains(column))
        .filter_map(|(_, number)| number.parse::<f64>().ok())
        .sum();
    // SAFETY: asks for a constant.
    Ok(ticks / unsafe { libc::sysconf(libc::_SC_CLK_TCK) } as f64)
}

/// Processor seconds of all children that have ended, and of theirs.
fn children_seconds() -> f64 {
    let mut usage = zeroed_usage();
    // SAFETY: valid for writing; it only fails for a wrong first argument.
    unsafe { libc::getrusage(libc::RUSAGE_CHILDREN, &mut usage) };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

fn zeroed_usage() -> libc::rusage {
    // SAFETY: plain numbers, for which zero is a value.
    unsafe { std::mem::zeroed() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_measured_and_its_output_kept() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo '{\"a\": 1}'; echo error >&2"]);
        let finished = run(&mut command).unwrap().checked(&command).unwrap();
        assert_eq!(finished.json::<serde_json::Value>().unwrap()["a"], 1);
        assert_eq!(finished.stderr, "error\n");
        assert!(finished.peak_mib > 0.1 && finished.seconds > 0.0 && finished.others >= 0.0);
    }

    #[test]
    fn a_failure_says_what_the_process_said() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo no such model >&2; exit 3"]);
        let error = run(&mut command).unwrap().checked(&command).err().unwrap().to_string();
        assert!(error.contains("no such model") && error.contains("exit status: 3"), "{error}");
    }
}
