//! How far frames are from those that they should be. Frames are `[F, height, width, 3]` in about -1 … 1.

use serde::Serialize;

use super::plan::{PIXELS, Span, TilePlan};

/// All of it.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Quality {
    /// dB, see [`psnr`].
    pub psnr: f64,
    pub ssim: f64,
    /// Levels of 255, see [`seam`].
    pub seam: f64,
    /// The largest difference of two values.
    pub worst: f32,
}

impl Quality {
    /// Of frames that were decoded by `plan`.
    pub fn of(frames: &[f32], reference: &[f32], plan: &TilePlan) -> Self {
        let worst = frames.iter().zip(reference).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        let size = plan.latent.map(|extent| extent * PIXELS);
        let (psnr, ssim) = (psnr(frames, reference), ssim(frames, reference, size));
        Self { psnr, ssim, seam: seam(frames, reference, plan), worst }
    }
}

/// Gaussian window of SSIM.
const WINDOW: usize = 11;
const SIGMA: f64 = 1.5;

/// Peak signal to noise in dB, of the values as they are: nothing is clamped or rounded, the peak is 2. Infinite for
/// equal frames.
pub fn psnr(frames: &[f32], reference: &[f32]) -> f64 {
    let squares = frames.iter().zip(reference).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2));
    10.0 * (4.0 * reference.len() as f64 / squares.sum::<f64>()).log10()
}

/// Structural similarity of the luma (0.299, 0.587, 0.114) of frames of `[height, width]` pixels, at least 11 each, as
/// they are shown (clamped): Gaussian window of 11×11 with deviation 1.5, K 0.01 and 0.03, mean over all windows that
/// fit into a frame and all frames.
pub fn ssim(frames: &[f32], reference: &[f32], [height, width]: [usize; 2]) -> f64 {
    let kernel: [f64; WINDOW] = std::array::from_fn(|i| {
        let x = i as f64 - (WINDOW / 2) as f64;
        (-x * x / (2.0 * SIGMA * SIGMA)).exp()
    });
    let kernel = kernel.map(|k| k / kernel.iter().sum::<f64>());
    let smooth = |plane: &[f64]| {
        let (rows, cols) = (height + 1 - WINDOW, width + 1 - WINDOW);
        let across: Vec<f64> = plane
            .chunks_exact(width)
            .flat_map(|row| row.windows(WINDOW).map(|run| run.iter().zip(&kernel).map(|(x, k)| x * k).sum::<f64>()))
            .collect();
        let sum = |at: usize| kernel.iter().enumerate().map(|(i, k)| across[at + i * cols] * k).sum::<f64>();
        (0..rows * cols).map(sum).collect::<Vec<_>>()
    };
    let luma = |frame: &[f32]| {
        let shown = |x: f32| ((f64::from(x) + 1.0) / 2.0).clamp(0.0, 1.0);
        let luma = |rgb: &[f32]| 0.299 * shown(rgb[0]) + 0.587 * shown(rgb[1]) + 0.114 * shown(rgb[2]);
        frame.chunks_exact(3).map(luma).collect::<Vec<_>>()
    };
    let (mut sum, mut count) = (0.0, 0);
    let len = height * width * 3;
    for (a, b) in frames.chunks_exact(len).zip(reference.chunks_exact(len)) {
        let (a, b) = (luma(a), luma(b));
        let product = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).collect::<Vec<_>>();
        let (mean_a, mean_b) = (smooth(&a), smooth(&b));
        let (aa, bb, ab) = (smooth(&product(&a, &a)), smooth(&product(&b, &b)), smooth(&product(&a, &b)));
        for i in 0..mean_a.len() {
            let (ma, mb) = (mean_a[i], mean_b[i]);
            let (var_a, var_b, cov) = (aa[i] - ma * ma, bb[i] - mb * mb, ab[i] - ma * mb);
            let (c1, c2) = (0.01f64.powi(2), 0.03f64.powi(2));
            sum += (2.0 * ma * mb + c1) * (2.0 * cov + c2) / ((ma * ma + mb * mb + c1) * (var_a + var_b + c2));
            count += 1;
        }
    }
    sum / f64::from(count)
}

/// The largest seam in levels of 0 … 255: the difference between the gradient across a cut and the same gradient of the
/// reference, at the worst value of any frame. Cuts are where tiles begin, end and change hands.
pub fn seam(frames: &[f32], reference: &[f32], plan: &TilePlan) -> f64 {
    let [height, width] = plan.latent.map(|extent| extent * PIXELS);
    let cuts = |spans: Vec<Span>, extent: usize| {
        let ends = spans.iter().flat_map(|span| [span.start, span.own_start, span.end, span.own_end]);
        let mut cuts: Vec<usize> = ends.map(|end| end * PIXELS).filter(|&cut| cut > 0 && cut < extent).collect();
        cuts.sort_unstable();
        cuts.dedup();
        cuts
    };
    let rows = cuts(plan.row_spans(), height);
    let cols = cuts(plan.col_spans(), width);
    let mut worst = 0f32;
    for (a, b) in frames.chunks_exact(height * width * 3).zip(reference.chunks_exact(height * width * 3)) {
        let mut across = |at: usize, step: usize| {
            worst = worst.max(((a[at] - a[at - step]) - (b[at] - b[at - step])).abs());
        };
        for row in &rows {
            (0..width * 3).for_each(|i| across(row * width * 3 + i, width * 3));
        }
        for col in &cols {
            (0..height * 3).for_each(|i| across((i / 3 * width + col) * 3 + i % 3, 3));
        }
    }
    f64::from(worst) * 127.5
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tiles::plan::Tiling;

    /// One frame of 16×24 pixels.
    fn frame(value: impl Fn(usize, usize) -> f32) -> Vec<f32> {
        (0..16 * 24 * 3).map(|i| value(i / 72, i / 3 % 24)).collect()
    }

    #[test]
    fn figures_are_those_of_their_definitions() {
        let plan = "shared:2x2+1".parse::<Tiling>().unwrap().plan([2, 3], 1).unwrap();
        let picture = frame(|y, x| ((y * 5 + x * 3) % 17) as f32 / 17.0 - 0.5);
        let same = Quality::of(&picture, &picture, &plan);
        assert_eq!((same.psnr, same.seam, same.worst), (f64::INFINITY, 0.0, 0.0));
        assert!((same.ssim - 1.0).abs() < 1e-12);

        // A hundredth of the range everywhere: 40 dB, and no gradient differs.
        let shifted: Vec<f32> = picture.iter().map(|x| x + 0.02).collect();
        let quality = Quality::of(&shifted, &picture, &plan);
        assert!((quality.psnr - 40.0).abs() < 1e-3 && quality.seam < 1e-3, "{quality:?}");
        assert!((quality.worst - 0.02).abs() < 1e-6 && quality.ssim < 1.0);

        // A step of 0.2 where the second tile begins, at column 8, is one of 25.5 levels; elsewhere it is no seam.
        let step = |at: usize| frame(|y, x| picture[(y * 24 + x) * 3] + if x >= at { 0.2 } else { 0.0 });
        assert!((seam(&step(8), &picture, &plan) - 25.5).abs() < 1e-3);
        assert!(seam(&step(9), &picture, &plan) < 1e-3);
    }

    #[test]
    fn ssim_of_two_flat_frames_is_that_of_their_luminance() {
        let (a, b) = (frame(|_, _| 0.0), frame(|_, _| 0.5));
        let (ma, mb) = (0.5, 0.75);
        let expected = (2.0 * ma * mb + 1e-4) / (ma * ma + mb * mb + 1e-4);
        assert!((ssim(&a, &b, [16, 24]) - expected).abs() < 1e-9);
    }
}
