//! What figures were measured on.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, ensure};
use jiff::Timestamp;
use serde::Serialize;

/// Stands in every stored result.
#[derive(Serialize)]
pub struct Setting {
    pub date: Timestamp,
    /// `git describe` of the sources, with `-dirty` if they are changed.
    pub revision: String,
    pub cpu: String,
    pub cores: usize,
    pub memory_mib: u64,
}

impl Setting {
    pub fn here() -> anyhow::Result<Self> {
        let read = |path: &str| std::fs::read_to_string(path).with_context(|| path.to_owned());
        let field = |text: &str, name: &str| {
            let value = text.lines().find_map(|line| line.strip_prefix(name)?.split_once(':'));
            value.map_or("unknown".to_owned(), |(_, value)| value.trim().to_owned())
        };
        let memory = field(&read("/proc/meminfo")?, "MemTotal");
        Ok(Self {
            date: Timestamp::now(),
            revision: git(Path::new("."), &["describe", "--always", "--dirty", "--abbrev=10"])?,
            cpu: field(&read("/proc/cpuinfo")?, "model name"),
            cores: std::thread::available_parallelism()?.get(),
            memory_mib: memory.trim_end_matches(" kB").parse().unwrap_or(0) / 1024,
        })
    }

    /// One line for people.
    pub fn line(&self) -> String {
        let Self { date, revision, cpu, cores, memory_mib } = self;
        format!("{} {revision}, {cpu}, {cores} cores, {memory_mib} MiB", date.strftime("%Y-%m-%d"))
    }
}

/// What git prints in `folder`.
pub fn git(folder: &Path, arguments: &[&str]) -> anyhow::Result<String> {
    let output = Command::new("git").arg("-C").arg(folder).args(arguments).output().context("git does not run")?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "git {}: {}", arguments.join(" "), error.trim());
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
