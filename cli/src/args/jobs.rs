//! Options of the commands on jobs and batches.

use std::path::PathBuf;

use clap::{Args as ClapArgs, value_parser};
use farm_core::id::TenantId;
use farm_core::job::spec::MAX_PRIORITY;
use farm_core::job::state::JobState;

use super::Output;

#[derive(Debug, ClapArgs)]
pub struct Submit {
    /// The prompt file; - reads standard input.
    #[arg(value_name = "FILE.jsonl|-")]
    pub file: PathBuf,
    /// Model for lines that name none.
    #[arg(long, value_name = "NAME")]
    pub model: Option<String>,
    /// Priority of lines that name none, 0 to 1000; higher goes first.
    // A negative one is taken as this option's value, so that the error says what is wrong with it.
    #[arg(long, value_name = "P", allow_negative_numbers = true,
        value_parser = value_parser!(i32).range(0..=i64::from(MAX_PRIORITY)))]
    pub priority: Option<i32>,
    /// Who the jobs are charged to; `default` if left out.
    #[arg(long, value_name = "NAME")]
    pub tenant: Option<TenantId>,
    /// Start nothing before this job or batch is done: an id or a unique ending. May be given several times.
    #[arg(long, value_name = "ID")]
    pub after: Vec<String>,
    /// Cancel the rest of the batch when more of its jobs than this have failed.
    #[arg(long, value_name = "N")]
    pub max_failures: Option<u32>,
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
    /// Only jobs of this batch: its id, or a unique ending.
    #[arg(long, value_name = "ID")]
    pub batch: Option<String>,
    #[command(flatten)]
    pub output: Output,
}

#[derive(Debug, ClapArgs)]
pub struct One {
    /// A job's or a batch's id, or a unique ending of at least 4 digits.
    pub id: String,
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
    /// A job's or a batch's id, or a unique ending; all running jobs if left out.
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
pub struct Several {
    /// Ids of jobs or batches, or unique endings of at least 4 digits.
    #[arg(required = true, value_name = "ID")]
    pub ids: Vec<String>,
    #[command(flatten)]
    pub output: Output,
}

#[derive(Debug, ClapArgs)]
#[group(id = "scope", required = true, multiple = false, args = ["ids", "tenant", "all"])]
pub struct Scope {
    /// Ids of jobs or batches, or unique endings of at least 4 digits.
    #[arg(value_name = "ID")]
    pub ids: Vec<String>,
    /// All that is charged to this tenant.
    #[arg(long, value_name = "NAME")]
    pub tenant: Option<TenantId>,
    /// The whole farm.
    #[arg(long)]
    pub all: bool,
    #[command(flatten)]
    pub output: Output,
}

#[derive(Debug, ClapArgs)]
pub struct Fetch {
    /// Ids of jobs, or of batches for all their clips, or unique endings of at least 4 digits.
    #[arg(required = true, value_name = "ID")]
    pub ids: Vec<String>,
    /// Folder for the clips.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    #[command(flatten)]
    pub output: Output,
}
