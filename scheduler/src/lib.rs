//! The farm's scheduler: a durable queue, a pure planning core and the public HTTP API.
//!
//! | module | subject |
//! |---|---|
//! | [`core`] | what the farm decides: `(state, event, now) → effects` |
//! | [`queue`] | the truth on disk |
//! | [`actor`] | takes events in order, lets the core decide, commits, then speaks |
//! | [`lead`] | who leads, and for how long |
//! | [`api`] | what `farmctl` and people talk to |
//! | [`gc`], [`config`] | what is not kept; prices and retention |
//! | [`link`] | the way to the nodes |
//! | [`bench`] | how fast and how fair it is |
//! | [`listen`], [`run`] | the one port; start and stop |
//! | [`sim`] | a simulator of the whole farm around the core |

pub mod actor;
pub mod api;
pub mod bench;
pub mod config;
pub mod core;
pub mod gc;
pub mod lead;
pub mod link;
pub mod listen;
pub mod queue;
pub mod run;
pub mod sim;
