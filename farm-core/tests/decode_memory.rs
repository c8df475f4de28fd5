//! Decoding a long clip takes the memory of decoding a short one. Alone in its file: peaks are those of the process.
#![cfg(all(feature = "model", target_os = "linux"))]

use std::fs;
use std::path::Path;

use farm_core::engine::cpu::CpuEngine;
use farm_core::engine::{Engine, SequenceOps};
use farm_core::model::latent::{DitLatent, VaeLatent};
use farm_core::model::noise::normals;
use farm_core::model::vae::VaeDecoder;
use farm_core::model::weights::Loader;
use farm_core::model::weights::checkpoint::Checkpoint;

/// Peak resident set of this process in KiB since the last reset.
fn peak_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

fn reset_peak() {
    fs::write("/proc/self/clear_refs", "5").unwrap();
}

#[test]
fn memory_does_not_grow_with_the_number_of_frames() {
    let engine = CpuEngine::new(2).unwrap();
    let checkpoint = Checkpoint::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/mochi-tiny")).unwrap();
    let part = checkpoint.vae().unwrap();
    let decoder = VaeDecoder::load(&Loader { engine: &engine, source: part }, part.config()).unwrap();

    // The sum over bytes is used, so that no decode can be left out.
    let decode = |latent_frames: usize| {
        let shape = [12, latent_frames, 8, 16];
        let noise = normals(1, 0..shape.iter().product::<usize>() as u64);
        let latent = decoder.denormalize(&engine, &DitLatent(engine.upload(&noise, &shape).unwrap())).unwrap();
        reset_peak();
        let (mut stream, mut frames, mut sum) = (decoder.stream(), 0, 0u64);
        for t in 0..latent_frames {
            let part = VaeLatent(engine.narrow(&latent.0, 0, t, 1).unwrap());
            let out = stream.push(&engine, &part, &mut |_, _| ()).unwrap();
            frames += engine.shape(&out)[0];
            sum += engine.to_rgb8(&out).unwrap().iter().map(|&b| u64::from(b)).sum::<u64>();
        }
        (frames, sum, peak_kib())
    };
    // The allocator keeps what is freed in other pieces each time, a few percent of the peak: medians of three.
    let [short, long] = [(6, 31), (28, 163)].map(|(latent_frames, frames)| {
        let mut peaks = [(); 3].map(|()| {
            let (made, sum, peak) = decode(latent_frames);
            assert!(made == frames && sum > 0);
            peak
        });
        peaks.sort();
        peaks[1]
    });
    println!("peak of 31 frames {short} KiB, of 163 frames {long} KiB");
    assert!(long as f64 <= 1.2 * short as f64, "31 frames peak at {short} KiB, 163 at {long} KiB");
}
