//! The σ schedule: linear for the first part of the steps, quadratic for the rest.

use crate::model::ModelError;

/// Steps + 1 falling values from 1 (noise) to 0 (data).
#[derive(Clone, Debug, PartialEq)]
pub struct SigmaSchedule(Vec<f64>);

impl SigmaSchedule {
    /// `linear_steps` (half of `steps` if left out) equal steps cover `threshold_noise` of the way; a parabola that
    /// continues their slope covers the rest. One step is `[1, 0]`. Errors if the values would not fall strictly.
    pub fn linear_quadratic(
        steps: usize,
        threshold_noise: f64,
        linear_steps: Option<usize>,
    ) -> Result<Self, ModelError> {
        let bad = |what: String| Err(ModelError::Input(format!("sigma schedule: {what}")));
        if steps == 0 {
            return bad("needs at least 1 step".into());
        }
        if steps == 1 {
            return Ok(Self(vec![1.0, 0.0]));
        }
        let linear_steps = linear_steps.unwrap_or(steps / 2);
        if linear_steps == 0 || linear_steps >= steps {
            return bad(format!("linear_steps {linear_steps} is not in 1..{steps}"));
        }
        let (s, k, quadratic) = (steps as f64, linear_steps as f64, (steps - linear_steps) as f64);
        let excess = k - threshold_noise * s;
        let a = excess / (k * quadratic * quadratic);
        let b = threshold_noise / k - 2.0 * excess / (quadratic * quadratic);
        let c = a * (k * k);
        let progress = |i: usize| {
            let i = i as f64;
            if i < k { i * threshold_noise / k } else { a * (i * i) + b * i + c }
        };
        let mut sigmas: Vec<f64> = (0..steps).map(|i| 1.0 - progress(i)).collect();
        sigmas.push(0.0);
        // Written so that NaN counts as not falling.
        if !sigmas.windows(2).all(|pair| pair[0] > pair[1]) {
            return bad(format!(
                "threshold_noise {threshold_noise} with {linear_steps} linear of {steps} steps does not fall"
            ));
        }
        Ok(Self(sigmas))
    }

    pub fn steps(&self) -> usize {
        self.0.len() - 1
    }

    pub fn sigmas(&self) -> &[f64] {
        &self.0
    }

    /// Model input of step `step` (from 0): 1000·(1 − σ), rising from 0. σ is rounded to f32 first, as in the reference.
    pub fn timestep(&self, step: usize) -> f32 {
        (1.0 - self.0[step] as f32) * 1000.0
    }

    /// Step length σ_i − σ_{i+1}, formed in f64 and rounded once.
    pub fn dsigma(&self, step: usize) -> f32 {
        (self.0[step] - self.0[step + 1]) as f32
    }
}

#[cfg(test)]
mod tests {
    use super::SigmaSchedule;

    #[track_caller]
    fn check(steps: usize, threshold: f64, linear: Option<usize>, expected: &[(usize, f64)]) {
        let schedule = SigmaSchedule::linear_quadratic(steps, threshold, linear).unwrap();
        assert_eq!(schedule.steps(), steps);
        assert_eq!((schedule.sigmas()[0], schedule.sigmas()[steps]), (1.0, 0.0));
        for &(i, progress) in expected {
            assert!((1.0 - schedule.sigmas()[i] - progress).abs() < 6e-9, "u_{i} is {}", 1.0 - schedule.sigmas()[i]);
        }
    }

    #[test]
    fn published_values() {
        let u = [(1, 0.00078125), (31, 0.02421875), (32, 0.025), (33, 0.02670898), (34, 0.03027344), (48, 0.275)];
        check(64, 0.025, None, &u);
        check(64, 0.025, Some(32), &[(60, 0.77421875), (63, 0.94077148)]);
        check(28, 0.025, None, &[(1, 0.00178571), (14, 0.025), (15, 0.03163265), (27, 0.86734694)]);
        let distilled = [0.0, 0.1 / 6.0, 0.2 / 6.0, 0.05, 0.4 / 6.0, 0.5 / 6.0, 0.1, 1.0 / 3.0];
        check(8, 0.1, Some(6), &distilled.into_iter().enumerate().collect::<Vec<_>>());
        check(1, 0.025, None, &[]);
        check(2, 0.025, None, &[(1, 0.025)]);
        check(3, 0.025, None, &[(1, 0.025)]);
    }

    #[test]
    fn model_inputs_are_rounded_like_the_reference() {
        let schedule = SigmaSchedule::linear_quadratic(64, 0.025, None).unwrap();
        assert_eq!(schedule.timestep(0), 0.0);
        assert_eq!(schedule.timestep(48), (1.0 - (0.725f64 as f32)) * 1000.0);
        assert_eq!(schedule.dsigma(0), 0.00078125);
        assert_eq!(schedule.dsigma(63), schedule.sigmas()[63] as f32);
    }

    #[test]
    fn schedules_that_do_not_fall_are_refused() {
        let refused = |steps, threshold, linear| SigmaSchedule::linear_quadratic(steps, threshold, linear).is_err();
        assert!(refused(0, 0.025, None));
        assert!(refused(8, 0.025, Some(0)) && refused(8, 0.025, Some(8)));
        assert!(refused(8, 0.0, None) && refused(8, 1.0, None) && refused(8, f64::NAN, None));
    }
}
