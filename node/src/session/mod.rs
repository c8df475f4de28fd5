//! The node's side of the conversation with the scheduler: connect, register, heartbeat, obey, report, and again.

pub mod actor;
pub mod messages;
pub mod state;
