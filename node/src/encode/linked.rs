//! mp4 by the linked ffmpeg libraries.

use std::io;
use std::path::Path;

use ffmpeg_next as ffmpeg;

use ffmpeg::codec::encoder;
use ffmpeg::format::Pixel;
use ffmpeg::software::scaling;
use ffmpeg::util::color;
use ffmpeg::{Dictionary, Packet, Rational, codec, format, frame};

use super::{CRF, FRAME_RATE, FrameSink, MBTREE, PRESET, check_whole, frame_bytes};

const ENCODER: &str = "libx264";

/// Whether an mp4 could be written at all.
pub fn check() -> io::Result<()> {
    find_encoder().map(|_| ())
}

fn find_encoder() -> io::Result<ffmpeg::Codec> {
    ffmpeg::init()?;
    // Its errors come back to us; what it says of a clip that went well is not for our users.
    ffmpeg::log::set_level(ffmpeg::log::Level::Error);
    encoder::find_by_name(ENCODER).ok_or_else(|| {
        io::Error::new(io::ErrorKind::Unsupported, format!("this machine's libavcodec has no {ENCODER}"))
    })
}

pub struct Mp4Sink {
    file: format::context::Output,
    encoder: encoder::Video,
    to_yuv: scaling::Context,
    rgb: frame::Video,
    /// Frames taken so far; the next one's time stamp.
    count: i64,
    /// Chosen by the muxer when the header is written.
    stream_time_base: Rational,
    width: u32,
    height: u32,
}

impl Mp4Sink {
    pub fn create(path: &Path, width: u32, height: u32) -> io::Result<Self> {
        let codec = find_encoder()?;
        let mut file = format::output_as(path, "mp4")?;
        let mut video = codec::context::Context::new_with_codec(codec).encoder().video()?;
        video.set_width(width);
        video.set_height(height);
        video.set_format(Pixel::YUV420P);
        video.set_time_base(Rational(1, FRAME_RATE as i32));
        video.set_frame_rate(Some(Rational(FRAME_RATE as i32, 1)));
        // The matrix that swscale uses by default, and that players assume for clips below HD. Tagged, so that none
        // has to assume.
        video.set_colorspace(color::Space::SMPTE170M);
        video.set_color_range(color::Range::MPEG);
        if file.format().flags().contains(format::Flags::GLOBAL_HEADER) {
            video.set_flags(codec::Flags::GLOBAL_HEADER);
        }
        let mut options = Dictionary::new();
        options.set("crf", CRF);
        options.set("preset", PRESET);
        // One thread: the same frames give the same bytes, and the other cores are rendering.
        options.set("threads", "1");
        options.set("mbtree", MBTREE);
        let encoder = video.open_as_with(codec, options)?;
        let mut stream = file.add_stream(codec)?;
        stream.set_parameters(&encoder);
        stream.set_avg_frame_rate(Rational(FRAME_RATE as i32, 1));
        let mut options = Dictionary::new();
        options.set("movflags", "+faststart");
        file.write_header_with(options)?;
        let stream_time_base = file.stream(0).map_or(Rational(1, FRAME_RATE as i32), |stream| stream.time_base());
        let flags = scaling::Flags::BILINEAR | scaling::Flags::ACCURATE_RND | scaling::Flags::FULL_CHR_H_INT;
        let to_yuv = scaling::Context::get(Pixel::RGB24, width, height, Pixel::YUV420P, width, height, flags)?;
        let rgb = frame::Video::new(Pixel::RGB24, width, height);
        Ok(Self { file, encoder, to_yuv, rgb, count: 0, stream_time_base, width, height })
    }

    /// Moves the packets that are ready from the encoder to the file.
    fn drain(&mut self) -> io::Result<()> {
        let mut packet = Packet::empty();
        loop {
            match self.encoder.receive_packet(&mut packet) {
                Ok(()) => {}
                // It wants more frames, or has given everything.
                Err(ffmpeg::Error::Other { errno: ffmpeg::error::EAGAIN } | ffmpeg::Error::Eof) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
            packet.set_stream(0);
            packet.rescale_ts(Rational(1, FRAME_RATE as i32), self.stream_time_base);
            packet.write_interleaved(&mut self.file)?;
        }
    }
}

impl FrameSink for Mp4Sink {
    fn frames(&mut self, rgb24: &[u8]) -> io::Result<()> {
        let row = 3 * self.width as usize;
        let frame = frame_bytes(self.width, self.height);
        check_whole(rgb24, frame)?;
        for pixels in rgb24.chunks_exact(frame) {
            // ffmpeg's rows may be padded.
            let stride = self.rgb.stride(0);
            for (from, to) in pixels.chunks_exact(row).zip(self.rgb.data_mut(0).chunks_mut(stride)) {
                to[..row].copy_from_slice(from);
            }
            let mut yuv = frame::Video::new(Pixel::YUV420P, self.width, self.height);
            self.to_yuv.run(&self.rgb, &mut yuv)?;
            yuv.set_pts(Some(self.count));
            self.count += 1;
            self.encoder.send_frame(&yuv)?;
            self.drain()?;
        }
        Ok(())
    }

    fn finish(&mut self) -> io::Result<()> {
        self.encoder.send_eof()?;
        self.drain()?;
        Ok(self.file.write_trailer()?)
    }
}
