//! Operations on volumes.

use std::ops::Range;

use crate::engine::cuda::device::{Arg, Buffer, Device, Dtype, Work};
use crate::engine::cuda::gpu::{Gpu, dims, int, moving, shape_error};
use crate::engine::cuda::kernels::{self, Typed};
use crate::engine::cuda::tensor::Tensor;
use crate::engine::{EngineError, Result};
use crate::tiles::statistics::{Sums, Totals};

/// As in `kernels/volume.cu`.
const THREADS: usize = 256;
const TILE: usize = 4096;
const TILE_PIXELS: usize = 64;
/// Values, about, of a block that sums or norms: some for each thread, and blocks enough for the smallest frames.
const PART: usize = 1 << 15;

/// From f32 to the type of activations: the sum in f32 as on every engine, then rounded if that is bf16.
pub fn denormalize_latent<D: Device>(gpu: &Gpu<D>, latent: &Tensor<D>, mean: &[f32], std: &[f32]) -> Result<Tensor<D>> {
    const OP: &str = "denormalize_latent";
    let [channels, frames, height, width] = dims(OP, "[C, T, h, w]", latent)?;
    if channels != mean.len() || channels != std.len() {
        return Err(shape_error(OP, format!("[{}, T, h, w] with {} deviations", mean.len(), std.len()), latent.dims()));
    }
    let latent = gpu.cast(latent, Dtype::F32)?;
    let scales = gpu.upload(OP, &[mean, std].concat(), &[2, channels])?;
    let out = gpu.empty(OP, &[frames, height, width, channels], gpu.dtype())?;
    let pixels = Arg::Long((frames * height * width) as i64);
    let args = [latent.pointer(), scales.pointer(), out.pointer(), pixels, int(OP, channels)?];
    let work = moving(&[&latent, &scales, &out]);
    gpu.over_values(kernels::denormalize_latent.of(out.dtype()), out.len(), &args, work)?;
    Ok(out)
}

/// In an order that depends on the rectangle's size, the number of channels and the type.
pub fn group_sums<D: Device>(
    gpu: &Gpu<D>,
    x: &Tensor<D>,
    groups: usize,
    rows: Range<usize>,
    cols: Range<usize>,
) -> Result<Sums> {
    const OP: &str = "group_sums";
    let [frames, height, width, channels] = checked(OP, x, groups)?;
    if rows.is_empty() || cols.is_empty() || rows.end > height || cols.end > width {
        return Err(shape_error(OP, format!("rows {rows:?} and columns {cols:?} of a frame"), x.dims()));
    }
    let count = rows.len() * cols.len() * (channels / groups);
    let moments = moments(OP, gpu, x, groups, rows, cols)?;
    let mut bytes = vec![0; 16 * frames * groups];
    gpu.device.copy_out(moments.address(), &mut bytes)?;
    let values = bytes.as_chunks().0.iter().map(|bytes| f64::from_ne_bytes(*bytes));
    Ok(Sums { count: count as u64, moments: values.collect::<Vec<_>>().as_chunks().0.to_vec() })
}

/// Mean and sum of squared deviations of each frame and group, `[frames · groups, 2]` in f64, on the device.
fn moments<D: Device>(
    op: &'static str,
    gpu: &Gpu<D>,
    x: &Tensor<D>,
    groups: usize,
    rows: Range<usize>,
    cols: Range<usize>,
) -> Result<Buffer<D>> {
    let [frames, height, width, channels] = checked(op, x, groups)?;
    let (pixels, first) = (rows.len() * cols.len(), rows.start * width + cols.start);
    let parts = Parts::new(op, [frames, pixels, channels], x.dtype())?;
    let sums = Buffer::new(&gpu.device, 16 * frames * parts.blocks * channels)?;
    let args = [
        // Not a part of the tensor: the rectangle goes on from frame to frame.
        Arg::Pointer(x.address() + (first * channels * x.dtype().bytes()) as u64),
        Arg::Pointer(sums.address()),
        Arg::Long((height * width * channels) as i64),
        int(op, width)?,
        int(op, channels)?,
        int(op, cols.len())?,
        int(op, pixels)?,
        int(op, parts.run)?,
    ];
    int(op, height * width)?;
    let work = Work::moving(frames * pixels * channels * x.dtype().bytes() + sums.bytes());
    gpu.launch(kernels::group_sums.of(x.dtype()), parts.grid, THREADS as u32, 0, &args, work)?;
    let moments = Buffer::new(&gpu.device, 16 * frames * groups)?;
    let args = [
        Arg::Pointer(sums.address()),
        Arg::Pointer(moments.address()),
        Arg::Long((pixels * (channels / groups)) as i64),
        int(op, parts.blocks)?,
        int(op, channels)?,
        int(op, groups)?,
    ];
    let work = Work::moving(sums.bytes() + moments.bytes());
    gpu.launch(kernels::group_moments, [blocks(op, frames * groups)?, 1, 1], THREADS as u32, 0, &args, work)?;
    Ok(moments)
}

/// Without totals, those of x stay on the device. The scale `weight / sqrt(variance + 1e-5)` is computed in f64 and
/// rounded to f32, what is made of each value in f32, as on the CPU, and the result is rounded to the type of x.
pub fn group_norm_silu<D: Device>(
    gpu: &Gpu<D>,
    x: &Tensor<D>,
    weight: &Tensor<D>,
    bias: &Tensor<D>,
    groups: usize,
    totals: Option<&Totals>,
) -> Result<Tensor<D>> {
    const OP: &str = "group_norm_silu";
    let [frames, height, width, channels] = checked(OP, x, groups)?;
    for affine in [weight, bias] {
        if affine.dims() != [channels] {
            return Err(shape_error(OP, format!("[{channels}]"), affine.dims()));
        }
    }
    let (weight, bias) = (gpu.cast(weight, Dtype::F32)?, gpu.cast(bias, Dtype::F32)?);
    let totals = match totals {
        Some(Totals(totals)) if totals.len() != frames * groups => {
            return Err(shape_error(OP, format!("totals of {frames} frames of {groups} groups"), &[totals.len()]));
        }
        Some(Totals(totals)) => gpu.upload(OP, totals.as_flattened(), &[frames, groups, 2])?,
        None => {
            let moments = moments(OP, gpu, x, groups, 0..height, 0..width)?;
            let out = gpu.empty(OP, &[frames, groups, 2], Dtype::F32)?;
            let values = Arg::Long((height * width * (channels / groups)) as i64);
            let count = frames * groups;
            let args = [Arg::Pointer(moments.address()), out.pointer(), values, Arg::Long(count as i64)];
            let work = Work::moving(moments.bytes() + out.len() * out.dtype().bytes());
            gpu.over_values(kernels::group_totals, count, &args, work)?;
            out
        }
    };
    let scales = gpu.empty(OP, &[frames, channels, 2], Dtype::F32)?;
    let count = Arg::Long((frames * channels) as i64);
    let args = [totals.pointer(), weight.pointer(), scales.pointer(), count, int(OP, channels)?, int(OP, groups)?];
    let work = moving(&[&totals, &weight, &scales]);
    gpu.over_values(kernels::group_scales, frames * channels, &args, work)?;

    let out = gpu.empty(OP, x.dims(), x.dtype())?;
    let parts = Parts::new(OP, [frames, height * width, channels], x.dtype())?;
    let args = [
        x.pointer(),
        scales.pointer(),
        bias.pointer(),
        out.pointer(),
        int(OP, height * width)?,
        int(OP, channels)?,
        int(OP, parts.run)?,
    ];
    let work = moving(&[x, &scales, &bias, &out]);
    gpu.launch(kernels::group_norm_silu.of(x.dtype()), parts.grid, THREADS as u32, 0, &args, work)?;
    Ok(out)
}

/// The shape of a volume that is not empty and whose channels are so many groups.
fn checked<D: Device>(op: &'static str, x: &Tensor<D>, groups: usize) -> Result<[usize; 4]> {
    let shape @ [_, _, _, channels] = dims(op, "[T, H, W, C]", x)?;
    if groups == 0 || !channels.is_multiple_of(groups) || x.is_empty() {
        return Err(shape_error(op, format!("channels that {groups} groups divide, none empty"), x.dims()));
    }
    Ok(shape)
}

/// How blocks share out frames, as `Part` in `kernels/volume.cu`.
struct Parts {
    /// Pixels of a block.
    run: usize,
    /// Blocks of a frame.
    blocks: usize,
    grid: [u32; 3],
}

impl Parts {
    fn new(op: &'static str, [frames, pixels, channels]: [usize; 3], dtype: Dtype) -> Result<Self> {
        let run = (PART / channels).clamp(1, pixels);
        let (of_frame, vectors) = (pixels.div_ceil(run), channels.div_ceil(16 / dtype.bytes()));
        let grid = [blocks(op, frames * of_frame)?, blocks(op, vectors.div_ceil(THREADS))?, 1];
        Ok(Self { run, blocks: of_frame, grid })
    }
}

fn blocks(op: &'static str, count: usize) -> Result<u32> {
    let message = || format!("{count} blocks are more than a kernel has");
    u32::try_from(count).map_err(|_| EngineError::Backend { op, message: message() })
}

pub fn depth_to_space_time<D: Device>(
    gpu: &Gpu<D>,
    x: &Tensor<D>,
    st: usize,
    s: usize,
    drop: usize,
) -> Result<Tensor<D>> {
    const OP: &str = "depth_to_space_time";
    let [frames, height, width, packed] = dims(OP, "[T, H, W, C]", x)?;
    let factor = st * s * s;
    if !(1..=TILE).contains(&factor) || !packed.is_multiple_of(factor) || drop >= st * frames || x.is_empty() {
        return Err(shape_error(
            OP,
            format!("channels that {st}·{s}·{s} divides and more than {drop} frames"),
            x.dims(),
        ));
    }
    let (channels, count) = (packed / factor, frames * height * width);
    // As many channels as a tile takes, in even shares; and if it takes them all, of several pixels.
    let shares = packed.div_ceil(TILE / factor * factor);
    let of = channels.div_ceil(shares);
    let pixels = if shares == 1 { (TILE / packed).min(TILE_PIXELS) } else { 1 };
    let out = gpu.empty(OP, &[st * frames - drop, s * height, s * width, channels], x.dtype())?;
    let args = [
        x.pointer(),
        out.pointer(),
        int(OP, count)?,
        int(OP, height)?,
        int(OP, width)?,
        int(OP, channels)?,
        int(OP, st)?,
        int(OP, s)?,
        int(OP, drop)?,
        int(OP, of)?,
        int(OP, pixels)?,
    ];
    let grid = [blocks(OP, count.div_ceil(pixels))?, blocks(OP, channels.div_ceil(of))?, 1];
    // What is dropped is not read.
    let work = moving(&[&out, &out]);
    gpu.launch(kernels::depth_to_space_time.of(x.dtype()), grid, THREADS as u32, 0, &args, work)?;
    Ok(out)
}

pub fn to_rgb8<D: Device>(gpu: &Gpu<D>, x: &Tensor<D>) -> Result<Vec<u8>> {
    to_integers("to_rgb8", gpu, x, kernels::to_rgb8, 1)
}

pub fn to_rgb16<D: Device>(gpu: &Gpu<D>, x: &Tensor<D>) -> Result<Vec<u16>> {
    let bytes = to_integers("to_rgb16", gpu, x, kernels::to_rgb16, 2)?;
    Ok(bytes.as_chunks().0.iter().map(|bytes| u16::from_ne_bytes(*bytes)).collect())
}

/// The bytes of what a kernel makes of frames, `size` for each value.
fn to_integers<D: Device>(
    op: &'static str,
    gpu: &Gpu<D>,
    x: &Tensor<D>,
    kernel: Typed,
    size: usize,
) -> Result<Vec<u8>> {
    if x.dims().len() != 4 || x.dims()[3] != 3 {
        return Err(shape_error(op, "[T, H, W, 3]", x.dims()));
    }
    let mut bytes = vec![0; size * x.len()];
    if !bytes.is_empty() {
        let out = Buffer::new(&gpu.device, bytes.len())?;
        let args = [x.pointer(), Arg::Pointer(out.address()), Arg::Long(x.len() as i64)];
        let work = Work::moving(x.len() * x.dtype().bytes() + out.bytes());
        gpu.over_values(kernel.of(x.dtype()), x.len(), &args, work)?;
        gpu.device.copy_out(out.address(), &mut bytes)?;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests;
