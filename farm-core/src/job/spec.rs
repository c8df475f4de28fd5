//! What to render, checked once: a [`RenderRequest`] is what the user asked for, a [`RenderSpec`] has every value.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Pixels are a multiple of this: VAE 8 × patch 2.
pub const SIZE_STEP: u32 = 16;
/// Frames are `FRAME_STEP · k + 1`: the VAE's causal time upsampling 3·2.
pub const FRAME_STEP: u32 = 6;

pub const MAX_SIZE: u32 = 4096;
pub const MAX_FRAMES: u32 = 6001;
pub const MAX_STEPS: u32 = 1000;
pub const MAX_GUIDANCE: f64 = 100.0;
pub const MAX_PRIORITY: i32 = 1000;
/// Entries of `after`.
pub const MAX_AFTER: usize = 32;
pub const MAX_LABELS: usize = 32;
pub const MAX_LABEL_BYTES: usize = 256;

/// A number, or one number per step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum GuidanceScale {
    Constant(f64),
    PerStep(Vec<f64>),
}

impl GuidanceScale {
    /// The scale of step `step` (from 0). `PerStep` was checked to have one value per step.
    pub fn at(&self, step: usize) -> f64 {
        match self {
            Self::Constant(scale) => *scale,
            Self::PerStep(scales) => scales[step],
        }
    }
}

/// One line of a prompt file, checked as far as it goes without the model: everything left out is `None`.
///
/// Serialised (keys sorted, absent ones left out), it is the stored form of the request and part of its identity.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RenderRequest {
    pub prompt: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub negative_prompt: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub width: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub height: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_frames: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_inference_steps: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guidance_scale: Option<GuidanceScale>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// The user's own name for the line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<i32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// What the clip waits for: names (`id`) of lines of the same file, or ids of jobs or batches of the farm. It starts
    /// when all of them are done.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub after: Vec<String>,
    /// Labels that the node has to have.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub require: BTreeMap<String, String>,
}

/// A checkpoint's own generation defaults: `generation_config.json` in the model folder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GenerationDefaults {
    pub width: u32,
    pub height: u32,
    pub num_frames: u32,
    pub num_inference_steps: u32,
    pub guidance_scale: GuidanceScale,
    /// σ schedule: how much of the way the linear half covers. 0.025 unless the weights are distilled.
    #[serde(default = "default_threshold_noise")]
    pub threshold_noise: f64,
    /// σ schedule: number of linear steps; half of all steps if left out.
    #[serde(default)]
    pub linear_steps: Option<u32>,
}

fn default_threshold_noise() -> f64 {
    0.025
}

impl Default for GenerationDefaults {
    /// The published model's reference command line: 848×480, 163 frames, 64 steps, guidance 6.
    fn default() -> Self {
        Self {
            width: 848,
            height: 480,
            num_frames: 163,
            num_inference_steps: 64,
            guidance_scale: GuidanceScale::Constant(6.0),
            threshold_noise: default_threshold_noise(),
            linear_steps: None,
        }
    }
}

/// A render with every value decided. Built only by [`RenderSpec::resolve`], so its invariants hold everywhere:
/// width and height are multiples of 16 in 16..=4096, frames 6k+1, steps ≥ 1, one guidance value per step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "UncheckedSpec")]
pub struct RenderSpec {
    pub prompt: String,
    /// Empty: the null branch has no text at all.
    pub negative_prompt: String,
    pub width: u32,
    pub height: u32,
    pub num_frames: u32,
    pub num_inference_steps: u32,
    pub guidance_scale: GuidanceScale,
    pub threshold_noise: f64,
    pub linear_steps: Option<u32>,
    pub seed: u64,
}

/// Same fields as [`RenderSpec`], before its check: what deserialisation reads.
#[derive(Deserialize)]
struct UncheckedSpec {
    prompt: String,
    negative_prompt: String,
    width: u32,
    height: u32,
    num_frames: u32,
    num_inference_steps: u32,
    guidance_scale: GuidanceScale,
    threshold_noise: f64,
    linear_steps: Option<u32>,
    seed: u64,
}

#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SpecError {
    #[error("{name} {value} is not a multiple of 16 in 16..={MAX_SIZE}")]
    Size { name: &'static str, value: u32 },
    #[error("num_frames {0} is not 6k+1 in 1..={MAX_FRAMES} (1, 7, 13, 19, …)")]
    Frames(u32),
    #[error("num_inference_steps {0} is not in 1..={MAX_STEPS}")]
    Steps(u32),
    #[error("guidance_scale {0} is not in 0..={MAX_GUIDANCE}")]
    Guidance(f64),
    #[error("guidance_scale has {got} values for {steps} steps")]
    GuidanceLength { got: usize, steps: u32 },
    #[error("linear_steps {linear_steps} is not in 1..{steps}")]
    LinearSteps { linear_steps: u32, steps: u32 },
    #[error("threshold_noise {0} is not in 0..1")]
    ThresholdNoise(f64),
}

pub fn check_size(name: &'static str, value: u32) -> Result<(), SpecError> {
    let ok = value.is_multiple_of(SIZE_STEP) && (SIZE_STEP..=MAX_SIZE).contains(&value);
    if ok { Ok(()) } else { Err(SpecError::Size { name, value }) }
}

pub fn check_frames(frames: u32) -> Result<(), SpecError> {
    let ok = frames % FRAME_STEP == 1 && frames <= MAX_FRAMES;
    if ok { Ok(()) } else { Err(SpecError::Frames(frames)) }
}

pub fn check_steps(steps: u32) -> Result<(), SpecError> {
    if (1..=MAX_STEPS).contains(&steps) { Ok(()) } else { Err(SpecError::Steps(steps)) }
}

/// Each value is in range and, if `steps` is known, a list has one value per step.
pub fn check_guidance(scale: &GuidanceScale, steps: Option<u32>) -> Result<(), SpecError> {
    let in_range = |g: f64| (0.0..=MAX_GUIDANCE).contains(&g);
    match scale {
        GuidanceScale::Constant(g) if !in_range(*g) => Err(SpecError::Guidance(*g)),
        GuidanceScale::Constant(_) => Ok(()),
        GuidanceScale::PerStep(list) => {
            if let Some(g) = list.iter().find(|g| !in_range(**g)) {
                return Err(SpecError::Guidance(*g));
            }
            match steps {
                Some(steps) if list.len() != steps as usize => {
                    Err(SpecError::GuidanceLength { got: list.len(), steps })
                }
                _ => Ok(()),
            }
        }
    }
}

impl RenderSpec {
    /// Fills what the request left out from the checkpoint's defaults and checks the whole.
    /// `seed` is used if the request has none (it is drawn once, at submission).
    pub fn resolve(request: &RenderRequest, defaults: &GenerationDefaults, seed: u64) -> Result<Self, SpecError> {
        UncheckedSpec {
            prompt: request.prompt.clone(),
            negative_prompt: request.negative_prompt.clone().unwrap_or_default(),
            width: request.width.unwrap_or(defaults.width),
            height: request.height.unwrap_or(defaults.height),
            num_frames: request.num_frames.unwrap_or(defaults.num_frames),
            num_inference_steps: request.num_inference_steps.unwrap_or(defaults.num_inference_steps),
            guidance_scale: request.guidance_scale.clone().unwrap_or_else(|| defaults.guidance_scale.clone()),
            threshold_noise: defaults.threshold_noise,
            linear_steps: defaults.linear_steps,
            seed: request.seed.unwrap_or(seed),
        }
        .try_into()
    }

    /// Latent frames, `(frames − 1)/6 + 1`.
    pub fn latent_frames(&self) -> u32 {
        (self.num_frames - 1) / FRAME_STEP + 1
    }

    /// Latent shape `[12, T, h, w]`.
    pub fn latent_shape(&self) -> [usize; 4] {
        [12, self.latent_frames() as usize, (self.height / 8) as usize, (self.width / 8) as usize]
    }
}

impl TryFrom<UncheckedSpec> for RenderSpec {
    type Error = SpecError;

    fn try_from(spec: UncheckedSpec) -> Result<Self, SpecError> {
        check_size("width", spec.width)?;
        check_size("height", spec.height)?;
        check_frames(spec.num_frames)?;
        check_steps(spec.num_inference_steps)?;
        check_guidance(&spec.guidance_scale, Some(spec.num_inference_steps))?;
        if !(spec.threshold_noise >= 0.0 && spec.threshold_noise < 1.0) {
            return Err(SpecError::ThresholdNoise(spec.threshold_noise));
        }
        let steps = spec.num_inference_steps;
        // One step has the schedule [1, 0] whatever the number of linear steps.
        if let Some(linear_steps) = spec.linear_steps
            && steps > 1
            && !(1..steps).contains(&linear_steps)
        {
            return Err(SpecError::LinearSteps { linear_steps, steps });
        }
        Ok(Self {
            prompt: spec.prompt,
            negative_prompt: spec.negative_prompt,
            width: spec.width,
            height: spec.height,
            num_frames: spec.num_frames,
            num_inference_steps: spec.num_inference_steps,
            guidance_scale: spec.guidance_scale,
            threshold_noise: spec.threshold_noise,
            linear_steps: spec.linear_steps,
            seed: spec.seed,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(json: &str) -> RenderRequest {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn left_out_values_come_from_the_checkpoint() {
        let spec =
            RenderSpec::resolve(&request(r#"{"prompt":"x","width":96}"#), &GenerationDefaults::default(), 7).unwrap();
        assert_eq!((spec.width, spec.height, spec.num_frames, spec.seed), (96, 480, 163, 7));
        assert_eq!(spec.latent_shape(), [12, 28, 60, 12]);
    }

    #[test]
    fn guidance_list_is_checked_against_the_resolved_steps() {
        let error = RenderSpec::resolve(
            &request(r#"{"prompt":"x","guidance_scale":[1,2]}"#),
            &GenerationDefaults::default(),
            0,
        );
        assert_eq!(error.unwrap_err(), SpecError::GuidanceLength { got: 2, steps: 64 });
    }

    #[test]
    fn a_stored_spec_cannot_smuggle_in_illegal_values() {
        let mut spec = serde_json::to_value(
            RenderSpec::resolve(&request(r#"{"prompt":"x"}"#), &GenerationDefaults::default(), 0).unwrap(),
        )
        .unwrap();
        spec["num_frames"] = 8.into();
        let error = serde_json::from_value::<RenderSpec>(spec).unwrap_err().to_string();
        assert!(error.contains("num_frames 8"), "{error}");
    }
}
