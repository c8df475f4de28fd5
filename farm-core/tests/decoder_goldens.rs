//! The video decoder against what PyTorch computes for the same weights and latents (`tests/goldens`), whole and in
//! chunks. Rule: max|a − b| ≤ 5e-5 · max(1, max|b|).
#![cfg(feature = "model")]

use std::path::Path;

use farm_core::engine::cpu::CpuEngine;
use farm_core::engine::{Engine, SequenceOps};
use farm_core::model::latent::VaeLatent;
use farm_core::model::vae::VaeDecoder;
use farm_core::model::weights::Loader;
use farm_core::model::weights::checkpoint::Checkpoint;
use safetensors::SafeTensors;

const TOLERANCE: f32 = 5e-5;

/// `[1, C, T, H, W]` → the shape `[T, H, W, C]` and the values in that order.
fn golden(file: &SafeTensors<'_>, name: &str) -> Option<([usize; 4], Vec<f32>)> {
    let tensor = file.tensor(name).ok()?;
    let &[1, c, t, h, w] = tensor.shape() else { panic!("{name} has shape {:?}", tensor.shape()) };
    let values: Vec<f32> = tensor.data().as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
    let pixels = t * h * w;
    let channels_last = (0..pixels * c).map(|i| values[i % c * pixels + i / c]).collect();
    Some(([t, h, w, c], channels_last))
}

fn check(what: &str, got: &[f32], expected: &[f32]) {
    assert_eq!(got.len(), expected.len(), "{what}");
    assert!(!got.iter().any(|x| x.is_nan()), "{what} has NaN");
    let worst = got.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    let scale = expected.iter().map(|b| b.abs()).fold(1.0, f32::max);
    println!("{what:50} {worst:.2e} at {scale:.3}");
    assert!(worst <= TOLERANCE * scale, "{what}: differs by {worst:.3e}, allowed {:.3e}", TOLERANCE * scale);
}

fn check_decoder(folder: &str, goldens: &str) {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let checkpoint = Checkpoint::open(&repository.join(folder)).unwrap();
    let bytes = std::fs::read(repository.join("tests/goldens").join(goldens).join("goldens.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let engine = CpuEngine::new(2).unwrap();
    let part = checkpoint.vae().unwrap();
    let decoder = VaeDecoder::load(&Loader { engine: &engine, source: part }, part.config()).unwrap();

    let (shape, latent) = golden(&file, "vae.in").unwrap();
    let latent = engine.upload(&latent, &shape).unwrap();
    let (_, expected) = golden(&file, "vae.out_genmo").unwrap();
    let frames = shape[0];
    let mut whole = Vec::new();
    for chunk in [frames, 1, 2, 3] {
        let (mut stream, mut out) = (decoder.stream(), Vec::new());
        for start in (0..frames).step_by(chunk) {
            let part = VaeLatent(engine.narrow(&latent, 0, start, chunk.min(frames - start)).unwrap());
            let tap = &mut |name: &str, x: &<CpuEngine as SequenceOps>::Tensor| {
                if chunk == frames
                    && let Some((_, expected)) = golden(&file, name)
                {
                    check(&format!("{folder} {name}"), &engine.download(x).unwrap(), &expected);
                }
            };
            out.extend(engine.download(&stream.push(&engine, &part, tap).unwrap()).unwrap());
        }
        check(&format!("{folder} vae.out_genmo, {chunk} latents at a time"), &out, &expected);
        if chunk == frames {
            whole = out;
        } else {
            assert!(out == whole, "{folder}: chunks of {chunk} change bits");
        }
    }
}

#[test]
fn decoder_is_the_reference_in_both_layouts_and_any_chunks() {
    check_decoder("tests/goldens/small", "small");
    check_decoder("tests/goldens/small/original", "small");
    check_decoder("assets/mochi-tiny", "mochi-tiny");
}
