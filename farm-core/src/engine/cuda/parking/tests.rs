use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Mutex;

use super::*;
use crate::engine::cuda::device::{Arg, Launch, Matmul};
use crate::engine::cuda::emulation::Emulation;
use crate::engine::cuda::gpu::moving;
use crate::engine::cuda::kernels;
use crate::engine::streaming::{Streaming, walk};
use crate::precision::Precision;

const BLOCKS: usize = 5;
/// Matrices of a block; the last block has the first alone, as a transformer's last block has fewer.
static SHAPES: [[usize; 2]; 2] = [[8, 40], [3, 40]];

/// Weights of all blocks, some of them parked.
struct Network<D: Device> {
    streaming: Streaming,
    blocks: Vec<Place<D>>,
    slots: Slots<D>,
}

enum Place<D: Device> {
    Resident(Vec<Tensor<D>>),
    Parked(Parked<D>),
}

fn gpu<D: Device>(device: D) -> Gpu<D> {
    Gpu::new(Arc::new(device), Precision::F32)
}

fn shapes(block: usize) -> &'static [[usize; 2]] {
    if block + 1 == BLOCKS { &SHAPES[..1] } else { &SHAPES }
}

fn weights<D: Device>(gpu: &Gpu<D>, block: usize) -> Vec<Tensor<D>> {
    let weight = |(i, [rows, columns]): (usize, &[usize; 2])| {
        let value = |at: usize| ((at * 7 + 11 * block + i) % 13) as f32 / 3.0 - 2.0;
        gpu.upload("test", &(0..rows * columns).map(value).collect::<Vec<_>>(), &[*rows, *columns]).unwrap()
    };
    shapes(block).iter().enumerate().map(weight).collect()
}

impl<D: Device> Network<D> {
    fn load(gpu: &Gpu<D>, streaming: Streaming) -> Self {
        let place = |block| {
            let weights = weights(gpu, block);
            if streaming.streams(block, BLOCKS) {
                Place::Parked(park(gpu, &weights.iter().collect::<Vec<_>>()).unwrap())
            } else {
                Place::Resident(weights)
            }
        };
        let blocks: Vec<_> = (0..BLOCKS).map(place).collect();
        let parked: Vec<_> = blocks.iter().filter_map(Place::parked).collect();
        let slots = Slots::new(gpu, &parked, streaming.slots.min(parked.len())).unwrap();
        Self { streaming, blocks, slots }
    }

    /// Two launches a weight: `x = silu(x + w)`.
    fn pass(&self, gpu: &Gpu<D>, x: &Tensor<D>) {
        let x = RefCell::new(x.clone());
        let fetch = |block: usize| self.blocks[block].parked().map(|parked| self.slots.start_fetch(parked)).transpose();
        walk(self.streaming, BLOCKS, fetch, |block, fetched| {
            let fetched = fetched.flatten().map(Fetch::finish).transpose()?;
            let weights = match &self.blocks[block] {
                Place::Resident(weights) => weights,
                Place::Parked(_) => fetched.as_ref().unwrap(),
            };
            for weight in weights {
                let x = x.borrow().part(0, weight.dims());
                let [add, silu] = [kernels::add, kernels::silu].map(|kernel| kernel.of(Dtype::F32));
                let count = Arg::Long(weight.len() as i64);
                gpu.over_values(
                    add,
                    weight.len(),
                    &[x.pointer(), weight.pointer(), x.pointer(), count],
                    moving(&[&x, weight, &x]),
                )?;
                gpu.over_values(silu, weight.len(), &[x.pointer(), x.pointer(), count], moving(&[&x, &x]))?;
            }
            Ok::<(), EngineError>(())
        })
        .unwrap();
    }
}

impl<D: Device> Place<D> {
    fn parked(&self) -> Option<&Parked<D>> {
        match self {
            Self::Parked(parked) => Some(parked),
            Self::Resident(_) => None,
        }
    }
}

fn all_streamings() -> impl Iterator<Item = Streaming> {
    (0..=BLOCKS).flat_map(|resident| (1..4).map(move |slots| Streaming { resident, slots }))
}

#[test]
fn weights_that_are_fetched_give_the_bits_of_weights_that_stay() {
    let gpu = gpu(Emulation::default());
    let values: Vec<f32> = (0..320).map(|i| (i as f32).sin()).collect();
    let run = |streaming: Streaming| {
        let x = gpu.upload("test", &values, &[8, 40]).unwrap();
        let network = Network::load(&gpu, streaming);
        (0..3).for_each(|_| network.pass(&gpu, &x));
        gpu.download(&x).unwrap().into_iter().map(f32::to_bits).collect::<Vec<_>>()
    };
    let expected = run(Streaming { resident: BLOCKS, slots: 0 });
    for streaming in all_streamings() {
        assert_eq!(run(streaming), expected, "{streaming:?}");
    }
    assert_eq!(gpu.device.used(), 0);
}

/// What a device was asked for. Marks are numbered by their place here.
#[derive(Clone, Debug, PartialEq)]
enum Event {
    Alloc(Address, usize),
    Free(Address),
    CopyIn(Address),
    CopyOut(Address),
    /// To, bytes, and the mark before.
    Fetch(Address, usize, usize),
    Mark,
    Wait(usize),
    Launch(Vec<Address>),
}

/// A device that only writes down what it is asked for.
#[derive(Default)]
struct Recording {
    log: Mutex<Vec<Event>>,
}

impl Recording {
    fn push(&self, event: Event) -> usize {
        let mut log = self.log.lock().unwrap();
        log.push(event);
        log.len() - 1
    }

    fn log(&self) -> Vec<Event> {
        self.log.lock().unwrap().clone()
    }
}

impl Device for Recording {
    type Host = Vec<u8>;
    type Mark = usize;

    fn name(&self) -> String {
        "recording".into()
    }

    fn runs(&self, _source: kernels::Source) -> bool {
        true
    }

    fn alloc(&self, bytes: usize) -> Result<Address> {
        let mut log = self.log.lock().unwrap();
        let end =
            log.iter().map(|event| if let Event::Alloc(at, bytes) = event { at + *bytes as u64 } else { 0 }).max();
        let address = end.unwrap_or(0).next_multiple_of(256) + 256;
        log.push(Event::Alloc(address, bytes));
        Ok(address)
    }

    fn free(&self, address: Address, _bytes: usize) {
        self.push(Event::Free(address));
    }

    fn copy_in(&self, to: Address, _from: &[u8]) -> Result<()> {
        self.push(Event::CopyIn(to));
        Ok(())
    }

    fn copy_out(&self, from: Address, _to: &mut [u8]) -> Result<()> {
        self.push(Event::CopyOut(from));
        Ok(())
    }

    fn copy(&self, _to: Address, _from: Address, _bytes: usize) -> Result<()> {
        unreachable!("no weight is copied on the device")
    }

    fn host(&self, bytes: usize) -> Result<Vec<u8>> {
        Ok(vec![0; bytes])
    }

    fn mark(&self) -> Result<usize> {
        Ok(self.push(Event::Mark))
    }

    fn fetch(&self, to: Address, from: &Vec<u8>, after: &usize) -> Result<usize> {
        Ok(self.push(Event::Fetch(to, from.len(), *after)))
    }

    fn wait(&self, mark: &usize) -> Result<()> {
        self.push(Event::Wait(*mark));
        Ok(())
    }

    fn pull(&self, _peer: &Self, _from: Address, _bytes: usize, _after: &usize) -> Result<(Address, usize)> {
        unreachable!("there is no other device")
    }

    fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        let pointer = |arg: &Arg| if let Arg::Pointer(address) = arg { Some(*address) } else { None };
        self.push(Event::Launch(launch.args.iter().filter_map(pointer).collect()));
        Ok(())
    }

    fn matmul(&self, _matmul: &Matmul) -> Result<bool> {
        Ok(false)
    }
}

/// Bytes that are in use in the end, and at the peak.
#[derive(Default)]
struct Memory {
    used: usize,
    peak: usize,
}

fn memory(log: &[Event]) -> Memory {
    let (mut sizes, mut memory) = (HashMap::new(), Memory::default());
    for event in log {
        match event {
            Event::Alloc(address, bytes) => {
                sizes.insert(*address, *bytes);
                memory.used += bytes;
                memory.peak = memory.peak.max(memory.used);
            }
            Event::Free(address) => memory.used -= sizes.remove(address).unwrap(),
            _ => {}
        }
    }
    memory
}

/// Bytes of a block, as it is parked.
fn block_bytes(block: usize) -> usize {
    shapes(block).iter().map(|[rows, columns]| (4 * rows * columns).next_multiple_of(ALIGN)).sum()
}

#[test]
fn no_slot_is_overwritten_while_it_is_read_and_none_is_read_before_it_is_there() {
    for streaming in all_streamings() {
        let gpu = gpu(Recording::default());
        let network = Network::load(&gpu, streaming);
        let x = gpu.empty("test", &[8, 40], Dtype::F32).unwrap();
        (0..3).for_each(|_| network.pass(&gpu, &x));
        let log = gpu.device.log();
        let mut reads = 0;
        for (at, event) in log.iter().enumerate() {
            let before = &log[..at];
            match event {
                Event::Fetch(to, bytes, after) => {
                    let inside = |address: &u64| (*to..*to + *bytes as u64).contains(address);
                    let late = before
                        .iter()
                        .skip(after + 1)
                        .find(|event| matches!(event, Event::Launch(addresses) if addresses.iter().any(inside)));
                    assert_eq!(late, None, "{streaming:?}: read after the mark that the fetch waits for");
                }
                Event::Launch(addresses) => {
                    for address in addresses {
                        let into = |event: &Event| matches!(event, Event::Fetch(to, bytes, _) if (*to..*to + *bytes as u64).contains(address));
                        let Some(fetch) = before.iter().rposition(into) else { continue };
                        let there = before.iter().rposition(|event| *event == Event::Wait(fetch));
                        assert!(there > Some(fetch), "{streaming:?}: read without a wait for its fetch");
                        reads += 1;
                    }
                }
                _ => {}
            }
        }
        let streams = (0..BLOCKS).filter(|block| streaming.streams(*block, BLOCKS));
        let weights: usize = streams.map(|block| if block + 1 == BLOCKS { 1 } else { 2 }).sum();
        assert_eq!(reads, 3 * weights, "{streaming:?}");
    }
}

#[test]
fn the_next_fetch_is_asked_for_before_a_block_and_nothing_waits_for_the_device() {
    for slots in [2, 3] {
        let gpu = gpu(Recording::default());
        let network = Network::load(&gpu, Streaming { resident: 0, slots });
        let x = gpu.empty("test", &[8, 40], Dtype::F32).unwrap();
        let loaded = gpu.device.log().len();
        (0..2).for_each(|_| network.pass(&gpu, &x));
        let log = gpu.device.log().split_off(loaded);
        let (mut asked, mut begun) = (0, 0);
        for event in &log {
            match event {
                Event::Fetch(..) => asked += 1,
                // A block begins with the wait for its own.
                Event::Wait(_) => {
                    let in_pass = begun % BLOCKS;
                    let expected = begun - in_pass + (in_pass + slots).min(BLOCKS);
                    assert_eq!(asked, expected, "when block {in_pass} begins");
                    begun += 1;
                }
                Event::Mark | Event::Launch(_) => {}
                other => panic!("{other:?} in the middle of a pass"),
            }
        }
        assert_eq!((asked, begun), (2 * BLOCKS, 2 * BLOCKS));
    }
}

#[test]
fn streamed_weights_take_the_blocks_that_stay_and_the_slots() {
    for streaming in all_streamings() {
        let gpu = gpu(Recording::default());
        let network = Network::load(&gpu, streaming);
        let loaded = gpu.device.log();
        let x = gpu.empty("test", &[8, 40], Dtype::F32).unwrap();
        (0..2).for_each(|_| network.pass(&gpu, &x));
        let (streamed, stay): (Vec<_>, Vec<_>) = (0..BLOCKS).partition(|block| streaming.streams(*block, BLOCKS));
        let resident: usize =
            stay.iter().flat_map(|block| shapes(*block)).map(|[rows, columns]| 4 * rows * columns).sum();
        let largest = streamed.iter().map(|block| block_bytes(*block)).max().unwrap_or(0);
        let slots = streaming.slots.min(streamed.len()) * largest;
        // While they are loaded, one block passes through on its way to the host.
        assert!(memory(&loaded).peak <= resident + slots.max(largest), "{streaming:?}: to load them");
        assert_eq!(memory(&loaded).used, resident + slots, "{streaming:?}: loaded");
        let after = memory(&gpu.device.log());
        assert_eq!(after.used, resident + slots + 4 * x.len(), "{streaming:?}: a pass takes no more");
        assert_eq!(after.peak, after.used.max(memory(&loaded).peak), "{streaming:?}: nor at its peak");
    }
}

#[test]
fn a_fetch_that_is_given_up_gives_its_slot_back_after_it_has_arrived() {
    let gpu = gpu(Recording::default());
    let parked = park(&gpu, &[&weights(&gpu, 0)[0]]).unwrap();
    let slots = Slots::new(&gpu, &[&parked], 1).unwrap();
    let fetch = slots.start_fetch(&parked).unwrap();
    assert!(slots.start_fetch(&parked).err().unwrap().to_string().contains("every slot is in use"));
    let asked = gpu.device.log().len();
    drop(fetch);
    assert_eq!(gpu.device.log()[asked..], [Event::Wait(asked - 1), Event::Mark]);
    let tensors = slots.start_fetch(&parked).unwrap().finish().unwrap();
    // The memory lives as long as what is in it.
    drop(slots);
    let asked = gpu.device.log().len();
    drop(tensors);
    assert!(matches!(gpu.device.log()[asked..], [Event::Mark, Event::Free(_)]));
}
