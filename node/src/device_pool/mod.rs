//! Which devices exist, who has them, and the attempts that run on them.

pub mod actor;
pub mod messages;
pub mod state;
