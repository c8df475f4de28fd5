//! What goes over a stream of a channel, either way: a header of fixed size and as many bytes as it says.
//!
//! TCP's own checksum misses one damaged segment in some ten thousand, and a stream may pass a proxy that damages what it
//! copies; so frames carry their own. It is SHA-256 cut short because that is here already, fast where the processor has
//! it, and sixteen bytes of it are met by accident never. Against an adversary it guards nothing: that is what TLS is for.
//! The header has a sum of its own, so that a damaged length is noticed at once and not after as many bytes.

use bytes::{Buf, Bytes, BytesMut};
use sha2::{Digest, Sha256};

const HEADER: usize = 46;
const SUMMED: usize = HEADER - 8;
/// Payloads of this length are always taken: a channel's own are not longer.
pub(super) const LEAST: usize = 256;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// First on each stream. `number` is how many messages have been received; the payload is the length of the longest
    /// message that is taken, as a u64.
    Hello,
    /// A sign of life.
    Ack,
    Message,
    /// Numbered as a message is: there are no more.
    End,
    /// The sender has given the channel up; the payload says why.
    Lost,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Frame {
    pub(super) kind: Kind,
    /// Nobody takes messages here any more.
    pub(super) deaf: bool,
    /// How many messages have been taken here.
    pub(super) taken: u64,
    pub(super) number: u64,
    pub(super) payload: Bytes,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum FrameError {
    Corrupt(&'static str),
    TooLong { bytes: u32 },
}

impl Frame {
    pub(super) fn header(&self) -> [u8; HEADER] {
        let mut header = [0; HEADER];
        header[0] = match self.kind {
            Kind::Hello => 0,
            Kind::Ack => 1,
            Kind::Message => 2,
            Kind::End => 3,
            Kind::Lost => 4,
        };
        header[1] = u8::from(self.deaf);
        header[2..10].copy_from_slice(&self.taken.to_le_bytes());
        header[10..18].copy_from_slice(&self.number.to_le_bytes());
        // Longer ones are refused before they come here.
        header[18..22].copy_from_slice(&(self.payload.len() as u32).to_le_bytes());
        header[22..SUMMED].copy_from_slice(&sum::<16>(&self.payload));
        let own = sum::<8>(&header[..SUMMED]);
        header[SUMMED..].copy_from_slice(&own);
        header
    }
}

fn sum<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let digest = Sha256::digest(bytes);
    let mut sum = [0; N];
    sum.copy_from_slice(&digest[..N]);
    sum
}

/// Puts frames together from what a stream brings.
pub(super) struct FrameReader {
    bytes: BytesMut,
    /// Read of the frame that is coming, but for its payload.
    header: Option<(Frame, usize, [u8; 16])>,
    max_payload: usize,
}

impl FrameReader {
    pub(super) fn new(max_payload: usize) -> Self {
        Self { bytes: BytesMut::new(), header: None, max_payload: max_payload.max(LEAST) }
    }

    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole frame. After an error the stream is of no use.
    pub(super) fn next(&mut self) -> Result<Option<Frame>, FrameError> {
        if self.header.is_none() {
            let Some(header) = self.bytes.first_chunk::<HEADER>() else { return Ok(None) };
            self.header = Some(self.parse(header)?);
            self.bytes.advance(HEADER);
        }
        match self.header.take() {
            Some((mut frame, length, expected)) if self.bytes.len() >= length => {
                frame.payload = self.bytes.split_to(length).freeze();
                if sum::<16>(&frame.payload) != expected {
                    return Err(FrameError::Corrupt("a message's checksum is wrong"));
                }
                Ok(Some(frame))
            }
            header => {
                self.header = header;
                Ok(None)
            }
        }
    }

    fn parse(&self, header: &[u8; HEADER]) -> Result<(Frame, usize, [u8; 16]), FrameError> {
        if sum::<8>(&header[..SUMMED])[..] != header[SUMMED..] {
            return Err(FrameError::Corrupt("a header's checksum is wrong"));
        }
        let kind = match header[0] {
            0 => Kind::Hello,
            1 => Kind::Ack,
            2 => Kind::Message,
            3 => Kind::End,
            4 => Kind::Lost,
            _ => return Err(FrameError::Corrupt("there is no such kind of frame")),
        };
        let u64_at = |at: usize| header[at..].first_chunk().map_or(0, |&bytes| u64::from_le_bytes(bytes));
        let bytes = header[18..].first_chunk().map_or(0, |&bytes| u32::from_le_bytes(bytes));
        if bytes as usize > self.max_payload {
            return Err(FrameError::TooLong { bytes });
        }
        let mut expected = [0; 16];
        expected.copy_from_slice(&header[22..SUMMED]);
        let deaf = header[1] & 1 == 1;
        let frame = Frame { kind, deaf, taken: u64_at(2), number: u64_at(10), payload: Bytes::new() };
        Ok((frame, bytes as usize, expected))
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn frame() -> impl Strategy<Value = Frame> {
        let kind = prop::sample::select(vec![Kind::Hello, Kind::Ack, Kind::Message, Kind::End, Kind::Lost]);
        (kind, any::<bool>(), any::<u64>(), any::<u64>(), vec(any::<u8>(), 0..40)).prop_map(
            |(kind, deaf, taken, number, payload)| Frame { kind, deaf, taken, number, payload: payload.into() },
        )
    }

    fn bytes(frames: &[Frame]) -> Vec<u8> {
        frames.iter().flat_map(|frame| [&frame.header()[..], &frame.payload].concat()).collect()
    }

    proptest! {
        #[test]
        fn frames_are_read_back_however_they_are_cut(frames in vec(frame(), 0..5), piece in 1..60usize) {
            let mut reader = FrameReader::new(40);
            let mut read = Vec::new();
            for piece in bytes(&frames).chunks(piece) {
                reader.push(piece);
                while let Some(frame) = reader.next().unwrap() {
                    read.push(frame);
                }
            }
            prop_assert_eq!(read, frames);
        }

        #[test]
        fn a_damaged_bit_is_noticed_and_nothing_after_it_is_taken(
            frames in vec(frame(), 1..5), bit in any::<prop::sample::Index>()
        ) {
            let mut damaged = bytes(&frames);
            let bit = bit.index(damaged.len() * 8);
            damaged[bit / 8] ^= 1 << (bit % 8);
            let mut reader = FrameReader::new(40);
            reader.push(&damaged);
            let mut whole = 0;
            let error = loop {
                match reader.next() {
                    Ok(Some(frame)) => prop_assert_eq!(&frame, &frames[whole]),
                    Ok(None) => return Err(TestCaseError::fail("not noticed")),
                    Err(error) => break error,
                }
                whole += 1;
            };
            prop_assert!(matches!(error, FrameError::Corrupt(_)));
        }
    }

    #[test]
    fn a_message_over_the_limit_is_refused_by_its_header() {
        let frame = Frame { kind: Kind::Message, deaf: false, taken: 0, number: 0, payload: vec![0; 401].into() };
        let mut reader = FrameReader::new(400);
        reader.push(&frame.header());
        assert_eq!(reader.next(), Err(FrameError::TooLong { bytes: 401 }));
    }
}
