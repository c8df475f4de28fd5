//! Artifacts in object storage, and the create-once result that decides which attempt counts.

pub mod artifact;
pub mod key;
