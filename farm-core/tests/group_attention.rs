//! Attention over a group is attention on one rank: in f64 to rounding, in f32 to 1e-5, and without a ring to the bit.
#![cfg(feature = "model")]

mod ranks;

use std::ops::Range;

use farm_core::engine::cpu::CpuEngine;
use farm_core::engine::{AttentionOut, Engine, EngineError, Qkv, SequenceOps, Transfer};
use farm_core::parallel::attention::{JointOut, joint_attention};
use farm_core::parallel::cost::sent_values_per_layer;
use farm_core::parallel::group::RankGroup;
use farm_core::parallel::shard::Shares;
use farm_core::parallel::topology::Topology;

use crate::ranks::{on_ranks, topologies};

const HEAD_DIM: usize = 8;
const TOKENS: [usize; 3] = [105, 97, 13];
const HEADS: [usize; 3] = [6, 5, 12];
const TEXT: [usize; 3] = [0, 1, 17];

/// f64 tensors and plain attention, written for clarity.
struct Exact;

#[derive(Clone, Debug)]
struct Array {
    shape: Vec<usize>,
    values: Vec<f64>,
}

impl Transfer for Array {
    fn sizes(&self) -> Vec<usize> {
        self.shape.clone()
    }

    fn byte_len(&self) -> usize {
        8 * self.values.len()
    }
}

type Result<T> = std::result::Result<T, EngineError>;

impl SequenceOps for Exact {
    type Tensor = Array;

    fn reshape(&self, x: &Array, shape: &[usize]) -> Result<Array> {
        assert_eq!(shape.iter().product::<usize>(), x.values.len());
        Ok(Array { shape: shape.to_vec(), values: x.values.clone() })
    }

    fn narrow(&self, x: &Array, dim: usize, start: usize, len: usize) -> Result<Array> {
        let inner: usize = x.shape[dim + 1..].iter().product();
        let mut shape = x.shape.clone();
        shape[dim] = len;
        let outer: usize = x.shape[..dim].iter().product();
        let runs = (0..outer).map(|i| (i * x.shape[dim] + start) * inner);
        Ok(Array { values: runs.flat_map(|at| x.values[at..at + len * inner].to_vec()).collect(), shape })
    }

    fn concat(&self, parts: &[&Array], dim: usize) -> Result<Array> {
        let mut shape = parts[0].shape.clone();
        shape[dim] = parts.iter().map(|part| part.shape[dim]).sum();
        let outer: usize = shape[..dim].iter().product();
        let run = |part: &Array, i: usize| {
            let len: usize = part.shape[dim..].iter().product();
            part.values[i * len..(i + 1) * len].to_vec()
        };
        let values = (0..outer).flat_map(|i| parts.iter().flat_map(move |part| run(part, i))).collect();
        Ok(Array { shape, values })
    }

    fn to_bytes(&self, x: &Array) -> Result<Vec<u8>> {
        Ok(x.values.iter().flat_map(|value| value.to_le_bytes()).collect())
    }

    fn tensor_of_bytes(&self, bytes: &[u8], shape: &[usize]) -> Result<Array> {
        let values = bytes.as_chunks().0.iter().map(|value| f64::from_le_bytes(*value)).collect();
        Ok(Array { shape: shape.to_vec(), values })
    }

    fn attention(&self, q: &Array, keys: &[&Array], values: &[&Array]) -> Result<AttentionOut<Array>> {
        let &[queries, heads, d] = &q.shape[..] else { panic!("{:?}", q.shape) };
        let (k, v) = (self.concat(keys, 0)?, self.concat(values, 0)?);
        let (mut out, mut lse) = (Vec::new(), Vec::new());
        let row = |x: &Array, i: usize, head: usize| x.values[(i * heads + head) * d..][..d].to_vec();
        for i in 0..queries {
            for head in 0..heads {
                let q = row(q, i, head);
                let dot = |j| q.iter().zip(row(&k, j, head)).map(|(q, k)| q * k).sum::<f64>() / (d as f64).sqrt();
                let weights: Vec<f64> = (0..k.shape[0]).map(|j| dot(j).exp()).collect();
                let sum: f64 = weights.iter().sum();
                lse.push(sum.ln());
                let mut mean = vec![0.0; d];
                for (j, weight) in weights.iter().enumerate() {
                    mean.iter_mut().zip(row(&v, j, head)).for_each(|(mean, v)| *mean += weight / sum * v);
                }
                out.extend(mean);
            }
        }
        let lse = Array { shape: vec![queries, heads], values: lse };
        Ok(AttentionOut { out: Array { shape: vec![queries, heads * d], values: out }, lse })
    }

    fn merge_attention(&self, a: &AttentionOut<Array>, b: &AttentionOut<Array>) -> Result<AttentionOut<Array>> {
        let d = a.out.values.len() / a.lse.values.len().max(1);
        let lse: Vec<f64> =
            a.lse.values.iter().zip(&b.lse.values).map(|(a, b)| a.max(*b) + (-(a - b).abs()).exp().ln_1p()).collect();
        let share = |of: &AttentionOut<Array>, i: usize| (of.lse.values[i / d] - lse[i / d]).exp() * of.out.values[i];
        let out = (0..a.out.values.len()).map(|i| share(a, i) + share(b, i)).collect();
        let array = |shape: &[usize], values| Array { shape: shape.to_vec(), values };
        Ok(AttentionOut { out: array(&a.out.shape, out), lse: array(&a.lse.shape, lse) })
    }
}

/// Values in [-2, 2), different for every seed.
fn values(count: usize, seed: u64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f64 / (1u64 << 22) as f64 - 2.0
    };
    (0..count).map(|_| next()).collect()
}

/// Both streams of the whole sequence, `[rows, heads, head_dim]`.
struct Inputs<T> {
    tokens: usize,
    text_rows: usize,
    heads: usize,
    visual: Qkv<T>,
    text: Qkv<T>,
}

impl<T> Inputs<T> {
    fn new(tokens: usize, text: usize, heads: usize, make: impl Fn(Vec<f64>, &[usize]) -> T) -> Self {
        let tensor = |rows: usize, seed| make(values(rows * heads * HEAD_DIM, seed), &[rows, heads, HEAD_DIM]);
        Inputs {
            tokens,
            text_rows: text,
            heads,
            visual: Qkv { q: tensor(tokens, 1), k: tensor(tokens, 2), v: tensor(tokens, 3) },
            text: Qkv { q: tensor(text, 4), k: tensor(text, 5), v: tensor(text, 6) },
        }
    }

    fn shares(&self, topology: Topology) -> Shares {
        Shares::new(topology, self.tokens, self.text_rows, self.heads, HEAD_DIM)
    }

    /// Attention of this rank's rows.
    fn on_rank<O: SequenceOps<Tensor = T>>(&self, ops: &O, group: &RankGroup<O>, text_asks: bool) -> JointOut<T> {
        let shares = self.shares(group.topology());
        let [tokens, text] = shares.rows(group.rank());
        let part = |x: &T, rows: &Range<usize>| ops.narrow(x, 0, rows.start, rows.len()).unwrap();
        let cut = |of: &Qkv<T>, rows| Qkv { q: part(&of.q, rows), k: part(&of.k, rows), v: part(&of.v, rows) };
        let text_part = (!text.is_empty()).then(|| cut(&self.text, &text));
        let visual = cut(&self.visual, &tokens);
        joint_attention(ops, group, shares, &visual, text_part.as_ref(), text_asks).unwrap()
    }

    /// Attention over the group, put together: all visual rows, then all text rows (none if they do not ask).
    fn over<O: SequenceOps<Tensor = T>>(&self, ops: &O, topology: Topology, text_asks: bool) -> [T; 2]
    where
        T: Transfer,
    {
        let mut outs = on_ranks(topology, |group: &RankGroup<O>| self.on_rank(ops, group, text_asks));
        // Branches compute the same here; the second one's result is dropped.
        outs.truncate(topology.sequence_ranks());
        let visual: Vec<&T> = outs.iter().map(|out| &out.visual).collect();
        let nothing = ops.narrow(visual[0], 0, 0, 0).unwrap();
        let text: Vec<&T> = [&nothing].into_iter().chain(outs.iter().filter_map(|out| out.text.as_ref())).collect();
        [ops.concat(&visual, 0).unwrap(), ops.concat(&text, 0).unwrap()]
    }

    /// Bytes that each rank sends in one attention, as the transport counts them.
    fn sent<O: SequenceOps<Tensor = T>>(&self, ops: &O, topology: Topology) -> Vec<u64>
    where
        T: Transfer,
    {
        on_ranks(topology, |group: &RankGroup<O>| {
            self.on_rank(ops, group, true);
            group.bytes_sent()
        })
    }
}

fn every_case(mut check: impl FnMut(usize, usize, usize)) {
    for tokens in TOKENS {
        for heads in HEADS {
            for text in TEXT {
                check(tokens, heads, text);
            }
        }
    }
}

#[test]
fn every_topology_equals_one_rank_to_rounding_in_f64() {
    every_case(|tokens, heads, text| {
        let inputs = Inputs::new(tokens, text, heads, |values, shape| Array { shape: shape.to_vec(), values });
        let expected = inputs.over(&Exact, Topology::SOLO, true);
        for topology in topologies(12, heads, tokens) {
            let got = inputs.over(&Exact, topology, true);
            for (got, expected) in got.iter().zip(&expected) {
                assert_eq!(got.shape, expected.shape);
                let worst = got.values.iter().zip(&expected.values).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
                assert!(worst < 1e-12, "{topology}, {tokens} tokens, {heads} heads, {text} text rows: {worst}");
            }
        }
    });
}

#[test]
fn every_topology_equals_one_rank_in_f32_and_without_a_ring_to_the_bit() {
    let engine = CpuEngine::new(1).unwrap();
    every_case(|tokens, heads, text| {
        let upload = |values: Vec<f64>, shape: &[usize]| {
            engine.upload(&values.into_iter().map(|x| x as f32).collect::<Vec<_>>(), shape).unwrap()
        };
        let inputs = Inputs::new(tokens, text, heads, upload);
        let of = |topology, asks| inputs.over(&engine, topology, asks).map(|x| engine.download(&x).unwrap());
        let expected = of(Topology::SOLO, true);
        for topology in topologies(12, heads, tokens) {
            let got = of(topology, true);
            let case = format!("{topology}, {tokens} tokens, {heads} heads, {text} text rows");
            for (got, expected) in got.iter().zip(&expected) {
                assert_eq!(got.len(), expected.len());
                let worst = got.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(worst < 1e-5, "{case}: {worst}");
            }
            assert!(topology.ring() > 1 || got == expected, "{case}: bits");
            if text > 0 {
                // The last block: text keys count, text queries are not asked.
                let [visual, none] = of(topology, false);
                assert!(visual == got[0] && none.is_empty(), "{case}: without text queries");
            }
        }
    });
}

/// What the engine computes in is bf16 for one, f32 for the other; what they are given is the same.
#[cfg(feature = "cuda")]
#[test]
fn a_ring_in_bf16_rounds_once_at_its_end() {
    use std::sync::Arc;

    use farm_core::engine::cuda::{CudaEngine, emulation::Emulation};
    use farm_core::precision::Precision;

    let of = |precision, topology| {
        let engine = CudaEngine::new(Arc::new(Emulation::default()), precision);
        let upload = |values: Vec<f64>, shape: &[usize]| {
            let bytes: Vec<u8> = match precision {
                Precision::Bf16 => {
                    values.iter().flat_map(|x| half::bf16::from_f64(*x).to_bits().to_le_bytes()).collect()
                }
                Precision::F32 => values.iter().flat_map(|x| half::bf16::from_f64(*x).to_f32().to_le_bytes()).collect(),
            };
            engine.tensor_of_bytes(&bytes, shape).unwrap()
        };
        Inputs::new(13, 5, 6, upload).over(&engine, topology, true).map(|x| engine.download(&x).unwrap())
    };
    for topology in [(2, 1), (4, 1), (3, 2)].map(|(ring, ulysses)| Topology::new(1, ring, ulysses).unwrap()) {
        let exact = of(Precision::F32, topology).map(|out| {
            let rounded = |x: f32| half::bf16::from_f32(x).to_f32();
            out.into_iter().map(rounded).collect::<Vec<_>>()
        });
        assert!(of(Precision::Bf16, topology) == exact, "{topology}");
    }
}

#[test]
fn ranks_send_what_the_formula_says() {
    every_case(|tokens, heads, text| {
        let inputs = Inputs::new(tokens, text, heads, |values, shape| Array { shape: shape.to_vec(), values });
        for topology in topologies(12, heads, tokens) {
            let sent = inputs.sent(&Exact, topology);
            for (rank, sent) in sent.into_iter().enumerate() {
                let expected = sent_values_per_layer(topology, rank, tokens, text, heads, HEAD_DIM);
                assert_eq!(sent, 8 * expected, "{topology}, rank {rank}, {tokens} tokens, {heads} heads, {text} text");
            }
        }
    });
    // Even shards: the formula of the literature, 4·(N·De/P)·(U−1)/U + 2·(N·De/P)·(R−1).
    for (ring, ulysses) in [(1, 2), (2, 1), (1, 4), (2, 2), (4, 1), (3, 2)] {
        let (tokens, heads, ranks) = (96, 12, ring * ulysses);
        let inputs = Inputs::new(tokens, 0, heads, |values, shape| Array { shape: shape.to_vec(), values });
        let part = tokens * heads * HEAD_DIM / ranks;
        let expected = 4 * part * (ulysses - 1) / ulysses + 2 * part * (ring - 1);
        for sent in inputs.sent(&Exact, Topology::new(1, ring, ulysses).unwrap()) {
            assert_eq!(sent, 8 * expected as u64, "ring {ring} x ulysses {ulysses}");
        }
    }
}

#[test]
fn rows_that_do_not_fit_the_rank_are_an_error() {
    let inputs = Inputs::new(13, 2, 6, |values, shape| Array { shape: shape.to_vec(), values });
    let solo = RankGroup::<Exact>::solo().unwrap();
    let error = |text: Option<&Qkv<Array>>, visual: &Qkv<Array>| {
        joint_attention(&Exact, &solo, inputs.shares(Topology::SOLO), visual, text, true).err().unwrap().to_string()
    };
    assert!(error(None, &inputs.visual).contains("2 text rows"));
    assert!(error(Some(&inputs.text), &inputs.text).contains("[13, 6, 8]"));
    assert!(error(Some(&inputs.visual), &inputs.visual).contains("[2, 6, 8]"));
}
