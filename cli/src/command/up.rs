//! `farmctl up`: a whole farm as child processes in the foreground. It only wraps the other programs, restarts
//! nothing, and takes everything down with it.

use std::future::{pending, poll_fn};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::process::{ExitStatus, Stdio};
use std::task::Poll;
use std::time::Duration;

use reqwest::Url;
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::{Child as Process, Command};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{sleep, timeout};

use crate::args::Up;
use crate::client::Client;
use crate::error::{Error, Status};
use crate::output::{self, clean, plural};

const BUNDLED_MODEL: &str = "assets/mochi-tiny";
/// How farm-scheduler's one line on standard output begins.
const ANNOUNCEMENT: &str = "listening on http://";
const POLL: Duration = Duration::from_millis(100);
/// From SIGTERM to SIGKILL. Nodes hand their work back meanwhile, and stop by themselves after 25 s.
const GRACE: Duration = Duration::from_secs(30);

pub async fn run(args: Up, secret_file: Option<PathBuf>) -> Result<Status, Error> {
    let plan = Plan::new(args, secret_file)?;
    // Before the first child: a Ctrl-C from here on stops them all in order.
    let mut stop = StopSignals::new()?;
    let mut farm = Farm { children: Vec::new() };
    let outcome = farm.live(&plan, &mut stop).await;
    farm.shut_down(&mut stop).await;
    outcome.map(|()| Status::Ok)
}

/// Everything decided before the first process starts.
struct Plan {
    scheduler: PathBuf,
    node: PathBuf,
    scheduler_args: Vec<String>,
    /// Name of each node, and its arguments without the scheduler's address, which is not known yet.
    nodes: Vec<(String, Vec<String>)>,
    secret_file: Option<PathBuf>,
}

impl Plan {
    fn new(args: Up, secret_file: Option<PathBuf>) -> Result<Self, Error> {
        let model = model_folder(args.model)?;
        let model_name = model.file_name().and_then(|name| name.to_str()).filter(|name| !name.contains('='));
        let Some(model_name) = model_name else {
            return Err(Error::usage(format!("{} has a name that cannot name a model", model.display())));
        };
        std::fs::create_dir_all(&args.data).map_err(Error::file("create the folder", &args.data))?;
        let data = args.data.canonicalize().map_err(Error::file("open the folder", &args.data))?;
        let store = match args.store {
            Some(store) => store,
            None => {
                let folder = data.join("store");
                std::fs::create_dir_all(&folder).map_err(Error::file("create the folder", &folder))?;
                let url = Url::from_file_path(&folder)
                    .map_err(|()| Error::usage(format!("{} cannot be written as a URL", folder.display())))?;
                url.to_string()
            }
        };
        let secret = match &secret_file {
            Some(path) => vec!["--secret-file".to_owned(), text(path)?],
            None => Vec::new(),
        };

        let scheduler_args = ["--listen", &args.listen, "--data", &text(&data)?, "--store", &store];
        let tiles = args.tiles.map(|tiles| ["--tiles".to_owned(), tiles.to_string()]);
        let nodes = (1..=args.nodes.get()).map(|number| {
            let name = format!("node-{number}");
            let model = format!("{model_name}={}", text(&model)?);
            let node_data = text(&data.join(&name))?;
            let own = ["join", "--name", &name, "--devices", &args.devices, "--model", &model, "--store", &store];
            let own = own.into_iter().chain(["--data", &node_data]).map(str::to_owned);
            let steps = args.checkpoint_steps.map(|steps| ["--checkpoint-steps".to_owned(), steps.to_string()]);
            let node_args = own.chain(steps.into_iter().flatten()).chain(secret.clone()).collect();
            Ok((name, node_args))
        });
        Ok(Self {
            scheduler: find_program("farm-scheduler")?,
            node: find_program("farm-node")?,
            scheduler_args: scheduler_args
                .into_iter()
                .map(str::to_owned)
                .chain(tiles.into_iter().flatten())
                .chain(secret.clone())
                .collect(),
            nodes: nodes.collect::<Result<_, Error>>()?,
            secret_file,
        })
    }
}

struct Farm {
    /// The scheduler is the first.
    children: Vec<Child>,
}

struct Child {
    name: String,
    process: Process,
}

impl Farm {
    /// Starts everything and stays until a signal or the end of the scheduler.
    async fn live(&mut self, plan: &Plan, stop: &mut StopSignals) -> Result<(), Error> {
        let mut scheduler = Child::start("scheduler", &plan.scheduler, &plan.scheduler_args)?;
        let announced = announced_address(scheduler.process.stdout.take());
        self.children.push(scheduler);
        let address = tokio::select! {
            address = announced => address.to_string(),
            ended = self.first_end() => return Err(self.ended_early(ended)),
            () = stop.next() => return Ok(()),
        };
        let client = Client::new(&address, plan.secret_file.as_deref())?;
        for (name, args) in &plan.nodes {
            let args: Vec<_> = args.iter().cloned().chain(["--scheduler".to_owned(), address.clone()]).collect();
            let mut node = Child::start(name, &plan.node, &args)?;
            if let Some(out) = node.process.stdout.take() {
                tokio::spawn(prefix_lines(name.clone(), out));
            }
            self.children.push(node);
        }
        tokio::select! {
            line = ready_line(&client, &plan.nodes) => output::line(&line?)?,
            ended = self.first_end() => return Err(self.ended_early(ended)),
            () = stop.next() => return Ok(()),
        }
        loop {
            let (index, status) = tokio::select! {
                ended = self.first_end() => ended,
                () = stop.next() => return Ok(()),
            };
            let child = self.children.remove(index);
            if index == 0 {
                return Err(Error::SchedulerEnded(ending(status)));
            }
            let left = self.children.len() as u64 - 1;
            eprintln!("{} ended ({}), the farm goes on with {}", child.name, ending(status), plural(left, "node"));
        }
    }

    /// Waits for the end of any child: its place in the list, and how it ended.
    async fn first_end(&mut self) -> (usize, io::Result<ExitStatus>) {
        poll_fn(|context| {
            for (index, child) in self.children.iter_mut().enumerate() {
                if let Poll::Ready(status) = pin!(child.process.wait()).poll(context) {
                    return Poll::Ready((index, status));
                }
            }
            Poll::Pending
        })
        .await
    }

    /// A child ended before the farm was complete.
    fn ended_early(&mut self, (index, status): (usize, io::Result<ExitStatus>)) -> Error {
        let child = self.children.remove(index);
        match index {
            0 => Error::SchedulerEnded(ending(status)),
            _ => Error::with_help(
                format!("{} ended before it had joined ({})", child.name, ending(status)),
                "its last lines above say why",
            ),
        }
    }

    /// Nodes first, so that they can tell the scheduler. Another signal meanwhile ends the grace.
    async fn shut_down(&mut self, stop: &mut StopSignals) {
        while self.children.len() > 1 {
            let nodes = self.children.split_off(1);
            end_all(nodes, stop).await;
        }
        end_all(std::mem::take(&mut self.children), stop).await;
    }
}

impl Child {
    fn start(name: &str, program: &Path, args: &[String]) -> Result<Self, Error> {
        let mut command = Command::new(program);
        command
            .args(args)
            // The lines get a name in front; colours would be cleaned away with a mess left behind.
            .env("NO_COLOR", "1")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // A Ctrl-C on the terminal goes to farmctl alone, which stops the children in order.
            .process_group(0)
            .kill_on_drop(true);
        #[cfg(target_os = "linux")]
        die_with_parent(&mut command);
        let mut process = command.spawn().map_err(Error::file("start", program))?;
        if let Some(out) = process.stderr.take() {
            tokio::spawn(prefix_lines(name.to_owned(), out));
        }
        Ok(Self { name: name.to_owned(), process })
    }
}

/// Even a farmctl that is killed takes its children along.
#[cfg(target_os = "linux")]
fn die_with_parent(command: &mut Command) {
    let parent = std::process::id();
    // SAFETY: between fork and exec only the async-signal-safe prctl, getppid and _exit are called; nothing is
    // allocated and no lock is taken.
    unsafe {
        command.pre_exec(move || {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                return Err(io::Error::last_os_error());
            }
            // The parent may have died before the line above: then nobody sends the signal any more.
            if libc::getppid() as u32 != parent {
                libc::_exit(1);
            }
            Ok(())
        });
    }
}

/// SIGTERM, then SIGKILL after [`GRACE`] or another signal to farmctl.
async fn end_all(mut children: Vec<Child>, stop: &mut StopSignals) {
    for child in &children {
        if let Some(pid) = child.process.id() {
            // SAFETY: kill takes plain numbers. The child is not reaped while `id` gives its number, so it is no other's.
            unsafe { libc::kill(pid as libc::pid_t, libc::SIGTERM) };
        }
    }
    let all_gone = async {
        for child in &mut children {
            // A status that cannot be read means that there is nothing left to wait for.
            let _ = child.process.wait().await;
        }
    };
    tokio::select! {
        _ = timeout(GRACE, all_gone) => {}
        () = stop.next() => {}
    }
    for child in &mut children {
        if let Ok(None) = child.process.try_wait() {
            eprintln!("{} does not stop, killing it", child.name);
            // Fails only for a process that is gone.
            let _ = child.process.kill().await;
        }
    }
}

/// Repeats a child's lines on standard error with its name in front.
async fn prefix_lines(name: String, out: impl AsyncRead + Unpin) {
    let mut lines = BufReader::new(out).split(b'\n');
    while let Ok(Some(line)) = lines.next_segment().await {
        eprintln!("{name:<9} | {}", clean(&String::from_utf8_lossy(&line)));
    }
}

/// Where the scheduler says that it listens, as seen from this machine. Never ends if it does not say: then it ends
/// itself, which is noticed.
async fn announced_address(out: Option<impl AsyncRead + Unpin + Send + 'static>) -> SocketAddr {
    if let Some(out) = out {
        let mut lines = BufReader::new(out).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            if let Some(address) = line.strip_prefix(ANNOUNCEMENT).and_then(|address| address.parse().ok()) {
                tokio::spawn(prefix_lines("scheduler".to_owned(), lines.into_inner()));
                return reachable(address);
            }
        }
    }
    pending().await
}

/// Waits until every node is registered. Loading and hashing a large model takes minutes, so there is no deadline: a
/// node that gives up ends, and that is noticed.
async fn ready_line(client: &Client, nodes: &[(String, Vec<String>)]) -> Result<String, Error> {
    loop {
        let list = client.nodes().await?.nodes;
        let joined = |name: &str| list.iter().any(|node| node.alive && node.node.0 == name);
        if nodes.iter().all(|(name, _)| joined(name)) {
            let info = client.farm().await?;
            let models: Vec<_> = info.models.iter().map(|model| clean(&model.name)).collect();
            return Ok(format!(
                "farm ready at http://{}: {}, {}, model {}, store {}",
                client.address(),
                plural(info.nodes, "node"),
                plural(info.devices, "device"),
                models.join(" "),
                clean(&info.store)
            ));
        }
        sleep(POLL).await;
    }
}

fn model_folder(given: Option<PathBuf>) -> Result<PathBuf, Error> {
    let folder = given.unwrap_or_else(|| BUNDLED_MODEL.into());
    match folder.canonicalize() {
        Ok(path) if path.is_dir() => Ok(path),
        _ => {
            Err(Error::with_help(format!("there is no model folder {}", folder.display()), "name one with --model DIR"))
        }
    }
}

/// The program beside farmctl itself, else the first on the PATH.
fn find_program(name: &str) -> Result<PathBuf, Error> {
    let beside = std::env::current_exe().ok().and_then(|own| Some(own.parent()?.join(name)));
    let on_path = std::env::var_os("PATH").unwrap_or_default();
    let on_path = std::env::split_paths(&on_path).map(|dir| dir.join(name));
    beside.into_iter().chain(on_path).find(|path| path.is_file()).ok_or_else(|| {
        Error::with_help(
            format!("cannot find {name} beside farmctl or on the PATH"),
            "build all programs with `make build`",
        )
    })
}

/// Where the listener is reached from this machine.
fn reachable(listen: SocketAddr) -> SocketAddr {
    let ip = match listen.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, listen.port())
}

fn text(path: &Path) -> Result<String, Error> {
    let text = path.to_str().map(str::to_owned);
    text.ok_or_else(|| Error::usage(format!("the path {} is not utf-8", path.display())))
}

fn ending(status: io::Result<ExitStatus>) -> String {
    match status {
        Ok(status) => status.to_string(),
        Err(error) => error.to_string(),
    }
}

/// Ctrl-C, SIGTERM and a closed terminal.
struct StopSignals([Signal; 3]);

impl StopSignals {
    fn new() -> Result<Self, Error> {
        let open = |kind| signal(kind).map_err(|error| Error::usage(format!("cannot listen for signals: {error}")));
        Ok(Self([open(SignalKind::interrupt())?, open(SignalKind::terminate())?, open(SignalKind::hangup())?]))
    }

    async fn next(&mut self) {
        let [interrupt, terminate, hangup] = &mut self.0;
        let came = tokio::select! {
            came = interrupt.recv() => came,
            came = terminate.recv() => came,
            came = hangup.recv() => came,
        };
        if came.is_none() {
            // The source of signals is gone: then none will come.
            pending().await
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_scheduler_says_where_it_listens() {
        let out: &[u8] = b"some other line\nlistening on http://0.0.0.0:4567\n";
        assert_eq!(announced_address(Some(out)).await.to_string(), "127.0.0.1:4567");
    }

    #[test]
    fn nodes_reach_a_scheduler_that_listens_everywhere() {
        assert_eq!(reachable("0.0.0.0:7".parse().unwrap()).to_string(), "127.0.0.1:7");
        assert_eq!(reachable("[::]:7".parse().unwrap()).to_string(), "[::1]:7");
        assert_eq!(reachable("10.1.2.3:7".parse().unwrap()).to_string(), "10.1.2.3:7");
    }
}
