//! What every program of the farm shares. Modules in reading order:
//!
//! | layer (feature) | modules | subject |
//! |---|---|---|
//! | plain | [`id`], [`job`] | names of things; a prompt line becomes a [`job::spec::RenderSpec`] |
//! | plain | [`api`] | what `farmctl` and the scheduler say to each other over HTTP |
//! | plain | [`wire`] | what the scheduler and the nodes say to each other; `wire::cluster` (`cluster`) carries it over ractor |
//! | plain | [`parallel`] | how a clip is spread over a group of devices |
//! | plain | [`tiles`] | how its decode is cut into tiles |
//! | plain | [`precision`] | how exactly it is denoised |
//! | `store` | [`store`] | artifacts in object storage and the create-once result |
//! | `model` | [`engine`], [`comm`], [`model`] | the operations of one device; messages between ranks; Mochi over both |
//!
//! Glossary: a *job* is one prompt line; an *attempt* is one try at it; a *lease* lends devices to an attempt; an
//! *epoch* is one reign of a scheduler, a number from the queue store that only grows; an *artifact* is a stored object.

pub mod api;
#[cfg(feature = "model")]
pub mod comm;
#[cfg(feature = "model")]
pub mod engine;
pub mod id;
pub mod job;
#[cfg(feature = "model")]
pub mod model;
pub mod parallel;
pub mod precision;
#[cfg(feature = "store")]
pub mod store;
pub mod tiles;
pub mod wire;

/// Version of the program, recorded in every result.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
