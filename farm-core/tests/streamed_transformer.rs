//! The transformer on an emulated GPU, its blocks on the device or fetched from the host's memory.
#![cfg(feature = "cuda")]

use std::path::Path;
use std::sync::Arc;

use farm_core::engine::cuda::CudaEngine;
use farm_core::engine::cuda::emulation::Emulation;
use farm_core::engine::streaming::Streaming;
use farm_core::engine::{Engine, EngineError};
use farm_core::model::ModelError;
use farm_core::model::dit::Dit;
use farm_core::model::weights::Loader;
use farm_core::model::weights::checkpoint::Checkpoint;
use farm_core::parallel::group::RankGroup;
use farm_core::precision::Precision;

/// Of a device with `memory` bytes: the bits of two branches' velocities in two steps, and bytes in use between them.
fn velocities(
    precision: Precision,
    memory: usize,
    streaming: Option<Streaming>,
) -> Result<(Vec<u32>, usize), ModelError> {
    let checkpoint = Checkpoint::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/mochi-tiny")).unwrap();
    let engine = CudaEngine::new(Arc::new(Emulation::with_memory(memory)), precision);
    let (part, group) = (checkpoint.dit().unwrap(), RankGroup::solo()?);
    let loader = Loader { engine: &engine, source: part };
    let dit = match streaming {
        Some(streaming) => Dit::load_streamed(&loader, part.config(), streaming)?,
        None => Dit::load(&loader, part.config())?,
    };
    let values = |len: usize| (0..len).map(|i| (i * 31 % 17) as f32 / 8.0 - 1.0).collect::<Vec<f32>>();
    let shape = [12, 1, 4, 6];
    let latent = engine.upload(&values(shape.iter().product()), &shape)?;
    let geometry = dit.geometry(&engine, &group, shape)?;
    let features = engine.upload(&values(5 * part.config().text_dim), &[5, part.config().text_dim])?;
    let branches = [Some(&features), None].map(|features| dit.text_conditioning(&engine, &group, features));
    let [cond, uncond] = branches;
    let (cond, uncond) = (cond?, uncond?);
    let (mut bits, used) = (Vec::new(), engine.device().used());
    for timestep in [0.0, 400.0] {
        for velocity in dit.velocities(&engine, &group, &geometry, &latent, timestep, &[&cond, &uncond])? {
            bits.extend(engine.download(&velocity)?.into_iter().map(f32::to_bits));
        }
        assert_eq!(engine.device().used(), used, "{streaming:?}: a step gives back what it takes");
    }
    Ok((bits, used))
}

#[test]
fn fetched_blocks_give_the_bits_of_resident_ones_in_less_memory() {
    for precision in [Precision::F32, Precision::Bf16] {
        let (expected, all) = velocities(precision, usize::MAX, None).unwrap();
        assert!(expected.iter().all(|bits| f32::from_bits(*bits).is_finite()));
        for (resident, slots) in [(0, 2), (2, 1)] {
            let streaming = Streaming { resident, slots };
            let (got, used) = velocities(precision, usize::MAX, Some(streaming)).unwrap();
            assert!(got == expected, "{precision}, {streaming:?}: other bits");
            // Of three blocks the slots take as many as there are, and what is fetched is no longer where it was.
            assert!(used < all || resident + slots == 3, "{precision}, {streaming:?}: {used} of {all} bytes");
        }
    }
}

#[test]
fn a_device_without_room_for_resident_blocks_has_room_for_fetched_ones() {
    let all = velocities(Precision::Bf16, usize::MAX, None).unwrap().1;
    let resident = velocities(Precision::Bf16, all - 1, None);
    assert!(matches!(resident, Err(ModelError::Engine(EngineError::OutOfMemory { .. }))));
    velocities(Precision::Bf16, all - 1, Some(Streaming { resident: 0, slots: 1 })).unwrap();
}
