//! What a farm costs over `farm-node render`: the same clip, of about a minute, rendered by one process and by a farm of one
//! node in turn. `make bench-overhead`.

use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use farm_tests::farm::Farm;
use farm_tests::{programs, repository, wait_until};
use jiff::Timestamp;
use serde_json::Value;

/// Wall time of the clip alone.
const CLIP: f64 = 60.0;
const ROUNDS: usize = 3;
/// Of the wall time.
const GOAL: f64 = 0.005;
const SIZE: &str = "128";
/// Steps that the length of a clip is worked out from.
const PROBE: u32 = 60;

fn main() -> ExitCode {
    let folder = tempfile::tempdir().unwrap();
    let probe = render(PROBE, folder.path());
    let steps = ((CLIP / probe * f64::from(PROBE)) as u32).min(1000);
    let mut farm = Farm::start(None, Vec::new());
    farm.start_node_with("node", 1, &["--threads", "2"]);
    let (mut alone, mut farmed) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        alone.push(render(steps, folder.path()));
        farmed.push(on_farm(&farm, steps, round));
        println!("round {round}: alone {:.3} s, on the farm {:.3} s", alone[round], farmed[round]);
    }
    let [alone, farmed] = [alone, farmed].map(|mut times| {
        times.sort_by(f64::total_cmp);
        times[ROUNDS / 2]
    });
    let part = farmed / alone - 1.0;
    let verdict = if part < GOAL { "PASS" } else { "FAIL" };
    println!(
        "{steps} steps: alone {alone:.3} s, on the farm {farmed:.3} s (medians of {ROUNDS}): {:+.2} % (goal {:.1} %) {verdict}",
        100.0 * part,
        100.0 * GOAL
    );
    if part < GOAL { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn line(steps: u32) -> Value {
    let size: u32 = SIZE.parse().unwrap();
    serde_json::json!({
        "prompt": "a red ball growing", "width": size, "height": size, "num_frames": 25, "num_inference_steps": steps, "seed": 1
    })
}

/// Wall seconds of a process from its start to its end.
fn render(steps: u32, folder: &Path) -> f64 {
    let mut command = Command::new(programs().join("farm-node"));
    command.args(["render", "--prompt", "a red ball growing", "--width", SIZE, "--height", SIZE]);
    command.args(["--num-frames", "25", "--seed", "1", "--threads", "2", "--steps", &steps.to_string()]);
    command.arg("--model").arg(repository().join("assets/mochi-tiny")).arg("--out").arg(folder.join("clip.mp4"));
    let began = Instant::now();
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    began.elapsed().as_secs_f64()
}

/// Seconds from the submission to the end, by the scheduler's clock.
fn on_farm(farm: &Farm, steps: u32, round: usize) -> f64 {
    let mut line = line(steps);
    line["id"] = format!("round-{round}").into();
    farm.submit(&line.to_string());
    let find = || {
        let jobs = farm.json(&["list"]);
        let job = jobs["jobs"].as_array()?.iter().find(|job| job["id"] == line["id"]).cloned()?;
        assert_ne!(job["state"], "failed", "{job:#}");
        (job["state"] == "done").then_some(job)
    };
    // Asked seldom: asking costs as well.
    std::thread::park_timeout(Duration::from_secs_f64(CLIP * 0.8));
    let mut job = None;
    wait_until(Duration::from_secs(600), "the clip is done", || {
        job = find();
        job.is_some()
    });
    let time = |key: &str| job.as_ref().unwrap()[key].as_str().unwrap().parse::<Timestamp>().unwrap();
    time("finished").duration_since(time("submitted")).as_secs_f64()
}
