//! Processes are killed with SIGKILL, and every clip is accepted exactly once all the same.

use std::time::Duration;

use farm_tests::farm::Farm;
use farm_tests::wait_until;
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(240);

fn jobs(farm: &Farm) -> Vec<Value> {
    farm.json(&["list"])["jobs"].as_array().cloned().unwrap_or_default()
}

fn in_state(farm: &Farm, state: &str) -> usize {
    jobs(farm).iter().filter(|job| job["state"] == state).count()
}

/// The job that a node's first device renders.
fn rendered_by(farm: &Farm, node: &str) -> Option<String> {
    let nodes = farm.json(&["nodes"]);
    let node = nodes["nodes"].as_array()?.iter().find(|n| n["node"] == node)?;
    Some(node["devices"][0]["job"].as_str()?.to_owned())
}

#[test]
fn a_clip_whose_node_is_killed_is_rendered_elsewhere() {
    let mut farm = Farm::start(None, Vec::new());
    farm.start_node("victim", 1);
    farm.submit(r#"{"prompt": "a red ball moving left on a black background", "num_inference_steps": 500, "seed": 1}"#);
    let mut job = None;
    wait_until(LIMIT, "the clip denoises", || {
        job = rendered_by(&farm, "victim");
        job.as_ref().is_some_and(|job| farm.json(&["show", job])["progress"]["stage"] == "denoise")
    });
    let job = job.unwrap();
    farm.kill_node("victim");
    farm.start_node("heir", 1);
    wait_until(LIMIT, "the clip is done", || farm.json(&["show", &job])["state"] == "done");

    let detail = farm.json(&["show", &job]);
    assert_eq!(detail["result"]["node"], "heir");
    assert_eq!(detail["result"]["attempt"], 2);
    let outcomes: Vec<_> = detail["attempts"].as_array().unwrap().iter().map(|a| a["outcome"].clone()).collect();
    assert_eq!(outcomes, ["node_lost", "completed"]);
}

#[test]
fn two_hundred_clips_are_each_accepted_once_though_a_node_and_the_scheduler_are_killed() {
    const CLIPS: usize = 200;
    let mut farm = Farm::start(None, Vec::new());
    farm.start_node("one", 1);
    farm.start_node("two", 1);
    let lines: Vec<String> = (0..CLIPS)
        .map(|n| {
            format!(
                r#"{{"prompt": "a red ball growing on a black background", "id": "clip-{n}", "num_inference_steps": 2, "num_frames": 7, "seed": {n}}}"#
            )
        })
        .collect();
    farm.submit(&lines.join("\n"));

    wait_until(LIMIT, "20 clips are done and node one renders", || {
        in_state(&farm, "done") >= 20 && rendered_by(&farm, "one").is_some()
    });
    farm.kill_node("one");
    wait_until(LIMIT, "60 clips are done", || in_state(&farm, "done") >= 60);
    farm.kill_scheduler();
    farm.start_scheduler();
    assert_eq!(jobs(&farm).len(), CLIPS, "jobs were lost with the scheduler");
    farm.start_node("one", 1);
    wait_until(LIMIT, "all clips are done", || in_state(&farm, "done") == CLIPS);

    let mut attempts = 0;
    for job in jobs(&farm) {
        let id = job["job"].as_str().unwrap();
        let detail = farm.json(&["show", id]);
        let tries = detail["attempts"].as_array().unwrap();
        let completed: Vec<_> = tries.iter().filter(|a| a["outcome"] == "completed").collect();
        assert_eq!(completed.len(), 1, "{id} was accepted {} times: {detail:#}", completed.len());
        attempts += tries.len();

        // The manifest, the queue and the stored bytes agree.
        let manifest = farm.folder().join("store/jobs").join(id).join("result.json");
        let manifest: Value = serde_json::from_slice(&std::fs::read(manifest).unwrap()).unwrap();
        assert_eq!(manifest, detail["result"], "{id}");
        let clip = farm.folder().join("store").join(manifest["clip"].as_str().unwrap());
        assert_eq!(std::fs::metadata(clip).unwrap().len(), manifest["clip_bytes"].as_u64().unwrap(), "{id}");
    }
    println!("{CLIPS} clips, {attempts} attempts");
}
