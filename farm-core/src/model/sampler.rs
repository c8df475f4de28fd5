//! The Euler loop with classifier-free guidance.

use std::ops::ControlFlow;

use crate::engine::Engine;
use crate::job::spec::{GuidanceScale, check_guidance};
use crate::model::ModelError;
use crate::model::dit::{Dit, LatentGeometry, TextConditioning};
use crate::model::schedule::SigmaSchedule;

/// Everything that a denoise needs besides its noise.
pub struct Sampler<'a, E: Engine> {
    pub dit: &'a Dit<E>,
    pub geometry: &'a LatentGeometry<E>,
    pub cond: &'a TextConditioning<E>,
    /// The negative prompt, or no text at all. Always computed, whatever the guidance.
    pub uncond: &'a TextConditioning<E>,
    pub schedule: &'a SigmaSchedule,
    pub guidance: &'a GuidanceScale,
    pub order: BranchOrder,
}

/// How the two branches of a step are computed. The result has the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BranchOrder {
    /// One after the other: half the activations.
    Sequential,
    /// Block by block together: each block's weights are read once a step.
    Together,
}

impl<E: Engine> Sampler<'_, E> {
    /// Noise `[C, T, h, w]` → latent of the same shape, DiT-normalised.
    ///
    /// `on_step` is called with the number of finished steps, the number of all steps and the latent: before the first
    /// step and after each. `Break` ends the loop with [`ModelError::Stopped`].
    pub fn run(
        &self,
        engine: &E,
        noise: &E::Tensor,
        on_step: &mut dyn FnMut(usize, usize, &E::Tensor) -> ControlFlow<()>,
    ) -> Result<E::Tensor, ModelError> {
        let steps = self.schedule.steps();
        check_guidance(self.guidance, Some(steps as u32)).map_err(|error| ModelError::Input(error.to_string()))?;
        let mut z = noise.clone();
        for step in 0..steps {
            if on_step(step, steps, &z).is_break() {
                return Err(ModelError::Stopped);
            }
            let [cond, uncond] = self.velocities(engine, &z, self.schedule.timestep(step))?;
            let guidance = self.guidance.at(step) as f32;
            z = engine.euler_step(&z, &cond, Some(&uncond), guidance, self.schedule.dsigma(step))?;
        }
        match on_step(steps, steps, &z) {
            ControlFlow::Continue(()) => Ok(z),
            ControlFlow::Break(()) => Err(ModelError::Stopped),
        }
    }

    /// Velocities of the conditional and the unconditional branch.
    fn velocities(&self, engine: &E, z: &E::Tensor, timestep: f32) -> Result<[E::Tensor; 2], ModelError> {
        let of = |branches: &[_]| self.dit.velocities(engine, self.geometry, z, timestep, branches);
        let both = match self.order {
            BranchOrder::Together => of(&[self.cond, self.uncond])?,
            BranchOrder::Sequential => [of(&[self.cond])?, of(&[self.uncond])?].concat(),
        };
        both.try_into().map_err(|_| ModelError::Input("guidance needs two velocities".into()))
    }
}
