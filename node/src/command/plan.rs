//! `farm-node plan`: which degrees are fastest for a clip on given devices.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, ensure};
use comfy_table::{CellAlignment, Table, presets};
#[cfg(feature = "cuda")]
use farm_core::engine::cuda::plan as memory_plan;
use farm_core::job::spec::GenerationDefaults;
#[cfg(feature = "cuda")]
use farm_core::model::config::{T5Config, VaeConfig};
use farm_core::model::weights::checkpoint::Checkpoint;
use farm_core::parallel::cost::devices::Devices;
use farm_core::parallel::cost::shape::MAX_TEXT_TOKENS;
use farm_core::parallel::cost::{Candidate, ClipShape, ModelShape, Overrides, Site, candidates};
#[cfg(feature = "cuda")]
use farm_core::parallel::topology::Topology;
#[cfg(feature = "cuda")]
use farm_core::precision::Precision;

use super::ClipSize;

#[derive(clap::Args)]
pub struct Args {
    /// Number of devices
    #[arg(long, value_name = "N")]
    pub devices: usize,
    /// Kind of device, a name in config/devices.toml or in --devices-file
    #[arg(long, value_name = "NAME")]
    pub device: String,
    /// Link between the devices of a host, a name as well
    #[arg(long, value_name = "NAME")]
    pub link: String,
    /// Hosts that the devices are in, as evenly as possible
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub hosts: usize,
    /// Link between hosts
    #[arg(long, value_name = "NAME")]
    pub link_between: Option<String>,
    /// File of devices and links that go over those the program knows
    #[arg(long, value_name = "FILE")]
    pub devices_file: Option<PathBuf>,
    /// Checkpoint folder [default: sizes of the published model]
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    #[command(flatten)]
    pub size: ClipSize,
    /// Text tokens of the prompt, its end mark among them; there is no negative prompt
    #[arg(long, value_name = "N", default_value_t = MAX_TEXT_TOKENS)]
    pub text_tokens: usize,
    #[command(flatten)]
    pub degrees: Degrees,
    /// How the clip fits into so much of one device's memory, in bf16 and stage by stage, in place of the degrees; for
    /// example 16GiB
    #[cfg(feature = "cuda")]
    #[arg(long, value_name = "BYTES", value_parser = crate::devices::parse_bytes)]
    pub memory: Option<f64>,
    /// Print the candidates as a JSON list
    #[arg(long)]
    pub json: bool,
}

/// Degrees that a person may fix.
#[derive(Clone, Copy, Debug, Default, clap::Args)]
pub struct Degrees {
    /// Groups of ranks for the branches of the guidance, 1 or 2 [default: chosen]
    #[arg(long, value_name = "N")]
    pub cfg: Option<usize>,
    /// Places that pass keys and values round [default: chosen]
    #[arg(long, value_name = "N")]
    pub ring: Option<usize>,
    /// Ranks of a place that exchange tokens for heads [default: chosen]
    #[arg(long, value_name = "N")]
    pub ulysses: Option<usize>,
    /// Each rank keeps a part of the weights; --shard=false: each keeps all [default: chosen]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub shard: Option<bool>,
}

impl From<Degrees> for Overrides {
    fn from(Degrees { cfg, ring, ulysses, shard }: Degrees) -> Self {
        Self { cfg, ring, ulysses, shard }
    }
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let site = site(&args)?;
    let (model, defaults) = match &args.model {
        None => (ModelShape::mochi1(), GenerationDefaults::default()),
        Some(dir) => {
            let checkpoint = Checkpoint::open(dir)?;
            let dit = checkpoint.dit().with_context(|| format!("{} has no transformer", dir.display()))?;
            (dit.config().shape(), checkpoint.generation_defaults().clone())
        }
    };
    let (width, height) = (args.size.width.unwrap_or(defaults.width), args.size.height.unwrap_or(defaults.height));
    let num_frames = args.size.num_frames.unwrap_or(defaults.num_frames);
    let steps = args.size.steps.unwrap_or(defaults.num_inference_steps);
    let text = args.text_tokens;
    ensure!((1..=MAX_TEXT_TOKENS).contains(&text), "--text-tokens {text} is not in 1..={MAX_TEXT_TOKENS}");
    #[cfg(feature = "cuda")]
    if let Some(memory) = args.memory {
        let clip = memory_plan::Clip { width, height, frames: num_frames, text: [text, 0] };
        return fit(&args, memory, &model, &clip);
    }
    let clip = ClipShape::new(width, height, num_frames, steps, [text, 0])?;
    let list = candidates(&model, &clip, &site, args.devices, args.degrees.into())?;
    let mut out = io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&list)?)?;
    } else {
        let hosts = if args.hosts > 1 { format!(" in {} hosts", args.hosts) } else { String::new() };
        writeln!(
            out,
            "{width}x{height}, {num_frames} frames, {steps} steps: {} visual and {text} text tokens; {} x {}{hosts}",
            clip.tokens, args.devices, args.device
        )?;
        writeln!(out, "{}", table(&list))?;
    }
    if !list.iter().any(|candidate| candidate.fits) {
        eprintln!("warning: none of these fits into the memory of {}", args.device);
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints how a clip fits into one device.
#[cfg(feature = "cuda")]
fn fit(args: &Args, memory: f64, dit: &ModelShape, clip: &memory_plan::Clip) -> anyhow::Result<ExitCode> {
    let known = args.devices_file.as_deref().map_or_else(Devices::embedded, Devices::with_file)?;
    let mut device = known.device(&args.device)?;
    device.memory = memory;
    let target = memory_plan::Target { device, host_link: known.link(&args.link)? };
    let (t5, vae) = match &args.model {
        None => (T5Config::mochi1(), VaeConfig::mochi1()),
        Some(dir) => {
            let checkpoint = Checkpoint::open(dir)?;
            let t5 = checkpoint.t5().with_context(|| format!("{} has no text encoder", dir.display()))?;
            let vae = checkpoint.vae().with_context(|| format!("{} has no vae decoder", dir.display()))?;
            (t5.config().clone(), vae.config().clone())
        }
    };
    let networks = memory_plan::Networks { dit: *dit, t5: &t5, vae: &vae };
    let plan = memory_plan::plan(&networks, clip, Precision::Bf16, Topology::SOLO, &target)?;
    let text = if args.json { serde_json::to_string_pretty(&plan)? } else { plan.to_string() };
    writeln!(io::stdout(), "{text}")?;
    Ok(ExitCode::SUCCESS)
}

fn site(args: &Args) -> anyhow::Result<Site> {
    let known = match &args.devices_file {
        Some(file) => Devices::with_file(file)?,
        None => Devices::embedded()?,
    };
    let mut site = Site::one_host(known.device(&args.device)?, known.link(&args.link)?);
    let (devices, hosts) = (args.devices, args.hosts);
    ensure!(hosts > 0, "--hosts 0; the least is 1");
    ensure!(hosts <= devices.max(1), "{devices} devices cannot be in {hosts} hosts");
    match &args.link_between {
        Some(link) => site.between = known.link(link)?,
        None => ensure!(hosts == 1, "{hosts} hosts need --link-between, the link between them"),
    }
    if hosts > 1 {
        site.devices_per_host = devices.div_ceil(hosts);
    }
    Ok(site)
}

fn table(list: &[Candidate]) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header([
        "CFG",
        "RING",
        "ULYSSES",
        "SHARD",
        "TIME",
        "SENT BY A RANK",
        "MEMORY",
        "",
    ]);
    for Candidate { topology, shard, seconds, bytes, memory, fits } in list {
        table.add_row([
            topology.cfg().to_string(),
            topology.ring().to_string(),
            topology.ulysses().to_string(),
            (if *shard { "yes" } else { "no" }).into(),
            time(*seconds),
            amount(*bytes as f64),
            amount(*memory as f64),
            (if *fits { "" } else { "does not fit" }).into(),
        ]);
    }
    for column in table.column_iter_mut().take(7) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.lines().map(|line| line.trim_end().to_owned()).collect::<Vec<_>>().join("\n")
}

fn time(seconds: f64) -> String {
    match seconds {
        s if s < 1.0 => format!("{:.1} ms", 1e3 * s),
        s if s < 100.0 => format!("{s:.1} s"),
        s => format!("{s:.0} s"),
    }
}

pub(super) fn amount(bytes: f64) -> String {
    match bytes {
        b if b < 1e3 => format!("{b:.0} B"),
        b if b < 1e6 => format!("{:.1} kB", b / 1e3),
        b if b < 1e9 => format!("{:.1} MB", b / 1e6),
        b => format!("{:.1} GB", b / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn args(line: &str) -> Args {
        Line::try_parse_from(line.split_whitespace()).unwrap().args
    }

    fn error(line: &str) -> String {
        format!("{:#}", run(args(line)).unwrap_err())
    }

    #[test]
    fn shard_is_a_word_or_a_choice() {
        let shard = |word| args(&format!("plan --devices 2 --device l40 --link pcie4 {word}")).degrees.shard;
        assert_eq!([shard(""), shard("--shard"), shard("--shard=false")], [None, Some(true), Some(false)]);
    }

    #[test]
    fn what_cannot_be_planned_says_why() {
        let devices = |n| format!("plan --devices {n} --link pcie4 --device l40");
        assert!(error("plan --devices 2 --device l41 --link pcie4").contains("known are"));
        assert!(error("plan --devices 2 --device l40 --link wifi").contains("known are"));
        assert!(
            error(&format!("{} --cfg 2 --ring 3 --ulysses 2", devices(6))).contains("needs 12 devices, there are 6")
        );
        assert!(error(&format!("{} --ulysses 25", devices(25))).contains("25 ulysses ranks share 24 heads"));
        assert!(error(&format!("{} --width 100", devices(2))).contains("width 100"));
        assert!(error(&format!("{} --text-tokens 257", devices(2))).contains("1..=256"));
        assert!(error(&format!("{} --hosts 2", devices(2))).contains("--link-between"));
        assert!(error(&format!("{} --hosts 3 --link-between 10gbe", devices(2))).contains("cannot be in 3 hosts"));
        assert!(error(&devices(0)).contains("degree of 0"));
        assert!(error(&devices(65)).contains("more than 64 ranks"));
        assert!(error(&format!("{} --model nowhere", devices(2))).contains("nowhere"));
        assert!(error(&format!("{} --devices-file nowhere.toml", devices(2))).contains("nowhere.toml"));
    }

    #[test]
    fn hosts_take_the_devices_as_evenly_as_possible() {
        let line = "plan --devices 5 --device l40 --link pcie4 --hosts 2 --link-between 100gbe";
        let site = site(&args(line)).unwrap();
        assert_eq!((site.devices_per_host, site.between.bandwidth), (3, 12.5e9));
    }

    #[test]
    fn the_table_reads_well_at_every_size() {
        assert_eq!([time(0.0042), time(67.58), time(394.4)], ["4.2 ms", "67.6 s", "394 s"]);
        assert_eq!([amount(0.0), amount(15_360.0), amount(3.6e11)], ["0 B", "15.4 kB", "360.0 GB"]);
    }
}
