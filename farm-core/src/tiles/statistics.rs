//! Statistics of a group norm over frames that several tiles share.

use serde::{Deserialize, Serialize};

/// Sums of one tile over the part of its frames that it owns, for one norm of one chunk.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sums {
    /// Values in each frame's part of a group: own pixels times channels of a group.
    pub count: u64,
    /// Mean and sum of squared deviations from it, `[frames · groups]`.
    pub moments: Vec<[f64; 2]>,
}

/// What all tiles together make of it: mean and biased variance, `[frames · groups]`. Rounded to f32, so that whoever
/// uses them later, from a log, uses the same.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Totals(pub Vec<[f32; 2]>);

/// Merges the tiles' sums, in the order given, in f64.
pub fn merge<'a>(parts: impl IntoIterator<Item = &'a Sums>) -> Result<Totals, String> {
    let mut parts = parts.into_iter();
    let first = parts.next().ok_or("no tile has given sums")?;
    let mut count = first.count as f64;
    let mut merged = first.moments.clone();
    for part in parts {
        if part.moments.len() != merged.len() {
            return Err(format!("sums of {} and of {} groups do not add up", merged.len(), part.moments.len()));
        }
        let (added, total) = (part.count as f64, count + part.count as f64);
        for ([mean, m2], [other, other_m2]) in merged.iter_mut().zip(&part.moments) {
            let delta = other - *mean;
            *mean += delta * (added / total);
            *m2 += other_m2 + delta * delta * (count * added / total);
        }
        count = total;
    }
    let totals = merged.into_iter().map(|[mean, m2]| [mean as f32, (m2 / count) as f32]);
    Ok(Totals(totals.collect()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sums(values: &[f64]) -> Sums {
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let m2 = values.iter().map(|v| (v - mean).powi(2)).sum();
        Sums { count: values.len() as u64, moments: vec![[mean, m2]] }
    }

    #[test]
    fn parts_that_do_not_fit_together_are_refused() {
        let two = Sums { count: 1, moments: vec![[0.0; 2]; 2] };
        assert!(merge([&sums(&[1.0]), &two]).unwrap_err().contains("1 and of 2 groups"));
        assert!(merge([]).is_err());
    }

    proptest! {
        #[test]
        fn merged_parts_have_the_statistics_of_the_whole(
            parts in prop::collection::vec(prop::collection::vec(-10.0..10.0f64, 1..9), 1..7), offset in -1e3..1e3f64
        ) {
            let parts: Vec<Vec<f64>> =
                parts.into_iter().map(|part| part.into_iter().map(|v| v + offset).collect()).collect();
            let given: Vec<Sums> = parts.iter().map(|part| sums(part)).collect();
            let [[mean, variance]] = merge(&given).unwrap().0[..] else { panic!("one group") };
            let all = sums(&parts.concat());
            let [expected_mean, m2] = all.moments[0];
            let expected = m2 / all.count as f64;
            prop_assert!((f64::from(mean) - expected_mean).abs() <= 1e-6 * expected_mean.abs().max(1.0));
            prop_assert!((f64::from(variance) - expected).abs() <= 1e-6 * expected.max(1e-3));
        }
    }
}
