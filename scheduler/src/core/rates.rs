//! How long attempts really take, against what the devices' rates alone say: learned from those that ended with a clip.

use std::sync::Arc;

use rustc_hash::FxHashMap;

use super::events::{Ask, Measured};

/// Kinds of clips that are remembered one by one; beyond that all are forgotten, and learned again.
const MAX_KINDS: usize = 4096;
/// A mean follows its newest values with at least this weight.
const NEWEST: f64 = 1.0 / 16.0;
/// So many attempts of a kind of clip say as much of it as all attempts of its model do.
const TRUST: f64 = 2.0;
/// Factors beyond this, or below its inverse, are mistakes.
const MAX_FACTOR: f64 = 1e6;

/// A mean of logarithms: of times that are twice and half as long as expected the mean is as expected.
#[derive(Clone, Copy, Debug, Default)]
struct Mean {
    log: f64,
    count: f64,
}

impl Mean {
    fn add(&mut self, value: f64) {
        self.count = (self.count + 1.0).min(1.0 / NEWEST);
        self.log += (value - self.log) / self.count;
    }
}

#[derive(Debug, Default)]
struct OfDevice {
    all: Mean,
    kinds: FxHashMap<Ask, Mean>,
}

#[derive(Debug, Default)]
pub struct Rates(FxHashMap<(Arc<str>, Arc<str>), OfDevice>);

impl Rates {
    pub fn restore(measured: impl IntoIterator<Item = Measured>) -> Self {
        let mut rates = Self::default();
        for Measured { model, device, base, seconds } in measured {
            rates.learn(&model.into(), &device.into(), None, base, seconds);
        }
        rates
    }

    /// An attempt on devices of this name that was expected to take `base` seconds has taken `seconds`.
    pub fn learn(&mut self, model: &Arc<str>, device: &Arc<str>, ask: Option<Ask>, base: f64, seconds: f64) {
        let factor = seconds / base;
        if !(1.0 / MAX_FACTOR..=MAX_FACTOR).contains(&factor) {
            return;
        }
        let known = self.0.entry((model.clone(), device.clone())).or_default();
        known.all.add(factor.ln());
        if let Some(ask) = ask {
            if known.kinds.len() >= MAX_KINDS && !known.kinds.contains_key(&ask) {
                known.kinds.clear();
            }
            known.kinds.entry(ask).or_default().add(factor.ln());
        }
    }

    /// What to multiply expected seconds with, if any attempt has ended there.
    pub fn factor(&self, model: &Arc<str>, device: &Arc<str>, ask: Ask) -> Option<f64> {
        let known = self.0.get(&(model.clone(), device.clone()))?;
        let kind = known.kinds.get(&ask).copied().unwrap_or_default();
        let log = (kind.count * kind.log + TRUST * known.all.log) / (kind.count + TRUST);
        Some(log.exp())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(steps: u32) -> Ask {
        Ask { num_inference_steps: Some(steps), ..Ask::default() }
    }

    #[test]
    fn what_was_measured_of_the_kind_outweighs_what_was_measured_of_the_model() {
        let (model, device): (Arc<str>, Arc<str>) = ("m".into(), "d".into());
        let mut rates = Rates::default();
        assert_eq!(rates.factor(&model, &device, ask(1)), None);
        for _ in 0..100 {
            rates.learn(&model, &device, Some(ask(1)), 1.0, 8.0);
            rates.learn(&model, &device, Some(ask(2)), 1.0, 2.0);
        }
        let [one, two, new] = [1, 2, 3].map(|steps| rates.factor(&model, &device, ask(steps)).unwrap());
        assert!(
            (6.5..8.1).contains(&one) && (1.9..2.5).contains(&two) && (3.0..5.5).contains(&new),
            "{one} {two} {new}"
        );
    }

    #[test]
    fn times_that_cannot_be_teach_nothing() {
        let (model, device): (Arc<str>, Arc<str>) = ("m".into(), "d".into());
        let mut rates = Rates::default();
        for (base, seconds) in [(0.0, 1.0), (1.0, 0.0), (f64::NAN, 1.0), (1.0, f64::INFINITY), (-1.0, 1.0)] {
            rates.learn(&model, &device, None, base, seconds);
        }
        assert_eq!(rates.factor(&model, &device, ask(1)), None);
    }
}
