//! What decoding a tile takes is what a plan counts with. Alone in its file: peaks are those of the process.
#![cfg(all(feature = "model", target_os = "linux"))]

use std::fs;
use std::sync::Arc;

use farm_core::engine::cpu::CpuEngine;
use farm_core::engine::{Engine, SequenceOps};
use farm_core::model::latent::VaeLatent;
use farm_core::model::vae::{Advance, TileStream, decode_bytes_per_pixel, random};
use farm_core::tiles::message::Frame;
use farm_core::tiles::plan::Tiling;

/// Peak resident set of this process in bytes since the last reset.
fn peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    1024 * line.trim().trim_end_matches(" kB").parse::<u64>().unwrap()
}

#[test]
fn a_pixel_of_a_tile_takes_the_bytes_that_a_plan_counts_with() {
    let engine = CpuEngine::new(2).unwrap();
    let config = random::published_layers();
    let decoder = Arc::new(random::decoder(&engine, &config, 1).unwrap());
    let decode = |height: usize, width: usize| {
        let latent = [2, height, width, 12];
        let latent = engine.upload(&vec![0.5; latent.iter().product()], &latent).unwrap();
        let plan = Tiling::WHOLE.plan([height, width], 1).unwrap();
        let frame = Frame { mode: plan.mode, latent: plan.latent, grid: plan.grid };
        fs::write("/proc/self/clear_refs", "5").unwrap();
        let mut tile = TileStream::new(decoder.clone(), 0, plan.tiles[0], frame).unwrap();
        for t in 0..2 {
            let chunk = VaeLatent(engine.narrow(&latent, 0, t, 1).unwrap());
            assert!(matches!(tile.begin(&engine, &chunk).unwrap(), Advance::Frames(_)));
        }
        peak()
    };
    let [small, large] = [(8, 8), (16, 20)].map(|(height, width)| decode(height, width));
    let (got, counted) = ((large - small) / (16 * 20 - 8 * 8), decode_bytes_per_pixel(&config));
    println!("{got} bytes a latent pixel, {counted} counted");
    // A tile with pixels around it holds one tensor more, and that one is counted always.
    assert!(got <= counted && 2 * got >= counted, "{got} bytes a latent pixel, {counted} counted");
}
