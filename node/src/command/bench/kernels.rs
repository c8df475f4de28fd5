//! `farm-node bench kernels`: rates of the operations that networks spend their time in, each alone, against what the cores
//! of the device can do at most. A change to a kernel is tried here first.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use comfy_table::{CellAlignment, Table, presets};
use farm_core::engine::{Engine, Over, RawDtype, RawTensor, SequenceOps};
use serde::Serialize;

use super::peak;
use crate::devices::{Devices, ThreadArgs};
use crate::engine::DeviceEngine;

/// An operation is repeated for so long, at least so often, and its best time counts: what else runs on the cores only
/// takes away.
const LEAST: Duration = Duration::from_millis(500);
const TRIES: usize = 3;
/// A small product goes through so many weights in turn, so that they come from memory, as in a network.
const WEIGHTS: usize = 12;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    threads: ThreadArgs,
    /// Print the figures as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Figures {
    threads: usize,
    /// f32 multiply-adds of one core at most, FLOP/s.
    core_flops: f64,
    kernels: Vec<Kernel>,
}

#[derive(Serialize)]
struct Kernel {
    name: &'static str,
    sizes: String,
    seconds: f64,
    /// FLOP/s; an addition and a multiplication are two.
    flops: f64,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let compute = args.threads.compute(Devices::CPU)?;
    let engine = compute.engine(0)?;
    compute.settle(0)?;
    let mut kernels = Vec::new();
    for (rows, width, out) in [(6360, 768, 2304), (6360, 768, 4096), (6360, 2048, 768)] {
        kernels.push(linear(&engine, [rows, width, out], Over::Tokens)?);
    }
    for (rows, width, out) in [(40, 1024, 1024), (40, 1024, 2816), (40, 2816, 1024)] {
        kernels.push(linear(&engine, [rows, width, out], Over::Few)?);
    }
    kernels.push(attention(&engine, [3180, 3220], [6, 128])?);
    for (channels, frames, height, width) in [(96, 2, 24, 32), (64, 4, 96, 128), (32, 6, 192, 256)] {
        kernels.push(convolution(&engine, channels, [frames, height, width])?);
    }
    let figures = Figures { threads: compute.threads(), core_flops: peak::multiply_adds().1, kernels };
    if args.json {
        println!("{}", serde_json::to_string(&figures)?);
    } else {
        println!("{}", figures.table());
    }
    Ok(ExitCode::SUCCESS)
}

impl Figures {
    fn table(&self) -> Table {
        let mut table = Table::new();
        table.load_style(presets::NOTHING).set_header(["kernel", "sizes", "ms", "GFLOP/s", "of f32"]);
        let most = self.core_flops * self.threads as f64;
        for kernel in &self.kernels {
            table.add_row([
                kernel.name.to_owned(),
                kernel.sizes.clone(),
                format!("{:.2}", 1e3 * kernel.seconds),
                format!("{:.0}", kernel.flops / 1e9),
                format!("{:.0} %", 100.0 * kernel.flops / most),
            ]);
        }
        for column in table.column_iter_mut().skip(2) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        table
    }
}

fn linear(engine: &DeviceEngine, [rows, width, out]: [usize; 3], over: Over) -> anyhow::Result<Kernel> {
    let count = if over == Over::Few { WEIGHTS } else { 1 };
    let weight = tensor(engine, &[out, width])?;
    let weights = (0..count).map(|_| engine.matrix(&weight, over)).collect::<Result<Vec<_>, _>>()?;
    let x = tensor(engine, &[rows, width])?;
    let seconds = best(|| weights.iter().try_for_each(|weight| engine.linear(&x, weight, None).map(drop)))?;
    let flops = (2 * rows * width * out) as f64;
    Ok(Kernel::new("linear", format!("{rows}×{width}×{out}"), seconds / count as f64, flops))
}

fn attention(engine: &DeviceEngine, [queries, keys]: [usize; 2], [heads, d]: [usize; 2]) -> anyhow::Result<Kernel> {
    let (q, kv) = (tensor(engine, &[queries, heads, d])?, tensor(engine, &[keys, heads, d])?);
    let seconds = best(|| engine.attention(&q, &[&kv], &[&kv]).map(drop))?;
    let flops = (4 * queries * keys * heads * d) as f64;
    Ok(Kernel::new("attention", format!("{queries}×{keys}, {heads} heads of {d}"), seconds, flops))
}

fn convolution(engine: &DeviceEngine, channels: usize, [frames, height, width]: [usize; 3]) -> anyhow::Result<Kernel> {
    const TAPS: usize = 27;
    let bytes = |len: usize| values(len).into_iter().flat_map(f32::to_le_bytes).collect::<Vec<_>>();
    let (weight, bias) = (bytes(channels * channels * TAPS), bytes(channels));
    let raw = |shape, bytes| RawTensor { dtype: RawDtype::F32, shape, bytes };
    let weight = engine.conv_weight(raw(&[channels, channels, 3, 3, 3], &weight), raw(&[channels], &bias))?;
    let x = tensor(engine, &[frames, height, width, channels])?;
    let seconds = best(|| engine.causal_conv3d(&x, &weight, None).map(drop))?;
    let flops = (2 * frames * height * width * channels * channels * TAPS) as f64;
    Ok(Kernel::new("convolution", format!("{frames}×{height}×{width}, {channels} channels"), seconds, flops))
}

impl Kernel {
    fn new(name: &'static str, sizes: String, seconds: f64, flops: f64) -> Self {
        Self { name, sizes, seconds, flops: flops / seconds }
    }
}

fn tensor(engine: &DeviceEngine, shape: &[usize]) -> farm_core::engine::Result<<DeviceEngine as SequenceOps>::Tensor> {
    engine.upload(&values(shape.iter().product()), shape)
}

/// Any values that are not all alike.
fn values(len: usize) -> Vec<f32> {
    (0..len).map(|i| (i % 61) as f32 / 61.0 - 0.5).collect()
}

/// Of a few runs, after one that is not counted.
fn best(work: impl Fn() -> farm_core::engine::Result<()>) -> farm_core::engine::Result<f64> {
    work()?;
    let (began, mut best, mut runs) = (Instant::now(), f64::INFINITY, 0);
    while runs < TRIES || began.elapsed() < LEAST {
        let started = Instant::now();
        work()?;
        best = best.min(started.elapsed().as_secs_f64());
        runs += 1;
    }
    Ok(best)
}
