//! mp4 by the `ffmpeg` program, fed through its standard input.

use std::io::{self, Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::thread::JoinHandle;

use super::{CRF, FRAME_RATE, FrameSink, MBTREE, PRESET, check_whole, frame_bytes};

/// Of the program's complaints, as much is kept.
const MESSAGE_BYTES: u64 = 4096;

/// Whether an mp4 could be written at all.
pub fn check() -> io::Result<()> {
    let status = Command::new("ffmpeg").arg("-version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(io::Error::other(format!("`ffmpeg -version` ended with {status}"))),
        Err(error) => Err(no_program(&error)),
    }
}

fn no_program(error: &io::Error) -> io::Error {
    let hint = "install it (Debian: apt-get install ffmpeg), or build farm-node with its `ffmpeg` feature";
    io::Error::new(error.kind(), format!("the ffmpeg program does not start ({error}); {hint}"))
}

pub struct Mp4Sink {
    program: Child,
    /// Gone once the clip is finished.
    input: Option<ChildStdin>,
    /// Reads what the program complains of, so that it never waits for a reader.
    complaints: Option<JoinHandle<String>>,
    frame: usize,
}

impl Mp4Sink {
    pub fn create(path: &Path, width: u32, height: u32) -> io::Result<Self> {
        let rate = FRAME_RATE.to_string();
        let mut program = Command::new("ffmpeg")
            .args(["-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", &format!("{width}x{height}")])
            .args([
                "-r", &rate, "-i", "-", "-c:v", "libx264", "-crf", CRF, "-preset", PRESET, "-threads", "1", "-mbtree",
                MBTREE,
            ])
            .args(["-sws_flags", "bilinear+accurate_rnd+full_chroma_int", "-pix_fmt", "yuv420p"])
            // swscale's default matrix, tagged.
            .args(["-colorspace", "smpte170m", "-color_range", "tv", "-movflags", "+faststart", "-f", "mp4"])
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| no_program(&error))?;
        let (input, errors) = (program.stdin.take(), program.stderr.take());
        let complaints = errors.map(|mut errors| {
            std::thread::spawn(move || {
                let mut text = Vec::new();
                // An unreadable complaint leaves the exit status.
                let _ = errors.by_ref().take(MESSAGE_BYTES).read_to_end(&mut text);
                let _ = io::copy(&mut errors, &mut io::sink());
                String::from_utf8_lossy(&text).trim().to_owned()
            })
        });
        Ok(Self { program, input, complaints, frame: frame_bytes(width, height) })
    }

    fn ended(&mut self) -> io::Result<()> {
        drop(self.input.take());
        let status = self.program.wait()?;
        let said = self.complaints.take().and_then(|thread| thread.join().ok()).unwrap_or_default();
        if status.success() { Ok(()) } else { Err(io::Error::other(format!("ffmpeg ended with {status}: {said}"))) }
    }
}

impl FrameSink for Mp4Sink {
    fn frames(&mut self, rgb24: &[u8]) -> io::Result<()> {
        check_whole(rgb24, self.frame)?;
        let Some(input) = &mut self.input else { return Err(io::Error::other("the clip is finished")) };
        // A broken pipe means that the program ended; what it said is the better error.
        match input.write_all(rgb24) {
            Err(error) => self.ended().and(Err(error)),
            Ok(()) => Ok(()),
        }
    }

    fn finish(&mut self) -> io::Result<()> {
        self.ended()
    }
}

impl Drop for Mp4Sink {
    fn drop(&mut self) {
        // Both fail only for a process that has ended.
        let _ = self.program.kill();
        let _ = self.program.wait();
    }
}
