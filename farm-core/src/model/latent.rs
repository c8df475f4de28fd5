//! Latents: the two spaces they live in, and their files.
//!
//! The transformer works on normalised values, the decoder on `z·std + mean`. Two types, because both are twelve
//! channels of plausible numbers and a mix-up decodes to a plausible, wrong clip.

use std::collections::HashMap;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use crate::job::spec::RenderSpec;
use crate::model::ModelError;
use crate::precision::Precision;

/// A latent as the transformer knows it: `[C, T, h, w]`, normalised.
#[derive(Clone)]
pub struct DitLatent<T>(pub T);

/// A latent as the decoder wants it: `[T, h, w, C]`, `z·std + mean`.
#[derive(Clone)]
pub struct VaeLatent<T>(pub T);

/// Key of a finished latent in its file.
pub const LATENT_KEY: &str = "latent";
/// Key of noise to start from.
pub const NOISE_KEY: &str = "noise";

/// A safetensors file with one tensor, `key`: f32 `[1, C, T, h, w]`. `values` are those of `[C, T, h, w]`.
pub fn to_safetensors(key: &str, values: &[f32], shape: [usize; 4]) -> Result<Vec<u8>, ModelError> {
    file(key, values, shape, None)
}

fn file(
    key: &str,
    values: &[f32],
    shape: [usize; 4],
    metadata: Option<HashMap<String, String>>,
) -> Result<Vec<u8>, ModelError> {
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let failed = |error| ModelError::Input(format!("latent of shape {shape:?} cannot be stored: {error}"));
    let view = TensorView::new(Dtype::F32, [&[1], &shape[..]].concat(), &bytes).map_err(failed)?;
    safetensors::serialize(HashMap::from([(key, view)]), metadata).map_err(failed)
}

/// The values of tensor `key`, which has to be f32 `[1, C, T, h, w]` with `[C, T, h, w] = shape` and finite throughout.
pub fn from_safetensors(bytes: &[u8], key: &str, shape: [usize; 4]) -> Result<Vec<f32>, ModelError> {
    let file = SafeTensors::deserialize(bytes)
        .map_err(|error| ModelError::Input(format!("not a safetensors file ({error})")))?;
    let tensor = file.tensor(key).map_err(|_| {
        let names = file.names().into_iter().take(8).collect::<Vec<_>>().join(", ");
        ModelError::Input(format!("no tensor {key:?} in the file; it has: {names}"))
    })?;
    let expected = [&[1], &shape[..]].concat();
    if tensor.dtype() != Dtype::F32 || tensor.shape() != expected {
        let (dtype, got) = (tensor.dtype(), tensor.shape());
        return Err(ModelError::Input(format!(
            "tensor {key:?} is {dtype:?} {got:?}, this clip needs F32 {expected:?}"
        )));
    }
    let values: Vec<f32> = tensor.data().as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
    match values.iter().position(|v| !v.is_finite()) {
        Some(index) => Err(ModelError::Input(format!("tensor {key:?} holds {} at element {index}", values[index]))),
        None => Ok(values),
    }
}

/// A latent of any size, read from its file.
#[derive(Debug, PartialEq)]
pub struct StoredLatent {
    pub values: Vec<f32>,
    /// `[C, T, h, w]`
    pub size: [usize; 4],
    /// The step that it is of, and that of the finished latent, if the file says that it is not finished.
    pub unfinished: Option<(u32, u32)>,
}

/// Reads a finished latent, or a checkpoint of one. Errors if it does not have this number of channels, is empty, or holds
/// what is not finite.
pub fn read_latent(bytes: &[u8], channels: usize) -> Result<StoredLatent, ModelError> {
    let bad = |what: String| ModelError::Input(format!("not a latent: {what}"));
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(|error| bad(error.to_string()))?;
    let info = header.info(LATENT_KEY).ok_or_else(|| bad(format!("no tensor {LATENT_KEY:?} in it")))?;
    let size = match info.shape[..] {
        [1, c, frames, height, width] if frames > 0 && height > 0 && width > 0 => [c, frames, height, width],
        _ => return Err(bad(format!("a shape of {:?}, not [1, {channels}, T, h, w]", info.shape))),
    };
    if size[0] != channels {
        return Err(bad(format!("{} channels, the decoder has {channels}", size[0])));
    }
    let number = |key: &str| header.metadata().as_ref()?.get(key)?.parse::<u32>().ok();
    let request = header.metadata().as_ref().and_then(|metadata| metadata.get("request"));
    let steps = request
        .and_then(|request| serde_json::from_str::<RenderSpec>(request).ok())
        .map(|spec| spec.num_inference_steps);
    let unfinished = number("step").zip(steps).filter(|(step, steps)| step < steps);
    Ok(StoredLatent { values: from_safetensors(bytes, LATENT_KEY, size)?, size, unfinished })
}

/// Where a clip can go on: the latent `[C, T, h, w]` after `step` steps, which after the last is to be decoded.
#[derive(Clone, Debug, PartialEq)]
pub struct LatentCheckpoint {
    pub step: u32,
    /// How all steps so far were computed.
    pub precision: Precision,
    pub values: Vec<f32>,
}

/// Says in a file's metadata what it is.
const CHECKPOINT_FORMAT: (&str, &str) = ("format", "farm latent checkpoint 1");
/// Files of versions that knew fp32 only do not have it, and are of that.
const PRECISION_KEY: &str = "precision";

impl LatentCheckpoint {
    /// A safetensors file like that of a finished latent, with the step and all that the latent depends on (the precision,
    /// the request and the model's content hash) in its metadata.
    pub fn to_bytes(&self, spec: &RenderSpec, model_hash: &str) -> Result<Vec<u8>, ModelError> {
        let request = serde_json::to_string(spec).map_err(|error| ModelError::Input(error.to_string()))?;
        let (format, version) = CHECKPOINT_FORMAT;
        let metadata = [
            (format, version.to_owned()),
            ("step", self.step.to_string()),
            (PRECISION_KEY, self.precision.to_string()),
            ("request", request),
            ("model", model_hash.to_owned()),
        ];
        let metadata = metadata.map(|(key, value)| (key.to_owned(), value));
        file(LATENT_KEY, &self.values, spec.latent_shape(), Some(HashMap::from(metadata)))
    }

    /// Errors if the file is damaged, or of another clip. Of any precision: who goes on with it has to look.
    pub fn from_bytes(bytes: &[u8], spec: &RenderSpec, model_hash: &str) -> Result<Self, ModelError> {
        let bad = |what: String| ModelError::Input(format!("latent checkpoint: {what}"));
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(|error| bad(error.to_string()))?;
        let metadata = header.metadata().clone().unwrap_or_default();
        let get = |key: &str| metadata.get(key).ok_or_else(|| bad(format!("no {key:?} in its metadata")));
        let (format, version) = CHECKPOINT_FORMAT;
        if get(format)? != version {
            return Err(bad(format!("its format is {:?}, not {version:?}", get(format)?)));
        }
        let of: RenderSpec = serde_json::from_str(get("request")?).map_err(|error| bad(error.to_string()))?;
        if of != *spec || get("model")? != model_hash {
            return Err(bad("it is of another clip or another model".into()));
        }
        let step: u32 = get("step")?.parse().map_err(|_| bad("its step is no number".into()))?;
        if step == 0 || step > spec.num_inference_steps {
            return Err(bad(format!("step {step} of {}", spec.num_inference_steps)));
        }
        let precision = match metadata.get(PRECISION_KEY) {
            Some(precision) => precision.parse().map_err(bad)?,
            None => Precision::F32,
        };
        Ok(Self { step, precision, values: from_safetensors(bytes, LATENT_KEY, spec.latent_shape())? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: [usize; 4] = [12, 2, 2, 4];

    fn values() -> Vec<f32> {
        (0..SHAPE.iter().product::<usize>()).map(|i| i as f32 * 0.25 - 3.0).collect()
    }

    #[test]
    fn a_stored_latent_is_read_back() {
        let bytes = to_safetensors(LATENT_KEY, &values(), SHAPE).unwrap();
        assert_eq!(from_safetensors(&bytes, LATENT_KEY, SHAPE).unwrap(), values());
    }

    #[test]
    fn a_file_that_does_not_fit_the_clip_says_what_it_holds() {
        let bytes = to_safetensors("z", &values(), SHAPE).unwrap();
        let error = |bytes: &[u8], key, shape| from_safetensors(bytes, key, shape).unwrap_err().to_string();
        assert!(error(&bytes, NOISE_KEY, SHAPE).contains("it has: z"));
        let wrong = error(&bytes, "z", [12, 2, 4, 2]);
        assert!(wrong.contains("[1, 12, 2, 2, 4]") && wrong.contains("[1, 12, 2, 4, 2]"), "{wrong}");
        assert!(error(&bytes[..40], "z", SHAPE).contains("not a safetensors file"));
        let mut with_nan = values();
        with_nan[7] = f32::NAN;
        let bytes = to_safetensors("z", &with_nan, SHAPE).unwrap();
        assert!(error(&bytes, "z", SHAPE).contains("NaN at element 7"));
    }

    #[test]
    fn a_latent_of_any_size_is_read_and_what_is_none_is_refused_by_its_fault() {
        let bytes = to_safetensors(LATENT_KEY, &values(), SHAPE).unwrap();
        let latent = read_latent(&bytes, 12).unwrap();
        assert_eq!((latent.values, latent.size, latent.unfinished), (values(), SHAPE, None));
        let checkpoint = LatentCheckpoint { step: 3, precision: Precision::Bf16, values: values() }
            .to_bytes(&spec(1), "hash")
            .unwrap();
        assert_eq!(read_latent(&checkpoint, 12).unwrap().unfinished, Some((3, 8)));
        let error = |bytes: &[u8], channels| read_latent(bytes, channels).unwrap_err().to_string();
        assert!(error(&bytes, 16).contains("12 channels, the decoder has 16"));
        assert!(error(&to_safetensors("z", &values(), SHAPE).unwrap(), 12).contains("no tensor \"latent\""));
        assert!(error(&to_safetensors(LATENT_KEY, &[], [12, 0, 2, 4]).unwrap(), 12).contains("[1, 12, 0, 2, 4]"));
        assert!(error(&bytes[..bytes.len() - 1], 12).contains("not a latent"));
        let mut with_nan = values();
        with_nan[7] = f32::NAN;
        assert!(error(&to_safetensors(LATENT_KEY, &with_nan, SHAPE).unwrap(), 12).contains("NaN at element 7"));
    }

    fn spec(seed: u64) -> RenderSpec {
        let request = r#"{"prompt": "a", "width": 32, "height": 16, "num_frames": 7, "num_inference_steps": 8}"#;
        RenderSpec::resolve(&serde_json::from_str(request).unwrap(), &Default::default(), seed).unwrap()
    }

    #[test]
    fn a_checkpoint_is_read_back_for_its_own_clip_only() {
        let checkpoint = LatentCheckpoint { step: 3, precision: Precision::Bf16, values: values() };
        let bytes = checkpoint.to_bytes(&spec(1), "hash").unwrap();
        assert_eq!(LatentCheckpoint::from_bytes(&bytes, &spec(1), "hash").unwrap(), checkpoint);
        let error =
            |bytes: &[u8], spec, hash| LatentCheckpoint::from_bytes(bytes, &spec, hash).unwrap_err().to_string();
        assert!(error(&bytes, spec(2), "hash").contains("another clip"));
        assert!(error(&bytes, spec(1), "other").contains("another model"));
        for cut in [0, 7, 20, bytes.len() - 1] {
            assert!(LatentCheckpoint::from_bytes(&bytes[..cut], &spec(1), "hash").is_err(), "{cut}");
        }
        // Keys and values of equal lengths, which leave the rest of the file as it is.
        let with = |from: &str, to: &str| {
            let at = bytes.windows(from.len()).position(|window| window == from.as_bytes()).unwrap();
            [&bytes[..at], to.as_bytes(), &bytes[at + from.len()..]].concat()
        };
        let old = LatentCheckpoint::from_bytes(&with("precision", "unheardof"), &spec(1), "hash").unwrap();
        assert_eq!(old, LatentCheckpoint { precision: Precision::F32, ..checkpoint });
        assert!(error(&with("bf16", "fp64"), spec(1), "hash").contains("no precision fp64"));
        let latent = to_safetensors(LATENT_KEY, &values(), SHAPE).unwrap();
        assert!(error(&latent, spec(1), "hash").contains("no \"format\""));
        let beyond = LatentCheckpoint { step: 9, precision: Precision::F32, values: values() }
            .to_bytes(&spec(1), "hash")
            .unwrap();
        assert!(error(&beyond, spec(1), "hash").contains("step 9 of 8"));
    }
}
