//! `farm-node bench`: where the time of one clip goes, and its peak memory.

use std::path::PathBuf;
use std::process::ExitCode;

#[derive(clap::Args)]
pub struct Args {
    /// Checkpoint folder
    #[arg(long, value_name = "DIR", default_value = "assets/mochi-tiny")]
    pub model: PathBuf,
    /// Print one JSON object instead of a table
    #[arg(long)]
    pub json: bool,
}

pub fn run(_args: Args) -> anyhow::Result<ExitCode> {
    anyhow::bail!("bench is not built yet")
}
