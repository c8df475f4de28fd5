//! `farm-node`: a render node of the farm, and the commands that work on one machine without a farm.

mod attempt;
mod checkpoints;
mod command;
mod cores;
mod data_plane;
mod decode;
mod device_pool;
mod device_thread;
mod devices;
mod encode;
mod engine;
mod engine_device;
mod evidence;
mod fit;
mod link;
mod models;
mod outbox;
mod progress;
mod root;
mod scratch;
mod session;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Every result of the engine is fresh memory. This one gives out again what was freed a moment ago; libc's gives large pieces
/// back to the system, which has to clear them anew.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

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
    Render(Box<command::render::Args>),
    /// Make frames of a latent that was kept
    Decode(command::decode::Args),
    /// Lend this machine's devices to a farm
    Join(command::join::Args),
    /// Inspect a checkpoint, compare it with reference tensors, tokenize
    Model(command::model::Args),
    /// Measure where the time of one clip goes, and its peak memory
    Bench(command::bench::Args),
    /// Predict which degrees of a group are fastest for a clip
    Plan(command::plan::Args),
    /// Measure this machine's rates for plan
    Calibrate(command::calibrate::Args),
    /// Tell what this machine has: processor, GPUs, libraries of CUDA, encoder; and how to get what is missing
    Doctor(command::doctor::Args),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Render(args) => command::render::run(*args),
        Command::Decode(args) => command::decode::run(args),
        Command::Join(args) => command::join::run(args),
        Command::Model(args) => command::model::run(args),
        Command::Bench(args) => command::bench::run(args),
        Command::Plan(args) => command::plan::run(args),
        Command::Calibrate(args) => command::calibrate::run(args),
        Command::Doctor(args) => command::doctor::run(args),
    };
    result.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}
