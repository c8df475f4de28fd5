//! Clips on groups of devices, in a farm of real processes.

use std::path::Path;
use std::time::Duration;

use farm_tests::farm::Farm;
use farm_tests::wait_until;
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(240);

/// Submits one line to a farm with one node of so many devices, and returns the result.
fn rendered_on(devices: u32, line: &str) -> Value {
    let mut farm = Farm::start(None, Vec::new());
    farm.start_node("only", devices);
    farm.submit(line);
    farm.done(LIMIT).remove(0)["result"].clone()
}

/// How many devices rendered the clip, as its result says it in two ways.
fn devices(result: &Value) -> usize {
    let topology = &result["topology"];
    let world: u64 = ["cfg", "ring", "ulysses"].iter().map(|degree| topology[degree].as_u64().unwrap()).product();
    let devices = result["devices"].as_array().unwrap().len();
    assert_eq!(devices as u64, world, "{result:#}");
    devices
}

#[test]
fn a_lone_clip_is_rendered_by_all_devices_of_a_node_and_is_the_clip_of_one() {
    let line = r#"{"prompt": "a green ball moving up on a blue background", "num_inference_steps": 6, "seed": 5}"#;
    let (four, one) = (rendered_on(4, line), rendered_on(1, line));
    assert_eq!((devices(&four), devices(&one)), (4, 1));
    assert_eq!(four["clip_sha256"], one["clip_sha256"]);
}

#[test]
fn a_long_queue_is_rendered_by_small_groups_side_by_side() {
    // So long that even what waits behind the clips that are looked at is a long queue by the rule of group sizes, whatever
    // the number of devices that are free at one time. Nobody waits for the rest.
    const CLIPS: usize = 160;
    const LOOKED_AT: usize = 12;
    let mut farm = Farm::start(None, Vec::new());
    let line = |n| format!(r#"{{"prompt": "a red ball", "num_inference_steps": 8, "seed": {n}}}"#);
    farm.submit(&(0..CLIPS).map(line).collect::<Vec<_>>().join("\n"));
    farm.start_node("only", 4);
    let mut ids = Vec::new();
    wait_until(LIMIT, "the first clips are done", || {
        let mut jobs = farm.json(&["list"])["jobs"].as_array().cloned().unwrap_or_default();
        assert!(jobs.iter().all(|job| job["state"] != "failed"), "{jobs:#?}");
        jobs.truncate(LOOKED_AT);
        ids = jobs.iter().map(|job| job["job"].as_str().unwrap().to_owned()).collect();
        jobs.len() == LOOKED_AT && jobs.iter().all(|job| job["state"] == "done")
    });
    let jobs: Vec<Value> = ids.iter().map(|job| farm.json(&["show", job])).collect();
    let sizes: Vec<usize> = jobs.iter().map(|job| devices(&job["result"])).collect();
    assert_eq!(sizes, [1; LOOKED_AT]);

    // As many at one time as there are devices.
    let spans: Vec<(String, String)> = jobs
        .iter()
        .map(|job| {
            let attempt = &job["attempts"][0];
            let at = |key: &str| attempt[key].as_str().unwrap().to_owned();
            (at("started"), at("ended"))
        })
        .collect();
    let at_once = |moment: &String| spans.iter().filter(|(start, end)| start <= moment && moment < end).count();
    let most = spans.iter().map(|(start, _)| at_once(start)).max().unwrap();
    assert!(most >= 4, "{spans:?}");
}

/// Steps of the latent checkpoints that the store has of a job.
fn latents(farm: &Farm, job: &str) -> Vec<u32> {
    let folder = farm.folder().join("store/jobs").join(job).join("latent");
    let step = |path: &Path| path.file_stem()?.to_str()?.parse().ok();
    let entries = std::fs::read_dir(folder).into_iter().flatten();
    entries.filter_map(|entry| step(&entry.ok()?.path())).collect()
}

#[test]
fn a_clip_whose_node_is_killed_goes_on_at_its_latest_latent_with_fewer_devices() {
    const EVERY: u32 = 50;
    let line = r#"{"prompt": "a red ball moving left", "num_inference_steps": 800, "num_frames": 7, "seed": 1}"#;
    let mut farm = Farm::start(None, Vec::new());
    let every = ["--checkpoint-steps", "50"];
    farm.start_node_with("victim", 4, &every);
    farm.submit(line);
    let mut job = String::new();
    let mut seen = 0;
    wait_until(LIMIT, "the clip is past its second checkpoint", || {
        let jobs = farm.json(&["list"]);
        job = jobs["jobs"][0]["job"].as_str().unwrap_or_default().to_owned();
        let progress = &jobs["jobs"][0]["progress"];
        if progress["stage"] == "denoise" {
            seen = progress["done"].as_u64().unwrap_or_default() as u32;
        }
        assert_ne!(jobs["jobs"][0]["state"], "done", "too fast to be killed");
        seen > 2 * EVERY && !latents(&farm, &job).is_empty()
    });
    farm.kill_node("victim");
    let latest = *latents(&farm, &job).iter().max().unwrap();
    assert!(latest + EVERY >= seen, "at step {seen} the latest checkpoint is of step {latest}");

    farm.start_node_with("heir", 3, &every);
    let detail = farm.done(LIMIT).remove(0);
    let result = &detail["result"];
    assert_eq!(result["node"], "heir");
    assert!((2..4).contains(&devices(result)), "{result:#}");
    let log = farm.json(&["logs", &job]);
    let lines: Vec<&str> = log["lines"].as_array().unwrap().iter().map(|l| l["line"].as_str().unwrap()).collect();
    assert!(lines.contains(&format!("resumed at step {latest} of 800").as_str()), "{lines:#?}");
    assert_eq!(latents(&farm, &job), [0; 0], "a finished clip keeps no latents");
    println!("killed at step {seen} or a little later, resumed at {latest}");
    assert_eq!(result["clip_sha256"], rendered_on(1, line)["clip_sha256"]);
}
