//! Looks at an mp4 as a stranger would: with the ffmpeg programs, and at nothing but pixels.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// What ffprobe says of the only stream of a clip, frames counted by decoding them.
pub fn probe(mp4: &Path) -> Value {
    let output = Command::new("ffprobe")
        .args(["-v", "error", "-count_frames", "-show_entries"])
        .arg("stream=codec_name,pix_fmt,width,height,nb_read_frames,r_frame_rate")
        .args(["-of", "json"])
        .arg(mp4)
        .output()
        .expect("ffprobe runs");
    assert!(output.status.success(), "{}: {}", mp4.display(), String::from_utf8_lossy(&output.stderr));
    let probed: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(probed["streams"].as_array().map(Vec::len), Some(1), "{}: {probed}", mp4.display());
    probed["streams"][0].clone()
}

/// The thing that moves in one frame.
#[derive(Clone, Copy, Debug)]
pub struct Blob {
    /// Centre in pixels, from the top left.
    pub x: f64,
    pub y: f64,
    /// Pixels.
    pub area: f64,
    pub rgb: [f64; 3],
}

/// The blob of every frame: the pixels that differ from the background, which is the median of the frame's border.
/// A frame without one gives none.
pub fn blobs(mp4: &Path, width: usize, height: usize) -> Vec<Option<Blob>> {
    let output = Command::new("ffmpeg")
        .args(["-nostdin", "-v", "error", "-i"])
        .arg(mp4)
        .args(["-f", "rawvideo", "-pix_fmt", "rgb24", "-"])
        .output()
        .expect("ffmpeg runs");
    assert!(output.status.success(), "{}: {}", mp4.display(), String::from_utf8_lossy(&output.stderr));
    output.stdout.chunks_exact(width * height * 3).map(|frame| blob(frame, width, height)).collect()
}

fn blob(frame: &[u8], width: usize, height: usize) -> Option<Blob> {
    let pixel = |x: usize, y: usize| -> [f64; 3] { std::array::from_fn(|c| frame[(y * width + x) * 3 + c].into()) };
    let edge =
        (0..width).flat_map(|x| [(x, 0), (x, height - 1)]).chain((0..height).flat_map(|y| [(0, y), (width - 1, y)]));
    let edge: Vec<_> = edge.map(|(x, y)| pixel(x, y)).collect();
    let background: [f64; 3] = std::array::from_fn(|c| {
        let mut values: Vec<f64> = edge.iter().map(|rgb| rgb[c]).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    });

    let (mut sum_x, mut sum_y, mut area, mut rgb) = (0.0, 0.0, 0.0, [0.0; 3]);
    for y in 0..height {
        for x in 0..width {
            let here = pixel(x, y);
            let distance: f64 = (0..3).map(|c| (here[c] - background[c]).powi(2)).sum::<f64>().sqrt();
            // Half the way from any of the backgrounds to the darkest of the colours.
            if distance > 70.0 {
                area += 1.0;
                sum_x += x as f64;
                sum_y += y as f64;
                (0..3).for_each(|c| rgb[c] += here[c]);
            }
        }
    }
    // A few pixels are noise of the codec.
    (area >= 20.0).then(|| Blob { x: sum_x / area, y: sum_y / area, area, rgb: rgb.map(|sum| sum / area) })
}

/// Name of the colour that the blob shows: which of its channels are bright.
pub fn colour(blob: &Blob) -> &'static str {
    let brightest = blob.rgb.iter().copied().fold(0.0, f64::max);
    match blob.rgb.map(|channel| channel > 0.6 * brightest) {
        [true, false, false] => "red",
        [false, true, false] => "green",
        [false, false, true] => "blue",
        [true, true, false] => "yellow",
        [true, false, true] => "magenta",
        [true, true, true] => "white",
        _ => "other",
    }
}

/// What the blob does from the first frames to the last: `left`, `right`, `up`, `down`, `growing` or `still`.
pub fn motion(blobs: &[Blob]) -> &'static str {
    let part = (blobs.len() / 5).max(1);
    let mean = |of: fn(&Blob) -> f64, blobs: &[Blob]| blobs.iter().map(of).sum::<f64>() / blobs.len() as f64;
    let change = |of: fn(&Blob) -> f64| (mean(of, &blobs[..part]), mean(of, &blobs[blobs.len() - part..]));
    let ((x0, x1), (y0, y1), (a0, a1)) = (change(|b| b.x), change(|b| b.y), change(|b| b.area));
    let (dx, dy) = (x1 - x0, y1 - y0);
    // Pixels; what stays still drifts by less, what moves goes further.
    const MOVED: f64 = 6.0;
    match () {
        () if dx.abs().max(dy.abs()) < MOVED && a1 > 1.4 * a0 => "growing",
        () if dx.abs().max(dy.abs()) < MOVED => "still",
        () if dx.abs() > dy.abs() => {
            if dx < 0.0 {
                "left"
            } else {
                "right"
            }
        }
        () => {
            if dy < 0.0 {
                "up"
            } else {
                "down"
            }
        }
    }
}
