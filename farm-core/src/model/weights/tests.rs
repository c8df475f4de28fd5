//! Checkpoint folders: the committed small ones, and hollow ones whose files have headers and no data.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use half::{bf16, f16};

use super::checkpoint::Checkpoint;
use super::names::{self, Entry, Naming};
use super::report::{Layout, PartReport, TensorStatus};
use super::{Loader, StoredTensor, Tensors, Values, WeightError, WeightSource};
use crate::engine::cpu::CpuEngine;
use crate::engine::{Engine, RawDtype, RawTensor};
use crate::model::config::{DitConfig, T5Config, VaeConfig};

fn golden(folder: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens").join(folder)
}

fn published_dit() -> DitConfig {
    DitConfig {
        num_layers: 48,
        num_heads: 24,
        head_dim: 128,
        hidden_x: 3072,
        hidden_y: 1536,
        ffn_x: 8192,
        ffn_y: 4096,
        in_channels: 12,
        text_dim: 4096,
        time_dim: 256,
        pool_heads: 8,
    }
}

/// Stored names and shapes.
type Shapes = Vec<(String, Vec<usize>)>;

fn stored(entries: &[Entry]) -> Shapes {
    let split = |entry: &Entry| {
        let mut shape = entry.shape.clone();
        shape[0] /= entry.stored.len();
        entry.stored.iter().map(|name| (name.clone(), shape.clone())).collect::<Vec<_>>()
    };
    entries.iter().flat_map(split).collect()
}

/// A file of the true size whose data is a hole.
fn write_hollow(path: &Path, dtype: &str, shapes: &[(String, Vec<usize>)]) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let width = if dtype == "F32" { 4 } else { 2 };
    let mut end = 0u64;
    let mut header = serde_json::Map::new();
    for (name, shape) in shapes {
        let start = end;
        end += shape.iter().product::<usize>() as u64 * width;
        header.insert(name.clone(), serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]}));
    }
    let header = serde_json::to_vec(&header).unwrap();
    let mut file = fs::File::create(path).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(&header).unwrap();
    file.set_len(8 + header.len() as u64 + end).unwrap();
}

/// `{stem}{variant}-0000N-of-0000M.safetensors` and `{stem}.safetensors.index{variant}.json`.
fn write_hollow_shards(dir: &Path, stem: &str, variant: &str, dtype: &str, shapes: &Shapes, shards: usize) {
    let mut weight_map = serde_json::Map::new();
    for (number, shard) in shapes.chunks(shapes.len().div_ceil(shards)).enumerate() {
        let name = format!("{stem}{variant}-{:05}-of-{shards:05}.safetensors", number + 1);
        write_hollow(&dir.join(&name), dtype, shard);
        weight_map.extend(shard.iter().map(|(tensor, _)| (tensor.clone(), name.clone().into())));
    }
    let index = serde_json::json!({"metadata": {"total_size": 0}, "weight_map": weight_map});
    fs::write(dir.join(format!("{stem}.safetensors.index{variant}.json")), index.to_string()).unwrap();
}

fn write_config(dir: &Path, part: &str, config: serde_json::Value) {
    fs::create_dir_all(dir.join(part)).unwrap();
    fs::write(dir.join(part).join("config.json"), config.to_string()).unwrap();
}

fn small_dit() -> DitConfig {
    DitConfig {
        num_layers: 2,
        num_heads: 2,
        head_dim: 4,
        hidden_x: 8,
        hidden_y: 4,
        ffn_x: 6,
        ffn_y: 5,
        text_dim: 8,
        ..published_dit()
    }
}

fn original() -> Naming {
    Naming::Original { prefix: String::new() }
}

fn values(tensor: &StoredTensor<'_>) -> Vec<f32> {
    let piece_values = |piece: &RawTensor<'_>| -> Vec<f32> {
        match piece.dtype {
            RawDtype::F32 => piece.bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
            RawDtype::Bf16 => piece.bytes.as_chunks::<2>().0.iter().map(|&b| bf16::from_le_bytes(b).to_f32()).collect(),
            RawDtype::F16 => panic!("no golden is f16"),
        }
    };
    pieces(tensor).iter().flat_map(piece_values).collect()
}

fn pieces<'a>(tensor: &'a StoredTensor<'_>) -> &'a [RawTensor<'a>] {
    match &tensor.values {
        Values::Pieces(pieces) => pieces,
        Values::Drawn(_) => panic!("a checkpoint's tensors are stored"),
    }
}

fn refusal(dir: &Path) -> String {
    Checkpoint::open(dir).unwrap_err().to_string()
}

#[test]
fn both_layouts_of_one_model_give_the_same_tensors() {
    let diffusers = Checkpoint::open(&golden("small")).unwrap();
    let original_layout = Checkpoint::open(&golden("small/original")).unwrap();
    assert_eq!((diffusers.layout(), original_layout.layout()), (Layout::Diffusers, Layout::Original));

    let (a, b) = (diffusers.dit().unwrap(), original_layout.dit().unwrap());
    assert_eq!(a.config(), b.config());
    let dit_names = names::dit(a.config(), &original());
    let (c, d) = (diffusers.vae().unwrap(), original_layout.vae().unwrap());
    assert_eq!((&c.config().channels, &c.config().layers), (&d.config().channels, &d.config().layers));
    let vae_names = names::vae(c.config(), &original());
    let pairs: [(&dyn WeightSource, &dyn WeightSource, Vec<Entry>); 2] = [(a, b, dit_names), (c, d, vae_names)];
    for (a, b, entries) in pairs {
        for Entry { name, shape, .. } in entries {
            let (a, b) = (a.get(&name).unwrap(), b.get(&name).unwrap());
            assert_eq!((&a.shape, &b.shape), (&shape, &shape), "{name}");
            let rows: usize = pieces(&a).iter().map(|piece| piece.shape[0]).sum();
            assert_eq!(rows, shape[0], "{name}");
            let (a, b) = (values(&a), values(&b));
            assert_eq!(a.len(), shape.iter().product::<usize>(), "{name}");
            assert!(a == b, "{name} has other values");
        }
    }
    assert!(original_layout.t5().is_none() && diffusers.t5().is_some());
}

#[test]
fn released_tensors_are_read_again_with_the_same_values() {
    let dir = golden("small");
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let dit = checkpoint.dit().unwrap();
    let names = || names::dit(dit.config(), &Naming::Diffusers).into_iter().map(|entry| entry.name);
    let read = |name: &str| values(&dit.get(name).unwrap());
    let before: Vec<_> = names().map(|name| read(&name)).collect();
    for (name, before) in names().zip(&before) {
        // A borrowed tensor outlives its release.
        let borrowed = dit.get(&name).unwrap();
        dit.release(&name);
        assert!(&values(&borrowed) == before && &read(&name) == before, "{name}");
    }
    dit.release("no tensor");
    let hash = checkpoint.content_hash().unwrap();
    assert_eq!(hash, Checkpoint::open(&dir).unwrap().content_hash().unwrap());
    assert!(names().zip(before).all(|(name, before)| read(&name) == before));
}

#[test]
fn rows_are_those_of_the_whole_matrix_for_every_stored_type_and_piece() {
    /// A matrix `[6, 3]` of three pieces.
    struct Mixed([Vec<u8>; 3]);
    impl WeightSource for Mixed {
        fn get(&self, name: &str) -> Result<StoredTensor<'_>, WeightError> {
            let pieces = [(RawDtype::F32, &[2, 3]), (RawDtype::F16, &[1, 3]), (RawDtype::Bf16, &[3, 3])];
            let pieces = pieces.into_iter().zip(&self.0);
            let pieces = pieces.map(|((dtype, shape), bytes)| RawTensor { dtype, shape, bytes }).collect();
            match name {
                "mixed" => Ok(StoredTensor { shape: vec![6, 3], values: Values::Pieces(pieces) }),
                _ => Err(WeightError::Missing { name: name.into() }),
            }
        }
    }
    let source = Mixed([
        (0..6).flat_map(|i| (i as f32 + 0.1).to_le_bytes()).collect(),
        (6..9).flat_map(|i| f16::from_f32(i as f32).to_le_bytes()).collect(),
        (9..18).flat_map(|i| bf16::from_f32(i as f32).to_le_bytes()).collect(),
    ]);
    let engine = CpuEngine::new(1).unwrap();
    let loader = Loader { engine: &engine, source: &source };
    let whole = engine.download(&loader.tensor("mixed", &[6, 3]).unwrap()).unwrap();
    let rows = [5, 0, 2, 2, 3, 1, 4];
    let expected: Vec<f32> = rows.iter().flat_map(|&row| &whole[3 * row as usize..][..3]).copied().collect();
    let got = loader.rows("mixed", [6, 3], &rows).unwrap();
    assert_eq!((got.dims(), engine.download(&got).unwrap()), (&[7, 3][..], expected));

    let refusal = |name, shape, rows: &[u32]| loader.rows(name, shape, rows).err().unwrap().to_string();
    assert_eq!(refusal("mixed", [6, 3], &[0, 6]), "tensor mixed has no row 6, only 6");
    assert_eq!(refusal("mixed", [7, 3], &[0]), "tensor mixed has shape [6, 3], expected [7, 3]");
    assert_eq!(refusal("other", [6, 3], &[0]), "tensor other is missing from the checkpoint");
}

#[test]
fn the_published_sizes_are_counted_from_headers_alone() {
    let dir = tempfile::tempdir().unwrap();
    let original_dir = dir.path().join("original");
    write_hollow(&original_dir.join("dit.safetensors"), "F32", &stored(&names::dit(&published_dit(), &original())));
    write_hollow(
        &original_dir.join("decoder.safetensors"),
        "F32",
        &stored(&names::vae(&VaeConfig::mochi1(), &original())),
    );
    write_hollow_shards(
        &original_dir.join("t5"),
        "model",
        "",
        "F32",
        &stored(&names::t5(&T5Config::mochi1(), "shared.weight")),
        4,
    );

    let hub = dir.path().join("hub");
    let dit = stored(&names::dit(&published_dit(), &Naming::Diffusers));
    let mut vae = stored(&names::vae(&VaeConfig::mochi1(), &Naming::Diffusers));
    vae.push(("encoder.proj_in.weight".into(), vec![64, 15]));
    write_hollow_shards(&hub.join("transformer"), "diffusion_pytorch_model", ".bf16", "BF16", &dit, 3);
    write_hollow(&hub.join("vae/diffusion_pytorch_model.bf16.safetensors"), "BF16", &vae);
    write_hollow_shards(
        &hub.join("text_encoder"),
        "model",
        "",
        "F32",
        &stored(&names::t5(&T5Config::mochi1(), "shared.weight")),
        4,
    );

    for (dir, layout, counts) in
        [(&original_dir, Layout::Original, [879, 162, 219]), (&hub, Layout::Diffusers, [1071, 162, 219])]
    {
        let inspection = Checkpoint::inspect(dir).unwrap();
        assert_eq!(inspection.findings(), [""; 0]);
        assert_eq!(inspection.layout, layout);
        let parameters: Vec<u64> = inspection.parts.iter().map(|part| part.parameters).collect();
        assert_eq!(parameters, [10_027_677_744, 362_526_595, 4_762_310_656]);
        let used = |part: &PartReport| part.with_status(TensorStatus::Used).len();
        assert_eq!(inspection.parts.iter().map(used).collect::<Vec<_>>(), counts);

        let checkpoint = Checkpoint::open(dir).unwrap();
        assert_eq!(checkpoint.dit().unwrap().config(), &published_dit());
        assert_eq!(checkpoint.t5().unwrap().config(), &T5Config::mochi1());
        let vae = checkpoint.vae().unwrap().config();
        assert_eq!((&vae.channels, &vae.layers), (&VaeConfig::mochi1().channels, &VaeConfig::mochi1().layers));
        assert_eq!((vae.latents_mean[0], vae.latents_std[11]), (-0.06730895953510081, 0.9274757570805041));
    }
    let bytes = &Checkpoint::inspect(&hub).unwrap().parts[0].bytes_by_dtype;
    assert_eq!(bytes["BF16"], 2 * 10_027_677_744);
}

#[test]
fn missing_unknown_and_misshapen_tensors_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("dit.safetensors");
    let sound = stored(&names::dit(&small_dit(), &original()));
    write_hollow(&file, "F32", &sound);
    Checkpoint::open(dir.path()).unwrap();

    let without = |name: &str| sound.iter().filter(|(tensor, _)| tensor != name).cloned().collect::<Shapes>();
    write_hollow(&file, "F32", &without("blocks.1.attn.k_norm_y.weight"));
    assert!(refusal(dir.path()).contains("1 missing tensors: blocks.1.attn.k_norm_y.weight"));
    // A tensor that sizes are told from.
    write_hollow(&file, "F32", &without("x_embedder.proj.weight"));
    assert!(refusal(dir.path()).contains("tensor x_embedder.proj.weight is missing"));

    let mut extra = sound.clone();
    extra.extend((0..30).map(|i| (format!("lora.{i:02}"), vec![1])));
    write_hollow(&file, "F32", &extra);
    let message = refusal(dir.path());
    assert!(message.contains("30 unexpected tensors: lora.00, lora.01"), "{message}");
    assert!(message.contains("lora.19, … (30 in all)") && !message.contains("lora.20"), "{message}");

    let mut misshapen = sound.clone();
    misshapen.iter_mut().find(|(name, _)| name == "t5_yproj.bias").unwrap().1 = vec![9];
    write_hollow(&file, "F32", &misshapen);
    assert!(refusal(dir.path()).contains("t5_yproj.bias [9] instead of [4]"), "{}", refusal(dir.path()));

    write_hollow(&file, "I16", &sound);
    assert!(refusal(dir.path()).contains("not of F32, F16 or BF16: "), "{}", refusal(dir.path()));
}

#[test]
fn a_configuration_that_contradicts_the_tensors_is_refused_with_both_values() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("transformer/diffusion_pytorch_model.safetensors");
    write_hollow(&file, "BF16", &stored(&names::dit(&small_dit(), &Naming::Diffusers)));
    write_config(dir.path(), "transformer", serde_json::json!({"num_layers": 3, "num_attention_heads": 2}));
    assert!(refusal(dir.path()).contains("transformer/config.json says num_layers is 3, the tensors say 2"));
    write_config(dir.path(), "transformer", serde_json::json!({"qk_norm": "layer_norm"}));
    assert!(refusal(dir.path()).contains("qk_norm is \"layer_norm\", only \"rms_norm\" is supported"));
    write_config(dir.path(), "transformer", serde_json::json!({"num_layers": "2"}));
    assert!(refusal(dir.path()).contains("num_layers is \"2\", expected a whole number"));
    write_config(dir.path(), "transformer", serde_json::json!({"num_layers": 2, "out_channels": null}));
    Checkpoint::open(dir.path()).unwrap();

    // A decoder whose projections do not fit the expansions.
    let vae = VaeConfig { channels: vec![64, 64, 32, 32], layers: vec![1; 5], ..VaeConfig::mochi1() };
    write_hollow(
        &dir.path().join("vae/diffusion_pytorch_model.safetensors"),
        "BF16",
        &stored(&names::vae(&vae, &Naming::Diffusers)),
    );
    write_config(dir.path(), "vae", serde_json::json!({"temporal_expansions": [1, 3, 2]}));
    let message = refusal(dir.path());
    assert!(
        message.contains("up stage 0 has 768 rows, but expansions 2 (time) and 2 (space) of 64 channels need 512"),
        "{message}"
    );
    write_config(dir.path(), "vae", serde_json::json!({"layers_per_block": [1, 2, 1, 1, 1]}));
    assert!(refusal(dir.path()).contains("layers_per_block is [1, 2, 1, 1, 1], the tensors say [1, 1, 1, 1, 1]"));
    write_config(dir.path(), "vae", serde_json::json!({"scaling_factor": 2.0, "latents_std": vec![3.0; 12]}));
    assert_eq!(Checkpoint::open(dir.path()).unwrap().vae().unwrap().config().latents_std, [1.5; 12]);

    // Parts that do not fit each other.
    let t5 =
        T5Config { vocab_size: 10, d_model: 16, num_heads: 2, d_kv: 2, d_ff: 3, num_layers: 1, ..T5Config::mochi1() };
    write_hollow(
        &dir.path().join("text_encoder/model.safetensors"),
        "F32",
        &stored(&names::t5(&t5, "encoder.embed_tokens.weight")),
    );
    assert!(refusal(dir.path()).contains("takes text of width 8, the text encoder gives 16"));
}

#[test]
fn the_widest_precision_is_read_and_said() {
    let dir = tempfile::tempdir().unwrap();
    let part = dir.path().join("transformer");
    let shapes = stored(&names::dit(&small_dit(), &Naming::Diffusers));
    write_hollow_shards(&part, "diffusion_pytorch_model", ".bf16", "BF16", &shapes, 2);
    let only = Checkpoint::open(dir.path()).unwrap();
    assert!(only.notes().is_empty(), "{:?}", only.notes());
    write_hollow_shards(&part, "diffusion_pytorch_model", "", "F32", &shapes, 3);
    let both = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(both.inspection().parts[0].bytes_by_dtype.keys().collect::<Vec<_>>(), ["F32"]);
    assert!(both.notes()[0].contains("index.json is read (4 bytes a value)"), "{:?}", both.notes());

    // An unfinished download of the wider files does not hide the others.
    fs::remove_file(part.join("diffusion_pytorch_model-00002-of-00003.safetensors")).unwrap();
    let rest = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(rest.inspection().parts[0].bytes_by_dtype.keys().collect::<Vec<_>>(), ["BF16"]);
    assert!(rest.notes()[0].contains("1 of its 3 files are not there"), "{:?}", rest.notes());
    fs::remove_file(part.join("diffusion_pytorch_model.bf16-00001-of-00002.safetensors")).unwrap();
    assert!(refusal(dir.path()).contains("lists files that are not there: diffusion_pytorch_model"));
}

#[test]
fn a_folder_of_both_layouts_is_read_as_diffusers_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    write_hollow(&dir.path().join("dit.safetensors"), "F32", &[]);
    write_hollow(
        &dir.path().join("transformer/diffusion_pytorch_model.safetensors"),
        "BF16",
        &stored(&names::dit(&small_dit(), &Naming::Diffusers)),
    );
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.layout(), Layout::Diffusers);
    assert!(checkpoint.notes()[0].contains("holds both layouts"), "{:?}", checkpoint.notes());
}

#[test]
fn a_repackaged_file_is_read_through_its_prefix() {
    let dir = tempfile::tempdir().unwrap();
    let naming = Naming::Original { prefix: "model.diffusion_model.".into() };
    write_hollow(&dir.path().join("dit.safetensors"), "F16", &stored(&names::dit(&small_dit(), &naming)));
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.dit().unwrap().get("blocks.1.mlp_x.w2.weight").unwrap().shape, [8, 6]);
}

#[test]
fn an_index_that_lies_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let part = dir.path().join("transformer");
    let shapes = stored(&names::dit(&small_dit(), &Naming::Diffusers));
    write_hollow_shards(&part, "diffusion_pytorch_model", "", "F32", &shapes, 2);
    let shards =
        ["diffusion_pytorch_model-00001-of-00002.safetensors", "diffusion_pytorch_model-00002-of-00002.safetensors"];
    // The same tensors in both shards.
    fs::copy(part.join(shards[0]), part.join(shards[1])).unwrap();
    let message = refusal(dir.path());
    assert!(message.contains("is in both") && message.contains("but it is not"), "{message}");
}

#[test]
fn a_folder_without_weights_says_what_was_expected() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("transformer")).unwrap();
    assert!(refusal(dir.path()).contains("holds no checkpoint"));
    assert!(refusal(&dir.path().join("nowhere")).contains("holds no checkpoint"));
}

#[test]
fn the_content_hash_covers_weights_configurations_tokenizer_and_defaults() {
    let dir = tempfile::tempdir().unwrap();
    let weights = dir.path().join("transformer/diffusion_pytorch_model.safetensors");
    write_hollow(&weights, "BF16", &stored(&names::dit(&small_dit(), &Naming::Diffusers)));
    let hash = || Checkpoint::open(dir.path()).unwrap().content_hash().unwrap().to_string();
    let mut seen = vec![hash()];
    assert_eq!(seen[0], hash());
    let mut expect_change = |what: &str| {
        let now = hash();
        assert!(!seen.contains(&now), "{what} does not change the hash");
        seen.push(now);
    };
    write_config(dir.path(), "transformer", serde_json::json!({"num_layers": 2}));
    expect_change("a configuration");
    fs::create_dir(dir.path().join("tokenizer")).unwrap();
    fs::write(dir.path().join("tokenizer/tokenizer.json"), "{}").unwrap();
    expect_change("the tokenizer");
    let defaults = r#"{"width":64,"height":64,"num_frames":25,"num_inference_steps":24,"guidance_scale":4.5}"#;
    fs::write(dir.path().join("generation_config.json"), defaults).unwrap();
    expect_change("the generation defaults");
    let mut bytes = fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&weights, bytes).unwrap();
    expect_change("a weight");
    // Files that are not read do not count.
    fs::write(dir.path().join("README.md"), "x").unwrap();
    assert_eq!(seen.last(), Some(&hash()));
}

#[test]
fn generation_defaults_have_to_be_legal() {
    let dir = tempfile::tempdir().unwrap();
    write_hollow(&dir.path().join("dit.safetensors"), "F32", &stored(&names::dit(&small_dit(), &original())));
    assert_eq!(Checkpoint::open(dir.path()).unwrap().generation_defaults().num_frames, 163);
    let path = dir.path().join("generation_config.json");
    fs::write(&path, r#"{"width":64,"height":64,"num_frames":24,"num_inference_steps":24,"guidance_scale":4.5}"#)
        .unwrap();
    assert!(refusal(dir.path()).contains("num_frames 24"));
    fs::write(&path, r#"{"width":64}"#).unwrap();
    assert!(refusal(dir.path()).contains("missing field"));
}

#[test]
fn the_bundled_checkpoint_is_complete() {
    let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/mochi-tiny");
    let checkpoint = Checkpoint::open(&assets).unwrap();
    let parameters: Vec<u64> = checkpoint.inspection().parts.iter().map(|part| part.parameters).collect();
    assert_eq!((parameters[0], parameters[2]), (2_201_808, 94_656));
    assert_eq!(checkpoint.generation_defaults().num_inference_steps, 24);
    let dit = checkpoint.dit().unwrap().config();
    assert_eq!((dit.num_heads, dit.head_dim, dit.num_layers, dit.hidden_y), (12, 16, 3, 48));
    let vae = checkpoint.vae().unwrap().config();
    assert_eq!((&vae.channels[..], &vae.layers[..]), (&[64, 32, 32, 32][..], &[1; 5][..]));
    assert_eq!((vae.latents_mean[3], &vae.temporal_expansions[..]), (1.2578229904174805, &[3, 2, 1][..]));
}
