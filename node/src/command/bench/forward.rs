//! `farm-node bench forward`: one network of a checkpoint over the inputs of a file, timed, and how far its output is from
//! the one in the same file.
//!
//! Tensors are named as in tools/goldens, batches are of one, and no text is padded:
//!
//! | network | inputs | output |
//! |---|---|---|
//! | `dit` | `dit.in` `[1, C, T, h, w]`, `dit.t` `[1]`, `dit.text` `[1, tokens, width]` | `dit.out` |
//! | `t5` | `t5.ids` `[1, tokens]` | `t5.out` |
//! | `vae` | `vae.in` `[1, C, T, h, w]`, as the decoder takes it | `vae.out_genmo` |

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use farm_core::engine::Engine;
use farm_core::model::dit::Dit;
use farm_core::model::latent::VaeLatent;
use farm_core::model::t5::T5Encoder;
use farm_core::model::vae::VaeDecoder;
use farm_core::model::weights::Loader;
use farm_core::model::weights::checkpoint::Checkpoint;
use farm_core::model::weights::file::TensorFile;
use farm_core::parallel::group::RankGroup;
use serde::Serialize;

use super::{median, peak_mib};
use crate::command::layout::{channels_first, channels_last};
use crate::devices::{Devices, ThreadArgs};

#[derive(clap::Args)]
pub struct Args {
    #[arg(value_enum)]
    network: Network,
    /// Checkpoint folder; the other networks may be missing
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Inputs and expected output
    #[arg(long, value_name = "FILE.safetensors")]
    tensors: PathBuf,
    #[command(flatten)]
    threads: ThreadArgs,
    /// Forwards to take the median of
    #[arg(long, value_name = "N", default_value = "5")]
    runs: NonZeroUsize,
    /// Forwards before them, which are not counted
    #[arg(long, value_name = "N", default_value_t = 1)]
    warm_ups: usize,
}

#[derive(Clone, Copy, PartialEq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
enum Network {
    /// A prompt's branch of one step: its features, latent and time to a velocity
    Dit,
    /// Ids to features
    T5,
    /// A latent to frames, one latent frame at a time
    Vae,
}

/// The output is JSON alone.
#[derive(Serialize)]
struct Figures {
    network: Network,
    threads: usize,
    /// Opening the checkpoint and loading the network.
    load: f64,
    /// FLOPs of the matrix products and attention of a forward, which are nearly all; none where they are not counted.
    flops: Option<f64>,
    /// Of each counted forward.
    seconds: Vec<f64>,
    median: f64,
    /// Before the output is compared.
    peak_mib: f64,
    /// |got − expected| / |expected|
    relative_l2: f64,
    /// The largest difference of two values.
    max_difference: f64,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let compute = args.threads.compute(Devices::CPU)?;
    let engine = compute.engine(0)?;
    compute.settle(0)?;
    let tensors = TensorFile::open(&args.tensors)?;
    let watch = Watch { started: Instant::now(), warm_ups: args.warm_ups, runs: args.runs.get() };
    let checkpoint = Checkpoint::open(&args.model)?;
    let (timed, expected) = match args.network {
        Network::Dit => (dit(&engine, &checkpoint, &tensors, watch)?, "dit.out"),
        Network::T5 => (t5(&engine, &checkpoint, &tensors, watch)?, "t5.out"),
        Network::Vae => (vae(&engine, &checkpoint, &tensors, watch)?, "vae.out_genmo"),
    };
    let peak_mib = peak_mib()?;
    let (output, expected) = ((timed.layout)(&timed.output), tensors.floats(expected)?);
    let (relative_l2, max_difference) = compare(&output, &expected)?;
    let figures = Figures {
        network: args.network,
        threads: compute.threads(),
        load: timed.load,
        flops: timed.flops,
        median: median(&timed.seconds),
        seconds: timed.seconds,
        peak_mib,
        relative_l2,
        max_difference,
    };
    println!("{}", serde_json::to_string(&figures)?);
    Ok(ExitCode::SUCCESS)
}

/// Times a network that began to load at `started`.
struct Watch {
    started: Instant,
    warm_ups: usize,
    runs: usize,
}

struct Timed {
    load: f64,
    flops: Option<f64>,
    seconds: Vec<f64>,
    /// Of the last forward.
    output: Vec<f32>,
    /// From the network's layout to the file's.
    layout: fn(&[f32]) -> Vec<f32>,
}

impl Watch {
    /// Called when the network is loaded.
    fn time(
        self,
        flops: Option<f64>,
        layout: fn(&[f32]) -> Vec<f32>,
        mut forward: impl FnMut() -> anyhow::Result<Vec<f32>>,
    ) -> anyhow::Result<Timed> {
        let load = self.started.elapsed().as_secs_f64();
        let (mut seconds, mut output) = (Vec::new(), Vec::new());
        for run in 0..self.warm_ups + self.runs {
            drop(std::mem::take(&mut output));
            let began = Instant::now();
            output = forward()?;
            if run >= self.warm_ups {
                seconds.push(began.elapsed().as_secs_f64());
            }
        }
        Ok(Timed { load, flops, seconds, output, layout })
    }
}

fn dit<E: Engine>(engine: &E, checkpoint: &Checkpoint, tensors: &TensorFile, watch: Watch) -> anyhow::Result<Timed> {
    let part = checkpoint.dit().context("the checkpoint has no transformer")?;
    let dit = Dit::load(&Loader { engine, source: part }, part.config())?;
    let size = volume(tensors, "dit.in")?;
    let latent = engine.upload(&tensors.floats("dit.in")?, &size)?;
    let [timestep] = tensors.floats("dit.t")?[..] else { bail!("dit.t is not one number") };
    let &[1, tokens, width] = shape(tensors, "dit.text")? else { bail!("dit.text is not [1, tokens, width]") };
    let text = engine.upload(&tensors.floats("dit.text")?, &[tokens, width])?;
    let solo = RankGroup::solo()?;
    let (shape, visual) = (part.config().shape(), size[1] * (size[2] / 2) * (size[3] / 2));
    let flops = (0..shape.layers).map(|layer| {
        // Nothing reads what text would take from the last layer.
        let queries = if layer + 1 == shape.layers { visual } else { visual + tokens };
        shape.linear_flops(layer, visual, tokens) + shape.attention_flops(queries, visual + tokens, shape.heads)
    });
    watch.time(Some(flops.sum()), <[f32]>::to_vec, || {
        // Of a clip, the first two are made once for all steps.
        let geometry = dit.geometry(engine, &solo, size)?;
        let branch = dit.text_conditioning(engine, &solo, Some(&text))?;
        let velocities = dit.velocities(engine, &solo, &geometry, &latent, timestep, &[&branch])?;
        Ok(engine.download(&velocities[0])?)
    })
}

fn t5<E: Engine>(engine: &E, checkpoint: &Checkpoint, tensors: &TensorFile, watch: Watch) -> anyhow::Result<Timed> {
    let part = checkpoint.t5().context("the checkpoint has no text encoder")?;
    let encoder = T5Encoder::load(engine, part.clone(), part.config())?;
    ensure!(matches!(shape(tensors, "t5.ids")?, [1, _]), "t5.ids is not [1, tokens]");
    let ids = tensors.numbers("t5.ids")?;
    let (config, tokens) = (part.config(), ids.len() as f64);
    let inner = (config.num_heads * config.d_kv) as f64;
    let parameters = config.d_model as f64 * (4.0 * inner + 3.0 * config.d_ff as f64);
    let flops = config.num_layers as f64 * (2.0 * tokens * parameters + 4.0 * tokens * tokens * inner);
    watch.time(Some(flops), <[f32]>::to_vec, || Ok(engine.download(&encoder.encode(engine, &ids)?)?))
}

fn vae<E: Engine>(engine: &E, checkpoint: &Checkpoint, tensors: &TensorFile, watch: Watch) -> anyhow::Result<Timed> {
    let part = checkpoint.vae().context("the checkpoint has no vae decoder")?;
    let decoder = VaeDecoder::load(&Loader { engine, source: part }, part.config())?;
    let [c, t, h, w] = volume(tensors, "vae.in")?;
    let latent = engine.upload(&channels_last(&tensors.floats("vae.in")?, c), &[t, h, w, c])?;
    watch.time(
        None,
        |frames| channels_first(frames, 3),
        || {
            let (mut stream, mut frames) = (decoder.stream(), Vec::new());
            // As a clip is decoded.
            for at in 0..t {
                let chunk = VaeLatent(engine.narrow(&latent, 0, at, 1)?);
                frames.extend(engine.download(&stream.push(engine, &chunk, &mut |_, _| ())?)?);
            }
            Ok(frames)
        },
    )
}

fn shape<'a>(tensors: &'a TensorFile, name: &str) -> anyhow::Result<&'a [usize]> {
    let info = tensors.tensors().get(name);
    Ok(&info.with_context(|| format!("{} has no tensor {name}", tensors.path().display()))?.shape)
}

/// `[C, T, h, w]` of the tensor `name` `[1, C, T, h, w]`.
fn volume(tensors: &TensorFile, name: &str) -> anyhow::Result<[usize; 4]> {
    match *shape(tensors, name)? {
        [1, c, t, h, w] => Ok([c, t, h, w]),
        ref other => bail!("{name} is {other:?}, not [1, C, T, h, w]"),
    }
}

/// The relative L2 difference and the largest difference.
fn compare(got: &[f32], expected: &[f32]) -> anyhow::Result<(f64, f64)> {
    ensure!(got.len() == expected.len(), "{} values, {} are expected", got.len(), expected.len());
    let (mut square, mut whole, mut max) = (0.0, 0.0, 0.0f64);
    for (&got, &expected) in got.iter().zip(expected) {
        let (got, expected) = (f64::from(got), f64::from(expected));
        let difference = (got - expected).abs();
        ensure!(difference.is_finite(), "{got} where {expected} is expected");
        square += difference * difference;
        whole += expected * expected;
        max = max.max(difference);
    }
    ensure!(whole > 0.0, "the expected output is nothing but zeros");
    Ok(((square / whole).sqrt(), max))
}

#[cfg(test)]
mod tests {
    use farm_core::engine::cpu::CpuEngine;

    use super::*;

    /// The committed references have more rows than one, and padding: what they hold for the decoder fits as it is.
    #[test]
    fn a_decode_meets_its_reference() {
        let goldens = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/goldens/small"));
        let (engine, checkpoint) = (CpuEngine::new(1).unwrap(), Checkpoint::open(&goldens).unwrap());
        let tensors = TensorFile::open(&goldens.join("goldens.safetensors")).unwrap();
        let watch = Watch { started: Instant::now(), warm_ups: 1, runs: 2 };
        let timed = vae(&engine, &checkpoint, &tensors, watch).unwrap();
        assert_eq!(timed.seconds.len(), 2);
        let expected = tensors.floats("vae.out_genmo").unwrap();
        let (relative_l2, _) = compare(&(timed.layout)(&timed.output), &expected).unwrap();
        assert!(relative_l2 < 1e-5, "{relative_l2}");
    }

    #[test]
    fn the_difference_is_relative_to_the_expected_and_never_hides_a_nan() {
        let (relative_l2, max) = compare(&[3.0, 4.5], &[3.0, 4.0]).unwrap();
        assert_eq!((relative_l2, max), (0.1, 0.5));
        assert!(compare(&[f32::NAN], &[1.0]).is_err());
        assert!(compare(&[1.0], &[1.0, 1.0]).is_err());
        assert!(compare(&[0.0], &[0.0]).is_err());
    }
}
