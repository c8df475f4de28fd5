//! What a clip takes of a device's memory, stage by stage, before anything is loaded: which weights stay, which wait in the
//! host's memory, how the decode is cut. Arithmetic only.

mod misfit;
mod sizes;
#[cfg(test)]
mod tests;

use std::fmt;

use serde::{Deserialize, Serialize};

pub use self::misfit::{Misfit, Remedy};
pub use self::sizes::denoise_tensors;
use crate::engine::streaming::Streaming;
use crate::job::spec::FRAME_STEP;
use crate::model::config::{T5Config, VaeConfig};
use crate::parallel::cost::{DeviceRates, LinkRates, ModelShape, USABLE_MEMORY};
use crate::parallel::shard::Shares;
use crate::parallel::topology::Topology;
use crate::precision::Precision;
use crate::tiles::plan::{PIXELS, Tiling};

/// Of what has failed, the part that is planned with next.
const AFTER_FAILURE: f64 = 0.9;

/// A checkpoint's networks.
#[derive(Clone, Copy, Debug)]
pub struct Networks<'a> {
    pub dit: ModelShape,
    pub t5: &'a T5Config,
    pub vae: &'a VaeConfig,
}

/// Sizes of a clip. Those that a [`RenderSpec`](crate::job::spec::RenderSpec) may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Clip {
    pub width: u32,
    pub height: u32,
    pub frames: u32,
    /// Text tokens of both branches.
    pub text: [usize; 2],
}

/// A device, and the link to the host that it is in.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Target {
    /// Its `memory` is all of it, or what was free when somebody looked; a part of it is left for the driver.
    pub device: DeviceRates,
    pub host_link: LinkRates,
}

/// How a clip fits.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    pub precision: Precision,
    /// All networks stay on the device. If not, the text encoder is loaded block by block and the decoder for the decode.
    pub kept: bool,
    /// Blocks of the transformer on the device, and slots for the others.
    pub streaming: Streaming,
    pub blocks: usize,
    /// Bytes of page-locked memory in the host.
    pub parked: u64,
    pub stages: [StagePlan; 3],
    /// Bytes that may be filled.
    pub usable: u64,
    /// The whole frame, or tiles of which the device has one at a time.
    pub tiling: Tiling,
    pub speed: Speed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    Text,
    Denoise,
    Decode,
}

/// Bytes at the peak of a stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StagePlan {
    pub stage: Stage,
    pub weights: u64,
    pub activations: u64,
}

/// Predicted seconds of a denoising step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Speed {
    /// A block, for all branches of a device.
    pub block: f64,
    /// The fetch of a block.
    pub fetch: f64,
    /// All blocks, fetched as planned.
    pub step: f64,
    /// All blocks, if all were on the device.
    pub resident_step: f64,
}

impl Clip {
    fn latent_frames(&self) -> u64 {
        u64::from(self.frames.saturating_sub(1) / FRAME_STEP) + 1
    }

    /// Of a frame: height and width.
    fn latent(&self) -> [usize; 2] {
        [self.height, self.width].map(|size| size as usize / PIXELS)
    }

    fn latent_pixels(&self) -> u64 {
        self.latent().iter().map(|size| *size as u64).product()
    }

    fn tokens(&self) -> usize {
        let [height, width] = self.latent();
        self.latent_frames() as usize * (height / 2) * (width / 2)
    }
}

impl StagePlan {
    pub fn bytes(&self) -> u64 {
        self.weights + self.activations
    }
}

impl Plan {
    /// Bytes of the stage that takes most.
    pub fn peak(&self) -> u64 {
        self.stages.iter().map(StagePlan::bytes).max().unwrap_or(0)
    }

    /// Memory to plan with if an allocation has failed although this had room: another program has taken it, or a stage takes
    /// more than was counted.
    pub fn less(&self) -> f64 {
        AFTER_FAILURE * self.peak() as f64 / USABLE_MEMORY
    }
}

/// The fastest way to fit `clip` into the device of rank 0 of a group, which has the most to hold: it encodes the text and
/// decodes. In order: everything stays; the transformer stays, as many of its blocks as there is room for and the others
/// streamed; the same, and the decode is cut into tiles.
///
/// Errors with what is lacking and what would fit.
pub fn plan(
    networks: &Networks<'_>,
    clip: &Clip,
    precision: Precision,
    topology: Topology,
    target: &Target,
) -> Result<Plan, Misfit> {
    let fit =
        Fit { networks, clip, precision, topology, target, usable: (USABLE_MEMORY * target.device.memory) as u64 };
    fit.plan().map_err(|short| Misfit { remedies: misfit::remedies(&fit), ..short })
}

/// What is to fit, and where.
#[derive(Clone, Copy)]
struct Fit<'a> {
    networks: &'a Networks<'a>,
    clip: &'a Clip,
    precision: Precision,
    topology: Topology,
    target: &'a Target,
    usable: u64,
}

impl Fit<'_> {
    fn plan(&self) -> Result<Plan, Misfit> {
        let blocks = self.networks.dit.layers;
        let all = Streaming { resident: blocks, slots: 0 };
        let kept = self.with(all, true, Tiling::WHOLE);
        if kept.peak() <= self.usable {
            return Ok(kept);
        }
        let least = self.streamed(0, Tiling::WHOLE);
        let tiling = if least.peak() <= self.usable { Tiling::WHOLE } else { self.tiled(&least)? };
        let fits = |resident: usize| self.streamed(resident, tiling).peak() <= self.usable;
        // Each block that stays takes more.
        let resident = (0..=blocks).rev().find(|resident| fits(*resident)).unwrap_or(0);
        Ok(self.streamed(resident, tiling))
    }

    /// With so many blocks that stay, and as few slots as are as fast as more.
    fn streamed(&self, resident: usize, tiling: Tiling) -> Plan {
        if resident >= self.networks.dit.layers {
            return self.with(Streaming { resident, slots: 0 }, false, tiling);
        }
        let [two, three] = [2, 3].map(|slots| self.with(Streaming { resident, slots }, false, tiling));
        if three.peak() <= self.usable && three.speed.step < two.speed.step { three } else { two }
    }

    /// Tiles that fit beside what `least` has in its decode; none of its other stages may be too large.
    fn tiled(&self, least: &Plan) -> Result<Tiling, Misfit> {
        let misfit = |at: &StagePlan, takes: u64| Misfit {
            stage: at.stage,
            takes,
            usable: self.usable,
            precision: self.precision,
            remedies: Vec::new(),
        };
        if let Some(stage) = least.stages[..2].iter().find(|stage| stage.bytes() > self.usable) {
            return Err(misfit(stage, stage.bytes()));
        }
        let decode = &least.stages[2];
        let per_pixel = sizes::decode_bytes_per_pixel(self.networks.vae, self.precision);
        let beside = sizes::beside_decode(self.networks.vae, self.clip);
        let room = self.usable.saturating_sub(decode.weights + beside);
        let limited = format!("auto@{room}").parse::<Tiling>().map_err(|_| misfit(decode, decode.bytes()))?;
        let tiles = limited.plan(self.clip.latent(), per_pixel).map_err(|_| misfit(decode, decode.bytes()))?;
        // As they are called: the sizes that were found, not the room that there is.
        let largest = tiles.tiles.iter().max_by_key(|tile| tile.pixels());
        let (rows, cols) = largest.map_or((0, 0), |tile| (tile.rows.len(), tile.cols.len()));
        format!("shared:{rows}x{cols}").parse().map_err(|_| misfit(decode, decode.bytes()))
    }

    fn with(&self, streaming: Streaming, kept: bool, tiling: Tiling) -> Plan {
        let &Self { networks, clip, precision, topology, .. } = self;
        let (model, dtype) = (&networks.dit, sizes::dtype(precision));
        let blocks = model.layers;
        let block_bytes = |layer: usize| sizes::block(model, layer).bytes(dtype);
        let (streamed, stay): (Vec<usize>, Vec<usize>) = (0..blocks).partition(|i| streaming.streams(*i, blocks));
        let stay: u64 = stay.into_iter().map(block_bytes).sum();
        let vectors: u64 = streamed.iter().map(|layer| 4 * sizes::block(model, *layer).vectors).sum();
        let slot = streamed.iter().map(|layer| block_bytes(*layer)).max().unwrap_or(0);
        let parked: u64 = streamed.iter().map(|layer| block_bytes(*layer)).sum::<u64>() - vectors;
        let slots = streaming.slots.min(streamed.len()) as u64;
        let dit = sizes::around_blocks(model).bytes(dtype) + stay + vectors + slots * slot;

        // The text encoder is f32 in every precision.
        let f32 = sizes::dtype(Precision::F32);
        let text_blocks = if kept { networks.t5.num_layers as u64 } else { 1 };
        let t5 =
            sizes::around_text_blocks(networks.t5).bytes(f32) + text_blocks * sizes::text_block(networks.t5).bytes(f32);
        let vae = sizes::decoder(networks.vae).bytes(dtype);
        let pixels = match tiling.plan(clip.latent(), 1) {
            Ok(tiles) => tiles.tiles.iter().map(|tile| tile.pixels() as u64).max().unwrap_or(0),
            // Whole, which fits any frame with a pixel.
            Err(_) => clip.latent_pixels(),
        };
        let decode = pixels * sizes::decode_bytes_per_pixel(networks.vae, precision);
        let stage = |stage, own: u64, activations| {
            let weights = if kept { dit + t5 + vae } else { dit + own };
            StagePlan { stage, weights, activations }
        };
        let brought = !streamed.is_empty();
        Plan {
            precision,
            kept,
            streaming,
            blocks,
            parked,
            stages: [
                stage(Stage::Text, t5, sizes::text_activations(networks.t5, clip.text)),
                stage(Stage::Denoise, 0, sizes::denoise_activations(networks, clip, precision, topology, brought)),
                stage(Stage::Decode, vae, decode + sizes::beside_decode(networks.vae, clip)),
            ],
            usable: self.usable,
            tiling,
            speed: self.speed(streaming, slot),
        }
    }

    /// `fetched`: bytes of a block that is fetched.
    fn speed(&self, streaming: Streaming, fetched: u64) -> Speed {
        let (model, device, link) = (&self.networks.dit, &self.target.device, &self.target.host_link);
        let value_bytes = sizes::dtype(self.precision).bytes() as f64;
        let branch = |text: usize| {
            let shares = Shares::new(self.topology, self.clip.tokens(), text, model.heads, model.head_dim);
            let [tokens, text_rows] = shares.row_counts(0);
            let segment: usize = shares.segment(0).iter().sum();
            let flops = model.attention_flops(segment, self.clip.tokens() + text, shares.heads(0).len());
            model.linear_flops(0, tokens, text_rows) / device.linear
                + flops / device.attention
                + value_bytes * model.elementwise_values(tokens, text_rows) / device.bandwidth
        };
        let [cond, uncond] = self.clip.text.map(branch);
        let block = if self.topology.cfg() == 1 { cond + uncond } else { cond.max(uncond) };
        let fetch = if fetched == 0 { 0.0 } else { link.latency + fetched as f64 / link.bandwidth };
        let step = streaming.seconds(model.layers, block, fetch);
        Speed { block, fetch, step, resident_step: block * model.layers as f64 }
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Text => "text",
            Self::Denoise => "denoise",
            Self::Decode => "decode",
        })
    }
}

/// In decimal gigabytes, as memory is sold.
struct Gigabytes(u64);

impl fmt::Display for Gigabytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{:.2}", self.0 as f64 / 1e9))
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:8} {:>12} {:>15} {:>8}", "stage", "weights GB", "activations GB", "sum GB")?;
        for stage in &self.stages {
            let [weights, activations, sum] = [stage.weights, stage.activations, stage.bytes()].map(Gigabytes);
            writeln!(f, "{:8} {weights:>12} {activations:>15} {sum:>8}", stage.stage)?;
        }
        writeln!(
            f,
            "{} GB of {} GB that may be filled, {}",
            Gigabytes(self.peak()),
            Gigabytes(self.usable),
            self.precision
        )?;
        let (resident, blocks) = (self.streaming.resident, self.blocks);
        if resident >= blocks {
            let others =
                if self.kept { "text encoder and decoder too" } else { "text encoder and decoder come and go" };
            writeln!(f, "transformer on the device, {others}")?;
        } else {
            let Speed { step, resident_step, .. } = self.speed;
            writeln!(
                f,
                "{resident} of {blocks} blocks on the device, {} GB in the host's memory through {} slots: {step:.2} s a step, {:.1} % more \
                 than without",
                Gigabytes(self.parked),
                self.streaming.slots,
                100.0 * (step / resident_step - 1.0).max(0.0)
            )?;
        }
        write!(f, "decode {}", self.tiling)
    }
}
