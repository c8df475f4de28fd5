//! Requests like those of the published file: how many a tenant has falls with its rank; they come in sessions of some in a
//! row, those of large tenants at a quicker pace; sessions begin by day and hour as they do there; run times are log-normal
//! around the model's and the batch's means. All numbers are fitted to the file. `bench trace` prints how near the result
//! comes.

use rand::distr::weighted::WeightedIndex;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rand_distr::{Distribution, LogNormal, Normal, Zipf};

use super::Row;

const TENANTS: u32 = 4247;
/// Requests of the tenant of rank r, from 1: SIZE · (r + 1)^−FALL, at least one.
const SIZE: f64 = 1800.0;
const FALL: f64 = 0.85;
/// Of the logarithm of a session's requests: mean and deviation.
const LENGTH: (f64, f64) = (2.4, 1.3);
/// Likewise of the seconds between two of them, and what of it a tenant's requests take away with their logarithm.
const GAP: (f64, f64) = (4.8, 1.0);
const PACE: f64 = 0.3;
/// Requests by hour after the first midnight, UTC+8, and by day.
const HOURS: [f64; 24] = [
    3830.0, 1094.0, 1169.0, 1211.0, 668.0, 360.0, 337.0, 253.0, 123.0, 45.0, 36.0, 2.0, 0.0, 3.0, 3.0, 40.0, 640.0,
    2343.0, 2776.0, 625.0, 1093.0, 3324.0, 3319.0, 3529.0,
];
const DAYS: [f64; 24] = [
    89.0, 93.0, 86.0, 63.0, 563.0, 1118.0, 1597.0, 1475.0, 426.0, 1163.0, 1483.0, 1778.0, 1355.0, 1931.0, 788.0, 271.0,
    1353.0, 2138.0, 2723.0, 2257.0, 2512.0, 903.0, 399.0, 259.0,
];
const MODELS: u32 = 87;
const MODEL_ZIPF: f64 = 1.2;
/// Mean logarithm of the run times of the most used models; others are [`OTHER_MODEL`].
const MODEL_MEANS: [f64; 12] = [2.89, 3.62, 3.03, 3.01, 4.16, 3.12, 3.01, 3.66, 3.06, 3.05, 3.11, 3.17];
const OTHER_MODEL: f64 = 3.15;
/// A request of a session is for another model than the one before.
const OTHER: f64 = 0.28;
/// Images of a request, how many have so many, and what that adds to the logarithm of the run time.
const IMAGES: [(u32, f64, f64); 4] = [(1, 0.58, -0.10), (2, 0.08, 0.05), (4, 0.19, 0.20), (8, 0.15, 0.22)];
const STEPS: [(u32, f64); 4] = [(30, 0.91), (40, 0.05), (28, 0.02), (50, 0.02)];
/// What is left of a run time's logarithm.
const NOISE: f64 = 0.37;

pub fn rows(seed: u64) -> Vec<Row> {
    let random = &mut StdRng::seed_from_u64(seed);
    let (days, hours) = (weighted(DAYS), weighted(HOURS));
    let length = LogNormal::new(LENGTH.0, LENGTH.1).expect(LEGAL);
    let noise = Normal::new(0.0, NOISE).expect(LEGAL);
    let model_of = Zipf::new(f64::from(MODELS), MODEL_ZIPF).expect(LEGAL);
    let images_of = weighted(IMAGES.map(|(_, weight, _)| weight));
    let steps_of = weighted(STEPS.map(|(_, weight)| weight));
    let mut rows = Vec::new();
    for tenant in 0..TENANTS {
        let all = ((SIZE * f64::from(tenant + 2).powf(-FALL)) as u32).max(1);
        let gap = LogNormal::new(GAP.0 - PACE * f64::from(all).ln(), GAP.1).expect(LEGAL);
        let mut left = all;
        while left > 0 {
            let hour = 24 * days.sample(random) + hours.sample(random);
            let mut at = 3600.0 * (hour as f64 + random.random::<f64>());
            let mut model = model_of.sample(random) as u32 - 1;
            let (images, _, of_images) = IMAGES[images_of.sample(random)];
            let (steps, _) = STEPS[steps_of.sample(random)];
            let requests = (length.sample(random).round() as u32).clamp(1, left);
            left -= requests;
            for _ in 0..requests {
                let of_model = MODEL_MEANS.get(model as usize).copied().unwrap_or(OTHER_MODEL);
                let seconds = (of_model + of_images + noise.sample(random)).exp().round().clamp(1.0, 600.0);
                rows.push(Row { at, seconds, tenant, model, images, steps, text: [100, 60] });
                at += gap.sample(random).min(1800.0);
                if random.random_bool(OTHER) {
                    model = model_of.sample(random) as u32 - 1;
                }
            }
        }
    }
    rows.sort_by(|a, b| a.at.total_cmp(&b.at));
    let first = rows.first().map_or(0.0, |row| row.at);
    rows.iter_mut().for_each(|row| row.at -= first);
    rows
}

const LEGAL: &str = "the constants are legal";

fn weighted<const N: usize>(weights: [f64; N]) -> WeightedIndex<f64> {
    WeightedIndex::new(weights).expect(LEGAL)
}

#[cfg(test)]
mod tests {
    use super::super::super::report::{quantile, sorted};
    use super::*;

    #[test]
    fn requests_are_like_those_of_the_published_file() {
        let rows = rows(1);
        let near = |value: f64, known: f64, part: f64| (value / known - 1.0).abs() <= part;
        assert!(near(rows.len() as f64, 26_823.0, 0.15), "{} requests", rows.len());
        let seconds = sorted(rows.iter().map(|row| row.seconds));
        for (part, known) in [(0.1, 13.0), (0.5, 23.0), (0.9, 53.0), (0.99, 106.0)] {
            assert!(near(quantile(&seconds, part), known, 0.2), "{part}: {}", quantile(&seconds, part));
        }
        assert_eq!(rows, super::rows(1), "a seed gives one trace");
    }
}
