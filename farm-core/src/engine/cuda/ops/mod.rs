//! The operations of the engine, one function for each method of its traits.

pub(super) mod attention;
pub(super) mod pointwise;
pub(super) mod product;
pub(super) mod rows;
pub(super) mod volume;
pub(super) mod weights;

#[cfg(test)]
mod testing;
