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
//! [`plan`] is geometry, [`statistics`] arithmetic, [`message`] what hands and the crew say to each other, [`codec`] the
//! bytes of it.

pub mod codec;
pub mod message;
pub mod plan;
pub mod statistics;
