//! The node's side of the conversation with the scheduler: connect, register, heartbeat, obey, report, and again.

pub mod actor;
pub mod dialer;
pub mod events;
mod helps;
pub mod messages;
mod reports;
pub mod state;
