//! A clip's decode: hands, the devices that decode tiles, and the stitcher that deals out the tiles, merges their
//! statistics, blends their pixels and feeds the encoder.
//!
//! ```text
//!  attempt ──▶ stitcher ◀──link──▶ hand on a device of this node
//!                 │     ◀──link──▶ data plane ◀──http──▶ data plane ◀──link──▶ hand on a device of another
//!                 ▼ chunk by chunk
//!            blend, encoder
//! ```

pub mod hand;
pub mod local;
pub mod stitcher;

use std::sync::Arc;

use farm_core::job::spec::{FRAME_STEP, RenderSpec};
use farm_core::model::config::VaeConfig;
use farm_core::model::vae::decode_bytes_per_pixel;
use farm_core::tiles::plan::Tiling;
use farm_core::tiles::shape::Shape;

/// Latent frames of a chunk. One is least memory, and no slower: its volumes are the likeliest to stay in cache.
pub const CHUNK: usize = 1;

/// The decode of a latent `[C, T, h, w]`, or why there is none with this tiling.
pub fn shape(tiling: Tiling, [_, frames, height, width]: [usize; 4], vae: &VaeConfig) -> Result<Arc<Shape>, String> {
    let plan = tiling.plan([height, width], decode_bytes_per_pixel(vae))?;
    let of_chunk = |chunk: usize| if chunk == 0 { 1 } else { FRAME_STEP };
    Ok(Arc::new(Shape::new(plan, (0..frames).map(of_chunk).collect(), vae.norm_shapes())))
}

/// Bytes of the longest message between a hand and its crew: a chunk of a tile that may be the whole frame, or the totals
/// of all steps.
pub fn max_message(spec: &RenderSpec) -> usize {
    let chunk = (FRAME_STEP * spec.width * spec.height) as usize * 3 * size_of::<u16>();
    chunk.max(8 << 20) + (1 << 16)
}
