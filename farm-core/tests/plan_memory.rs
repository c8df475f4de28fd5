//! A denoising step holds what a memory plan counts with. Alone in its file: the allocator is that of the process.
#![cfg(feature = "cuda")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use farm_core::engine::cpu::CpuEngine;
use farm_core::engine::cuda::plan::{Clip, Networks, denoise_tensors};
use farm_core::engine::streaming::Streaming;
use farm_core::engine::{Engine, SequenceOps};
use farm_core::model::dit::Dit;
use farm_core::model::weights::Loader;
use farm_core::model::weights::checkpoint::Checkpoint;
use farm_core::parallel::group::RankGroup;
use farm_core::parallel::topology::Topology;
use farm_core::precision::Precision;

/// Counts what is allocated, now and at most since the last reset.
struct Counting;

static USED: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// Safety: the system's, with arithmetic beside it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let used = USED.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(used, Ordering::Relaxed);
        // Safety: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        USED.fetch_sub(layout.size(), Ordering::Relaxed);
        // Safety: the caller's promise.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

#[test]
fn a_step_holds_the_tensors_that_a_plan_counts_with() {
    let checkpoint = Checkpoint::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/mochi-tiny")).unwrap();
    let engine = CpuEngine::new(1).unwrap();
    let (part, group) = (checkpoint.dit().unwrap(), RankGroup::solo().unwrap());
    let (t5, vae) = (checkpoint.t5().unwrap().config(), checkpoint.vae().unwrap().config());
    let networks = Networks { dit: part.config().shape(), t5, vae };
    let loader = Loader { engine: &engine, source: part };
    let streaming = Streaming { resident: 0, slots: 2 };
    for brought in [false, true] {
        let dit = if brought {
            Dit::load_streamed(&loader, part.config(), streaming)
        } else {
            Dit::load(&loader, part.config())
        };
        let dit = dit.unwrap();
        let step = |side: u32| {
            let clip = Clip { width: side, height: side, frames: 25, text: [40, 20] };
            let shape = [12, 5, side as usize / 8, side as usize / 8];
            let held = USED.load(Ordering::Relaxed);
            PEAK.store(held, Ordering::Relaxed);
            let values = |len: usize| (0..len).map(|i| (i % 17) as f32 / 8.0 - 1.0).collect::<Vec<f32>>();
            let latent = engine.upload(&values(shape.iter().product()), &shape).unwrap();
            let geometry = dit.geometry(&engine, &group, shape).unwrap();
            let branches = clip.text.map(|rows| {
                let features = [rows, part.config().text_dim];
                let features = engine.upload(&values(features.iter().product()), &features).unwrap();
                dit.text_conditioning(&engine, &group, Some(&features)).unwrap()
            });
            let branches: Vec<_> = branches.iter().take(if brought { 2 } else { 1 }).collect();
            let velocities = dit.velocities(&engine, &group, &geometry, &latent, 500.0, &branches).unwrap();
            assert!(velocities.iter().all(|v| engine.shape(v) == shape));
            let counted = denoise_tensors(&networks, &clip, Precision::F32, Topology::SOLO, brought);
            [(PEAK.load(Ordering::Relaxed) - held) as f64, counted as f64]
        };
        // What the engine's threads have beside tensors does not grow with the clip.
        let ([small, small_counted], [large, large_counted]) = (step(128), step(256));
        let (took, counted) = (large - small, large_counted - small_counted);
        println!("{large} bytes at the peak, {large_counted} counted; {took} and {counted} more than of a quarter");
        assert!((0.95..1.05).contains(&(took / counted)), "{took} bytes more at the peak, {counted} counted");
    }
}
