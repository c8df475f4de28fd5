//! What the farm decides, as a pure state machine: `(state, event, now) → effects`. No I/O, no clock, no thread.
//!
//! | module | subject |
//! |---|---|
//! | [`events`] | what can happen: messages of nodes, users' wishes, the passing of time |
//! | [`effects`] | what follows: changes to commit first, messages to send after, requests to load |
//! | [`farm`] | the state: jobs, nodes, leases; `step` |
//! | [`jobs`], [`table`], [`batch`], [`class`] | the life of a job; all by id; what it comes after; jobs that are alike |
//! | [`wishes`] | what users and operators ask for |
//! | [`tenant`] | what a tenant has used and may use |
//! | [`plan`], [`lend`], [`start`] | whose turn it is; devices for one job; its attempt |
//! | [`stock`], [`fit`], [`rates`] | nodes that are alike; which clips fit them; how long those take |
//! | [`gang`], [`reserve`], [`preempt`] | how many devices a clip gets; nodes kept for gangs; who gives way |
//! | [`register`] | who may join, and what becomes of attempts that outlived a session or a scheduler |
//! | [`report`] | heartbeats and reports: which attempts live, which have ended and how |
//! | [`hands`], [`help`] | which devices decode a finished latent, and how others are lent for it |
//! | [`health`] | nodes that fail what others can do |
//! | [`view`], [`why`], [`eta`] | what people may ask: the farm, why a job waits, when it is done |
//! | [`check`] | what must hold after every event |
//! | [`resolve`] | which model a prompt line means, and the key that makes submitting idempotent |
//!
//! The state here is a cache of the queue store plus what nodes last said. Every change is committed before anybody
//! is told of it, so a crash at any point loses only what nobody was told.

mod batch;
pub mod check;
mod class;
pub mod effects;
mod eta;
pub mod events;
pub mod farm;
mod fit;
mod gang;
mod hands;
mod health;
mod help;
mod jobs;
mod lend;
mod plan;
pub(crate) mod planted;
mod preempt;
mod rates;
mod register;
mod report;
mod reserve;
pub mod resolve;
mod start;
mod stock;
mod table;
mod tenant;
pub mod view;
mod why;
mod wishes;

#[cfg(test)]
pub(crate) mod fixture;
#[cfg(test)]
mod gang_rules;
#[cfg(test)]
mod hand_rules;
#[cfg(test)]
mod life_rules;
#[cfg(test)]
mod rules;
#[cfg(test)]
mod share_rules;
