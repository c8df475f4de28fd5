//! Bytes of what hands and the crew say to each other: little-endian, numbers of values before the values, nothing
//! between. Pixels and statistics are most of it, so they go as they are in memory.
//!
//! Decoding believes nothing: what does not fit what is left of the bytes is an error before memory is taken for it.
//! Values pass as they are, NaN included; whoever uses them judges them.

use std::sync::Arc;

use super::message::{Edges, Frame, FromHand, Pixels, ToHand};
use super::plan::{Mode, Span, Tile};
use super::statistics::{Sums, Totals};

/// What goes over a data plane.
pub trait Wire: Sized {
    fn encode(&self) -> Vec<u8>;
    /// Never panics, and takes memory in proportion to `bytes` only.
    fn decode(bytes: &[u8]) -> Result<Self, CodecError>;
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    #[error("{what} takes {needs} bytes, and {left} are left of the message")]
    Truncated { what: &'static str, needs: u64, left: usize },
    #[error("{tag} is no kind of {what}")]
    Tag { what: &'static str, tag: u8 },
    #[error("{left} bytes are left over at the end of a message")]
    TooLong { left: usize },
    #[error("a message's text is not UTF-8")]
    Text,
    #[error(
        "a tile's rows or columns, {start}..{end} of which {own_start}..{own_end} are its own, do not fit a latent of {extent}"
    )]
    Span { start: u64, end: u64, own_start: u64, own_end: u64, extent: usize },
    #[error("{value} is too large for this machine")]
    Size { value: u64 },
}

impl Wire for ToHand {
    fn encode(&self) -> Vec<u8> {
        let mut out = Writer::default();
        match self {
            Self::Assign { number, tile, frame, wanted_from, closed } => {
                out.u8(0);
                out.u32(*number);
                out.frame(frame);
                out.span(tile.rows);
                out.span(tile.cols);
                out.u32(*wanted_from);
                out.length(closed.len());
                closed.iter().for_each(|totals| out.totals(totals));
            }
            Self::Closed { step, totals, edges } => {
                out.u8(1);
                out.u32(*step);
                out.totals(totals);
                out.length(edges.len());
                for (tile, edges) in edges {
                    out.u32(*tile);
                    out.edges(edges);
                }
            }
            Self::Drop { number } => {
                out.u8(2);
                out.u32(*number);
            }
            Self::Done => out.u8(3),
        }
        out.0
    }

    fn decode(bytes: &[u8]) -> Result<Self, CodecError> {
        let mut from = Reader(bytes);
        let message = match from.u8("a message")? {
            0 => {
                let number = from.u32("a tile's number")?;
                let frame = from.frame()?;
                let tile = Tile { rows: from.span(frame.latent[0])?, cols: from.span(frame.latent[1])? };
                let wanted_from = from.u32("the first chunk wanted")?;
                // Totals take four bytes even where there are none of them.
                let closed = from.length("closed steps", 4)?;
                let closed = (0..closed).map(|_| from.totals().map(Arc::new)).collect::<Result<_, _>>()?;
                Self::Assign { number, tile, frame, wanted_from, closed }
            }
            1 => {
                let step = from.u32("a step")?;
                let totals = Arc::new(from.totals()?);
                let tiles = from.length("tiles with edges", 4 + 16)?;
                let edges = (0..tiles).map(|_| Ok((from.u32("a tile's number")?, Arc::new(from.edges()?))));
                Self::Closed { step, totals, edges: edges.collect::<Result<_, _>>()? }
            }
            2 => Self::Drop { number: from.u32("a tile's number")? },
            3 => Self::Done,
            tag => return Err(CodecError::Tag { what: "message to a hand", tag }),
        };
        from.end(message)
    }
}

impl Wire for FromHand {
    fn encode(&self) -> Vec<u8> {
        let mut out = Writer::default();
        match self {
            Self::Given { number, step, busy_ms, sums, edges } => {
                out.u8(0);
                out.u32(*number);
                out.u32(*step);
                out.u64(*busy_ms);
                out.u64(sums.count);
                out.values(&sums.moments, |[mean, m2]| join::<8, 16>(mean.to_le_bytes(), m2.to_le_bytes()));
                out.u8(u8::from(edges.is_some()));
                edges.iter().for_each(|edges| out.edges(edges));
            }
            Self::Frames { number, chunk, pixels } => {
                out.u8(1);
                out.u32(*number);
                out.u32(*chunk);
                match pixels {
                    Pixels::Rgb8(values) => {
                        out.u8(0);
                        out.bytes(values);
                    }
                    Pixels::Rgb16(values) => {
                        out.u8(1);
                        out.values(values, |value| value.to_le_bytes());
                    }
                }
            }
            Self::Failed { message } => {
                out.u8(2);
                out.bytes(message.as_bytes());
            }
        }
        out.0
    }

    fn decode(bytes: &[u8]) -> Result<Self, CodecError> {
        let mut from = Reader(bytes);
        let message = match from.u8("a message")? {
            0 => {
                let number = from.u32("a tile's number")?;
                let step = from.u32("a step")?;
                let busy_ms = from.u64("a time")?;
                let count = from.u64("a count")?;
                let moments = from.values("sums", |value: [u8; 16]| {
                    let (mean, m2) = halves(value);
                    [f64::from_le_bytes(mean), f64::from_le_bytes(m2)]
                })?;
                let edges = match from.u8("edges")? {
                    0 => None,
                    1 => Some(from.edges()?),
                    tag => return Err(CodecError::Tag { what: "edges", tag }),
                };
                Self::Given { number, step, busy_ms, sums: Sums { count, moments }, edges }
            }
            1 => {
                let number = from.u32("a tile's number")?;
                let chunk = from.u32("a chunk")?;
                let pixels = match from.u8("pixels")? {
                    0 => Pixels::Rgb8(from.bytes("pixels")?.to_vec()),
                    1 => Pixels::Rgb16(from.values("pixels", u16::from_le_bytes)?),
                    tag => return Err(CodecError::Tag { what: "pixels", tag }),
                };
                Self::Frames { number, chunk, pixels }
            }
            2 => {
                let text = std::str::from_utf8(from.bytes("text")?).map_err(|_| CodecError::Text)?;
                Self::Failed { message: text.to_owned() }
            }
            tag => return Err(CodecError::Tag { what: "message from a hand", tag }),
        };
        from.end(message)
    }
}

#[derive(Default)]
struct Writer(Vec<u8>);

impl Writer {
    fn u8(&mut self, value: u8) {
        self.0.push(value);
    }

    fn u32(&mut self, value: u32) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    /// Eight bytes would be room for what no message can hold.
    fn length(&mut self, values: usize) {
        debug_assert!(u32::try_from(values).is_ok());
        self.u32(values as u32);
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.length(bytes.len());
        self.0.extend_from_slice(bytes);
    }

    fn values<T: Copy, const N: usize>(&mut self, values: &[T], to_bytes: impl Fn(T) -> [u8; N]) {
        self.length(values.len());
        let start = self.0.len();
        self.0.resize(start + values.len() * N, 0);
        for (place, &value) in self.0[start..].as_chunks_mut().0.iter_mut().zip(values) {
            *place = to_bytes(value);
        }
    }

    fn totals(&mut self, totals: &Totals) {
        self.values(&totals.0, |[mean, variance]| join::<4, 8>(mean.to_le_bytes(), variance.to_le_bytes()));
    }

    fn edges(&mut self, Edges { top, bottom, left, right }: &Edges) {
        for side in [top, bottom, left, right] {
            self.values(side, f32::to_le_bytes);
        }
    }

    fn frame(&mut self, frame: &Frame) {
        self.u8(match frame.mode {
            Mode::Whole => 0,
            Mode::Shared => 1,
            Mode::Independent => 2,
            Mode::Exact => 3,
        });
        for value in frame.latent.into_iter().chain(frame.grid) {
            self.u64(value as u64);
        }
    }

    fn span(&mut self, span: Span) {
        for value in [span.start, span.end, span.own_start, span.own_end] {
            self.u64(value as u64);
        }
    }
}

/// What is left of a message.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, what: &'static str, bytes: u64) -> Result<&'a [u8], CodecError> {
        let truncated = CodecError::Truncated { what, needs: bytes, left: self.0.len() };
        let bytes = usize::try_from(bytes).map_err(|_| truncated.clone())?;
        let (taken, rest) = self.0.split_at_checked(bytes).ok_or(truncated)?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], CodecError> {
        let truncated = CodecError::Truncated { what, needs: N as u64, left: self.0.len() };
        let (taken, rest) = self.0.split_first_chunk().ok_or(truncated)?;
        self.0 = rest;
        Ok(*taken)
    }

    fn u8(&mut self, what: &'static str) -> Result<u8, CodecError> {
        self.array(what).map(|[value]| value)
    }

    fn u32(&mut self, what: &'static str) -> Result<u32, CodecError> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &'static str) -> Result<u64, CodecError> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// How many values of at least `least` bytes each follow.
    fn length(&mut self, what: &'static str, least: u64) -> Result<usize, CodecError> {
        let values = self.u32(what)?;
        let needs = u64::from(values) * least;
        if needs > self.0.len() as u64 {
            return Err(CodecError::Truncated { what, needs, left: self.0.len() });
        }
        Ok(values as usize)
    }

    fn bytes(&mut self, what: &'static str) -> Result<&'a [u8], CodecError> {
        let length = self.u32(what)?;
        self.take(what, u64::from(length))
    }

    fn values<T, const N: usize>(
        &mut self,
        what: &'static str,
        from_bytes: impl Fn([u8; N]) -> T,
    ) -> Result<Vec<T>, CodecError> {
        let values = self.u32(what)?;
        let bytes = self.take(what, u64::from(values) * N as u64)?;
        Ok(bytes.as_chunks().0.iter().map(|&value| from_bytes(value)).collect())
    }

    fn totals(&mut self) -> Result<Totals, CodecError> {
        let totals = self.values("totals", |value: [u8; 8]| {
            let (mean, variance) = halves(value);
            [f32::from_le_bytes(mean), f32::from_le_bytes(variance)]
        })?;
        Ok(Totals(totals))
    }

    fn edges(&mut self) -> Result<Edges, CodecError> {
        let mut side = || self.values("edges", f32::from_le_bytes);
        Ok(Edges { top: side()?, bottom: side()?, left: side()?, right: side()? })
    }

    fn size(&mut self, what: &'static str) -> Result<usize, CodecError> {
        let value = self.u64(what)?;
        usize::try_from(value).map_err(|_| CodecError::Size { value })
    }

    fn frame(&mut self) -> Result<Frame, CodecError> {
        let mode = match self.u8("a mode")? {
            0 => Mode::Whole,
            1 => Mode::Shared,
            2 => Mode::Independent,
            3 => Mode::Exact,
            tag => return Err(CodecError::Tag { what: "mode", tag }),
        };
        let latent = [self.size("a latent's height")?, self.size("a latent's width")?];
        Ok(Frame { mode, latent, grid: [self.size("a grid's rows")?, self.size("a grid's columns")?] })
    }

    /// In the order that lengths of it can be computed from.
    fn span(&mut self, extent: usize) -> Result<Span, CodecError> {
        let mut next = || self.u64("a tile's place");
        let (start, end, own_start, own_end) = (next()?, next()?, next()?, next()?);
        if !(start <= own_start && own_start < own_end && own_end <= end && end <= extent as u64) {
            return Err(CodecError::Span { start, end, own_start, own_end, extent });
        }
        // They are at most `extent`.
        let [start, end, own_start, own_end] = [start, end, own_start, own_end].map(|value| value as usize);
        Ok(Span { start, end, own_start, own_end })
    }

    fn end<T>(self, message: T) -> Result<T, CodecError> {
        if self.0.is_empty() { Ok(message) } else { Err(CodecError::TooLong { left: self.0.len() }) }
    }
}

fn join<const N: usize, const M: usize>(first: [u8; N], second: [u8; N]) -> [u8; M] {
    let mut both = [0; M];
    both[..N].copy_from_slice(&first);
    both[N..].copy_from_slice(&second);
    both
}

fn halves<const N: usize, const M: usize>(both: [u8; M]) -> ([u8; N], [u8; N]) {
    let (mut first, mut second) = ([0; N], [0; N]);
    first.copy_from_slice(&both[..N]);
    second.copy_from_slice(&both[N..]);
    (first, second)
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    /// Any bits: NaN and infinities too.
    fn float() -> impl Strategy<Value = f32> {
        any::<u32>().prop_map(f32::from_bits)
    }

    fn totals() -> impl Strategy<Value = Arc<Totals>> {
        vec([float(), float()], 0..9).prop_map(|values| Arc::new(Totals(values)))
    }

    fn edges() -> impl Strategy<Value = Edges> {
        let side = || vec(float(), 0..5);
        (side(), side(), side(), side()).prop_map(|(top, bottom, left, right)| Edges { top, bottom, left, right })
    }

    fn span() -> impl Strategy<Value = Span> {
        (0..9usize, 0..9usize, 1..9usize, 0..9usize).prop_map(|(start, before, own, after)| Span {
            start,
            own_start: start + before,
            own_end: start + before + own,
            end: start + before + own + after,
        })
    }

    fn frame() -> impl Strategy<Value = Frame> {
        let mode = prop::sample::select(vec![Mode::Whole, Mode::Shared, Mode::Independent, Mode::Exact]);
        (mode, 36..99usize, 36..99usize, any::<[u16; 2]>()).prop_map(|(mode, h, w, grid)| Frame {
            mode,
            latent: [h, w],
            grid: grid.map(usize::from),
        })
    }

    fn to_hand() -> impl Strategy<Value = ToHand> {
        prop_oneof![
            (any::<u32>(), span(), span(), frame(), any::<u32>(), vec(totals(), 0..5)).prop_map(
                |(number, rows, cols, frame, wanted_from, closed)| ToHand::Assign {
                    number,
                    tile: Tile { rows, cols },
                    frame,
                    wanted_from,
                    closed
                }
            ),
            (any::<u32>(), totals(), vec((any::<u32>(), edges().prop_map(Arc::new)), 0..4))
                .prop_map(|(step, totals, edges)| ToHand::Closed { step, totals, edges }),
            any::<u32>().prop_map(|number| ToHand::Drop { number }),
            Just(ToHand::Done),
        ]
    }

    fn from_hand() -> impl Strategy<Value = FromHand> {
        let moment = any::<[u64; 2]>().prop_map(|bits| bits.map(f64::from_bits));
        let sums = (any::<u64>(), vec(moment, 0..9)).prop_map(|(count, moments)| Sums { count, moments });
        let pixels = prop_oneof![
            vec(any::<u8>(), 0..40).prop_map(Pixels::Rgb8),
            vec(any::<u16>(), 0..40).prop_map(Pixels::Rgb16),
        ];
        prop_oneof![
            (any::<u32>(), any::<u32>(), any::<u64>(), sums, prop::option::of(edges())).prop_map(
                |(number, step, busy_ms, sums, edges)| FromHand::Given { number, step, busy_ms, sums, edges }
            ),
            (any::<u32>(), any::<u32>(), pixels).prop_map(|(number, chunk, pixels)| FromHand::Frames {
                number,
                chunk,
                pixels
            }),
            ".{0,20}".prop_map(|message| FromHand::Failed { message }),
        ]
    }

    /// Bytes say more than `==`, for which NaN is nothing.
    fn is_read_back<T: Wire>(message: &T) -> Result<(), TestCaseError> {
        let bytes = message.encode();
        prop_assert_eq!(T::decode(&bytes).map(|read| read.encode()), Ok(bytes.clone()));
        for cut in 0..bytes.len() {
            prop_assert!(T::decode(&bytes[..cut]).is_err(), "{} of {} bytes", cut, bytes.len());
        }
        let longer = [&bytes[..], &[0]].concat();
        prop_assert!(T::decode(&longer).is_err());
        Ok(())
    }

    /// What is taken for a message is one: it is encoded to the same bytes.
    fn is_refused_or_means_what_it_says<T: Wire>(bytes: &[u8]) -> Result<(), TestCaseError> {
        if let Ok(message) = T::decode(bytes) {
            prop_assert_eq!(message.encode(), bytes);
        }
        Ok(())
    }

    proptest! {
        #[test]
        fn messages_are_read_back_whole_or_not_at_all(to in to_hand(), from in from_hand()) {
            is_read_back(&to)?;
            is_read_back(&from)?;
        }

        #[test]
        fn any_bytes_are_a_message_or_an_error(bytes in vec(any::<u8>(), 0..200), kind in 0..5u8) {
            let bytes = [&[kind], &bytes[..]].concat();
            is_refused_or_means_what_it_says::<ToHand>(&bytes)?;
            is_refused_or_means_what_it_says::<FromHand>(&bytes)?;
        }

        #[test]
        fn flipped_bits_make_another_message_or_an_error(to in to_hand(), from in from_hand(), flips in vec(any::<prop::sample::Index>(), 1..4)) {
            let (mut to, mut from) = (to.encode(), from.encode());
            for flip in flips {
                for bytes in [&mut to, &mut from] {
                    let bit = flip.index(bytes.len() * 8);
                    bytes[bit / 8] ^= 1 << (bit % 8);
                }
            }
            is_refused_or_means_what_it_says::<ToHand>(&to)?;
            is_refused_or_means_what_it_says::<FromHand>(&from)?;
        }
    }

    #[test]
    fn a_length_that_lies_takes_no_memory() {
        let mut frames = FromHand::Frames { number: 1, chunk: 2, pixels: Pixels::Rgb16(vec![3]) }.encode();
        frames[10..14].copy_from_slice(&u32::MAX.to_le_bytes());
        let error = FromHand::decode(&frames).unwrap_err();
        assert_eq!(error, CodecError::Truncated { what: "pixels", needs: u64::from(u32::MAX) * 2, left: 2 });
    }

    #[test]
    fn a_tile_outside_its_latent_is_refused() {
        let span = |end| Span { start: 0, end, own_start: 0, own_end: 4 };
        let frame = Frame { mode: Mode::Shared, latent: [8, 8], grid: [1, 2] };
        let assign = |tile| ToHand::Assign { number: 0, tile, frame, wanted_from: 0, closed: vec![] }.encode();
        assert!(ToHand::decode(&assign(Tile { rows: span(8), cols: span(8) })).is_ok());
        assert!(ToHand::decode(&assign(Tile { rows: span(9), cols: span(8) })).is_err());
        assert!(ToHand::decode(&assign(Tile { rows: span(8), cols: span(3) })).is_err());
    }

    #[test]
    fn bytes_of_both_directions_stay_as_they_are() {
        let given = FromHand::Given {
            number: 1,
            step: 2,
            busy_ms: 3,
            sums: Sums { count: 4, moments: vec![[1.0, 0.5]] },
            edges: None,
        };
        let expected = [
            &[0, 1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0][..],
            &1f64.to_le_bytes(),
            &0.5f64.to_le_bytes(),
            &[0],
        ];
        assert_eq!(given.encode(), expected.concat());
        let closed = ToHand::Closed { step: 7, totals: Arc::new(Totals(vec![[1.0, 2.0]])), edges: vec![] };
        let expected = [&[1, 7, 0, 0, 0, 1, 0, 0, 0][..], &1f32.to_le_bytes(), &2f32.to_le_bytes(), &[0; 4]];
        assert_eq!(closed.encode(), expected.concat());
    }
}
