//! The subcommands of `farm-node`, one file each.

pub mod bench;
pub mod calibrate;
pub mod join;
pub mod model;
pub mod plan;
pub mod render;
