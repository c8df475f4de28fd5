//! `farm-scheduler`: reads its arguments and runs.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use farm_core::tiles::plan::Tiling;
use farm_scheduler::run::{Settings, run};
use tracing_subscriber::EnvFilter;

/// The farm's scheduler: keeps the queue and hands clips to nodes.
#[derive(Parser)]
#[command(version = farm_core::VERSION)]
struct Args {
    /// HOST:PORT for farmctl and the nodes; port 0 takes any free one
    #[arg(long, default_value = "127.0.0.1:7070")]
    listen: String,
    /// Folder of the queue; made if it is absent
    #[arg(long)]
    data: PathBuf,
    /// Where nodes put results: file:///folder, s3://bucket/prefix, or a plain path
    #[arg(long)]
    store: String,
    /// How clips are decoded: auto, whole, exact, or tiles of HxW latent pixels, which are 8 pixels of the clip
    #[arg(long, value_name = "TILING", default_value_t = Tiling::AUTO)]
    tiles: Tiling,
    /// File with the farm's shared secret, at least 16 bytes; needed unless --listen is a loopback address
    #[arg(long)]
    secret_file: Option<PathBuf>,
}

#[tokio::main]
async fn main() -> ExitCode {
    let Args { listen, data, store, tiles, secret_file } = Args::parse();
    let filter =
        EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info,ractor=warn,ractor_cluster=warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    match run(Settings { listen, data, store, tiling: tiles, secret_file }).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("farm-scheduler: {error:#}");
            ExitCode::FAILURE
        }
    }
}
