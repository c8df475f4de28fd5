//! The subcommands of `farm-node`, one file each.

pub mod bench;
pub mod calibrate;
pub mod decode;
pub mod doctor;
pub mod join;
mod layout;
pub mod model;
pub mod plan;
pub mod render;
pub mod target;
pub mod watch;

/// The size of a clip, as far as a command says it.
#[derive(clap::Args)]
pub struct ClipSize {
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
}
