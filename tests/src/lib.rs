//! What several tests over real processes and servers need.

pub mod s3;
