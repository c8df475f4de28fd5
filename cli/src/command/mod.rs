//! One file per subcommand.

pub mod change;
pub mod fetch;
mod list;
mod logs;
mod nodes;
mod show;
mod submit;
mod up;
mod watch;

use crate::args::{Args, Command};
use crate::client::{Change, Client};
use crate::error::{Error, Status};

pub async fn run(args: Args) -> Result<Status, Error> {
    let farm = args.farm;
    if let Command::Up(up) = args.command {
        return up::run(up, farm.secret_file).await;
    }
    let client = Client::new(&farm.scheduler, farm.secret_file.as_deref())?;
    match args.command {
        Command::Up(up) => up::run(up, farm.secret_file).await,
        Command::Submit(args) => submit::run(&client, args).await,
        Command::List(args) => list::run(&client, args).await,
        Command::Show(args) => show::run(&client, args).await,
        Command::Watch(args) => watch::run(&client, args).await,
        Command::Logs(args) => logs::run(&client, args).await,
        Command::Cancel(args) => change::run(&client, args, Change::Cancel).await,
        Command::Retry(args) => change::run(&client, args, Change::Retry).await,
        Command::Fetch(args) => fetch::run(&client, args).await,
        Command::Nodes(output) => nodes::run(&client, output).await,
    }
}
