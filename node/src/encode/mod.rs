//! Frames on their way into a file, one sink per kind of file.
//!
//! mp4 is H.264, yuv420p, 30 frames a second, index before the data (faststart). With the `ffmpeg` feature it is
//! written by the linked libraries, without it by the `ffmpeg` program; both are given the same settings.

#[cfg(feature = "ffmpeg")]
mod linked;
#[cfg(not(feature = "ffmpeg"))]
mod program;
mod raw;

use std::io;

#[cfg(feature = "ffmpeg")]
pub use linked::{Mp4Sink, check};
#[cfg(not(feature = "ffmpeg"))]
pub use program::{Mp4Sink, check};
pub use raw::RawSink;

/// Frames a second of every clip.
const FRAME_RATE: u32 = 30;
/// libx264's rate factor: visually near lossless.
const CRF: &str = "18";
const PRESET: &str = "medium";
/// Off: for most widths libx264's macroblock tree reads memory that it has not written, and the same frames give other
/// bytes each time.
const MBTREE: &str = "0";

/// Takes a clip's frames in order.
pub trait FrameSink {
    /// Any number of whole frames, RGB24, row-major.
    fn frames(&mut self, rgb24: &[u8]) -> io::Result<()>;

    /// Completes the file. No frames may follow.
    fn finish(&mut self) -> io::Result<()>;
}

/// Bytes of one RGB24 frame.
fn frame_bytes(width: u32, height: u32) -> usize {
    width as usize * height as usize * 3
}

/// Refuses a part of a frame, which would shear every later one.
fn check_whole(rgb24: &[u8], frame: usize) -> io::Result<()> {
    if rgb24.len().is_multiple_of(frame) {
        return Ok(());
    }
    let message = format!("{} bytes are not whole frames of {frame}", rgb24.len());
    Err(io::Error::new(io::ErrorKind::InvalidInput, message))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// A square that moves over a gradient: 7 frames of 32×16.
    fn frames() -> Vec<u8> {
        let mut rgb = Vec::new();
        for t in 0..7 {
            for (y, x) in (0..16).flat_map(|y| (0..32).map(move |x| (y, x))) {
                let inside = (4..12).contains(&y) && (4 * t..4 * t + 8).contains(&x);
                rgb.extend(if inside { [220, 40, 40] } else { [4 * x as u8, 8 * y as u8, 60] });
            }
        }
        rgb
    }

    #[test]
    fn an_mp4_decodes_to_the_frames_that_went_in_and_is_the_same_every_time() {
        let folder = tempfile::tempdir().unwrap();
        let frames = frames();
        let write = |name: &str, chunk: usize| {
            let path = folder.path().join(name);
            let mut sink = Mp4Sink::create(&path, 32, 16).unwrap();
            frames.chunks(chunk * frame_bytes(32, 16)).for_each(|part| sink.frames(part).unwrap());
            sink.finish().unwrap();
            path
        };
        let (path, again) = (write("a.mp4", 1), write("b.mp4", 3));
        assert_eq!(std::fs::read(&path).unwrap(), std::fs::read(again).unwrap());

        let decoded = Command::new("ffmpeg")
            .args(["-nostdin", "-v", "error", "-i", path.to_str().unwrap()])
            .args(["-f", "rawvideo", "-pix_fmt", "rgb24", "-"])
            .output()
            .unwrap();
        assert!(decoded.status.success(), "{}", String::from_utf8_lossy(&decoded.stderr));
        assert_eq!(decoded.stdout.len(), frames.len());
        let difference: f64 = frames.iter().zip(&decoded.stdout).map(|(a, b)| f64::from(a.abs_diff(*b))).sum::<f64>()
            / frames.len() as f64;
        // Colour has half the resolution in yuv420p, so edges differ; a wrong matrix or range differs everywhere.
        assert!(difference < 6.0, "mean difference {difference}");
    }

    #[cfg(all(feature = "ffmpeg", target_env = "gnu"))]
    #[test]
    fn the_bytes_of_an_mp4_do_not_depend_on_what_was_in_memory_before() {
        let folder = tempfile::tempdir().unwrap();
        // Waves, whose every block depends on others: 40 frames of 64×64.
        let pixel = |t: f32, x: f32, y: f32| {
            let wave = 128.0 + 100.0 * (x / 5.0 + t / 3.0).sin() * (y / 7.0 - t / 5.0).cos();
            [wave as u8, 255 - wave as u8, (wave as u8).wrapping_mul(3)]
        };
        let frame = |t| (0..64 * 64).flat_map(move |i| pixel(t as f32, (i % 64) as f32, (i / 64) as f32));
        let frames: Vec<u8> = (0..40).flat_map(frame).collect();
        let write = |fill: libc::c_int| {
            // SAFETY: a number for the allocator, which fills freed memory with it from then on.
            assert_eq!(unsafe { libc::mallopt(libc::M_PERTURB, fill) }, 1);
            let path = folder.path().join("a.mp4");
            let mut sink = Mp4Sink::create(&path, 64, 64).unwrap();
            sink.frames(&frames).unwrap();
            sink.finish().unwrap();
            std::fs::read(&path).unwrap()
        };
        let first = write(1);
        assert!([85, 170, 255, 0].into_iter().all(|fill| write(fill) == first));
    }

    #[test]
    fn a_part_of_a_frame_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let mut mp4 = Mp4Sink::create(&folder.path().join("a.mp4"), 32, 16).unwrap();
        assert_eq!(mp4.frames(&[0; 100]).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        let mut raw = RawSink::create(&folder.path().join("a.rgb"), 32, 16).unwrap();
        assert_eq!(raw.frames(&[0; 100]).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
