//! Every command in README.md and docs/ runs, in order, as a reader would type it, against the built programs.
//!
//! In the documents, a block marked `console` holds commands after `$ ` and samples of their output. A command that
//! ends with `# exit status N` has to end so, any other with 0. A block marked `jsonl NAME` is that file. Programs that
//! stay in the foreground are started, and the next command runs when they are ready.

use std::cell::OnceCell;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use farm_scheduler::queue::testing::Postgres;
use farm_tests::{programs, repository};

/// The documents with commands.
const WALKS: [&str; 7] = [
    "README.md",
    "docs/prompt-file.md",
    "docs/farmctl.md",
    "docs/parallelism.md",
    "docs/tiles.md",
    "docs/operations.md",
    "docs/gpu.md",
];
/// A job's short id in the documents; a real one takes its place.
const SAMPLE_JOB: &str = "5a0c31f2";
/// A batch's short id in the documents; that of the newest takes its place.
const SAMPLE_BATCH: &str = "9c41d07e";
/// Where the documents have the scheduler. The one that runs takes its place.
const SAMPLE_PORT: &str = ":7070";
const SAMPLE_HOST: &str = "10.0.0.1";
const SAMPLE_STORE: &str = "/mnt/farm";
/// A Postgres of the test's own takes its place.
const SAMPLE_QUEUE: &str = "postgres://farm@db/farm";
/// For one command, and for a program to get ready.
const LIMIT: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(50);

#[test]
fn the_readme_works_as_written() {
    Walk::new().run(WALKS[0]);
}

#[test]
fn the_page_on_prompt_files_works_as_written() {
    Walk::new().run(WALKS[1]);
}

#[test]
fn the_page_on_farmctl_works_as_written() {
    Walk::new().run(WALKS[2]);
}

#[test]
fn the_page_on_parallelism_works_as_written() {
    Walk::new().run(WALKS[3]);
}

#[test]
fn the_page_on_tiles_works_as_written() {
    Walk::new().run(WALKS[4]);
}

#[test]
fn the_page_on_operations_works_as_written() {
    Walk::new().run(WALKS[5]);
}

#[test]
fn the_page_on_gpus_works_as_written() {
    Walk::new().run(WALKS[6]);
}

#[test]
fn no_document_hides_commands_from_this_test() {
    let mut documents = vec![repository().join("README.md")];
    documents.extend(std::fs::read_dir(repository().join("docs")).unwrap().map(|entry| entry.unwrap().path()));
    for path in documents.into_iter().filter(|path| path.extension().is_some_and(|end| end == "md")) {
        let walked = WALKS.iter().any(|document| path == repository().join(document));
        for Block { info, .. } in blocks(&std::fs::read_to_string(&path).unwrap()) {
            let kind = info.split(' ').next().unwrap_or_default();
            let known = matches!(kind, "console" | "jsonl" | "json" | "text" | "rust" | "toml");
            assert!(known, "{}: a block marked {info:?}; commands go into `console`", path.display());
            assert!(walked || kind != "console", "{}: has commands, but is not in WALKS", path.display());
        }
    }
}

/// One document's commands, in a folder that looks like the repository.
struct Walk {
    running: Vec<Running>,
    folder: tempfile::TempDir,
    port: Option<u16>,
    postgres: OnceCell<Postgres>,
}

/// A program in the foreground of a terminal of its own.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // SAFETY: plain numbers; the child is not reaped yet, so the number is its own.
        unsafe { libc::kill(self.0.id() as libc::pid_t, libc::SIGTERM) };
        let deadline = Instant::now() + Duration::from_secs(15);
        while matches!(self.0.try_wait(), Ok(None)) && Instant::now() < deadline {
            thread::park_timeout(POLL);
        }
        // Both fail only for a process that has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Walk {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        for name in ["assets", "config", "tests"] {
            symlink(repository().join(name), folder.path().join(name)).unwrap();
        }
        std::fs::create_dir(folder.path().join("store")).unwrap();
        Self { running: Vec::new(), folder, port: None, postgres: OnceCell::new() }
    }

    fn run(mut self, document: &str) {
        let text = std::fs::read_to_string(repository().join(document)).unwrap();
        let mut commands = 0;
        for Block { info, lines } in blocks(&text) {
            if info == "console" {
                commands += lines.iter().filter(|line| line.starts_with("$ ")).count();
                self.console(&lines);
            } else if let Some(name) = info.strip_prefix("jsonl ") {
                std::fs::write(self.folder.path().join(name), lines.join("\n") + "\n").unwrap();
            }
        }
        assert!(commands > 0, "{document} has no commands");
        // Nodes before their scheduler.
        while self.running.pop().is_some() {}
    }

    fn console(&mut self, lines: &[&str]) {
        let mut printed = String::new();
        for line in lines {
            match line.strip_prefix("$ ") {
                Some(command) => printed = self.command(command),
                // Errors that a document shows are the real ones.
                None if line.contains(".jsonl:") => {
                    assert!(printed.lines().any(|real| real == *line), "shown: {line}\nprinted:\n{printed}")
                }
                None => {}
            }
        }
    }

    /// Runs a command and gives what it printed on standard error.
    fn command(&mut self, line: &str) -> String {
        // These build, install, and run this test among others.
        if line.starts_with("make ") {
            return String::new();
        }
        if ["farmctl up", "farm-scheduler ", "farm-node join "].iter().any(|start| line.starts_with(start)) {
            self.start(line);
            return String::new();
        }
        if let Some(line) = line.strip_suffix(" &") {
            let mut command = self.program("bash");
            command.args(["-euc", &format!("exec {}", self.real(line))]);
            self.running.push(Running(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()));
            return String::new();
        }
        let expected = match line.split_once("# exit status ") {
            Some((_, status)) => status.trim().parse().unwrap(),
            None => 0,
        };
        let line = self.real(line);
        let limit = LIMIT.as_secs().to_string();
        let Output { status, stdout, stderr } =
            self.program("timeout").args([&limit, "bash", "-euc", &line]).output().unwrap();
        let (stdout, stderr) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
        assert_eq!(status.code(), Some(expected), "$ {line}\n{stdout}{stderr}");
        stderr.into_owned()
    }

    fn start(&mut self, line: &str) {
        let joins = line.starts_with("farm-node join ");
        // A port of its own for each scheduler: tests run side by side.
        let mut line = if joins { self.real(line) } else { self.real(&line.replace(SAMPLE_PORT, ":0")) };
        if line.starts_with("farmctl up") {
            line += " --listen 127.0.0.1:0";
        }
        let nodes_before = if joins { self.nodes() } else { 0 };
        let mut command = self.program("bash");
        command.args(["-euc", &format!("exec {line}")]).stdin(Stdio::null());
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let stdout = lines_of(child.stdout.take().unwrap());
        let stderr = lines_of(child.stderr.take().unwrap());
        self.running.push(Running(child));
        let deadline = Instant::now() + LIMIT;
        loop {
            let said = stdout.recv_timeout(POLL).unwrap_or_default();
            if let Some((_, address)) = said.split_once(" http://") {
                // 127.0.0.1:4567: 2 nodes, …
                let port = address.split(':').nth(1).unwrap();
                self.port = Some(port.trim().parse().unwrap());
                return;
            }
            if joins && self.nodes() > nodes_before {
                return;
            }
            let ended = self.running.last_mut().unwrap().0.try_wait().unwrap();
            if ended.is_some() || Instant::now() > deadline {
                let said: Vec<String> = stderr.try_iter().collect();
                panic!("$ {line}\nis not ready, ended: {ended:?}\n{}", said.join("\n"));
            }
        }
    }

    /// Nodes of the farm that runs now.
    fn nodes(&self) -> usize {
        // If there is a secret, it is the farm's.
        let command = "farmctl $([ -e farm.secret ] && echo --secret-file farm.secret) nodes --json";
        let output = self.program("bash").args(["-c", command]).output().unwrap();
        let nodes: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        nodes["nodes"].as_array().map_or(0, Vec::len)
    }

    /// The command with what differs here from the reader's machines.
    fn real(&self, line: &str) -> String {
        let mut line = line.replace(SAMPLE_HOST, "127.0.0.1");
        line = line.replace(SAMPLE_STORE, self.folder.path().join("store").to_str().unwrap());
        if line.contains(SAMPLE_QUEUE) {
            let postgres = self.postgres.get_or_init(|| Postgres::start(&Default::default()));
            line = line.replace(SAMPLE_QUEUE, &postgres.database());
        }
        if let Some(port) = self.port {
            line = line.replace(SAMPLE_PORT, &format!(":{port}"));
        }
        for (sample, list, field) in [(SAMPLE_JOB, "list", "jobs job"), (SAMPLE_BATCH, "batches", "batches submission")]
        {
            if line.contains(sample) {
                let output = self.program("farmctl").args([list, "--json"]).output().unwrap();
                let listed: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
                let (all, id) = field.split_once(' ').unwrap();
                let id = listed[all][0][id].as_str().unwrap_or_else(|| panic!("{list} names nothing"));
                line = line.replace(sample, &id[id.len() - sample.len()..]);
            }
        }
        line
    }

    fn program(&self, name: &str) -> Command {
        let mut path = programs().into_os_string();
        path.push(":");
        path.push(std::env::var_os("PATH").unwrap_or_default());
        // `env` finds the program on the PATH that is set here.
        let mut command = Command::new("env");
        command.arg(name).current_dir(self.folder.path()).env("PATH", path);
        // A bare machine has no certificates, and none are needed.
        command.env("SSL_CERT_FILE", "/nonexistent").env("SSL_CERT_DIR", "/nonexistent");
        command.env("FARM_SCHEDULER", format!("127.0.0.1:{}", self.port.unwrap_or(9)));
        // SAFETY: only prctl is called between fork and exec. A test that is killed leaves nothing behind.
        unsafe {
            command.pre_exec(|| {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM);
                Ok(())
            })
        };
        command
    }
}

fn lines_of(out: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = channel();
    thread::spawn(move || {
        for line in BufReader::new(out).lines().map_while(Result::ok) {
            // Reads on when nobody listens any more: a full pipe would stop the program.
            let _ = sender.send(line);
        }
    });
    receiver
}

struct Block<'a> {
    /// What stands behind the opening fence.
    info: &'a str,
    lines: Vec<&'a str>,
}

fn blocks(text: &str) -> Vec<Block<'_>> {
    let mut blocks = Vec::new();
    let mut open: Option<Block> = None;
    for line in text.lines() {
        match (line.strip_prefix("```"), &mut open) {
            (Some(info), None) => open = Some(Block { info: info.trim(), lines: Vec::new() }),
            (Some(_), Some(_)) => blocks.extend(open.take()),
            (None, Some(block)) => block.lines.push(line),
            (None, None) => {}
        }
    }
    assert!(open.is_none(), "a block is not closed");
    blocks
}
