//! A farm of real processes that a test can take apart.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::{programs, repository, wait_until};

/// For one program to get ready.
const READY: Duration = Duration::from_secs(60);

/// One scheduler and any number of nodes, all gone when it is dropped.
pub struct Farm {
    folder: tempfile::TempDir,
    store: String,
    environment: Vec<(String, String)>,
    address: String,
    scheduler: Option<Process>,
    nodes: BTreeMap<String, Process>,
}

/// Killed, and waited for, when dropped.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only for a process that has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Farm {
    /// Starts a scheduler. Without a store, clips go to a folder that lives as long as the farm.
    pub fn start(store: Option<&str>, environment: Vec<(String, String)>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let own_store = format!("file://{}/store", folder.path().display());
        let store = store.map_or(own_store, str::to_owned);
        let mut farm =
            Self { folder, store, environment, address: "127.0.0.1:0".into(), scheduler: None, nodes: BTreeMap::new() };
        farm.start_scheduler();
        farm
    }

    /// Starts the scheduler, or starts it again: on the same address, over the same data.
    pub fn start_scheduler(&mut self) {
        let data = self.folder.path().join("queue");
        let mut command = self.program("farm-scheduler");
        command.args(["--listen", &self.address, "--store", &self.store, "--data"]).arg(data).stdout(Stdio::piped());
        let mut child = self.spawn(command, "scheduler");
        let mut line = String::new();
        BufReader::new(child.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening on http://");
        self.address = address.unwrap_or_else(|| panic!("no scheduler: {}", self.log("scheduler"))).to_owned();
        self.scheduler = Some(child);
    }

    /// Starts a node with the bundled checkpoint and waits until the farm knows it.
    pub fn start_node(&mut self, name: &str, devices: u32) {
        self.start_node_with(name, devices, &[]);
    }

    /// As [`Farm::start_node`], with more arguments.
    pub fn start_node_with(&mut self, name: &str, devices: u32, more: &[&str]) {
        let model = format!("mochi-tiny={}", repository().join("assets/mochi-tiny").display());
        let data = self.folder.path().join(name);
        let mut command = self.program("farm-node");
        command.args(["join", "--scheduler", &self.address, "--name", name, "--store", &self.store]);
        command.args(["--devices", &format!("cpu:{devices}"), "--threads", "1", "--model", &model, "--data"]).arg(data);
        command.args(more);
        let child = self.spawn(command, name);
        self.nodes.insert(name.to_owned(), child);
        wait_until(READY, &format!("{name} joins"), || {
            let nodes = self.json(&["nodes"]);
            nodes["nodes"].as_array().is_some_and(|all| all.iter().any(|n| n["node"] == name && n["alive"] == true))
        });
    }

    /// `kill -9`.
    pub fn kill_scheduler(&mut self) {
        self.scheduler = None;
    }

    /// `kill -9`.
    pub fn kill_node(&mut self, name: &str) {
        assert!(self.nodes.remove(name).is_some(), "{name} does not run");
    }

    pub fn farmctl(&self, args: &[&str]) -> Output {
        self.program("farmctl").args(args).stdin(Stdio::null()).output().unwrap()
    }

    /// What a `farmctl` command prints with `--json`; null if it fails.
    pub fn json(&self, args: &[&str]) -> Value {
        let output = self.farmctl(&[args, &["--json"]].concat());
        serde_json::from_slice(&output.stdout).unwrap_or_default()
    }

    /// Writes a file into the farm's folder.
    pub fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// What a program wrote to standard error, over all its starts.
    pub fn log(&self, name: &str) -> String {
        std::fs::read_to_string(self.folder.path().join(format!("{name}.log"))).unwrap_or_default()
    }

    fn program(&self, name: &str) -> Command {
        let mut command = Command::new(programs().join(name));
        command.envs(self.environment.iter().cloned()).env("FARM_SCHEDULER", &self.address);
        // A test that is killed leaves nothing behind.
        // SAFETY: only prctl is called between fork and exec.
        unsafe {
            command.pre_exec(|| {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                Ok(())
            })
        };
        command
    }

    fn spawn(&self, mut command: Command, name: &str) -> Process {
        let log = self.folder.path().join(format!("{name}.log"));
        let log = std::fs::OpenOptions::new().create(true).append(true).open(log).unwrap();
        Process(command.stdin(Stdio::null()).stderr(log).spawn().unwrap())
    }
}
