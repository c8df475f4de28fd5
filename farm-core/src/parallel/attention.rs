//! The joint attention of visual and text rows over all ranks of a branch: Ulysses inside a ring.
//!
//! A rank has some rows of both streams, with all heads. The Ulysses exchange gives it all rows of its ring place (the
//! *segment*), with its share of the heads; over the ring it attends to every segment; the reverse exchange gives it
//! its own rows back, with all heads.
//!
//! Text rows are dealt to ranks like visual ones, so a text key is in exactly one segment and is counted once, and a
//! text query is computed by exactly one rank per head.
//!
//! Without a ring the keys come in the order of a single rank, so every head is computed with the same operations on
//! the same values: the result has the same bits for any Ulysses degree. A ring merges partial results in f32, in an
//! order that starts with the rank's own segment, and rounds once at the end if the engine computes in another type: what
//! differs is some ulp of f32.

use crate::comm::{CommError, Exchange};
use crate::engine::{AttentionOut, EngineError, Qkv, SequenceOps};
use crate::parallel::group::RankGroup;
use crate::parallel::shard::Shares;

/// Why a step over the group failed: here, or at a peer.
#[derive(Debug, thiserror::Error)]
pub enum ParallelError {
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Comm(#[from] CommError),
}

/// Attention output of a rank's rows, `[rows, heads · head_dim]`.
pub struct JointOut<T> {
    pub visual: T,
    /// None if the rank has no text rows or they do not ask.
    pub text: Option<T>,
}

/// Attention of this rank's visual rows `[rows, heads, head_dim]`, and of its text rows if `text_asks`, over the rows of
/// all ranks of its branch. `text` is None if this rank has no text row.
pub fn joint_attention<O: SequenceOps>(
    ops: &O,
    group: &RankGroup<O>,
    shares: Shares,
    visual: &Qkv<O::Tensor>,
    text: Option<&Qkv<O::Tensor>>,
    text_asks: bool,
) -> Result<JointOut<O::Tensor>, ParallelError> {
    let layout = Layout { shares, rank: group.rank(), text_asks };
    layout.check(ops, visual, text)?;
    let segment = if group.ulysses.size() > 1 {
        layout.to_heads(ops, group, visual, text)?
    } else {
        Segment {
            q: visual.q.clone(),
            text_q: text.filter(|_| text_asks).map(|text| text.q.clone()),
            kv: KeysValues {
                visual: [visual.k.clone(), visual.v.clone()],
                text: text.map(|text| [text.k.clone(), text.v.clone()]),
            },
        }
    };
    let (visual, text) = layout.attend(ops, group, segment)?;
    if group.ulysses.size() > 1 {
        layout.to_rows(ops, group, &visual, text.as_ref())
    } else {
        Ok(JointOut { visual, text })
    }
}

/// One ring place's rows with this rank's heads.
struct Segment<T> {
    q: T,
    /// None if the place has no text rows or they do not ask.
    text_q: Option<T>,
    kv: KeysValues<T>,
}

/// Of visual rows, and of text rows if there are any that ask.
type Attended<A> = (A, Option<A>);

struct KeysValues<T> {
    visual: [T; 2],
    /// None if the place has no text rows.
    text: Option<[T; 2]>,
}

impl<T> KeysValues<T> {
    /// Keys of the streams, and their values.
    fn segments(&self) -> (Vec<&T>, Vec<&T>) {
        let streams = [Some(&self.visual), self.text.as_ref()];
        streams.into_iter().flatten().map(|[keys, values]| (keys, values)).unzip()
    }
}

/// Who holds what in one attention, seen from one rank.
struct Layout {
    shares: Shares,
    rank: usize,
    text_asks: bool,
}

impl Layout {
    fn my_ring(&self) -> usize {
        self.shares.topology().coords(self.rank).ring
    }

    fn ring(&self) -> usize {
        self.shares.topology().ring()
    }

    /// Number of heads that this rank attends with.
    fn my_heads(&self) -> usize {
        self.shares.heads(self.rank).len()
    }

    /// This rank and those it exchanges tokens for heads with, in their order.
    fn peers(&self) -> Vec<usize> {
        self.shares.topology().ulysses_peers(self.rank)
    }

    fn check<O: SequenceOps>(
        &self,
        ops: &O,
        visual: &Qkv<O::Tensor>,
        text: Option<&Qkv<O::Tensor>>,
    ) -> Result<(), ParallelError> {
        let [tokens, text_rows] = self.shares.row_counts(self.rank);
        let expect = |qkv: &Qkv<O::Tensor>, rows| {
            let expected = vec![rows, self.shares.all_heads(), self.shares.head_dim()];
            match [&qkv.q, &qkv.k, &qkv.v].into_iter().map(|x| ops.shape(x)).find(|shape| *shape != expected) {
                None => Ok(()),
                Some(got) => Err(EngineError::Shape {
                    op: "joint_attention",
                    expected: format!("{expected:?} for this rank"),
                    got: format!("{got:?}"),
                }),
            }
        };
        expect(visual, tokens)?;
        match text {
            Some(text) => expect(text, text_rows)?,
            None if text_rows == 0 => {}
            None => {
                let expected = format!("{text_rows} text rows for this rank");
                return Err(EngineError::Shape { op: "joint_attention", expected, got: "none".into() }.into());
            }
        }
        Ok(())
    }

    /// Tensors of the text stream that are exchanged for heads: q, k, v, or k, v.
    fn text_parts(&self) -> usize {
        if self.text_asks { 3 } else { 2 }
    }

    /// The Ulysses exchange: this rank's rows with all heads → the segment's rows with this rank's heads. A message
    /// holds, one after the other, the sender's visual q, k, v and text q (if it asks), k, v with the receiver's heads.
    fn to_heads<O: SequenceOps>(
        &self,
        ops: &O,
        group: &RankGroup<O>,
        visual: &Qkv<O::Tensor>,
        text: Option<&Qkv<O::Tensor>>,
    ) -> Result<Segment<O::Tensor>, ParallelError> {
        let mut parts = vec![&visual.q, &visual.k, &visual.v];
        if let Some(text) = text {
            parts.extend(self.text_asks.then_some(&text.q));
            parts.extend([&text.k, &text.v]);
        }
        let peers = self.peers();
        let mut messages = Vec::with_capacity(peers.len());
        for heads in peers.iter().map(|peer| self.shares.heads(*peer)) {
            let mine: Vec<O::Tensor> =
                parts.iter().map(|x| ops.narrow(x, 1, heads.start, heads.len())).collect::<Result<_, _>>()?;
            messages.push(ops.concat(&mine.iter().collect::<Vec<_>>(), 0)?);
        }
        let (heads, d, text_parts) = (self.my_heads(), self.shares.head_dim(), self.text_parts());
        let shapes: Vec<_> = peers
            .iter()
            .map(|peer| {
                let [tokens, text] = self.shares.row_counts(*peer);
                vec![3 * tokens + text_parts * text, heads, d]
            })
            .collect();
        let received = group.ulysses.all_to_all_v(messages, &shapes)?;

        // Part `part` of one stream: its rows from every peer.
        let collect = |stream: usize, part: usize| -> Result<O::Tensor, ParallelError> {
            let mut rows = Vec::with_capacity(peers.len());
            for (peer, message) in peers.iter().zip(&received) {
                let [tokens, text] = self.shares.row_counts(*peer);
                let (start, len) = if stream == 0 { (part * tokens, tokens) } else { (3 * tokens + part * text, text) };
                rows.push(ops.narrow(message, 0, start, len)?);
            }
            Ok(ops.concat(&rows.iter().collect::<Vec<_>>(), 0)?)
        };
        let [_, text_rows] = self.shares.segment(self.my_ring());
        let text = if text_rows > 0 { Some([collect(1, text_parts - 2)?, collect(1, text_parts - 1)?]) } else { None };
        Ok(Segment {
            q: collect(0, 0)?,
            text_q: if self.text_asks && text_rows > 0 { Some(collect(1, 0)?) } else { None },
            kv: KeysValues { visual: [collect(0, 1)?, collect(0, 2)?], text },
        })
    }

    /// Attention of the segment's queries over the keys of all ring places: visual and text rows.
    fn attend<O: SequenceOps>(
        &self,
        ops: &O,
        group: &RankGroup<O>,
        segment: Segment<O::Tensor>,
    ) -> Result<Attended<O::Tensor>, ParallelError> {
        let Segment { q, text_q, mut kv } = segment;
        if self.ring() == 1 {
            let (keys, values) = kv.segments();
            let attend = |q| ops.attention(q, &keys, &values).map(|attended| attended.out);
            return Ok((attend(&q)?, text_q.as_ref().map(attend).transpose()?));
        }
        let mut sums: Option<Attended<AttentionOut<O::Tensor>>> = None;
        for step in 0..self.ring() {
            // The keys of the next step are on their way while this step computes.
            let next = if step + 1 < self.ring() { Some(self.start_pass(ops, group, &kv, step)?) } else { None };
            let (keys, values) = kv.segments();
            let attend = |q| ops.attention_part(q, &keys, &values);
            let (visual, text) = (attend(&q)?, text_q.as_ref().map(attend).transpose()?);
            sums = Some(match sums {
                None => (visual, text),
                Some((visual_sum, text_sum)) => (
                    ops.merge_attention(&visual_sum, &visual)?,
                    match text_sum.zip(text) {
                        Some((sum, text)) => Some(ops.merge_attention(&sum, &text)?),
                        None => None,
                    },
                ),
            });
            if let Some(next) = next {
                kv = self.finish_pass(ops, next, step)?;
            }
        }
        // A ring has at least one place.
        let (visual, text) = sums.ok_or_else(|| CommError::Transport("a ring without places".into()))?;
        Ok((ops.whole_attention(visual)?, text.map(|text| ops.whole_attention(text)).transpose()?))
    }

    /// The ring place whose keys this rank has at `step`.
    fn source(&self, step: usize) -> usize {
        (self.my_ring() + self.ring() - step) % self.ring()
    }

    /// Passes the keys and values of `step` on, and asks for those of the next step.
    fn start_pass<'g, O: SequenceOps>(
        &self,
        ops: &O,
        group: &'g RankGroup<O>,
        kv: &KeysValues<O::Tensor>,
        step: usize,
    ) -> Result<Exchange<'g, O::Tensor>, ParallelError> {
        let parts: Vec<_> = kv.visual.iter().chain(kv.text.iter().flatten()).collect();
        let message = ops.concat(&parts, 0)?;
        let [tokens, text] = self.shares.segment(self.source(step + 1));
        let shape = vec![2 * (tokens + text), self.my_heads(), self.shares.head_dim()];
        let (me, ring) = (self.my_ring(), self.ring());
        let (next, previous) = ((me + 1) % ring, (me + ring - 1) % ring);
        Ok(group.ring.start_pass(next, message, previous, shape)?)
    }

    fn finish_pass<O: SequenceOps>(
        &self,
        ops: &O,
        pass: Exchange<'_, O::Tensor>,
        step: usize,
    ) -> Result<KeysValues<O::Tensor>, ParallelError> {
        let received = pass.wait()?;
        let [message] = &received[..] else {
            return Err(CommError::Transport(format!("ring: {} messages instead of one", received.len())).into());
        };
        let [tokens, text] = self.shares.segment(self.source(step + 1));
        let part = |start, len| ops.narrow(message, 0, start, len);
        Ok(KeysValues {
            visual: [part(0, tokens)?, part(tokens, tokens)?],
            text: if text > 0 { Some([part(2 * tokens, text)?, part(2 * tokens + text, text)?]) } else { None },
        })
    }

    /// The reverse exchange: the segment's rows with this rank's heads → this rank's rows with all heads. A message
    /// holds the receiver's visual rows, then its text rows if they asked.
    fn to_rows<O: SequenceOps>(
        &self,
        ops: &O,
        group: &RankGroup<O>,
        visual: &O::Tensor,
        text: Option<&O::Tensor>,
    ) -> Result<JointOut<O::Tensor>, ParallelError> {
        let peers = self.peers();
        let [first_token, first_text] = self.shares.rows(peers[0]).map(|rows| rows.start);
        let mut messages = Vec::with_capacity(peers.len());
        for peer in &peers {
            let [tokens, text_rows] = self.shares.rows(*peer);
            let mut parts = vec![ops.narrow(visual, 0, tokens.start - first_token, tokens.len())?];
            if let Some(text) = text {
                parts.push(ops.narrow(text, 0, text_rows.start - first_text, text_rows.len())?);
            }
            messages.push(ops.concat(&parts.iter().collect::<Vec<_>>(), 0)?);
        }
        let [tokens, text_rows] = self.shares.row_counts(self.rank);
        let text_rows = if self.text_asks { text_rows } else { 0 };
        let shapes: Vec<_> =
            peers.iter().map(|peer| self.shares.heads(*peer).len() * self.shares.head_dim()).collect::<Vec<_>>();
        let shapes: Vec<_> = shapes.into_iter().map(|width| vec![tokens + text_rows, width]).collect();
        let received = group.ulysses.all_to_all_v(messages, &shapes)?;
        let rows = ops.concat(&received.iter().collect::<Vec<_>>(), 1)?;
        Ok(JointOut {
            visual: ops.narrow(&rows, 0, 0, tokens)?,
            text: if text_rows > 0 { Some(ops.narrow(&rows, 0, tokens, text_rows)?) } else { None },
        })
    }
}
