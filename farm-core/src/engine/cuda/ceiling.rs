//! What a device can do at most: matrix products by the vendor's library and by this program's kernel, and copies.

use std::sync::Arc;
use std::time::Duration;

use super::device::{Buffer, Dtype};
use super::gpu::Gpu;
use super::ops::product::{matmul, own_product};
use super::ops::{pointwise, weights::Matrix};
use super::profile::Timed;
use crate::engine::{Draw, EngineError, Result};
use crate::precision::Precision;

/// Rows, columns and depth of a product: doubled from the least until one takes so long, or to the most.
const SIZES: [usize; 2] = [128, 8192];
const LONG: Duration = Duration::from_millis(1);
/// Bytes of a copy, likewise.
const COPIES: [usize; 2] = [1 << 20, 1 << 30];
const LONG_COPY: Duration = Duration::from_micros(500);
/// The best of so many counts.
const RUNS: usize = 5;

/// The best rate of a kind of product.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ProductRate {
    pub dtype: Dtype,
    /// In the vendor's library.
    pub vendor: bool,
    /// Rows, columns and depth.
    pub size: usize,
    /// FLOP/s
    pub flops: f64,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Ceiling {
    /// Of a library only if the device has it.
    pub products: Vec<ProductRate>,
    /// Bytes/s that a copy on the device reads and writes.
    pub copy: f64,
}

impl Ceiling {
    /// FLOP/s of the better product of this type; none if neither was measured.
    pub fn flops(&self, dtype: Dtype) -> Option<f64> {
        self.products.iter().filter(|rate| rate.dtype == dtype).map(|rate| rate.flops).reduce(f64::max)
    }
}

/// Takes about a second. The largest that the free memory has room for.
pub fn ceiling<D: Timed>(device: &Arc<D>) -> Result<Ceiling> {
    let mut products = Vec::new();
    for dtype in [Dtype::Bf16, Dtype::F32] {
        for vendor in [true, false] {
            products.extend(product(device, dtype, vendor)?);
        }
    }
    Ok(Ceiling { products, copy: copy(device)? })
}

fn product<D: Timed>(device: &Arc<D>, dtype: Dtype, vendor: bool) -> Result<Option<ProductRate>> {
    const OP: &str = "ceiling";
    let gpu = Gpu::new(device.clone(), Precision::Bf16);
    let mut best = None;
    largest(SIZES, LONG, |size| {
        // Values as of a network: what is computed with zeros takes less power, and so runs faster.
        let draw = |key| pointwise::draw(&gpu, Draw { key, first: 0, mean: 0.0, spread: 1.0 }, &[size, size]);
        let (x, weight) = (gpu.cast(&draw(1)?, dtype)?, Matrix::of(gpu.cast(&draw(2)?, dtype)?));
        let out = gpu.empty(OP, &[size, size], dtype)?;
        let by_vendor = matmul(OP, &x, &weight, None, &out)?;
        let time = fastest(&**device, || match vendor {
            true => device.matmul(&by_vendor),
            false => own_product(OP, &gpu, &x, &weight, None, &out).map(|()| true),
        })?;
        if let Some(time) = time {
            best = Some(ProductRate { dtype, vendor, size, flops: rate(by_vendor.work().flops, time) });
        }
        Ok(time)
    })?;
    Ok(best)
}

fn copy<D: Timed>(device: &Arc<D>) -> Result<f64> {
    let mut best = 0.0;
    largest(COPIES, LONG_COPY, |bytes| {
        let (from, to) = (Buffer::new(device, bytes)?, Buffer::new(device, bytes)?);
        let time = fastest(&**device, || device.copy(to.address(), from.address(), bytes).map(|()| true))?;
        best = time.map_or(best, |time| rate(2 * bytes as u64, time));
        Ok(time)
    })?;
    Ok(best)
}

/// Calls `run` with sizes until one takes `long`, the largest was run, the next does not fit, or there is nothing to run.
fn largest(
    [least, most]: [usize; 2],
    long: Duration,
    mut run: impl FnMut(usize) -> Result<Option<Duration>>,
) -> Result<()> {
    let mut size = least;
    loop {
        match run(size) {
            Ok(Some(time)) if time < long && size < most => size *= 2,
            Err(EngineError::OutOfMemory { .. }) if size > least => return Ok(()),
            ended => return ended.map(drop),
        }
    }
}

/// Of a few runs, after one that is not counted. None if the device does not have it.
fn fastest<D: Timed>(device: &D, run: impl Fn() -> Result<bool>) -> Result<Option<Duration>> {
    if !run()? {
        return Ok(None);
    }
    let mut best = Duration::MAX;
    for _ in 0..RUNS {
        let start = device.tick()?;
        run()?;
        let end = device.tick()?;
        best = best.min(device.between(&start, &end)?);
    }
    Ok(Some(best))
}

fn rate(work: u64, time: Duration) -> f64 {
    // A clock may be too coarse for the least sizes.
    work as f64 / time.as_secs_f64().max(1e-9)
}
