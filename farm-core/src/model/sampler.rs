//! The Euler loop with classifier-free guidance.

use std::ops::ControlFlow;

use crate::engine::Engine;
use crate::job::spec::{GuidanceScale, check_guidance};
use crate::model::ModelError;
use crate::model::dit::{Dit, LatentGeometry, TextConditioning};
use crate::model::schedule::SigmaSchedule;
use crate::parallel::group::RankGroup;

/// Everything that a denoise needs besides its noise.
pub struct Sampler<'a, E: Engine> {
    pub dit: &'a Dit<E>,
    pub geometry: &'a LatentGeometry<E>,
    pub cond: &'a TextConditioning<E>,
    /// The negative prompt, or no text at all. Always computed, whatever the guidance.
    pub uncond: &'a TextConditioning<E>,
    pub schedule: &'a SigmaSchedule,
    pub guidance: &'a GuidanceScale,
    /// The ranks that run this together, each with the same noise.
    pub group: &'a RankGroup<E>,
}

/// Called before the first step that is computed and after each, with the number of finished steps, of all steps, and the latent.
pub type OnStep<'a, T> = &'a mut dyn FnMut(usize, usize, &T) -> ControlFlow<()>;

impl<E: Engine> Sampler<'_, E> {
    /// Latent `[C, T, h, w]` before step `first` (noise before step 0) → finished latent, DiT-normalised.
    ///
    /// `Break` from `on_step` ends the loop with [`ModelError::Stopped`].
    pub fn run(
        &self,
        engine: &E,
        start: &E::Tensor,
        first: usize,
        on_step: OnStep<'_, E::Tensor>,
    ) -> Result<E::Tensor, ModelError> {
        let steps = self.schedule.steps();
        check_guidance(self.guidance, Some(steps as u32)).map_err(|error| ModelError::Input(error.to_string()))?;
        let mut z = start.clone();
        for step in first..steps {
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

    /// Velocities of the conditional and the unconditional branch. The result has the same bits however it is computed.
    fn velocities(&self, engine: &E, z: &E::Tensor, timestep: f32) -> Result<[E::Tensor; 2], ModelError> {
        let of = |branches: &[_]| self.dit.velocities(engine, self.group, self.geometry, z, timestep, branches);
        let both = match self.group.cfg.size() {
            // Every rank of the group has both. One after the other is half the activations, but each brings in weights.
            1 if self.dit.brings_weights() => of(&[self.cond, self.uncond])?,
            1 => [of(&[self.cond])?, of(&[self.uncond])?].concat(),
            _ => {
                let mine = of(&[[self.cond, self.uncond][self.group.cfg.me()]])?;
                let [mine] = &mine[..] else {
                    return Err(ModelError::Input("a branch has one velocity".into()));
                };
                let shape = self.geometry.shape().to_vec();
                self.group.cfg.all_gather_v(mine.clone(), &[shape.clone(), shape])?
            }
        };
        both.try_into().map_err(|_| ModelError::Input("guidance needs two velocities".into()))
    }
}
