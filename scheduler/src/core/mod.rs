//! What the farm decides, as a pure state machine: `(state, event, now) → effects`. No I/O, no clock, no thread.
//!
//! | module | subject |
//! |---|---|
//! | [`events`] | what can happen: messages of nodes, users' wishes, the passing of time |
//! | [`effects`] | what follows: changes to commit first, messages to send after, requests to load |
//! | [`farm`] | the state: jobs, nodes, leases; `step` |
//! | [`view`] | what people may ask of it, and why a job waits |
//! | [`register`] | who may join, and what becomes of attempts that outlived a session or a scheduler |
//! | [`report`] | heartbeats and reports: which attempts live, which have ended and how |
//! | [`place`] | which queued job gets which free devices |
//! | [`hands`], [`help`] | which devices decode a finished latent, and how others are lent for it |
//! | [`gang`], [`forecast`] | how many devices a clip gets, and the predictions behind that |
//! | [`resolve`] | which model a prompt line means, and the key that makes submitting idempotent |
//!
//! The state here is a cache of the queue store plus what nodes last said. Every change is committed before anybody
//! is told of it, so a crash at any point loses only what nobody was told.

pub mod effects;
pub mod events;
pub mod farm;
mod forecast;
mod gang;
mod hands;
mod help;
mod place;
mod register;
mod report;
pub mod resolve;
pub mod view;

#[cfg(test)]
mod fixture;
#[cfg(test)]
mod gang_rules;
#[cfg(test)]
mod hand_rules;
#[cfg(test)]
mod honest;
#[cfg(test)]
mod random;
#[cfg(test)]
mod rules;
