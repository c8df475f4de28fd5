//! A farm of real processes that a test can take apart.

use std::collections::BTreeMap;
use std::fs::Permissions;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use crate::network::Network;
use crate::{programs, repository, wait_until};

/// For one program to get ready.
const READY: Duration = Duration::from_secs(60);

/// How a farm differs from one on this machine with all defaults.
#[derive(Default)]
pub struct Setup {
    /// Where clips go. A folder that lives as long as the farm, if it is left out.
    pub store: Option<String>,
    pub environment: Vec<(String, String)>,
    /// More arguments of every scheduler.
    pub scheduler: Vec<String>,
    /// Programs run on its hosts: `farmctl` on the last one, and the scheduler too if nothing else is said.
    pub network: Option<Arc<Network>>,
    /// Several schedulers: the host of each, and the URL of the Postgres that they share.
    pub schedulers: Option<(Vec<usize>, String)>,
}

/// Schedulers and any number of nodes, all gone when it is dropped.
pub struct Farm {
    folder: tempfile::TempDir,
    store: String,
    setup: Setup,
    /// Of each scheduler.
    addresses: Vec<String>,
    /// By name; a lone scheduler's is [`SCHEDULER`].
    processes: BTreeMap<String, Process>,
}

pub const SCHEDULER: &str = "scheduler";
/// Of farms on a network.
pub const SECRET: &str = "known-to-all-who-take-part";

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
        Self::set_up(Setup { store: store.map(str::to_owned), environment, ..Setup::default() })
    }

    /// Starts a scheduler.
    pub fn set_up(setup: Setup) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let own_store = format!("file://{}/store", folder.path().display());
        let store = setup.store.clone().unwrap_or(own_store);
        let addresses = match &setup.network {
            Some(network) => {
                let alone = vec![network.hosts() - 1];
                let hosts = setup.schedulers.as_ref().map_or(alone, |(hosts, _)| hosts.clone());
                hosts.into_iter().map(|host| format!("{}:7070", network.address(host))).collect()
            }
            None => vec!["127.0.0.1:0".to_owned()],
        };
        let mut farm = Self { folder, store, setup, addresses, processes: BTreeMap::new() };
        if let Some(secret) = farm.secret() {
            std::fs::write(&secret, SECRET).unwrap();
            std::fs::set_permissions(&secret, Permissions::from_mode(0o600)).unwrap();
        }
        (0..farm.addresses.len()).for_each(|i| farm.start_scheduler_of(i));
        farm
    }

    /// Starts the lone scheduler again: on the same address, over the same data.
    pub fn start_scheduler(&mut self) {
        self.start_scheduler_of(0);
    }

    /// The name of one of several schedulers.
    pub fn scheduler_name(&self, i: usize) -> String {
        match self.setup.schedulers {
            Some(_) => format!("{SCHEDULER}-{i}"),
            None => SCHEDULER.to_owned(),
        }
    }

    /// Starts one of several schedulers, or starts it again.
    pub fn start_scheduler_of(&mut self, i: usize) {
        let name = self.scheduler_name(i);
        let host = self.setup.schedulers.as_ref().map(|(hosts, _)| hosts[i]);
        let mut command = self.program("farm-scheduler", host);
        command.args(self.secret().into_iter().flat_map(|secret| ["--secret-file".into(), secret]));
        match &self.setup.schedulers {
            Some((_, url)) => command.args(["--queue", url]),
            None => command.arg("--data").arg(self.folder.path().join("queue")),
        };
        command.args(["--listen", &self.addresses[i], "--store", &self.store]).stdout(Stdio::piped());
        command.args(&self.setup.scheduler);
        let mut child = self.spawn(command, &name);
        let mut line = String::new();
        BufReader::new(child.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening on http://");
        self.addresses[i] = address.unwrap_or_else(|| panic!("no scheduler: {}", self.log(&name))).to_owned();
        self.processes.insert(name, child);
    }

    /// Where nodes and `farmctl` look for a scheduler.
    fn address(&self) -> String {
        self.addresses.join(",")
    }

    /// Starts a node with the bundled checkpoint and waits until the farm knows it.
    pub fn start_node(&mut self, name: &str, devices: u32) {
        self.start_node_with(name, devices, &[]);
    }

    /// As [`Farm::start_node`], with more arguments.
    pub fn start_node_with(&mut self, name: &str, devices: u32, more: &[&str]) {
        self.spawn_node(name, None, devices, more);
        wait_until(READY, &format!("{name} joins"), || {
            let nodes = self.json(&["nodes"]);
            nodes["nodes"].as_array().is_some_and(|all| all.iter().any(|n| n["node"] == name && n["alive"] == true))
        });
    }

    /// Starts a node, on a host if there is a network, and waits for nothing.
    pub fn spawn_node(&mut self, name: &str, host: Option<usize>, devices: u32, more: &[&str]) {
        let model = format!("mochi-tiny={}", repository().join("assets/mochi-tiny").display());
        let mut command = self.program("farm-node", host);
        command.args(["join", "--scheduler", &self.address(), "--name", name, "--store", &self.store]);
        command.args(self.secret().into_iter().flat_map(|secret| ["--secret-file".into(), secret]));
        command.args(["--devices", &format!("cpu:{devices}"), "--model", &model]);
        // A test's nodes share the machine.
        if !more.contains(&"--threads") {
            command.args(["--threads", "1"]);
        }
        command.arg("--data").arg(self.folder.path().join(name)).args(more);
        let child = self.spawn(command, name);
        self.processes.insert(name.to_owned(), child);
    }

    /// `kill -9`.
    pub fn kill_scheduler(&mut self) {
        self.kill_node(SCHEDULER);
    }

    /// `kill -9`.
    pub fn kill_node(&mut self, name: &str) {
        assert!(self.processes.remove(name).is_some(), "{name} does not run");
    }

    pub fn is_running(&self, name: &str) -> bool {
        self.processes.contains_key(name)
    }

    /// Sends a signal to a process, which has to be there.
    pub fn signal(&self, name: &str, signal: libc::c_int) {
        // SAFETY: a signal to a child that has not been waited for.
        let sent = unsafe { libc::kill(self.processes[name].0.id() as libc::pid_t, signal) };
        assert_eq!(sent, 0, "{name} does not run");
    }

    /// Processes that have ended, though nobody has killed them.
    pub fn ended(&mut self) -> Vec<String> {
        let ended = |process: &mut Process| process.0.try_wait().unwrap().is_some();
        self.processes.iter_mut().filter_map(|(name, process)| ended(process).then(|| name.clone())).collect()
    }

    /// The most memory that each process has had, in bytes.
    pub fn peak_memory(&self) -> Vec<(&str, u64)> {
        let peak = |process: &Process| {
            let status = std::fs::read_to_string(format!("/proc/{}/status", process.0.id())).ok()?;
            let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
            Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? << 10)
        };
        // One that has ended has none.
        self.processes.iter().filter_map(|(name, process)| Some((&name[..], peak(process)?))).collect()
    }

    /// Queues a prompt file of these lines.
    pub fn submit(&self, lines: &str) {
        let file = self.file("prompts.jsonl", lines);
        let output = self.farmctl(&["submit", file.to_str().unwrap()]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// All jobs, in detail and in the order of their submission, once they are done.
    pub fn done(&self, within: Duration) -> Vec<Value> {
        let jobs = || self.json(&["list"])["jobs"].as_array().cloned().unwrap_or_default();
        wait_until(within, "all clips are done", || {
            let jobs = jobs();
            assert!(jobs.iter().all(|job| job["state"] != "failed"), "{jobs:#?}");
            !jobs.is_empty() && jobs.iter().all(|job| job["state"] == "done")
        });
        jobs().iter().map(|job| self.json(&["show", job["job"].as_str().unwrap()])).collect()
    }

    pub fn farmctl(&self, args: &[&str]) -> Output {
        self.program("farmctl", None).args(args).stdin(Stdio::null()).output().unwrap()
    }

    /// Starts a `farmctl` command and does not wait for it.
    pub fn spawn_farmctl(&self, args: &[&str]) -> Child {
        let mut command = self.program("farmctl", None);
        command.args(args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command.spawn().unwrap()
    }

    /// Of all schedulers.
    pub fn addresses(&self) -> &[String] {
        &self.addresses
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

    /// A farm that can be reached from elsewhere has a secret.
    fn secret(&self) -> Option<PathBuf> {
        self.setup.network.is_some().then(|| self.folder.path().join("secret"))
    }

    /// A program, on the network's last host if none is named.
    fn program(&self, name: &str, host: Option<usize>) -> Command {
        let program = programs().join(name);
        let mut command = match &self.setup.network {
            Some(network) => network.command(host.unwrap_or(network.hosts() - 1), &program),
            None => Command::new(program),
        };
        let environment = self.setup.environment.iter().map(|(name, value)| (name, value));
        command.envs(environment).env("FARM_SCHEDULER", self.address());
        command.envs(self.secret().map(|secret| ("FARM_SECRET_FILE", secret)));
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
