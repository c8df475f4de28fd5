//! A loaded network takes the memory of its weights once, and the table of a text encoder takes none. Alone in its file: the memory is that of the process.
#![cfg(all(feature = "model", target_os = "linux"))]

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

use farm_core::engine::Engine;
use farm_core::engine::cpu::CpuEngine;
use farm_core::model::t5::T5Encoder;
use farm_core::model::weights::checkpoint::Checkpoint;

/// The table is half as large as all other weights.
const VOCABULARY: usize = 16384;
const WIDTH: usize = 512;
const HEADS: usize = 8;
const HIDDEN: usize = 1024;
const LAYERS: usize = 6;

/// Writes a text encoder of f32 weights; gives the bytes of its table and of all other weights.
fn write_encoder(folder: &Path) -> [u64; 2] {
    let mut shapes = vec![("shared.weight".to_owned(), vec![VOCABULARY, WIDTH])];
    for i in 0..LAYERS {
        let mut push = |name: &str, shape: &[usize]| {
            shapes.push((format!("encoder.block.{i}.layer.{name}.weight"), shape.to_vec()));
        };
        for projection in ["q", "k", "v", "o"] {
            push(&format!("0.SelfAttention.{projection}"), &[WIDTH, WIDTH]);
        }
        if i == 0 {
            push("0.SelfAttention.relative_attention_bias", &[32, HEADS]);
        }
        push("0.layer_norm", &[WIDTH]);
        push("1.DenseReluDense.wi_0", &[HIDDEN, WIDTH]);
        push("1.DenseReluDense.wi_1", &[HIDDEN, WIDTH]);
        push("1.DenseReluDense.wo", &[WIDTH, HIDDEN]);
        push("1.layer_norm", &[WIDTH]);
    }
    shapes.push(("encoder.final_layer_norm.weight".into(), vec![WIDTH]));

    let (mut header, mut values) = (serde_json::Map::new(), 0usize);
    for (name, shape) in shapes {
        let start = values;
        values += shape.iter().product::<usize>();
        let offsets = [4 * start, 4 * values];
        header.insert(name, serde_json::json!({"dtype": "F32", "shape": shape, "data_offsets": offsets}));
    }
    let header = serde_json::to_vec(&header).unwrap();
    fs::create_dir(folder.join("text_encoder")).unwrap();
    let mut file = BufWriter::new(File::create(folder.join("text_encoder/model.safetensors")).unwrap());
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(&header).unwrap();
    for i in 0..values {
        file.write_all(&((i % 251) as f32 / 1000.0).to_le_bytes()).unwrap();
    }
    file.flush().unwrap();
    let table = VOCABULARY * WIDTH;
    [table, values - table].map(|values| 4 * values as u64)
}

/// Of this process, in bytes: `VmRSS` now, `VmHWM` at most since the last reset.
fn memory(field: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

#[test]
fn weights_are_in_memory_once_after_loading_and_the_table_never_is() {
    let folder = tempfile::tempdir().unwrap();
    let [table, size] = write_encoder(folder.path());
    let engine = CpuEngine::new(1).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let before = memory("VmRSS");
    fs::write("/proc/self/clear_refs", "5").unwrap();
    let part = |bytes: u64| bytes.saturating_sub(before) as f64 / size as f64;

    checkpoint.content_hash().unwrap();
    let hashed = part(memory("VmHWM"));
    let t5 = checkpoint.t5().unwrap();
    let encoder = T5Encoder::load(&engine, t5.clone(), t5.config()).unwrap();
    let loaded = part(memory("VmRSS"));
    let encode = |ids: &[u32]| {
        let features = engine.download(&encoder.encode(&engine, ids).unwrap()).unwrap();
        assert!(features.len() == ids.len() * WIDTH && features.iter().all(|value| value.is_finite()));
    };
    encode(&[1, 2, 3]);
    let files = memory("RssFile");
    // A row of every fourth window of pages that a fault maps.
    let ids: Vec<u32> = (0..VOCABULARY as u32).step_by(128).collect();
    encode(&ids);
    let kept = memory("RssFile").saturating_sub(files) as f64 / table as f64;
    let peak = part(memory("VmHWM"));
    println!(
        "of {size} bytes of weights: {hashed:.3} while hashing, {loaded:.3} loaded, {peak:.3} at most; of the table's \
         {table} {kept:.3} are kept"
    );
    assert!(hashed < 0.2, "hashing keeps {hashed:.3} of the weights in memory");
    assert!(loaded < 1.1 && peak < 1.3, "{loaded:.3} times the weights are in memory, {peak:.3} at most");
    assert!(kept < 0.1, "{kept:.3} of the table are in memory after a prompt");
}
