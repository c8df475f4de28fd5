//! `farm-node model`: what a checkpoint folder holds, and whether it computes what it should.

mod inspect;
mod parity;
mod tokenize;

use std::process::ExitCode;

use clap::Subcommand;

#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// List layout, tensors, parameters and what is missing, from the file headers alone
    Inspect(inspect::Args),
    /// Run every stage that a file of reference tensors has inputs for, and compare
    Parity(parity::Args),
    /// Print the token ids of each line of standard input
    Tokenize(tokenize::Args),
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    match args.command {
        Command::Inspect(args) => inspect::run(args),
        Command::Parity(args) => parity::run(args),
        Command::Tokenize(args) => tokenize::run(args),
    }
}
