//! Jobs: the prompt line a user writes, the render it resolves to, and the states it passes through.

pub mod prompt;
pub mod spec;
pub mod state;
