//! Benchmarks that start other programs: `peer` runs this engine and PyTorch in turn, `compare` an earlier revision and this
//! one, `clip` keeps what `farm-node bench` says.

mod clip;
mod compare;
mod machine;
mod peer;
mod process;
mod ratio;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;

/// Benchmarks of one program against another; run from the top folder of the repository
#[derive(Parser)]
#[command(name = "farm-bench", version)]
enum Cli {
    /// Time one clip of the bundled checkpoint, and keep the figures
    Clip(clip::Args),
    /// Time the networks and a clip here and in PyTorch, in turn
    Peer(peer::Args),
    /// Time an earlier revision and this one, in turn
    Compare(compare::Args),
}

fn main() -> anyhow::Result<ExitCode> {
    match Cli::parse() {
        Cli::Clip(args) => clip::run(args),
        Cli::Peer(args) => peer::run(args),
        Cli::Compare(args) => compare::run(args),
    }
}

/// `farm-node` beside this program.
fn farm_node() -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe().context("this program has no path")?;
    let node = own.with_file_name("farm-node");
    anyhow::ensure!(node.is_file(), "{} is not built; run `make build`", node.display());
    Ok(node)
}

/// Writes `figures`, for programs to read, and makes the folder.
fn store(path: &std::path::Path, figures: &impl serde::Serialize) -> anyhow::Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    let text = serde_json::to_string_pretty(figures)? + "\n";
    std::fs::write(path, text).with_context(|| path.display().to_string())
}
