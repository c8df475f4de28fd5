//! `farm-node doctor`: what this machine has for rendering, and how to get what is missing.

#[cfg(feature = "cuda")]
mod cuda;

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::process::ExitCode;
use std::thread;

use farm_core::engine::cpu;
use serde::Serialize;

use super::calibrate::memory_bytes;
use super::plan::amount;
use crate::encode;

#[derive(clap::Args)]
pub struct Args {
    /// Do not compile the kernels for the GPUs that are found
    #[arg(long)]
    pub quick: bool,
    /// Print what was found as JSON
    #[arg(long)]
    pub json: bool,
}

/// Ends well also where much is missing: then it has found that out.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let report = Report::new(args.quick);
    let mut out = io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&report)?)?;
    } else {
        write!(out, "{}", report.text())?;
    }
    Ok(ExitCode::SUCCESS)
}

#[derive(Serialize)]
struct Report {
    version: &'static str,
    machine: Machine,
    encoder: Encoder,
    /// None if the program was built without it.
    #[cfg(feature = "cuda")]
    cuda: Option<cuda::Cuda>,
    #[cfg(not(feature = "cuda"))]
    cuda: Option<()>,
}

#[derive(Serialize)]
struct Machine {
    /// That this process may use.
    cores: usize,
    memory_bytes: Option<u64>,
    /// Of the processor, that the engine uses.
    units: Vec<&'static str>,
}

#[derive(Serialize)]
struct Encoder {
    /// Whether FFmpeg's libraries are linked, or its program is started.
    linked: bool,
    /// Why there can be no mp4.
    error: Option<String>,
}

impl Report {
    fn new(quick: bool) -> Self {
        #[cfg(not(feature = "cuda"))]
        let _ = quick;
        let machine = Machine {
            cores: thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: memory_bytes().ok().map(|bytes| bytes as u64),
            units: cpu::units(),
        };
        let error = encode::check().err().map(|error| error.to_string());
        Self {
            version: env!("CARGO_PKG_VERSION"),
            machine,
            encoder: Encoder { linked: cfg!(feature = "ffmpeg"), error },
            #[cfg(feature = "cuda")]
            cuda: Some(cuda::Cuda::new(quick)),
            #[cfg(not(feature = "cuda"))]
            cuda: None,
        }
    }

    fn text(&self) -> String {
        let mut text = String::new();
        let Machine { cores, memory_bytes, units } = &self.machine;
        line(&mut text, "farm-node", self.version);
        let memory = memory_bytes.map_or_else(String::new, |bytes| format!(", {} of memory", amount(bytes as f64)));
        let units = if units.is_empty() { String::new() } else { format!(", {}", units.join(", ")) };
        line(&mut text, "processor", &format!("{cores} cores{units}{memory}"));
        let Encoder { linked, error } = &self.encoder;
        let kind = if *linked { "FFmpeg's libraries" } else { "the ffmpeg program" };
        line(&mut text, "encoder", &error.as_ref().map_or_else(|| kind.to_owned(), |error| format!("none: {error}")));
        #[cfg(feature = "cuda")]
        if let Some(cuda) = &self.cuda {
            cuda.text(&mut text);
        }
        #[cfg(not(feature = "cuda"))]
        line(&mut text, "GPUs", "none: farm-node was built without its `cuda` feature");
        text
    }
}

fn line(text: &mut String, what: &str, found: &str) {
    // Writing to a string does not fail.
    let _ = writeln!(text, "{what:<10} {found}");
}
