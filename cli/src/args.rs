//! The command line.

use std::num::NonZeroU32;
use std::path::PathBuf;

use clap::{Args as ClapArgs, Parser, Subcommand};
use farm_core::job::state::JobState;
use farm_core::tiles::plan::Tiling;

pub const DEFAULT_ADDRESS: &str = "127.0.0.1:7070";

/// Submit prompts to a mochi-farm, watch the clips and fetch them.
///
/// Exit status: 0 all went well; 1 a clip failed, was cancelled or could not be fetched; 2 wrong usage, or the farm
/// refused; 3 the scheduler cannot be reached; 130 interrupted while waiting.
#[derive(Debug, Parser)]
#[command(name = "farmctl", version, max_term_width = 100)]
pub struct Args {
    #[command(flatten)]
    pub farm: FarmArgs,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, ClapArgs)]
pub struct FarmArgs {
    /// The scheduler's address: HOST:PORT or a http URL.
    #[arg(long, global = true, value_name = "ADDR", env = "FARM_SCHEDULER", default_value = DEFAULT_ADDRESS)]
    pub scheduler: String,
    /// File that holds the farm's shared secret.
    #[arg(long, global = true, value_name = "FILE", env = "FARM_SECRET_FILE")]
    pub secret_file: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a whole farm on this machine, in the foreground, until Ctrl-C.
    Up(Up),
    /// Queue the prompts of a file, one JSON object a line.
    Submit(Submit),
    /// List jobs, oldest first.
    List(List),
    /// Show all that is known of one job.
    Show(OneJob),
    /// Follow a job, or all running ones, until nothing is left to do.
    Watch(Watch),
    /// Print a job's log.
    Logs(OneJob),
    /// Cancel jobs.
    Cancel(Jobs),
    /// Queue failed or cancelled jobs again.
    Retry(Jobs),
    /// Copy finished clips to a folder.
    Fetch(Fetch),
    /// List the farm's nodes and what their devices do.
    Nodes(Output),
}

impl Command {
    pub fn wants_json(&self) -> bool {
        let output = match self {
            Self::Up(_) => return false,
            Self::Submit(args) => &args.output,
            Self::List(args) => &args.output,
            Self::Show(args) | Self::Logs(args) => &args.output,
            Self::Watch(args) => &args.output,
            Self::Cancel(args) | Self::Retry(args) => &args.output,
            Self::Fetch(args) => &args.output,
            Self::Nodes(output) => output,
        };
        output.json
    }
}

#[derive(Debug, ClapArgs)]
pub struct Output {
    /// Print JSON instead of text: the bodies of the HTTP API.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, ClapArgs)]
pub struct Up {
    /// Number of node processes.
    #[arg(long, value_name = "N", default_value = "1")]
    pub nodes: NonZeroU32,
    /// Devices of each node.
    #[arg(long, value_name = "cpu:K", default_value = "cpu:1")]
    pub devices: String,
    /// Steps between two checkpoints of a latent; 0 for none. Left out: the nodes' own default.
    #[arg(long, value_name = "K")]
    pub checkpoint_steps: Option<u32>,
    /// How clips are decoded: auto, whole, exact, or tiles of HxW latent pixels. Left out: the scheduler's own default.
    #[arg(long, value_name = "TILING")]
    pub tiles: Option<Tiling>,
    /// Model folder; its name is the model's name. Left out: assets/mochi-tiny, if it is there.
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Where clips go: file:///DIR or s3://BUCKET/PREFIX. Left out: the folder `store` in the data folder.
    #[arg(long, value_name = "URL")]
    pub store: Option<String>,
    /// Folder for the queue.
    #[arg(long, value_name = "DIR", default_value = "farm-data")]
    pub data: PathBuf,
    /// Address of the scheduler; port 0 takes a free one.
    #[arg(long, value_name = "ADDR", default_value = DEFAULT_ADDRESS)]
    pub listen: String,
}

#[derive(Debug, ClapArgs)]
pub struct Submit {
    /// The prompt file; - reads standard input.
    #[arg(value_name = "FILE.jsonl|-")]
    pub file: PathBuf,
    /// Model for lines that name none.
    #[arg(long, value_name = "NAME")]
    pub model: Option<String>,
    /// Priority of lines that name none; higher goes first.
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub priority: Option<i32>,
    /// Stay until every clip is finished and show progress.
    #[arg(long)]
    pub wait: bool,
    /// Fetch every clip to this folder as it finishes; implies --wait.
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Queue the good lines of a file that has bad ones.
    #[arg(long)]
    pub skip_invalid: bool,
    /// Make new jobs even for lines that were submitted before.
    #[arg(long)]
    pub again: bool,
    #[command(flatten)]
    pub output: Output,
}

#[derive(Debug, ClapArgs)]
pub struct List {
    /// Only jobs in this state: queued, running, done, failed or cancelled.
    #[arg(long, value_name = "STATE")]
    pub state: Option<JobState>,
    #[command(flatten)]
    pub output: Output,
}

#[derive(Debug, ClapArgs)]
pub struct OneJob {
    /// A job id, or a unique ending of at least 4 digits.
    pub id: String,
    #[command(flatten)]
    pub output: Output,
}

#[derive(Debug, ClapArgs)]
pub struct Watch {
    /// A job id, or a unique ending; all running jobs if left out.
    pub id: Option<String>,
    #[command(flatten)]
    pub output: Output,
}

#[derive(Debug, ClapArgs)]
pub struct Jobs {
    /// Job ids, or unique endings of at least 4 digits.
    #[arg(required = true, value_name = "ID")]
    pub ids: Vec<String>,
    #[command(flatten)]
    pub output: Output,
}

#[derive(Debug, ClapArgs)]
pub struct Fetch {
    /// Job ids, or unique endings of at least 4 digits.
    #[arg(required = true, value_name = "ID")]
    pub ids: Vec<String>,
    /// Folder for the clips.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    #[command(flatten)]
    pub output: Output,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn a_priority_may_be_negative() {
        let args = Args::try_parse_from(["farmctl", "submit", "-", "--priority", "-3"]).unwrap();
        assert!(matches!(args.command, Command::Submit(Submit { priority: Some(-3), .. })));
    }
}
