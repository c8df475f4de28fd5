//! Mochi 1 over an [`Engine`](crate::engine::Engine): text encoder, AsymmDiT, sampler, VAE decoder, checkpoints.
