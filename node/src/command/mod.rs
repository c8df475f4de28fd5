//! The subcommands of `farm-node`, one file each.

pub mod bench;
pub mod join;
pub mod render;
