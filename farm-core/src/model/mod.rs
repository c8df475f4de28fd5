//! Mochi 1 over an [`Engine`](crate::engine::Engine): text encoder, AsymmDiT, sampler, VAE decoder, checkpoints.
//!
//! Structs here hold weights only; every call takes the engine it runs on, so that the devices of one process share
//! one copy of the weights.

mod block;
mod blocks;
pub mod config;
pub mod dit;
mod embed;
pub mod latent;
mod layers;
pub mod noise;
pub mod pipeline;
pub mod sampler;
pub mod schedule;
pub mod t5;
pub mod tokenizer;
pub mod vae;
pub mod weights;

/// What can go wrong between a checkpoint and a clip.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error(transparent)]
    Engine(#[from] crate::engine::EngineError),
    /// A rank of the group failed; which one, the error says.
    #[error(transparent)]
    Comm(#[from] crate::comm::CommError),
    #[error(transparent)]
    Weights(#[from] weights::WeightError),
    /// The request cannot be rendered with this checkpoint, on any machine.
    #[error("{0}")]
    Input(String),
    /// What was made could not be handed over.
    #[error("frames could not be written: {0}")]
    Output(#[source] std::io::Error),
    /// The caller asked to stop.
    #[error("stopped")]
    Stopped,
    /// The caller asked to hand over: the observer has had the latent of `step` finished steps, where others go on.
    #[error("handed over at step {step}")]
    HandedOver { step: u32 },
}

impl From<crate::parallel::attention::ParallelError> for ModelError {
    fn from(error: crate::parallel::attention::ParallelError) -> Self {
        use crate::parallel::attention::ParallelError;
        match error {
            ParallelError::Engine(error) => Self::Engine(error),
            ParallelError::Comm(error) => Self::Comm(error),
        }
    }
}
