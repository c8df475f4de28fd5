//! The command line.

mod farm;
mod jobs;

use std::path::PathBuf;

use clap::{Args as ClapArgs, Parser, Subcommand};
use clap_complete::Shell;

pub use self::farm::{Audit, Drain, Gc, Limit, Quota, Undrain, Up, Usage};
pub use self::jobs::{Fetch, Jobs, List, One, OneJob, Scope, Several, Submit, Watch};

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
    /// The scheduler's address: HOST:PORT or a http URL. Several of one farm, separated by commas: the one that leads
    /// is found.
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
    /// Queue the prompts of a file, one JSON object a line. The file's jobs are a batch.
    Submit(Submit),
    /// List jobs, oldest first.
    List(List),
    /// List batches, newest first.
    Batches(Output),
    /// Show all that is known of a job, or how a batch stands.
    Show(One),
    /// Say why a job waits, what would change that, and when its clip is expected.
    Why(OneJob),
    /// Follow a job or a batch, or all running jobs, until nothing is left to do.
    Watch(Watch),
    /// Print a job's log.
    Logs(OneJob),
    /// Cancel jobs, or all jobs of batches.
    Cancel(Several),
    /// Queue failed or cancelled jobs again.
    Retry(Jobs),
    /// Start nothing more of jobs, batches, a tenant or the whole farm. What runs is handed back at its next step.
    Pause(Scope),
    /// End a pause.
    Resume(Scope),
    /// Copy finished clips to a folder.
    Fetch(Fetch),
    /// Show the farm as it works, in a terminal: nodes, devices, jobs, reasons to wait, tenants.
    Top(Output),
    /// List the farm's nodes and what their devices do.
    Nodes(Output),
    /// Start nothing more on a node. What it runs goes on elsewhere.
    Drain(Drain),
    /// Let a node work again, after a drain or in a quarantine.
    Undrain(Undrain),
    /// List tenants, what they have and what they may have.
    Tenants(Output),
    /// Show a tenant's share and limits, or set those that are given.
    Quota(Quota),
    /// Sum up what ended attempts used, and what it cost.
    Usage(Usage),
    /// Print who did what, oldest first.
    Audit(Audit),
    /// Remove what the farm's rules of retention no longer keep.
    Gc(Gc),
    /// Print a completion script for a shell.
    Completions {
        /// The shell.
        shell: Shell,
    },
}

impl Command {
    pub fn wants_json(&self) -> bool {
        let output = match self {
            Self::Up(_) | Self::Completions { .. } => return false,
            Self::Submit(args) => &args.output,
            Self::List(args) => &args.output,
            Self::Show(args) => &args.output,
            Self::Why(args) | Self::Logs(args) => &args.output,
            Self::Watch(args) => &args.output,
            Self::Cancel(args) => &args.output,
            Self::Retry(args) => &args.output,
            Self::Pause(args) | Self::Resume(args) => &args.output,
            Self::Fetch(args) => &args.output,
            Self::Drain(args) => &args.output,
            Self::Undrain(args) => &args.output,
            Self::Quota(args) => &args.output,
            Self::Usage(args) => &args.output,
            Self::Audit(args) => &args.output,
            Self::Gc(args) => &args.output,
            Self::Batches(output) | Self::Top(output) | Self::Nodes(output) | Self::Tenants(output) => output,
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

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(line: &str) -> Result<Command, String> {
        let args = Args::try_parse_from(line.split(' ')).map_err(|error| error.to_string())?;
        Ok(args.command)
    }

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn a_priority_is_checked_before_anything_is_sent() {
        let Ok(Command::Submit(submit)) = parse("farmctl submit - --priority 1000") else { panic!() };
        assert_eq!(submit.priority, Some(1000));
        for bad in ["-3", "1001", "high"] {
            let error = parse(&format!("farmctl submit - --priority {bad}")).unwrap_err();
            assert!(error.contains(&format!("invalid value '{bad}' for '--priority <P>'")), "{error}");
        }
        assert!(parse("farmctl submit - --priority -3").unwrap_err().contains("-3 is not in 0..=1000"));
    }

    #[test]
    fn a_tenant_is_checked_before_anything_is_sent() {
        let error = parse("farmctl submit - --tenant Films").unwrap_err();
        assert!(error.contains("is not 1..=64 of a-z"), "{error}");
    }

    #[test]
    fn a_pause_has_one_scope() {
        for good in ["pause 5a0c31f2 5a0c31f3", "resume --tenant films", "pause --all"] {
            parse(&format!("farmctl {good}")).unwrap();
        }
        for bad in ["pause", "pause 5a0c31f2 --all", "resume --tenant films --all"] {
            assert!(parse(&format!("farmctl {bad}")).is_err(), "{bad}");
        }
    }
}
