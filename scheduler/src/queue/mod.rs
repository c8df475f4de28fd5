//! The queue and its history on disk: the truth that everything else is rebuilt from.

pub mod sqlite;
pub mod store;

#[cfg(test)]
mod suite;
