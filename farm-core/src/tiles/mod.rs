//! A clip's decode, cut into tiles that any devices work on together.
//!
//! ```text
//! latent ──▶ tiles (plan) ──▶ hands: devices that decode some tiles each ──▶ blend ──▶ encoder
//!                               ▲ │ a share of every norm's statistics
//!                         totals│ ▼
//!                              crew: who has which tile, what is closed, what is late
//! ```
//!
//! Tiles cut space, never time: each is a stream of chunks of one latent frame with the caches of its convolutions. What
//! tiles get wrong by themselves are the statistics of group norms, so at each norm every tile gives the sums over the
//! part that it owns and goes on with the totals of all.
//!
//! [`plan`] is geometry, [`shape`] the steps of a decode, [`statistics`] arithmetic. [`message`] is what hands and the
//! crew say to each other and [`codec`] the bytes of it; [`crew`] and [`hand`] decide what they do next. [`blend`] makes
//! frames of tiles. `local` has all tiles on one engine and [`quality`] measures what comes of it.

pub mod blend;
pub mod codec;
pub mod crew;
pub mod hand;
#[cfg(feature = "model")]
pub mod local;
pub mod message;
pub mod plan;
pub mod quality;
pub mod shape;
pub mod statistics;
