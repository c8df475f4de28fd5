//! Clips are decoded in tiles, by whoever has time for it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use farm_tests::clip::probe;
use farm_tests::farm::{Farm, Setup};
use farm_tests::{programs, repository, wait_until};
use jiff::Timestamp;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(240);
const TILES: &str = "shared:6x6+2";

fn farm() -> Farm {
    Farm::set_up(Setup { scheduler: vec!["--tiles".into(), TILES.into()], ..Setup::default() })
}

fn line(id: &str, frames: u32, steps: u32) -> Value {
    json!({
        "id": id, "prompt": "a red ball moving left on a black background", "width": 96, "height": 64, "seed": 3,
        "num_frames": frames, "num_inference_steps": steps
    })
}

fn lines(values: &[Value]) -> String {
    values.iter().map(Value::to_string).collect::<Vec<_>>().join("\n")
}

/// The lines of a job's log, with their times.
fn log(farm: &Farm, job: &Value) -> Vec<(String, Timestamp)> {
    let log = farm.json(&["logs", job["job"].as_str().unwrap()]);
    let text = |line: &Value, key: &str| line[key].as_str().unwrap().to_owned();
    let lines = log["lines"].as_array().unwrap().iter();
    lines.map(|line| (text(line, "line"), text(line, "at").parse().unwrap())).collect()
}

/// When a line of a job's log was written, if it was once and no more.
fn at(log: &[(String, Timestamp)], text: &str) -> Timestamp {
    let at: Vec<Timestamp> = log.iter().filter(|(line, _)| line == text).map(|(_, at)| *at).collect();
    assert_eq!(at.len(), 1, "{text:?} in {log:#?}");
    at[0]
}

#[test]
fn a_node_that_decodes_has_one_clip_while_the_one_that_denoises_has_the_next() {
    let mut split = farm();
    split.start_node_with("painter", 1, &["--role", "denoise"]);
    split.start_node_with("reader", 1, &["--role", "decode"]);
    let mut first = line("first", 85, 4);
    // Else the shorter one would go first.
    first["priority"] = 1.into();
    split.submit(&lines(&[first, line("second", 7, 4)]));
    let jobs = split.done(LIMIT);
    let first = &jobs[0]["result"];
    assert_eq!((&first["node"], &first["decode"]["hands"]), (&json!("painter"), &json!(["reader 0"])));
    let logs: Vec<_> = jobs.iter().map(|job| log(&split, job)).collect();
    assert!(at(&logs[0], "decode begins") < at(&logs[1], "denoise begins"), "one device does one thing");
    assert!(at(&logs[1], "denoise begins") < at(&logs[0], "upload begins"), "not at the same time: {logs:#?}");

    let mut alone = farm();
    alone.start_node("only", 1);
    alone.submit(&lines(&[line("first", 85, 4)]));
    let result = &alone.done(LIMIT)[0]["result"];
    assert_eq!(result["decode"]["hands"], json!(["only 0"]));
    assert_eq!(result["clip_sha256"], first["clip_sha256"]);
}

#[test]
fn a_clip_whose_node_dies_in_the_decode_is_decoded_by_another_and_not_denoised_again() {
    let mut farm = farm();
    for name in ["one", "two"] {
        farm.start_node(name, 1);
    }
    farm.submit(&lines(&[line("clip", 163, 2)]));
    let mut job = Value::Null;
    wait_until(LIMIT, "both nodes decode", || {
        job = farm.json(&["list"])["jobs"][0].clone();
        assert_ne!(job["state"], "done", "too fast to be killed");
        let nodes = farm.json(&["nodes"]);
        let busy = nodes["nodes"].as_array().is_some_and(|all| all.iter().all(|n| !n["devices"][0]["job"].is_null()));
        busy && job["progress"]["stage"] == "decode" && job["progress"]["done"] != 0
    });
    let detail = farm.json(&["show", job["job"].as_str().unwrap()]);
    let victim = detail["attempts"][0]["node"].as_str().unwrap().to_owned();
    let heir = if victim == "one" { "two" } else { "one" };
    farm.kill_node(&victim);

    let job = farm.done(LIMIT).remove(0);
    let outcomes: Vec<_> = job["attempts"].as_array().unwrap().iter().map(|a| a["outcome"].clone()).collect();
    assert_eq!(outcomes, ["node_lost", "completed"]);
    assert_eq!(
        (&job["result"]["node"], &job["result"]["decode"]["hands"]),
        (&json!(heir), &json!([format!("{heir} 0")]))
    );
    let log = log(&farm, &job);
    // Panics if there is a second.
    at(&log, "denoise begins");
    at(&log, "the latent is finished already");
}

#[test]
fn clips_of_any_length_have_all_their_frames_in_tiles_too() {
    const FRAMES: [u32; 4] = [1, 7, 19, 25];
    let mut farm = farm();
    farm.start_node("only", 2);
    farm.submit(&lines(&FRAMES.map(|frames| line(&format!("clip-{frames}"), frames, 2))));
    for (job, frames) in farm.done(LIMIT).iter().zip(FRAMES) {
        let result = &job["result"];
        assert_eq!((&result["spec"]["num_frames"], &result["decode"]["mode"]), (&json!(frames), &json!("shared")));
        let probed = probe(&farm.folder().join("store").join(result["clip"].as_str().unwrap()));
        assert_eq!(probed["nb_read_frames"], frames.to_string());
        assert_eq!((&probed["width"], &probed["height"]), (&json!(96), &json!(64)));
    }
}

/// A file with one tensor of f32.
fn latent(key: &str, shape: &[usize], value: f32) -> Vec<u8> {
    let values = vec![value; shape.iter().product()];
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let tensor = TensorView::new(Dtype::F32, shape.to_vec(), &bytes).unwrap();
    safetensors::serialize(HashMap::from([(key, tensor)]), None).unwrap()
}

/// Runs `farm-node decode` on a file and returns what it says, if it fails as it should.
fn refused(folder: &Path, file: &[u8], tiles: &str) -> String {
    let path: PathBuf = folder.join("latent.safetensors");
    std::fs::write(&path, file).unwrap();
    let mut command = Command::new(programs().join("farm-node"));
    command.arg("decode").arg(&path).arg("--out").arg(folder.join("clip.mp4")).args([
        "--tiles",
        tiles,
        "--threads",
        "1",
    ]);
    let output = command.arg("--model").arg(repository().join("assets/mochi-tiny")).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    let left = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
    assert_eq!(left.collect::<Vec<_>>(), ["latent.safetensors"], "{said}");
    said
}

#[test]
fn a_latent_that_cannot_be_decoded_is_refused_with_a_reason_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let shape = [1, 12, 2, 8, 8];
    let good = latent("latent", &shape, 0.5);
    let cases = [
        (latent("latent", &[1, 13, 2, 8, 8], 0.5), "13 channels, the decoder has 12"),
        (latent("latent", &[12, 2, 8, 8], 0.5), "a shape of [12, 2, 8, 8], not [1, 12, T, h, w]"),
        (latent("latent", &[1, 12, 2, 0, 8], 0.5), "a shape of [1, 12, 2, 0, 8]"),
        (latent("latent", &shape, f32::NAN), "holds NaN at element 0"),
        (latent("latent", &shape, f32::INFINITY), "holds inf at element 0"),
        (latent("noise", &shape, 0.5), "no tensor \"latent\""),
        (good[..good.len() - 3].to_vec(), "not a latent"),
        (b"RIFF, or so".to_vec(), "not a latent"),
        (Vec::new(), "not a latent"),
    ];
    for (file, reason) in cases {
        let said = refused(folder.path(), &file, "auto");
        assert!(said.contains(reason) && said.contains("latent.safetensors"), "{reason}: {said}");
    }
    let said = refused(folder.path(), &good, "shared:8x8@1000");
    assert!(said.contains("latent pixels takes") && said.contains("1000 are allowed"), "{said}");
}
