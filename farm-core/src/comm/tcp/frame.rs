//! What goes over a connection: frames of a kind (one byte), a length (four bytes, little endian) and a payload.
//!
//! A message is a head and parts of at most [`PART`] bytes. Other frames go between the parts, so signs of life and the
//! end of the group do not wait for a long message.

use std::io::ErrorKind;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, BufReader};
use tokio::time::timeout;

use crate::comm::CommError;

/// Largest payload of a frame.
pub(super) const PART: usize = 1 << 20;
/// Largest payload of a frame other than a part.
const SMALL: usize = 64 << 10;
/// Longest text in a frame.
const TEXT: usize = 4 << 10;
/// Largest message.
pub(super) const MAX_MESSAGE: u64 = 4 << 30;
const MAX_DIMS: usize = 8;

#[derive(Debug, PartialEq)]
pub(super) enum Frame {
    /// A sign of life, and whom the sender waits for.
    Alive { waits_for: Option<usize> },
    /// The head of a message; parts of `bytes` bytes in all follow.
    Message { shape: Vec<usize>, bytes: u64 },
    /// The head of a part of a message; its bytes are read apart.
    Part { bytes: usize },
    /// The sender has reached a barrier.
    Barrier,
    /// The group has ended.
    End(CommError),
    /// The sender leaves; it has sent all that it owed.
    Bye,
}

const ALIVE: u8 = 1;
const MESSAGE: u8 = 2;
const PART_OF_MESSAGE: u8 = 3;
const BARRIER: u8 = 4;
const END: u8 = 5;
const BYE: u8 = 6;

/// Stands for no rank in [`Frame::Alive`].
const NOBODY: u32 = u32::MAX;

impl Frame {
    /// The frame as it is sent; a part's bytes follow it.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut payload = Vec::new();
        let (kind, len) = match self {
            Self::Alive { waits_for } => {
                let rank = waits_for.and_then(|rank| u32::try_from(rank).ok()).unwrap_or(NOBODY);
                payload.extend(rank.to_le_bytes());
                (ALIVE, 4)
            }
            Self::Message { shape, bytes } => {
                payload.extend(bytes.to_le_bytes());
                shape.iter().for_each(|size| payload.extend((*size as u64).to_le_bytes()));
                (MESSAGE, payload.len())
            }
            Self::Part { bytes } => (PART_OF_MESSAGE, *bytes),
            Self::Barrier => (BARRIER, 0),
            Self::End(error) => {
                payload = serde_json::to_vec(&shortened(error)).unwrap_or_default();
                (END, payload.len())
            }
            Self::Bye => (BYE, 0),
        };
        let mut frame = vec![kind];
        frame.extend((len as u32).to_le_bytes());
        frame.append(&mut payload);
        frame
    }

    fn decode(kind: u8, payload: &[u8]) -> Result<Self, Fault> {
        let garbage = |what: String| Fault::Garbage(what);
        let numbers = || payload.as_chunks::<8>().0.iter().map(|bytes| u64::from_le_bytes(*bytes));
        match (kind, payload.len()) {
            (ALIVE, 4) => {
                let rank = payload.iter().rev().fold(0, |rank, byte| rank << 8 | u32::from(*byte));
                Ok(Self::Alive { waits_for: (rank != NOBODY).then_some(rank as usize) })
            }
            (MESSAGE, len) if len % 8 == 0 && (8..=8 * (MAX_DIMS + 1)).contains(&len) => {
                let bytes = numbers().next().unwrap_or_default();
                let shape: Option<Vec<usize>> = numbers().skip(1).map(|size| usize::try_from(size).ok()).collect();
                let shape = shape.ok_or_else(|| garbage("a shape beyond this machine".into()))?;
                if bytes > MAX_MESSAGE {
                    return Err(garbage(format!("a message of {bytes} bytes; at most {MAX_MESSAGE} are taken")));
                }
                Ok(Self::Message { shape, bytes })
            }
            (BARRIER, 0) => Ok(Self::Barrier),
            (END, _) => serde_json::from_slice(payload).map(Self::End).map_err(|error| garbage(error.to_string())),
            (BYE, 0) => Ok(Self::Bye),
            (kind, len) => Err(garbage(format!("a frame of kind {kind} and {len} bytes"))),
        }
    }
}

/// The error with texts that fit a frame.
fn shortened(error: &CommError) -> CommError {
    let mut error = error.clone();
    let cut = |text: &mut String| text.truncate(text.floor_char_boundary(TEXT));
    match &mut error {
        CommError::Lost { why, .. } => cut(why),
        CommError::Aborted { reason, .. } => cut(reason),
        CommError::Mismatch { expected, got, .. } => [expected, got].into_iter().for_each(cut),
        CommError::Transport(text) => cut(text),
        CommError::Silent { .. } | CommError::Stalled { .. } => {}
    }
    error
}

/// Why no frame came.
#[derive(Debug)]
pub(super) enum Fault {
    /// The connection has ended, one way or the other.
    Closed,
    Silent,
    Garbage(String),
    Io(std::io::Error),
}

/// Reads frames; each read has to give something within the time of silence.
pub(super) struct FrameReader<R> {
    inner: BufReader<R>,
    silence: Duration,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    pub(super) fn new(inner: R, silence: Duration) -> Self {
        Self { inner: BufReader::with_capacity(64 << 10, inner), silence }
    }

    /// The next frame. A part's bytes have to be read with [`FrameReader::part`] before the frame after it.
    pub(super) async fn next(&mut self) -> Result<Frame, Fault> {
        let mut head = Vec::with_capacity(5);
        self.append(5, &mut head).await?;
        let len = head[1..].iter().rev().fold(0, |len, byte| len << 8 | *byte as usize);
        if head[0] == PART_OF_MESSAGE {
            if len == 0 || len > PART {
                return Err(Fault::Garbage(format!("a part of {len} bytes")));
            }
            return Ok(Frame::Part { bytes: len });
        }
        if len > SMALL {
            return Err(Fault::Garbage(format!("a frame of kind {} and {len} bytes", head[0])));
        }
        let mut payload = Vec::new();
        self.append(len, &mut payload).await?;
        Frame::decode(head[0], &payload)
    }

    /// Appends the `len` bytes of a part to a message of `total`, whose memory grows with what came.
    pub(super) async fn part(&mut self, len: usize, total: usize, message: &mut Vec<u8>) -> Result<(), Fault> {
        if message.capacity() - message.len() < len {
            message.reserve_exact(message.len().max(len).min(total - message.len()));
        }
        self.append(len, message).await
    }

    async fn append(&mut self, len: usize, to: &mut Vec<u8>) -> Result<(), Fault> {
        let end = to.len() + len;
        while to.len() < end {
            let mut rest = (&mut self.inner).take((end - to.len()) as u64);
            match timeout(self.silence, rest.read_buf(to)).await {
                Err(_) => return Err(Fault::Silent),
                Ok(Ok(0)) => return Err(Fault::Closed),
                Ok(Ok(_)) => {}
                Ok(Err(error)) => return Err(Fault::of(error)),
            }
        }
        Ok(())
    }

    /// Reads to the end of the connection and forgets it.
    pub(super) async fn drain(&mut self) {
        // Whatever ends it is fine.
        let _ = tokio::io::copy_buf(&mut self.inner, &mut tokio::io::sink()).await;
    }
}

impl Fault {
    fn of(error: std::io::Error) -> Self {
        match error.kind() {
            ErrorKind::UnexpectedEof
            | ErrorKind::ConnectionReset
            | ErrorKind::ConnectionAborted
            | ErrorKind::BrokenPipe => Self::Closed,
            _ => Self::Io(error),
        }
    }

    /// What it means to a rank that expects frames of rank `rank`.
    pub(super) fn blame(self, rank: usize, silence: Duration) -> CommError {
        let lost = |why: String| CommError::Lost { rank, why };
        match self {
            Self::Closed => lost("its connection ended".into()),
            Self::Silent => CommError::Silent { rank, after: silence },
            Self::Garbage(what) => lost(format!("it sent garbage: {what}")),
            Self::Io(error) => lost(format!("its connection failed: {error}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8]) -> Result<Vec<Frame>, Fault> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let mut reader = FrameReader::new(bytes, Duration::from_secs(5));
            let mut frames = Vec::new();
            loop {
                match reader.next().await {
                    Ok(Frame::Part { bytes }) => {
                        reader.part(bytes, bytes, &mut Vec::new()).await?;
                        frames.push(Frame::Part { bytes });
                    }
                    Ok(frame) => frames.push(frame),
                    Err(Fault::Closed) if !frames.is_empty() => return Ok(frames),
                    Err(fault) => return Err(fault),
                }
            }
        })
    }

    #[test]
    fn frames_are_read_as_they_were_written() {
        let frames = || {
            vec![
                Frame::Alive { waits_for: None },
                Frame::Alive { waits_for: Some(70_000) },
                Frame::Message { shape: vec![3, 0, 1 << 40], bytes: MAX_MESSAGE },
                Frame::Message { shape: Vec::new(), bytes: 4 },
                Frame::Part { bytes: 4 },
                Frame::Barrier,
                Frame::End(CommError::Aborted { rank: 3, reason: "too \"hot\"".into() }),
                Frame::End(CommError::Silent { rank: 1, after: Duration::from_millis(2500) }),
                Frame::Bye,
            ]
        };
        let mut bytes = Vec::new();
        for frame in frames() {
            bytes.extend(frame.encode());
            if let Frame::Part { bytes: len } = frame {
                bytes.extend(vec![7; len]);
            }
        }
        assert_eq!(read(&bytes).unwrap(), frames());
    }

    #[test]
    fn long_texts_are_cut_to_fit_a_frame() {
        // Every character takes six bytes in JSON.
        let reason = "\u{1}".repeat(1 << 20);
        let frames = read(&Frame::End(CommError::Aborted { rank: 3, reason }).encode()).unwrap();
        assert_eq!(frames, [Frame::End(CommError::Aborted { rank: 3, reason: "\u{1}".repeat(TEXT) })]);
    }

    #[test]
    fn garbage_is_refused_before_memory_is_taken() {
        let frame = |kind: u8, len: u32, payload: &[u8]| [&[kind], &len.to_le_bytes()[..], payload].concat();
        let numbers = |numbers: &[u64]| numbers.iter().flat_map(|number| number.to_le_bytes()).collect::<Vec<_>>();
        for bytes in [
            frame(0, 0, b""),
            frame(9, 3, b"abc"),
            frame(BYE, u32::MAX, b""),
            frame(PART_OF_MESSAGE, u32::MAX, b""),
            frame(PART_OF_MESSAGE, 0, b""),
            frame(ALIVE, 3, b"abc"),
            frame(END, 3, b"abc"),
            frame(MESSAGE, 0, b""),
            frame(MESSAGE, 7, b"abcdefg"),
            frame(MESSAGE, 8, &numbers(&[MAX_MESSAGE + 1])),
            frame(MESSAGE, 80, &numbers(&[1; 10])),
            b"GET / HTTP/1.1\r\nHost: farm\r\n\r\n".to_vec(),
        ] {
            assert!(matches!(read(&bytes), Err(Fault::Garbage(_))), "{bytes:?}");
        }
    }

    #[test]
    fn memory_grows_with_the_bytes_that_came() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let mut message = Vec::new();
            let total = 1 << 40;
            let bytes = [1; 5000];
            let mut reader = FrameReader::new(&bytes[..], Duration::from_secs(5));
            for len in [1000, 3000, 1000] {
                reader.part(len, total, &mut message).await.unwrap();
                assert!(message.capacity() <= 2 * message.len().max(1000), "{}", message.capacity());
            }
            assert!(matches!(reader.part(1, total, &mut message).await, Err(Fault::Closed)));
        });
    }
}
