//! The main job, through real processes and a real S3 server: prompts in, clips in object storage, each showing what
//! its prompt says.

use farm_tests::clip::{blobs, colour, motion, probe};
use farm_tests::farm::Farm;
use farm_tests::repository;
use farm_tests::s3::S3Server;
use serde_json::Value;
use sha2::{Digest, Sha256};

/// Words of a prompt that name a motion, and the motion.
const MOTIONS: [(&str, &str); 10] = [
    ("left", "left"),
    ("right", "right"),
    (" up ", "up"),
    ("rising", "up"),
    ("down", "down"),
    ("falling", "down"),
    ("growing", "growing"),
    ("bigger", "growing"),
    ("still", "still"),
    ("not moving", "still"),
];
const COLOURS: [&str; 6] = ["red", "green", "blue", "yellow", "magenta", "white"];

/// The first of the words in the prompt decides: the background is named last.
fn wanted<'a>(prompt: &str, words: impl Iterator<Item = (&'a str, &'a str)>) -> &'a str {
    let found = words.filter_map(|(word, meaning)| Some((prompt.find(word)?, meaning)));
    found.min().unwrap_or_else(|| panic!("{prompt:?} names nothing to check")).1
}

#[test]
fn clips_in_the_bucket_show_what_their_prompts_say() {
    let server = S3Server::start(&["clips"]).unwrap();
    let mut farm = Farm::start(Some("s3://clips/farm"), server.environment());
    farm.start_node("one", 1);
    farm.start_node("two", 1);
    let prompts = repository().join("config/demo/prompts.jsonl");
    let out = farm.folder().join("out");

    let output =
        farm.farmctl(&["submit", prompts.to_str().unwrap(), "--wait", "--out", out.to_str().unwrap(), "--json"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

    let lines: Vec<Value> =
        std::fs::read_to_string(&prompts).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(lines.len() >= 12);
    let jobs = farm.json(&["list"]);
    let mut wrong = Vec::new();
    for line in &lines {
        let (id, prompt) = (line["id"].as_str().unwrap(), line["prompt"].as_str().unwrap());
        let (width, height) = (line["width"].as_u64().unwrap_or(64), line["height"].as_u64().unwrap_or(64));
        let mp4 = out.join(format!("{id}.mp4"));

        let stream = probe(&mp4);
        assert_eq!(stream["codec_name"], "h264", "{id}");
        assert_eq!(stream["pix_fmt"], "yuv420p", "{id}");
        assert_eq!((stream["width"].as_u64(), stream["height"].as_u64()), (Some(width), Some(height)), "{id}");
        assert_eq!(stream["nb_read_frames"], "25", "{id}");
        assert_eq!(stream["r_frame_rate"], "30/1", "{id}");

        let job = jobs["jobs"].as_array().unwrap().iter().find(|job| job["id"] == id).unwrap();
        let detail = farm.json(&["show", job["job"].as_str().unwrap()]);
        let result = &detail["result"];
        let bytes = std::fs::read(&mp4).unwrap();
        assert_eq!(result["clip_sha256"], format!("{:x}", Sha256::digest(&bytes)), "{id}");
        assert_eq!(result["spec"]["seed"], line["seed"], "{id}");
        // faststart: the index stands before the data.
        let at = |name: &[u8]| bytes.windows(4).position(|window| window == name);
        assert!(at(b"moov") < at(b"mdat"), "{id} cannot be played before it has come whole");

        let seen: Option<Vec<_>> = blobs(&mp4, width as usize, height as usize).into_iter().collect();
        let prompt = prompt.to_lowercase();
        let expected =
            (wanted(&prompt, COLOURS.iter().map(|name| (*name, *name))), wanted(&prompt, MOTIONS.iter().copied()));
        let shown = seen.map(|seen| (colour(&seen[seen.len() / 2]), motion(&seen)));
        println!("{id}: expected {expected:?}, shown {shown:?}");
        if shown != Some(expected) {
            wrong.push(format!("{id}: expected {expected:?}, shown {shown:?}"));
        }
    }
    // The checkpoint itself misses one motion in a hundred.
    assert!(wrong.len() <= 1, "{wrong:#?}");
}
