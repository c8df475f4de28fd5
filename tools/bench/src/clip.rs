//! `farm-bench clip`: what `farm-node bench` says, kept with the revision and the machine.

use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context, ensure};
use serde::Serialize;
use serde_json::Value;

use crate::machine::Setting;
use crate::{farm_node, store};

#[derive(clap::Args)]
pub struct Args {
    /// Where to keep the figures [default: bench/clip-REVISION.json in the folder of built programs]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Options of `farm-node bench`
    #[arg(last = true)]
    options: Vec<String>,
}

#[derive(Serialize)]
struct Kept {
    setting: Setting,
    /// As `farm-node bench --json` prints them: medians in seconds, memory in MiB.
    figures: Value,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let node = farm_node()?;
    let setting = Setting::here()?;
    let folder = tempfile::tempdir().context("no folder for the figures")?;
    let figures = folder.path().join("figures.json");
    let mut command = Command::new(&node);
    command.args(["bench", "--model", "assets/mochi-tiny", "--save"]).arg(&figures).args(&args.options);
    let status = command.status().with_context(|| node.display().to_string())?;
    // A goal that is missed is a result like another.
    ensure!(figures.exists(), "farm-node bench failed: {status}");
    let out = match args.out {
        Some(out) => out,
        None => node.with_file_name("..").join("bench").join(format!("clip-{}.json", setting.revision)),
    };
    let figures = serde_json::from_slice(&std::fs::read(&figures)?)?;
    store(&out, &Kept { setting, figures })?;
    println!("kept in {}", out.canonicalize().unwrap_or(out).display());
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
