//! `farm-node` without a farm: checkpoints against reference tensors, and single clips.

use std::path::Path;
use std::process::{Command, Output};

use farm_core::model::latent::{LATENT_KEY, NOISE_KEY, from_safetensors, to_safetensors};
use farm_tests::{programs, repository};
use serde_json::Value;

const PROMPT: &str = "a red ball moving left on a black background";
/// Of the clips below: 7 frames of 64×64.
const LATENT: [usize; 4] = [12, 2, 8, 8];

fn farm_node(args: &[&str]) -> Output {
    Command::new(programs().join("farm-node")).args(args).current_dir(repository()).output().unwrap()
}

fn render(out: &Path, more: &[&str]) -> Output {
    let out = out.to_str().unwrap();
    let clip = ["render", "--prompt", PROMPT, "--model", "assets/mochi-tiny", "--num-frames", "7", "--steps", "4"];
    farm_node(&[&clip[..], &["--out", out], more].concat())
}

fn rendered(out: &Path, more: &[&str]) -> Vec<u8> {
    let output = render(out, more);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    std::fs::read(out).unwrap()
}

#[test]
fn every_checkpoint_agrees_with_its_reference_tensors() {
    for (checkpoint, goldens) in [
        ("tests/goldens/small", "tests/goldens/small/goldens.safetensors"),
        ("tests/goldens/small/original", "tests/goldens/small/goldens.safetensors"),
        ("tests/goldens/small-bf16", "tests/goldens/small-bf16/goldens.safetensors"),
        ("assets/mochi-tiny", "tests/goldens/mochi-tiny/goldens.safetensors"),
    ] {
        let output = farm_node(&["model", "parity", checkpoint, goldens]);
        let printed = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{checkpoint}:\n{printed}{}", String::from_utf8_lossy(&output.stderr));
        println!("{checkpoint}:\n{printed}");
    }
}

#[test]
fn doctor_names_what_is_absent_and_ends_well() {
    let doctor = |args: &[&str]| {
        // In a folder without libraries, as on a machine without any, whatever this one has.
        let empty = tempfile::tempdir().unwrap();
        let mut command = Command::new(programs().join("farm-node"));
        command.arg("doctor").args(args).env("MOCHI_FARM_CUDA_LIBRARIES", empty.path());
        for variable in ["LD_LIBRARY_PATH", "VIRTUAL_ENV", "CONDA_PREFIX", "CUDA_HOME", "CUDA_PATH"] {
            command.env_remove(variable);
        }
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let report: Value = serde_json::from_str(&doctor(&["--json", "--quick"])).unwrap();
    assert!(
        report["machine"]["cores"].as_u64().unwrap() > 0 && report["machine"]["memory_bytes"].as_u64().unwrap() > 0
    );
    assert_eq!(report["encoder"]["error"], Value::Null);
    let libraries = report["cuda"]["libraries"].as_array().unwrap();
    let names: Vec<&str> = libraries.iter().map(|library| library["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["driver", "NVRTC", "cuBLASLt", "cuDNN", "NCCL"]);
    let text = doctor(&["--quick"]);
    for library in libraries {
        let line = text.lines().find(|line| line.starts_with(library["name"].as_str().unwrap())).unwrap();
        let told = match &library["found"] {
            Value::Null => [&library["without"], &library["remedy"]],
            found => [&found["path"], &found["version"]],
        };
        assert!(told.iter().all(|word| line.contains(word.as_str().unwrap())), "{line}");
    }
    // Where there is no driver there is no GPU, and the reason is given.
    if libraries[0]["found"].is_null() {
        assert_eq!(report["cuda"]["devices"], Value::Array(Vec::new()));
        assert!(text.contains("GPUs       none: there is no driver: found no libcuda.so.1;"), "{text}");
    }
}

#[test]
fn goldens_of_another_checkpoint_fail() {
    let output = farm_node(&["model", "parity", "assets/mochi-tiny", "tests/goldens/small/goldens.safetensors"]);
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn a_clip_has_the_same_bits_for_any_number_of_threads() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("clip.rgb");
    let clip = rendered(&path, &["--seed", "3", "--threads", "1"]);
    assert_eq!(clip.len(), 7 * 64 * 64 * 3);
    for threads in ["2", "3"] {
        assert_eq!(clip, rendered(&path, &["--seed", "3", "--threads", threads]), "{threads} threads");
    }
    assert_ne!(clip, rendered(&path, &["--seed", "4"]), "another seed, another clip");
}

#[test]
fn noise_from_a_file_takes_the_place_of_the_seeds() {
    let folder = tempfile::tempdir().unwrap();
    let (noise, latent) = (folder.path().join("noise.safetensors"), folder.path().join("latent.safetensors"));
    let values = farm_core::model::noise::normals(3, 0..LATENT.iter().product::<usize>() as u64);
    std::fs::write(&noise, to_safetensors(NOISE_KEY, &values, LATENT).unwrap()).unwrap();
    let by_seed = rendered(&latent, &["--seed", "3"]);
    let by_file = rendered(&latent, &["--seed", "9", "--noise", noise.to_str().unwrap()]);
    assert_eq!(by_seed, by_file);
    from_safetensors(&by_file, LATENT_KEY, LATENT).unwrap();

    // Of another size: refused before any work, and the earlier file is still there.
    let output = render(&latent, &["--width", "96", "--noise", noise.to_str().unwrap()]);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && error.contains("[1, 12, 2, 8, 12]"), "{error}");
    assert_eq!(std::fs::read(&latent).unwrap(), by_file);
}

#[test]
fn a_request_that_cannot_be_rendered_is_refused_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    for (name, more, hint) in [
        ("clip.mov", &["--seed", "1"][..], ".mp4, .rgb or .safetensors"),
        ("clip.mp4", &["--width", "70"], "width 70 is not a multiple of 16"),
        ("clip.mp4", &["--guidance-scale", "4,5"], "2 values for 4 steps"),
        ("no/such/folder/clip.mp4", &[], "no/such/folder"),
    ] {
        let output = render(&folder.path().join(name), more);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && error.contains(hint), "{name} {more:?}: {error}");
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn a_group_that_cannot_be_is_refused_with_what_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("clip.rgb");
    let peers = "127.0.0.1:9,127.0.0.1:10";
    for (arguments, reason) in [
        (&["--devices", "cpu:4", "--cfg", "2", "--ring", "1", "--ulysses", "3"][..], "needs 6 devices, there are 4"),
        (&["--devices", "cpu:2", "--ring", "0"], "degree of 0"),
        (&["--devices", "cpu:3", "--cfg", "3"], "1 or 2"),
        (&["--devices", "cpu:13", "--ulysses", "13"], "13 ulysses ranks share 12 heads"),
        (&["--devices", "cpu:33", "--ring", "33", "--cfg", "1"], "33 sequence ranks share 32 tokens"),
        (&["--devices", "cpu:65"], "more than 64 ranks"),
        (&["--rank", "2", "--world", "2", "--peers", peers, "--seed", "1"], "leave"),
        (&["--rank", "0", "--world", "3", "--peers", peers, "--seed", "1"], "2 addresses for --world 3"),
        (&["--rank", "0", "--world", "2", "--peers", peers], "same --seed"),
    ] {
        let output = render(&out, arguments);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(1) && error.contains(reason), "{arguments:?}: {error}");
        assert!(!out.exists());
    }
}

#[test]
fn an_inspected_checkpoint_lists_every_tensor() {
    let output = farm_node(&["model", "inspect", "assets/mochi-tiny", "--json"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let inspected: Value = serde_json::from_slice(&output.stdout).unwrap();
    let text = inspected.to_string();
    // Parameters of the transformer, as its README says.
    assert!(text.contains("2201808"), "{text}");
}
