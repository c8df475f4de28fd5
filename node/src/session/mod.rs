//! The node's side of the conversation with the scheduler: connect, register, heartbeat, obey, report, and again.

pub mod actor;
mod helps;
pub mod messages;
pub mod state;
