//! `farm-node render`: one clip, no farm.

use std::path::PathBuf;
use std::process::ExitCode;

use farm_core::job::spec::GuidanceScale;

#[derive(clap::Args)]
pub struct Args {
    /// What the clip shows
    #[arg(long, value_name = "TEXT")]
    pub prompt: String,
    /// What it should keep away from [default: nothing, guidance is against no text at all]
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub negative_prompt: String,
    /// Checkpoint folder
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Where the clip goes: .mp4, .rgb (raw RGB24 frames) or .safetensors (the final latent)
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// Pixels, a multiple of 16 [default: the checkpoint's]
    #[arg(long)]
    pub width: Option<u32>,
    /// Pixels, a multiple of 16 [default: the checkpoint's]
    #[arg(long)]
    pub height: Option<u32>,
    /// 6k+1 [default: the checkpoint's]
    #[arg(long)]
    pub num_frames: Option<u32>,
    /// Denoising steps [default: the checkpoint's]
    #[arg(long)]
    pub steps: Option<u32>,
    /// A number, or one number per step, separated by commas [default: the checkpoint's]
    #[arg(long, value_parser = parse_guidance)]
    pub guidance_scale: Option<GuidanceScale>,
    /// Decides the noise [default: drawn, and printed]
    #[arg(long)]
    pub seed: Option<u64>,
    /// Noise to start from instead of the seed's: safetensors, key `noise`, f32 [1, 12, T, height/8, width/8]
    #[arg(long, value_name = "FILE")]
    pub noise: Option<PathBuf>,
    /// Compute threads; the clip has the same bits for any number [default: one per core]
    #[arg(long, value_name = "N")]
    pub threads: Option<std::num::NonZeroUsize>,
    /// Arithmetic of the networks
    #[arg(long, value_enum, default_value_t = Precision::Fp32)]
    pub precision: Precision,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Precision {
    /// f32 throughout; bf16 checkpoints are widened
    Fp32,
}

fn parse_guidance(text: &str) -> Result<GuidanceScale, String> {
    let number = |s: &str| s.trim().parse::<f64>().map_err(|_| format!("{:?} is not a number", s.trim()));
    match text.split_once(',') {
        None => Ok(GuidanceScale::Constant(number(text)?)),
        Some(_) => Ok(GuidanceScale::PerStep(text.split(',').map(number).collect::<Result<_, _>>()?)),
    }
}

pub fn run(_args: Args) -> anyhow::Result<ExitCode> {
    anyhow::bail!("render is not built yet")
}
