//! `farm-scheduler`: reads its arguments and runs, or measures itself.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{ArgGroup, Parser};
use farm_core::tiles::plan::Tiling;
use farm_scheduler::bench;
use farm_scheduler::queue::location::Location;
use farm_scheduler::run::{Settings, run};
use tracing_subscriber::EnvFilter;

/// Decisions are many small allocations: with this one they take half the time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The farm's scheduler: keeps the queue and hands clips to nodes.
///
/// Any number of schedulers may share a queue in Postgres: one leads, the others stand by and take over when it ends.
#[derive(Parser)]
#[command(version = farm_core::VERSION, subcommand_negates_reqs = true, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    args: Option<Args>,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Measures how fast the scheduler decides and how well it shares; starts nothing
    Bench(bench::Args),
}

#[derive(clap::Args)]
#[command(group = ArgGroup::new("where").args(["data", "queue"]).required(true))]
struct Args {
    /// HOST:PORT for farmctl and the nodes; port 0 takes any free one
    #[arg(long, default_value = "127.0.0.1:7070")]
    listen: String,
    /// HOST:PORT that farmctl, nodes and other schedulers reach this one by [default: what it listens on]
    #[arg(long, value_name = "HOST:PORT")]
    advertise: Option<String>,
    /// Folder of a queue for one scheduler; made if it is absent
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Database of a queue for several schedulers: postgres://USER@HOST/DATABASE
    #[arg(long, value_name = "URL", env = "FARM_QUEUE", hide_env_values = true, value_parser = postgres)]
    queue: Option<Location>,
    /// Where nodes put results: file:///folder, s3://bucket/prefix, or a plain path
    #[arg(long)]
    store: String,
    /// How clips are decoded: auto, whole, exact, or tiles of HxW latent pixels, which are 8 pixels of the clip
    #[arg(long, value_name = "TILING", default_value_t = Tiling::AUTO)]
    tiles: Tiling,
    /// File with the farm's shared secret, at least 16 bytes; needed unless --listen is a loopback address
    #[arg(long)]
    secret_file: Option<PathBuf>,
    /// Prices and retention, as in config/farm.toml
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

fn postgres(url: &str) -> Result<Location, String> {
    match url.parse() {
        Ok(location @ Location::Postgres(_)) => Ok(location),
        Ok(Location::File(_)) => Err("write postgres://USER@HOST/DATABASE; a folder is named with --data".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

fn main() -> ExitCode {
    match Cli::parse() {
        Cli { command: Some(Command::Bench(args)), .. } => measure(args),
        Cli { args: Some(args), .. } => serve(args),
        Cli { .. } => ExitCode::FAILURE, // the parser asks for arguments
    }
}

fn measure(args: bench::Args) -> ExitCode {
    match bench::run(args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("farm-scheduler bench: {error:#}");
            ExitCode::from(2)
        }
    }
}

#[tokio::main]
async fn serve(args: Args) -> ExitCode {
    let Args { listen, advertise, data, queue, store, tiles: tiling, secret_file, config } = args;
    let queue = match (data, queue) {
        (Some(data), _) => Location::folder(&data),
        (None, Some(database)) => database,
        (None, None) => return ExitCode::FAILURE, // the parser asks for one of them
    };
    let filter =
        EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info,ractor=warn,ractor_cluster=warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    match run(Settings { listen, advertise, queue, store, tiling, secret_file, config }).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("farm-scheduler: {error:#}");
            ExitCode::FAILURE
        }
    }
}
