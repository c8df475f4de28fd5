//! A decoder of any size with random weights, for measurements and tests that no checkpoint has the size for.

use std::collections::HashMap;

use crate::engine::{Engine, RawDtype, RawTensor};
use crate::model::ModelError;
use crate::model::config::VaeConfig;
use crate::model::noise::normals;
use crate::model::vae::VaeDecoder;
use crate::model::weights::{Loader, StoredTensor, Values, WeightError, WeightSource};

/// A checkpoint's tensors, drawn so that values keep their size on the way through the network. The same for the same
/// seed, on any machine.
pub struct RandomWeights {
    /// Shape, and values in f32.
    tensors: HashMap<String, (Vec<usize>, Vec<u8>)>,
}

/// The published decoder with few channels.
pub fn published_layers() -> VaeConfig {
    VaeConfig { channels: vec![64, 64, 32, 32], ..VaeConfig::mochi1() }
}

/// A decoder with [`RandomWeights`].
pub fn decoder<E: Engine>(engine: &E, config: &VaeConfig, seed: u64) -> Result<VaeDecoder<E>, ModelError> {
    VaeDecoder::load(&Loader { engine, source: &RandomWeights::new(config, seed) }, config)
}

impl RandomWeights {
    /// What a decoder of this config asks for. A config that does not fit together is [`VaeDecoder::load`]'s to refuse.
    pub fn new(config: &VaeConfig, seed: u64) -> Self {
        let mut draw = Draw { seed, drawn: 0, tensors: HashMap::new() };
        let channels = &config.channels;
        let (first, last) = (channels.first().copied().unwrap_or(0), channels.last().copied().unwrap_or(0));
        draw.layer("blocks.0.0", &[first, config.latent_channels, 1, 1, 1], 1.0);
        // Frames are to be about -1 … 1; what residual blocks have added up to is a few times that.
        draw.layer("output_proj", &[3, last], 0.25);
        let layers = |stage: usize| 0..config.layers.get(stage).copied().unwrap_or(0);
        for i in layers(0) {
            draw.block(&format!("blocks.0.{}", i + 1), first);
        }
        let factors = config.temporal_expansions.iter().zip(&config.spatial_expansions);
        for (stage, (pair, (temporal, spatial))) in (1..).zip(channels.windows(2).zip(factors)) {
            draw.layer(&format!("blocks.{stage}.proj"), &[pair[1] * temporal * spatial * spatial, pair[0]], 1.0);
            for i in layers(stage) {
                draw.block(&format!("blocks.{stage}.blocks.{i}"), pair[0]);
            }
        }
        for i in layers(channels.len()) {
            draw.block(&format!("blocks.{}.{i}", channels.len()), last);
        }
        Self { tensors: draw.tensors }
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }
}

struct Draw {
    seed: u64,
    /// Values drawn so far.
    drawn: u64,
    tensors: HashMap<String, (Vec<usize>, Vec<u8>)>,
}

impl Draw {
    fn tensor(&mut self, name: String, shape: &[usize], mean: f64, deviation: f64) {
        let count = shape.iter().product::<usize>() as u64;
        let values = normals(self.seed, self.drawn..self.drawn + count);
        self.drawn += count;
        let values = values.iter().flat_map(|&v| ((f64::from(v) * deviation + mean) as f32).to_le_bytes());
        self.tensors.insert(name, (shape.to_vec(), values.collect()));
    }

    /// Weight `[out, in, …]` and bias.
    fn layer(&mut self, name: &str, shape: &[usize], gain: f64) {
        let inputs: usize = shape[1..].iter().product();
        self.tensor(format!("{name}.weight"), shape, 0.0, gain * (inputs as f64).powf(-0.5));
        self.tensor(format!("{name}.bias"), &shape[..1], 0.0, 0.1);
    }

    fn block(&mut self, name: &str, channels: usize) {
        for conv in [2, 5] {
            self.layer(&format!("{name}.stack.{conv}"), &[channels, channels, 3, 3, 3], 1.0);
        }
        for norm in [0, 3] {
            self.tensor(format!("{name}.stack.{norm}.weight"), &[channels], 1.0, 0.2);
            self.tensor(format!("{name}.stack.{norm}.bias"), &[channels], 0.0, 0.2);
        }
    }
}

impl WeightSource for RandomWeights {
    fn get(&self, name: &str) -> Result<StoredTensor<'_>, WeightError> {
        let (shape, bytes) = self.tensors.get(name).ok_or_else(|| WeightError::Missing { name: name.into() })?;
        let pieces = vec![RawTensor { dtype: RawDtype::F32, shape, bytes }];
        Ok(StoredTensor { shape: shape.clone(), values: Values::Pieces(pieces) })
    }
}
