//! A network's weights drawn by the engine that it is loaded onto, for measurements at any size: nothing is stored, and
//! nothing of it travels to the device.

use std::collections::HashMap;

use super::names::{self, Entry, Naming};
use super::{StoredTensor, Values, WeightError, WeightSource};
use crate::engine::Draw;
use crate::model::config::{DitConfig, T5Config, VaeConfig};

/// Norms' weights are 1, more or less; biases small; and matrices such that values keep their size on the way through.
const NORM_SPREAD: f32 = 0.2;
const BIAS_SPREAD: f32 = 0.1;

/// The tensors of a network. The same for the same seed.
pub struct DrawnWeights {
    tensors: HashMap<String, (Vec<usize>, Draw)>,
}

impl DrawnWeights {
    pub fn dit(config: &DitConfig, seed: u64) -> Self {
        Self::new(names::dit(config, &Naming::Diffusers), seed)
    }

    pub fn vae(config: &VaeConfig, seed: u64) -> Self {
        Self::new(names::vae(config, &Naming::Diffusers), seed)
    }

    pub fn t5(config: &T5Config, seed: u64) -> Self {
        Self::new(names::t5(config, names::T5_EMBEDDING[0]), seed)
    }

    fn new(entries: Vec<Entry>, key: u64) -> Self {
        let mut first = 0;
        let tensors = entries.into_iter().map(|Entry { name, shape, .. }| {
            let (mean, spread) = distribution(&name, &shape);
            let draw = Draw { key, first, mean, spread };
            first += shape.iter().product::<usize>() as u64;
            (name, (shape, draw))
        });
        Self { tensors: tensors.collect() }
    }
}

fn distribution(name: &str, shape: &[usize]) -> (f32, f32) {
    match shape {
        [_] if name.ends_with(".bias") => (0.0, BIAS_SPREAD),
        [_] => (1.0, NORM_SPREAD),
        // Tables that are looked up in.
        _ if name == "pos_frequencies" || name == names::T5_EMBEDDING[0] || name.ends_with("attention_bias.weight") => {
            (0.0, 1.0)
        }
        // Of a variance of 1 / inputs.
        [_, inputs @ ..] => (0.0, (3.0 / inputs.iter().product::<usize>().max(1) as f32).sqrt()),
        [] => (0.0, 0.0),
    }
}

impl WeightSource for DrawnWeights {
    fn get(&self, name: &str) -> Result<StoredTensor<'_>, WeightError> {
        let (shape, draw) = self.tensors.get(name).ok_or_else(|| WeightError::Missing { name: name.into() })?;
        Ok(StoredTensor { shape: shape.clone(), values: Values::Drawn(*draw) })
    }
}
