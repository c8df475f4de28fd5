//! What a benchmark found, for people and for programs.

use std::fmt;

use serde::Serialize;

#[derive(Debug, Serialize)]
pub struct Report {
    pub bench: &'static str,
    pub figures: Vec<Figure>,
    pub goals: Vec<Goal>,
}

#[derive(Debug, Serialize)]
pub struct Figure {
    pub what: String,
    pub value: f64,
    pub unit: &'static str,
}

#[derive(Debug, Serialize)]
pub struct Goal {
    pub what: String,
    pub value: f64,
    pub unit: &'static str,
    pub limit: Limit,
    pub met: bool,
}

#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Limit {
    AtLeast(f64),
    AtMost(f64),
}

impl Report {
    pub fn new(bench: &'static str) -> Self {
        Self { bench, figures: Vec::new(), goals: Vec::new() }
    }

    pub fn figure(&mut self, what: impl Into<String>, value: f64, unit: &'static str) {
        self.figures.push(Figure { what: what.into(), value, unit });
    }

    pub fn goal(&mut self, what: impl Into<String>, value: f64, unit: &'static str, limit: Limit) {
        let met = match limit {
            Limit::AtLeast(least) => value >= least,
            Limit::AtMost(most) => value <= most,
        };
        self.goals.push(Goal { what: what.into(), value, unit, limit, met });
    }

    pub fn is_met(&self) -> bool {
        self.goals.iter().all(|goal| goal.met)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.bench)?;
        for Figure { what, value, unit } in &self.figures {
            writeln!(f, "  {what}: {} {unit}", Short(*value))?;
        }
        for Goal { what, value, unit, limit, met } in &self.goals {
            let verdict = if *met { "PASS" } else { "FAIL" };
            let (word, limit) = match limit {
                Limit::AtLeast(least) => ("at least", least),
                Limit::AtMost(most) => ("at most", most),
            };
            writeln!(f, "  {verdict} {what}: {} {unit} ({word} {})", Short(*value), Short(*limit))?;
        }
        Ok(())
    }
}

/// Three digits that count, and all before the point.
struct Short(f64);

impl fmt::Display for Short {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = match self.0.abs() {
            size if size >= 100.0 || size.fract() == 0.0 => 0,
            size if size >= 10.0 => 1,
            size if size >= 1.0 => 2,
            _ => 3,
        };
        write!(f, "{:.digits$}", self.0)
    }
}

/// The value that this part of the sorted values does not exceed; 0 of none.
pub fn quantile(sorted: &[f64], part: f64) -> f64 {
    let last = sorted.len().saturating_sub(1);
    sorted.get((part * last as f64).round() as usize).copied().unwrap_or(0.0)
}

pub fn sorted(values: impl IntoIterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values
}

pub fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}
