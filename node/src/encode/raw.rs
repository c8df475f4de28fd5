//! Raw RGB24 frames, one after another, nothing else in the file.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use super::{FrameSink, check_whole, frame_bytes};

pub struct RawSink {
    file: BufWriter<File>,
    frame: usize,
}

impl RawSink {
    pub fn create(path: &Path, width: u32, height: u32) -> io::Result<Self> {
        Ok(Self { file: BufWriter::new(File::create(path)?), frame: frame_bytes(width, height) })
    }
}

impl FrameSink for RawSink {
    fn frames(&mut self, rgb24: &[u8]) -> io::Result<()> {
        check_whole(rgb24, self.frame)?;
        self.file.write_all(rgb24)
    }

    fn finish(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}
