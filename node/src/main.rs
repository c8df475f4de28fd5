//! `farm-node`: a render node of the farm, and the commands that work on one machine without a farm.

mod command;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "farm-node", version, about = "Render clips on this machine", propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

// One line per subcommand here and one arm in `main`; everything else lives in `command/<name>.rs`, which offers
// `Args` and `run(Args) -> anyhow::Result<ExitCode>`.
#[derive(Subcommand)]
enum Command {
    /// Render one clip here, without a farm
    Render(command::render::Args),
    /// Inspect a checkpoint, compare it with reference tensors, tokenize
    Model(command::model::Args),
    /// Measure where the time of one clip goes, and its peak memory
    Bench(command::bench::Args),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Render(args) => command::render::run(args),
        Command::Model(args) => command::model::run(args),
        Command::Bench(args) => command::bench::run(args),
    };
    result.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}
