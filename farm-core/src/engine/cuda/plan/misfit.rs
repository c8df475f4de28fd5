//! A clip that does not fit, and what would.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Clip, Fit, Gigabytes, Stage};
use crate::job::spec::{FRAME_STEP, SIZE_STEP};
use crate::precision::Precision;

/// A clip does not fit into a device's memory, however it is cut.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, thiserror::Error)]
pub struct Misfit {
    pub stage: Stage,
    /// Bytes that the stage takes at least, and those that may be filled.
    pub takes: u64,
    pub usable: u64,
    pub precision: Precision,
    /// What would fit, each by itself. If there is none, no clip of this model fits.
    pub remedies: Vec<Remedy>,
}

/// A change that lets the clip fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Remedy {
    Precision(Precision),
    /// As many, and fewer are fine too.
    Frames(u32),
    Size {
        width: u32,
        height: u32,
    },
}

impl fmt::Display for Misfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lacks = self.takes.saturating_sub(self.usable);
        write!(
            f,
            "the {} stage takes {} GB in {}, {} GB more than the {} GB that may be filled",
            self.stage,
            Gigabytes(self.takes),
            self.precision,
            Gigabytes(lacks),
            Gigabytes(self.usable)
        )?;
        match &self.remedies[..] {
            [] => f.write_str("; no clip of this model fits"),
            remedies => {
                let list: Vec<String> = remedies.iter().map(Remedy::to_string).collect();
                write!(f, "; what fits is {}", list.join(", or "))
            }
        }
    }
}

impl fmt::Display for Remedy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Precision(precision) => write!(f, "{precision}"),
            Self::Frames(frames) => write!(f, "{frames} frames"),
            Self::Size { width, height } => write!(f, "{width}x{height}"),
        }
    }
}

/// What would fit: another precision, the most frames, the largest frame of about the same form.
pub(super) fn remedies(fit: &Fit<'_>) -> Vec<Remedy> {
    let fits = |clip: Clip, precision| Fit { clip: &clip, precision, ..*fit }.plan().is_ok();
    let clip = *fit.clip;
    let precision = fit.precision != Precision::Bf16 && fits(clip, Precision::Bf16);
    let fewer = (0..(clip.frames.max(1) - 1) / FRAME_STEP).rev().map(|chunks| chunks * FRAME_STEP + 1);
    let frames = fewer.into_iter().find(|frames| fits(Clip { frames: *frames, ..clip }, fit.precision));
    let scaled = |size: u32, percent: u32| (size * percent / 100 / SIZE_STEP * SIZE_STEP).max(SIZE_STEP);
    let smaller = (1..20).rev().map(|part| (scaled(clip.width, 5 * part), scaled(clip.height, 5 * part)));
    let size = smaller.into_iter().find(|&(width, height)| fits(Clip { width, height, ..clip }, fit.precision));
    let precision = precision.then_some(Remedy::Precision(Precision::Bf16));
    let size = size.map(|(width, height)| Remedy::Size { width, height });
    [precision, frames.map(Remedy::Frames), size].into_iter().flatten().collect()
}
