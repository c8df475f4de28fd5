//! A Postgres server of a test's own: Debian's program, in a temporary folder, gone with the value.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// Where Debian puts a folder for each version.
const PROGRAMS: &str = "/usr/lib/postgresql";
const START: Duration = Duration::from_secs(60);
/// Another process may take the free port that was found.
const TRIES: u32 = 5;

/// How a server is to be.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Commits reach the disk. Only figures need that.
    pub durable: bool,
    /// Address to listen on; from others than this machine's own, everybody is let in.
    pub listen: String,
}

impl Default for Setup {
    fn default() -> Self {
        Self { durable: false, listen: "127.0.0.1".to_owned() }
    }
}

pub struct Postgres {
    server: Child,
    port: u16,
    programs: PathBuf,
    setup: Setup,
    databases: AtomicU32,
    // Last, so that it is removed when the server is gone.
    folder: TempDir,
}

impl Postgres {
    /// Starts a server. It ends with the thread that has called this, if it is not dropped before.
    ///
    /// # Panics
    /// If there is no Postgres, or it does not start.
    pub fn start(setup: &Setup) -> Self {
        let programs = programs();
        let folder = tempfile::Builder::new().prefix("farm-postgres-").tempdir().expect("a temporary folder");
        let user = user();
        if let Some((uid, gid)) = user {
            chown(folder.path(), Some(uid), Some(gid)).expect("the folder can be given away");
        }
        let data = folder.path().join("data");
        let mut initdb = as_user(&programs.join("initdb"), user, folder.path());
        initdb.arg("-D").arg(&data).args(["-U", "farm", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"]);
        finish(initdb);
        if setup.listen != "127.0.0.1" {
            let path = data.join("pg_hba.conf");
            let rules = fs::read_to_string(&path).expect("rules of access");
            fs::write(&path, rules + "host all all 0.0.0.0/0 trust\n").expect("rules of access");
        }
        for _ in 0..TRIES {
            let port = free_port();
            if let Some(server) = serve(&programs, user, folder.path(), setup, port) {
                let (setup, databases) = (setup.clone(), AtomicU32::new(0));
                return Self { server, port, programs, setup, databases, folder };
            }
        }
        panic!("postgres does not start: {}", log(folder.path()));
    }

    /// `kill -9` of the server, which takes its sessions with it.
    pub fn kill(&mut self) {
        // Both fail only for a process that has ended.
        let _ = self.server.kill();
        let _ = self.server.wait();
    }

    /// Starts a killed server again, over the same data and on the same port.
    ///
    /// # Panics
    /// If it does not start.
    pub fn start_again(&mut self) {
        let end = Instant::now() + START;
        // As long as sessions of the killed server are there, a new one refuses.
        loop {
            match serve(&self.programs, user(), self.folder.path(), &self.setup, self.port) {
                Some(server) => return self.server = server,
                None => assert!(Instant::now() < end, "postgres does not start again: {}", log(self.folder.path())),
            }
            sleep(Duration::from_millis(200));
        }
    }

    /// Sends a signal to the server and all its sessions.
    pub fn signal(&self, signal: libc::c_int) {
        let server = self.server.id();
        let children = fs::read_to_string(format!("/proc/{server}/task/{server}/children")).unwrap_or_default();
        for pid in children.split_whitespace().filter_map(|pid| pid.parse().ok()).chain([server as libc::pid_t]) {
            // SAFETY: sends a signal to processes of ours; one that has just ended is no harm.
            unsafe { libc::kill(pid, signal) };
        }
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Of the server process.
    pub fn pid(&self) -> u32 {
        self.server.id()
    }

    /// The URL of a database by this name.
    pub fn url(&self, database: &str) -> String {
        format!("postgres://farm@127.0.0.1:{}/{database}", self.port)
    }

    /// Makes an empty database and gives its URL.
    pub fn database(&self) -> String {
        let name = format!("farm{}", self.databases.fetch_add(1, Ordering::Relaxed));
        let mut create = Command::new(self.programs.join("createdb"));
        create.args(["-h", "127.0.0.1", "-U", "farm", "-p", &self.port.to_string(), &name]);
        finish(create);
        self.url(&name)
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        // Immediate shutdown: nobody will want its data.
        // SAFETY: the process is our child and not waited for yet, so the id is its own.
        unsafe { libc::kill(self.server.id() as libc::pid_t, libc::SIGQUIT) };
        let end = Instant::now() + Duration::from_secs(5);
        while matches!(self.server.try_wait(), Ok(None)) {
            if Instant::now() > end {
                let _ = self.server.kill();
                let _ = self.server.wait();
                return;
            }
            sleep(Duration::from_millis(10));
        }
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a free port").port()
}

fn serve(programs: &Path, user: Option<(u32, u32)>, folder: &Path, setup: &Setup, port: u16) -> Option<Child> {
    let durable = if setup.durable { "on" } else { "off" };
    let mut command = as_user(&programs.join("postgres"), user, folder);
    command.arg("-D").arg(folder.join("data")).args(["-p", &port.to_string()]);
    command.arg("-k").arg(folder);
    for setting in [
        format!("listen_addresses={}", setup.listen),
        format!("fsync={durable}"),
        format!("full_page_writes={durable}"),
        "shared_buffers=256MB".to_owned(),
        "max_wal_size=4GB".to_owned(),
    ] {
        command.args(["-c", &setting]);
    }
    let log = fs::File::options().create(true).append(true).open(folder.join("log")).expect("a log");
    command.stdout(Stdio::null()).stderr(log);
    // SAFETY: prctl is async-signal-safe.
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGQUIT);
            Ok(())
        });
    }
    let mut server = command.spawn().expect("postgres can be started");
    let end = Instant::now() + START;
    while Instant::now() < end {
        if matches!(server.try_wait(), Ok(Some(_)) | Err(_)) {
            return None;
        }
        let mut ready = Command::new(programs.join("pg_isready"));
        ready.args(["-q", "-h", "127.0.0.1", "-U", "farm", "-d", "postgres", "-p", &port.to_string()]);
        if ready.status().is_ok_and(|status| status.success()) {
            return Some(server);
        }
        sleep(Duration::from_millis(20));
    }
    let _ = server.kill();
    let _ = server.wait();
    None
}

/// The newest version.
fn programs() -> PathBuf {
    let versions = fs::read_dir(PROGRAMS).into_iter().flatten().flatten().filter_map(|entry| {
        let version: u32 = entry.file_name().to_str()?.parse().ok()?;
        let programs = entry.path().join("bin");
        programs.join("initdb").exists().then_some((version, programs))
    });
    let newest = versions.max_by_key(|(version, _)| *version);
    newest.unwrap_or_else(|| panic!("there is no Postgres in {PROGRAMS}; run tools/setup.sh")).1
}

/// Postgres refuses to run as root; then it runs as its own user, or as nobody.
fn user() -> Option<(u32, u32)> {
    // SAFETY: always succeeds.
    if unsafe { libc::geteuid() } != 0 {
        return None;
    }
    let users = fs::read_to_string("/etc/passwd").expect("the list of users");
    let find = |name: &str| {
        let line = users.lines().find(|line| line.split(':').next() == Some(name))?;
        let mut fields = line.split(':').skip(2);
        Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
    };
    let found = find("postgres").or_else(|| find("nobody"));
    Some(found.expect("a user postgres or nobody to run as"))
}

fn as_user(program: &Path, user: Option<(u32, u32)>, folder: &Path) -> Command {
    let mut command = Command::new(program);
    command.current_dir(folder).env_remove("PGDATA").stdin(Stdio::null());
    if let Some((uid, gid)) = user {
        command.uid(uid).gid(gid);
    }
    command
}

fn finish(mut command: Command) {
    let output = command.output().unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn log(folder: &Path) -> String {
    fs::read_to_string(folder.join("log")).unwrap_or_default()
}
