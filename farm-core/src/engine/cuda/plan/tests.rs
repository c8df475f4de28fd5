use proptest::prelude::*;

use super::sizes::Values;
use super::*;
use crate::engine::cuda::device::Dtype;

const TEXT: [usize; 2] = [256, 0];
const LARGE: Clip = Clip { width: 848, height: 480, frames: 163, text: TEXT };

/// Rates of a card with 24 GB (rtx4090 in config/devices.toml), and of its link at what copies from page-locked memory
/// sustain.
fn target(gigabytes: f64) -> Target {
    let device = DeviceRates {
        linear: 82e12,
        attention: 82e12,
        memory: gigabytes * 1e9,
        bandwidth: 1008e9,
        value_bytes: 2,
        shared_weights: false,
    };
    Target { device, host_link: LinkRates { bandwidth: 22e9, latency: 10e-6 } }
}

fn planned(clip: Clip, precision: Precision, gigabytes: f64) -> Result<Plan, Misfit> {
    let (t5, vae) = (T5Config::mochi1(), VaeConfig::mochi1());
    let networks = Networks { dit: ModelShape::mochi1(), t5: &t5, vae: &vae };
    plan(&networks, &clip, precision, Topology::SOLO, &target(gigabytes))
}

#[test]
fn weights_are_as_many_as_are_published() {
    let model = ModelShape::mochi1();
    let sum = |values: Values| values.matrices + values.vectors;
    for layer in [0, 47] {
        assert_eq!(sum(sizes::block(&model, layer)), model.block_parameters(layer));
    }
    assert_eq!(sizes::block(&model, 0).bytes(Dtype::Bf16) / 1_000_000, 415);
    assert_eq!(sum(sizes::around_blocks(&model)), model.other_parameters());
    let vectors = [sizes::block(&model, 0), sizes::block(&model, 47), sizes::around_blocks(&model)];
    assert_eq!(vectors.map(|values| values.vectors), [23_552, 17_408, 36_912]);
    // With the embedding table and the table of relative positions.
    let (table, positions) = (32128 * 4096, 32 * 64);
    let encoder =
        24 * sum(sizes::text_block(&T5Config::mochi1())) + sum(sizes::around_text_blocks(&T5Config::mochi1()));
    assert_eq!(encoder + table + positions, 4_762_310_656);
    assert_eq!(sum(sizes::decoder(&VaeConfig::mochi1())), 362_526_595);
}

#[test]
fn the_longest_clip_fits_into_16_gigabytes_at_the_speed_of_resident_weights() {
    for gigabytes in [16.0, 24.0] {
        let plan = planned(LARGE, Precision::Bf16, gigabytes).unwrap();
        println!("{gigabytes} GB\n{plan}\n");
        assert!(plan.peak() <= plan.usable && plan.tiling == Tiling::WHOLE);
        // 415 MB for each but the last of all, which has less.
        let streamed = (0..48).filter(|layer| plan.streaming.streams(*layer, 48));
        let matrices = streamed.map(|layer| 2 * sizes::block(&ModelShape::mochi1(), layer).matrices);
        assert_eq!(plan.parked, matrices.sum::<u64>(), "{plan}");
        assert!(plan.speed.step <= 1.05 * plan.speed.resident_step);
    }
}

#[test]
fn with_room_for_everything_everything_stays() {
    let plan = planned(LARGE, Precision::Bf16, 80.0).unwrap();
    println!("{plan}");
    assert!(plan.kept && plan.streaming.resident == 48);
    let plan = planned(LARGE, Precision::Bf16, 40.0).unwrap();
    assert!(!plan.kept && plan.streaming == Streaming { resident: 48, slots: 0 }, "{plan}");
}

#[test]
fn a_clip_that_does_not_fit_says_what_would_and_that_does() {
    let misfit = planned(LARGE, Precision::F32, 6.0).unwrap_err();
    println!("{misfit}");
    let text = misfit.to_string();
    assert!(text.starts_with("the denoise stage takes") && text.contains("GB more than the 5.70 GB"), "{text}");
    let lacks = format!(", {:.2} GB more", (misfit.takes - misfit.usable) as f64 / 1e9);
    assert!(misfit.remedies.len() == 3 && text.contains(&lacks), "{text}");
    for remedy in misfit.remedies {
        let mut changed = (LARGE, Precision::F32);
        match remedy {
            Remedy::Precision(precision) => changed.1 = precision,
            Remedy::Frames(frames) => {
                changed.0.frames = frames;
                assert!(planned(Clip { frames: frames + FRAME_STEP, ..LARGE }, Precision::F32, 6.0).is_err());
            }
            Remedy::Size { width, height } => (changed.0.width, changed.0.height) = (width, height),
        }
        assert!(planned(changed.0, changed.1, 6.0).is_ok(), "{remedy}");
    }
    let misfit = planned(LARGE, Precision::Bf16, 0.5).unwrap_err();
    assert!(misfit.to_string().contains("no clip of this model fits"), "{misfit}");
}

#[test]
fn a_frame_too_large_to_decode_is_cut_into_tiles() {
    let plan = planned(LARGE, Precision::F32, 12.0).unwrap();
    println!("{plan}");
    let tiles = plan.tiling.plan(LARGE.latent(), 1).unwrap();
    assert!(tiles.tiles.len() > 1 && plan.peak() <= plan.usable, "{plan}");
}

#[test]
fn a_plan_after_a_failure_takes_a_tenth_less_until_nothing_fits() {
    let mut last = planned(LARGE, Precision::Bf16, 24.0).unwrap();
    let misfit = loop {
        match planned(LARGE, Precision::Bf16, last.less() / 1e9) {
            Ok(next) => {
                assert!(next.peak() * 10 <= last.peak() * 9);
                last = next;
            }
            Err(misfit) => break misfit,
        }
    };
    assert!(!misfit.remedies.is_empty(), "{misfit}");
}

#[test]
fn a_plan_is_read_as_it_is_written() {
    let plan = planned(LARGE, Precision::Bf16, 16.0).unwrap();
    let json = serde_json::to_value(&plan).unwrap();
    assert_eq!(json["stages"][1]["stage"], "denoise");
    assert_eq!(json["tiling"], "whole");
    assert_eq!(serde_json::from_value::<Plan>(json).unwrap(), plan);
}

fn clips() -> impl Strategy<Value = Clip> {
    let sizes = (1u32..80, 1u32..50, 0u32..28);
    (sizes, 0usize..257, 0usize..257).prop_map(|((width, height, chunks), cond, uncond)| Clip {
        width: 16 * width,
        height: 16 * height,
        frames: 6 * chunks + 1,
        text: [cond, uncond],
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_plan_fits_and_more_memory_never_makes_it_worse(clip in clips(), gigabytes in 2.0f64..100.0, exact: bool) {
        let precision = if exact { Precision::F32 } else { Precision::Bf16 };
        if let Ok(plan) = planned(clip, precision, gigabytes) {
            prop_assert!(plan.peak() <= plan.usable);
            prop_assert!(plan.speed.step >= plan.speed.resident_step * (1.0 - 1e-9));
            let more = planned(clip, precision, 1.2 * gigabytes);
            let more = more.map_err(|misfit| TestCaseError::fail(misfit.to_string()))?;
            prop_assert!(more.kept >= plan.kept);
            let whole = |plan: &Plan| plan.tiling == Tiling::WHOLE;
            prop_assert!(whole(&more) >= whole(&plan));
            // A whole decode may take the room of blocks.
            prop_assert!(more.streaming.resident >= plan.streaming.resident || (whole(&more) && !whole(&plan)));
        }
    }

    #[test]
    fn a_smaller_clip_takes_no_more(clip in clips(), exact: bool) {
        let precision = if exact { Precision::F32 } else { Precision::Bf16 };
        let large = planned(clip, precision, 200.0).unwrap();
        let smaller = [
            Clip { frames: clip.frames.saturating_sub(6).max(1), ..clip },
            Clip { width: clip.width.saturating_sub(16).max(16), ..clip },
            Clip { text: clip.text.map(|text| text / 2), ..clip },
        ];
        for smaller in smaller {
            let small = planned(smaller, precision, 200.0).unwrap();
            for (small, large) in small.stages.iter().zip(&large.stages) {
                prop_assert!(small.bytes() <= large.bytes(), "{:?}: {:?} of {:?}", smaller, small, large);
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_short_of_memory_in_that_stage(clip in clips(), gigabytes in 0.1f64..8.0) {
        if let Err(misfit) = planned(clip, Precision::F32, gigabytes) {
            prop_assert!(misfit.takes > misfit.usable);
        }
    }
}
