//! `farmctl`, the user's command line. Everything goes over the scheduler's HTTP API ([`farm_core::api`]); there is
//! no second way in, and no tensor code here.
//!
//! Reading order: [`args`] → [`client`] (which finds the scheduler that leads) → [`follow`] (waiting for jobs) → [`board`] (showing them) → [`command`].

mod args;
mod board;
mod client;
mod command;
mod error;
mod follow;
mod output;
#[cfg(test)]
mod pretended;

use std::io::ErrorKind;
use std::process::ExitCode;

use clap::Parser;

use crate::error::Error;

// One thread: the kernel ties the children of `farmctl up` to the thread that started them, which has to live as long
// as the process.
#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let args = args::Args::parse();
    let json = args.command.wants_json();
    match command::run(args).await {
        Ok(status) => status.into(),
        // Whoever read our output has seen enough, as in `farmctl list | head`.
        Err(Error::Output(error)) if error.kind() == ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            let code = error.exit_code();
            match &error {
                // The scheduler's own words are an answer like any other.
                Error::Refused { answer, .. } if json && output::json(answer).is_ok() => {}
                _ => eprintln!("{:?}", miette::Report::new(error)),
            }
            ExitCode::from(code)
        }
    }
}
