//! Differences to the reference, tensor by tensor.

use std::fmt::Write;

use serde::Serialize;

/// What decides whether a tensor passes.
#[derive(Clone, Copy, Debug, Default)]
pub enum Measure {
    /// `max_abs <= tolerance · max(1, max|reference|)`
    #[default]
    Largest,
    /// `relative_l2` is at most this.
    Relative(f64),
}

/// One tensor against its reference.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    pub tensor: String,
    pub values: usize,
    /// Largest |a − b|; infinite where one is not a number, so that it can never pass.
    pub max_abs: f64,
    /// ‖a − b‖ / ‖b‖
    pub relative_l2: f64,
    pub tolerance: f64,
    /// Of `max_abs`: the tolerance times max(1, max|reference|); or of `relative_l2`, where that decides.
    pub limit: f64,
    pub passed: bool,
    /// Why it cannot pass, if it is not for its values.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    #[serde(skip)]
    max_reference: f64,
    #[serde(skip)]
    squares: [f64; 2],
}

/// A reference tensor, or some of its rows, that nothing was compared with.
#[derive(Clone, Debug, Serialize)]
pub struct Skipped {
    pub tensor: String,
    pub reason: String,
}

#[derive(Debug, Default, Serialize)]
pub struct Report {
    pub compared: Vec<Comparison>,
    pub skipped: Vec<Skipped>,
    #[serde(skip)]
    measure: Measure,
}

impl Report {
    pub fn new(measure: Measure) -> Self {
        Self { measure, ..Self::default() }
    }

    /// Adds values of `tensor`. What was added before (another sample) counts on.
    pub fn compare(&mut self, tensor: &str, got: &[f32], reference: &[f32], tolerance: f64) {
        let index = match self.compared.iter().position(|comparison| comparison.tensor == tensor) {
            Some(index) => index,
            None => {
                self.compared.push(Comparison {
                    tensor: tensor.into(),
                    values: 0,
                    max_abs: 0.0,
                    relative_l2: 0.0,
                    tolerance,
                    limit: tolerance,
                    passed: true,
                    problem: None,
                    max_reference: 0.0,
                    squares: [0.0; 2],
                });
                self.compared.len() - 1
            }
        };
        let c = &mut self.compared[index];
        c.values += reference.len();
        if got.len() != reference.len() {
            c.max_abs = f64::INFINITY;
            c.problem = Some(format!("{} values here, {} in the reference", got.len(), reference.len()));
        }
        for (&a, &b) in got.iter().zip(reference) {
            let (a, b) = (f64::from(a), f64::from(b));
            let difference = (a - b).abs();
            c.max_abs = c.max_abs.max(if difference.is_nan() { f64::INFINITY } else { difference });
            c.max_reference = c.max_reference.max(b.abs());
            c.squares[0] += difference * difference;
            c.squares[1] += b * b;
        }
        c.relative_l2 = if c.squares[0] == 0.0 { 0.0 } else { (c.squares[0] / c.squares[1]).sqrt() };
        let decides = match self.measure {
            Measure::Largest => {
                c.limit = c.tolerance * c.max_reference.max(1.0);
                c.max_abs
            }
            Measure::Relative(tolerance) => {
                (c.tolerance, c.limit) = (tolerance, tolerance);
                // A difference that is no number makes the norm none either.
                c.relative_l2
            }
        };
        c.passed = decides <= c.limit && c.limit.is_finite() && c.problem.is_none();
    }

    pub fn skip(&mut self, tensor: &str, reason: impl Into<String>) {
        self.skipped.push(Skipped { tensor: tensor.into(), reason: reason.into() });
    }

    /// Whether something was compared.
    pub fn ran(&self) -> bool {
        !self.compared.is_empty()
    }

    /// Whether something was compared and all of it is within tolerance.
    pub fn passed(&self) -> bool {
        self.ran() && self.compared.iter().all(|comparison| comparison.passed)
    }

    pub fn as_text(&self) -> String {
        let mut out = String::new();
        // Writing to a string cannot fail.
        if self.ran() {
            let _ = writeln!(out, "{:<20} {:>10} {:>10} {:>10}", "tensor", "max abs", "limit", "rel. L2");
        }
        for c in &self.compared {
            let verdict = if c.passed { "ok" } else { "FAIL" };
            let _ = writeln!(
                out,
                "{:<20} {:>10.2e} {:>10.2e} {:>10.2e}  {verdict}{}",
                c.tensor,
                c.max_abs,
                c.limit,
                c.relative_l2,
                c.problem.as_ref().map(|problem| format!(": {problem}")).unwrap_or_default()
            );
        }
        for skipped in &self.skipped {
            let _ = writeln!(out, "{:<20} skipped: {}", skipped.tensor, skipped.reason);
        }
        let failed = self.compared.iter().filter(|comparison| !comparison.passed).count();
        let verdict = match (self.ran(), failed) {
            (false, _) => "nothing could be compared".to_string(),
            (true, 0) => format!("all {} tensors are within tolerance", self.compared.len()),
            (true, _) => format!("{failed} of {} tensors are past their tolerance", self.compared.len()),
        };
        let _ = writeln!(out, "{verdict}");
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tolerance_scales_with_the_reference_but_not_below_one() {
        let mut report = Report::default();
        report.compare("large", &[100.5, 0.0], &[100.0, 0.0], 1e-2);
        report.compare("small", &[0.02], &[0.0001], 1e-2);
        assert_eq!(report.compared.iter().map(|c| c.passed).collect::<Vec<_>>(), [true, false]);
        assert_eq!(report.compared[0].limit, 1.0);
        assert!(!report.passed());
    }

    #[test]
    fn samples_of_one_tensor_count_together() {
        let mut report = Report::default();
        report.compare("x", &[1.0], &[1.0], 1e-3);
        report.compare("x", &[5.0], &[4.0], 1e-3);
        report.compare("x", &[1.0], &[1.0], 1e-3);
        let [c] = &report.compared[..] else { panic!("one line per tensor") };
        assert_eq!((c.values, c.max_abs, c.passed), (3, 1.0, false));
        assert!((c.relative_l2 - (1.0f64 / 18.0).sqrt()).abs() < 1e-12);
    }

    #[test]
    fn values_that_are_no_numbers_and_missing_values_never_pass() {
        for (got, reference) in
            [(&[f32::NAN][..], &[0.0][..]), (&[0.0], &[f32::NAN]), (&[f32::INFINITY], &[f32::INFINITY]), (&[], &[0.0])]
        {
            let mut report = Report::default();
            report.compare("x", got, reference, 1.0);
            assert!(!report.passed(), "{got:?} {reference:?}");
        }
        assert!(!Report::default().passed());
    }
}
