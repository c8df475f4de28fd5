//! What the node's process leaves behind for the one after it, should it die: which attempts are on its devices, and what
//! killed it.
//!
//! Two files in the node's folder. `running.json` names the attempts; a process that ends in good order leaves none. `death`
//! is empty until the process dies of its own: a handler of fatal signals writes a line to it, and so does a panic that ends
//! the process. A SIGKILL leaves nothing, so the next process looks at the kernel's count of processes that were killed
//! for want of memory: if it has grown, that is what has happened, as far as anybody can tell. Without evidence the death
//! is held against nobody: somebody killed the process, or its machine went down.
//!
//! A panic in a device's thread ends no process: it fails the attempt.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use anyhow::Context;
use farm_core::id::AttemptKey;
use farm_core::wire::to_scheduler::Crash;
use serde::{Deserialize, Serialize};

/// Bytes of `death` that are read.
const MAX_CAUSE: usize = 1024;
/// Bytes of `running.json` that are read; it has some hundred for each device.
const MAX_RUNNING: u64 = 1 << 20;
/// How a line of `death` begins that tells of a signal from another process.
const OUTSIDE: &str = "from outside: ";

/// `running.json`
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Running {
    attempts: Vec<AttemptKey>,
    machine: Machine,
    /// A death before this process's, which the scheduler does not know of yet.
    earlier: Option<Crash>,
}

/// The machine as it was when the process started.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Machine {
    /// One start of the machine.
    start: Option<String>,
    /// Whose processes are counted: those of a control group, or all.
    counted: String,
    /// How many of them have been killed for want of memory.
    oom_kills: Option<u64>,
}

impl Machine {
    fn now() -> Self {
        let start = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok();
        let group = std::fs::read_to_string("/proc/self/cgroup").ok().and_then(|text| {
            // The unified hierarchy's line.
            let group = text.lines().find_map(|line| line.strip_prefix("0::"))?;
            Some(format!("/sys/fs/cgroup{}/memory.events", group.trim_end_matches('/')))
        });
        // The machine's own count takes in processes that are not ours; it is the second choice.
        for counted in group.into_iter().chain(["/proc/vmstat".to_owned()]) {
            if let Some(oom_kills) = std::fs::read_to_string(&counted).ok().and_then(|text| oom_kills(&text)) {
                return Self { start, counted, oom_kills: Some(oom_kills) };
            }
        }
        Self { start, counted: String::new(), oom_kills: None }
    }

    /// The process that started on `before` was killed since; now is `self`.
    fn killed(&self, before: &Self) -> (String, bool) {
        if self.start != before.start {
            return ("its machine went down".to_owned(), false);
        }
        match (self.oom_kills, before.oom_kills) {
            (Some(now), Some(then)) if now > then && self.counted == before.counted => {
                (format!("killed for want of memory, by {} ({then} such kills before, {now} now)", self.counted), true)
            }
            _ => ("killed from outside".to_owned(), false),
        }
    }
}

fn oom_kills(text: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
}

/// What became of the process that left these, if it died while it had something to do.
fn examine(running: &Running, death: &str, now: &Machine) -> Option<Crash> {
    if running.attempts.is_empty() {
        // What it knew of one before it is not lost.
        return running.earlier.clone();
    }
    let death = death.trim();
    let (cause, own_fault) = match death.strip_prefix(OUTSIDE) {
        Some(signal) => (format!("{signal}, sent by another process"), false),
        None if death.is_empty() => now.killed(&running.machine),
        None => (death.replace('\n', "; "), true),
    };
    Some(Crash { attempts: running.attempts.clone(), cause, own_fault })
}

/// This process's own evidence, kept up to date.
pub struct Evidence {
    folder: PathBuf,
    running: Mutex<Running>,
    ended: AtomicBool,
    death: File,
}

impl Evidence {
    /// Looks at what the process before this one has left in the folder, and starts anew. The folder is this process's own.
    pub fn open(folder: &Path) -> anyhow::Result<Self> {
        let machine = Machine::now();
        let earlier = match read(&folder.join("running.json")) {
            Some(before) => {
                let death = std::fs::read(folder.join("death")).unwrap_or_default();
                let death = String::from_utf8_lossy(&death[..death.len().min(MAX_CAUSE)]).into_owned();
                examine(&before, &death, &machine)
            }
            None => None,
        };
        if let Some(crash) = &earlier {
            tracing::warn!(
                attempts = crash.attempts.len(),
                cause = crash.cause,
                own_fault = crash.own_fault,
                "the node's process before this one died while it ran attempts"
            );
        }
        let running = Running { attempts: Vec::new(), machine, earlier };
        let path = folder.join("death");
        let death = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
        let (folder, ended) = (folder.to_owned(), AtomicBool::new(false));
        let evidence = Self { folder, running: Mutex::new(running), ended, death };
        evidence.write(&evidence.lock()).with_context(|| format!("cannot write to {}", evidence.folder.display()))?;
        Ok(evidence)
    }

    /// What the scheduler has to be told of.
    pub fn crash(&self) -> Option<Crash> {
        self.lock().earlier.clone()
    }

    /// The scheduler knows of that.
    pub fn crash_known(&self) {
        self.change(|running| running.earlier = None);
    }

    /// These attempts are on the node's devices from now on.
    pub fn holding(&self, attempts: &[AttemptKey]) {
        self.change(|running| running.attempts = attempts.to_vec());
    }

    /// From here on fatal signals are written down.
    pub fn watch(&self) -> io::Result<()> {
        watch_signals(self.death.as_raw_fd())
    }

    /// The process ends by its own fault.
    pub fn dies_of(&self, cause: &str) {
        if let Err(error) = writeln!(&self.death, "{cause}") {
            tracing::warn!(%error, "cannot write down why the node ends");
        }
    }

    /// The process ends in good order, whatever is on its devices, and whoever is there to say so.
    pub fn end(&self) {
        self.holding(&[]);
        self.ended.store(true, Ordering::SeqCst);
    }

    /// Dropped by a panic that ends the process, it says so.
    pub fn panic_guard(self: &Arc<Self>) -> PanicGuard {
        PanicGuard(self.clone())
    }

    fn change(&self, change: impl FnOnce(&mut Running)) {
        let mut running = self.lock();
        if self.ended.load(Ordering::SeqCst) {
            return;
        }
        change(&mut running);
        // Without it a death is held against nobody.
        if let Err(error) = self.write(&running) {
            tracing::warn!(folder = %self.folder.display(), %error, "cannot write down what this node runs");
        }
    }

    /// Replaced as a whole. Not synced: it has to outlive the process, not the machine.
    fn write(&self, running: &Running) -> io::Result<()> {
        let (path, new) = (self.folder.join("running.json"), self.folder.join("running.json.new"));
        std::fs::write(&new, serde_json::to_vec(running)?)?;
        std::fs::rename(new, path)
    }

    fn lock(&self) -> MutexGuard<'_, Running> {
        // Plain data, replaced field by field.
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Evidence {
    fn drop(&mut self) {
        // The number may be another file's from here on.
        DEATH.store(-1, Ordering::SeqCst);
    }
}

pub struct PanicGuard(Arc<Evidence>);

impl Drop for PanicGuard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.dies_of("the node's program panicked");
        }
    }
}

/// None also if it cannot be read: then nothing is known.
fn read(path: &Path) -> Option<Running> {
    if std::fs::metadata(path).ok()?.len() > MAX_RUNNING {
        return None;
    }
    let read = serde_json::from_slice(&std::fs::read(path).ok()?);
    read.inspect_err(|error| tracing::warn!(file = %path.display(), %error, "cannot read what the last process left"))
        .ok()
}

/// Signals by which a process dies of its own, with what is written down for each.
const FATAL: [(libc::c_int, &str); 5] = [
    (libc::SIGSEGV, "signal 11 (SIGSEGV)\n"),
    (libc::SIGBUS, "signal 7 (SIGBUS)\n"),
    (libc::SIGILL, "signal 4 (SIGILL)\n"),
    (libc::SIGFPE, "signal 8 (SIGFPE)\n"),
    // A failed allocation and a panic within a panic end so.
    (libc::SIGABRT, "signal 6 (SIGABRT): too little memory, or a fault that the program found itself\n"),
];

/// Where the handler writes; -1 for nowhere.
static DEATH: AtomicI32 = AtomicI32::new(-1);

/// What was done about the signals before, in the order of [`FATAL`]: the standard library tells of a stack that is full.
static BEFORE: OnceLock<[libc::sigaction; FATAL.len()]> = OnceLock::new();

fn watch_signals(death: libc::c_int) -> io::Result<()> {
    DEATH.store(death, Ordering::SeqCst);
    if BEFORE.get().is_some() {
        return Ok(());
    }
    // SAFETY: all zeros is a valid sigaction, and where there is no new action sigaction only reads the old one.
    let before = unsafe {
        let mut before: [libc::sigaction; FATAL.len()] = std::mem::zeroed();
        for ((signal, _), before) in FATAL.iter().zip(&mut before) {
            libc::sigaction(*signal, std::ptr::null(), before);
        }
        before
    };
    // Set once, by whoever is first.
    let _ = BEFORE.set(before);
    for (signal, _) in FATAL {
        // SAFETY: all zeros is a valid sigaction; the handler has the type that SA_SIGINFO asks for, and calls only what
        // a signal handler may call. SA_ONSTACK: the thread's own stack may be what has run out.
        let set = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_fatal as *const () as libc::sighandler_t;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigemptyset(&mut action.sa_mask);
            libc::sigaction(signal, &action, std::ptr::null_mut())
        };
        if set != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Writes one line and lets the signal do what it would have done: a fault comes up again as soon as this returns, and a
/// signal that was sent is sent again. Calls nothing but write, getpid, sigaction and raise, and allocates nothing.
extern "C" fn on_fatal(signal: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let death = DEATH.load(Ordering::SeqCst);
    let place = FATAL.iter().position(|(number, _)| *number == signal).unwrap_or(0);
    let line = FATAL[place].1;
    // SAFETY: the kernel gives a valid `info`, whose sender is set where a process has sent the signal; `write` gets whole
    // strings, and `sigaction` the default or what was there before this handler.
    unsafe {
        let sent = matches!((*info).si_code, libc::SI_USER | libc::SI_QUEUE | libc::SI_TKILL);
        let outside = if sent && (*info).si_pid() != libc::getpid() { OUTSIDE } else { "" };
        for part in [outside, line] {
            libc::write(death, part.as_ptr().cast(), part.len());
        }
        if sent {
            // The standard library's handler lets signals that are no faults pass.
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = libc::SIG_DFL;
            libc::sigaction(signal, &action, std::ptr::null_mut());
            libc::raise(signal);
        } else if let Some(before) = BEFORE.get() {
            libc::sigaction(signal, &before[place], std::ptr::null_mut());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::{CommandExt, ExitStatusExt};
    use std::process::Command;

    use farm_core::id::{AttemptNo, Epoch, JobId};
    use uuid::Uuid;

    use super::*;

    const FOLDER: &str = "EVIDENCE_TEST_FOLDER";
    const DEATH_OF: &str = "EVIDENCE_TEST_DEATH";

    fn key(n: u32) -> AttemptKey {
        AttemptKey { job: JobId(Uuid::from_u128(9)), attempt: AttemptNo(n), epoch: Epoch(5) }
    }

    /// Another process: this test binary, told to run only this. Does nothing when run as an ordinary test.
    #[test]
    fn a_process_that_dies() {
        let (Ok(folder), Ok(death)) = (std::env::var(FOLDER), std::env::var(DEATH_OF)) else { return };
        let evidence = Arc::new(Evidence::open(Path::new(&folder)).unwrap());
        let _guard = evidence.panic_guard();
        evidence.watch().unwrap();
        evidence.holding(&[key(1)]);
        evidence.holding(&[key(2), key(3)]);
        match death.as_str() {
            // SAFETY: it is to be a fault.
            "fault" => unsafe { std::ptr::null_mut::<u8>().write_volatile(1) },
            "abort" => std::process::abort(),
            "overflow" => drop(std::thread::spawn(|| overflow(0)).join()),
            "panic" => panic!("at the end of its wits"),
            "order" => evidence.end(),
            // SAFETY: signals to oneself and, in the child, to its parent.
            "kill" => drop(unsafe { libc::raise(libc::SIGKILL) }),
            "other" => {
                let parent = std::process::id();
                let _ = Command::new("sh").args(["-c", &format!("kill -SEGV {parent}; sleep 20")]).status();
            }
            death => panic!("{death:?} is no death"),
        }
    }

    #[allow(unconditional_recursion)]
    fn overflow(depth: u64) -> u64 {
        let block = std::hint::black_box([depth; 512]);
        overflow(depth + 1) + block[17]
    }

    /// What the next process finds, and the signal that the last one died of.
    fn after(death: &str) -> (Option<Crash>, Option<i32>) {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "evidence::tests::a_process_that_dies", "--nocapture"]);
        command.env(FOLDER, folder.path()).env(DEATH_OF, death);
        // SAFETY: setrlimit may be called there. No core files.
        unsafe {
            command.pre_exec(|| {
                let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
                libc::setrlimit(libc::RLIMIT_CORE, &none);
                Ok(())
            });
        }
        let status = command.output().unwrap().status;
        let evidence = Evidence::open(folder.path()).unwrap();
        (evidence.crash(), status.signal())
    }

    #[test]
    fn a_death_of_its_own_is_told_with_its_cause_and_what_it_ran() {
        for (death, signal, cause) in [
            ("fault", Some(libc::SIGSEGV), "signal 11 (SIGSEGV)"),
            // The standard library says so and aborts.
            ("overflow", Some(libc::SIGABRT), "signal 11 (SIGSEGV)"),
            ("abort", Some(libc::SIGABRT), "signal 6 (SIGABRT)"),
            ("panic", None, "the node's program panicked"),
        ] {
            let (crash, died_of) = after(death);
            assert_eq!(died_of, signal, "{death}");
            let crash = crash.unwrap_or_else(|| panic!("{death} left no evidence"));
            assert!(crash.own_fault && crash.cause.starts_with(cause), "{death}: {crash:?}");
            assert_eq!(crash.attempts, [key(2), key(3)]);
        }
    }

    #[test]
    fn whoever_is_killed_from_outside_is_not_blamed_and_a_good_end_is_no_death() {
        let (crash, died_of) = after("other");
        assert_eq!(died_of, Some(libc::SIGSEGV));
        let crash = crash.unwrap();
        assert!(!crash.own_fault && crash.cause.contains("sent by another process"), "{crash:?}");
        let (crash, died_of) = after("kill");
        assert_eq!((died_of, crash.map(|crash| crash.attempts)), (Some(libc::SIGKILL), Some(vec![key(2), key(3)])));
        assert_eq!(after("order"), (None, None));
    }

    #[test]
    fn a_kill_is_the_process_own_fault_only_where_memory_ran_out_meanwhile() {
        let machine = |start: &str, counted: &str, oom_kills| Machine {
            start: Some(start.into()),
            counted: counted.into(),
            oom_kills,
        };
        let before = machine("a", "/group", Some(3));
        let running = Running { attempts: vec![key(1)], machine: before.clone(), earlier: None };
        let fault = |now: &Machine| examine(&running, "", now).unwrap().own_fault;
        assert!(fault(&machine("a", "/group", Some(4))));
        for other in [
            before,
            machine("b", "/group", Some(4)),
            machine("a", "/elsewhere", Some(4)),
            machine("a", "/group", Some(1)),
            machine("a", "/group", None),
        ] {
            assert!(!fault(&other), "{other:?}");
        }
        assert_eq!(oom_kills("low 0\noom 1\noom_kill 7\n"), Some(7));
        assert_eq!(oom_kills("oom_kill_disable 0\n"), None);
    }

    #[test]
    fn a_crash_is_told_until_the_scheduler_knows_of_it() {
        let folder = tempfile::tempdir().unwrap();
        let open = || Evidence::open(folder.path()).unwrap();
        open().holding(&[key(1)]);
        let crash = open().crash();
        assert!(crash.is_some());
        assert_eq!(open().crash(), crash, "a process that never got through changes nothing");
        let evidence = open();
        evidence.crash_known();
        assert_eq!(evidence.crash(), None);
        drop(evidence);
        assert_eq!(open().crash(), None);
        std::fs::write(folder.path().join("running.json"), "{").unwrap();
        assert_eq!(open().crash(), None, "what cannot be read tells nothing");
    }
}
