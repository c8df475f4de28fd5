//! One file per subcommand.

mod audit;
mod batches;
mod change;
mod drain;
pub mod fetch;
mod gc;
mod list;
mod logs;
mod nodes;
mod show;
mod submit;
mod tenants;
mod top;
mod up;
mod usage;
mod watch;
mod why;

use clap::CommandFactory;
use clap_complete::Shell;

use crate::args::{Args, Command};
use crate::client::{Change, Client};
use crate::error::{Error, Status};
use crate::output;

pub async fn run(args: Args) -> Result<Status, Error> {
    let farm = args.farm;
    let connect = || Client::new(&farm.scheduler, farm.secret_file.as_deref());
    match args.command {
        Command::Up(args) => up::run(args, farm.secret_file).await,
        Command::Completions { shell } => completions(shell),
        Command::Submit(args) => submit::run(&connect()?, args).await,
        Command::List(args) => list::run(&connect()?, args).await,
        Command::Batches(output) => batches::run(&connect()?, output).await,
        Command::Show(args) => show::run(&connect()?, args).await,
        Command::Why(args) => why::run(&connect()?, args).await,
        Command::Watch(args) => watch::run(&connect()?, args).await,
        Command::Logs(args) => logs::run(&connect()?, args).await,
        Command::Cancel(args) => change::cancel(&connect()?, args).await,
        Command::Retry(args) => change::retry(&connect()?, args).await,
        Command::Pause(args) => change::hold(&connect()?, args, Change::Pause).await,
        Command::Resume(args) => change::hold(&connect()?, args, Change::Resume).await,
        Command::Fetch(args) => fetch::run(&connect()?, args).await,
        Command::Top(output) => top::run(&connect()?, output).await,
        Command::Nodes(output) => nodes::run(&connect()?, output).await,
        Command::Drain(args) => drain::drain(&connect()?, args).await,
        Command::Undrain(args) => drain::undrain(&connect()?, args).await,
        Command::Tenants(output) => tenants::list(&connect()?, output).await,
        Command::Quota(args) => tenants::quota(&connect()?, args).await,
        Command::Usage(args) => usage::run(&connect()?, args).await,
        Command::Audit(args) => audit::run(&connect()?, args).await,
        Command::Gc(args) => gc::run(&connect()?, args).await,
    }
}

fn completions(shell: Shell) -> Result<Status, Error> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Args::command(), "farmctl", &mut script);
    output::line(String::from_utf8_lossy(&script).trim_end())?;
    Ok(Status::Ok)
}
