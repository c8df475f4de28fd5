//! The CPU engine: candle-core tensors in f32, with own kernels where candle has none.

pub mod conv;
pub mod volume;
