//! A device that records what it is asked for: every kernel with its work and the time that it took.
//!
//! Nothing waits for the device on the way: each launch has a tick before and one behind it in the order of work, and their
//! times are read when a stage ends, or when very many are open. What lies between two launches counts for neither.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::device::{Address, Device, Dtype, Launch, Matmul, Work};
use super::kernels::{Kernel, Source};
use crate::engine::Result;

#[cfg(test)]
mod tests;

/// Launches whose times are not read yet, at most. A driver takes about a thousand before it makes the host wait, so the
/// oldest of so many has long been done.
const MOST_OPEN: usize = 4096;

/// A device that can tell when it has come to a point in its work.
pub trait Timed: Device {
    type Tick: Send + 'static;

    /// The point after all work that was asked for so far, fetches aside.
    fn tick(&self) -> Result<Self::Tick>;
    /// [`Device::fetch`] with the points between which its copy is under way.
    fn timed_fetch(&self, to: Address, from: &Self::Host, after: &Self::Mark) -> Result<(Self::Mark, [Self::Tick; 2])>;
    /// The time between two points of the same order. Waits until the device has come to the second.
    fn between(&self, start: &Self::Tick, end: &Self::Tick) -> Result<Duration>;
}

/// What a device was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Those that multiply apart by their sizes.
    Kernel(Kernel, Option<[usize; 3]>),
    /// A matrix product in the vendor's library.
    Vendor(Dtype, [usize; 3]),
    Copy,
    CopyIn,
    CopyOut,
    /// Beside all others.
    Fetch,
}

impl Action {
    /// In what it computes, if it does: products of kernels that have one type are of bf16.
    pub fn arithmetic(&self) -> Option<Dtype> {
        match self {
            Self::Kernel(kernel, Some(_)) => Some(kernel.dtype().unwrap_or(Dtype::Bf16)),
            Self::Vendor(dtype, _) => Some(*dtype),
            Self::Kernel(_, None) | Self::Copy | Self::CopyIn | Self::CopyOut | Self::Fetch => None,
        }
    }

    pub fn sizes(&self) -> Option<[usize; 3]> {
        match self {
            Self::Kernel(_, sizes) => *sizes,
            Self::Vendor(_, sizes) => Some(*sizes),
            Self::Copy | Self::CopyIn | Self::CopyOut | Self::Fetch => None,
        }
    }
}

/// Without sizes.
impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kernel(kernel, _) => f.write_str(&kernel.name()),
            Self::Vendor(dtype, _) => write!(f, "cublasLt {dtype}"),
            Self::Copy => f.write_str("copy on the device"),
            Self::CopyIn => f.write_str("copy to the device"),
            Self::CopyOut => f.write_str("copy from the device"),
            Self::Fetch => f.write_str("fetch, beside the others"),
        }
    }
}

/// All calls of one action in a stage.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Record {
    pub action: Action,
    pub calls: u64,
    pub time: Duration,
    pub flops: u64,
    pub bytes: u64,
}

/// A stage.
#[derive(Clone, Debug, PartialEq)]
pub struct Profile {
    /// From the device's last work before it to the end of the last in it, by the host's clock.
    pub wall: Duration,
    /// In the order in which they came first.
    pub records: Vec<Record>,
    /// Bytes that tensors had at the most.
    pub peak: usize,
}

impl Profile {
    /// Of all that is done in order, so without fetches.
    pub fn busy(&self) -> Duration {
        self.records.iter().filter(|record| record.action != Action::Fetch).map(|record| record.time).sum()
    }
}

/// A device and a record of what it does.
pub struct Profiled<D: Timed> {
    device: Arc<D>,
    log: Mutex<Log<D>>,
    /// Bytes that are allocated.
    used: AtomicUsize,
    /// The most since [`Profiled::begin`].
    peak: AtomicUsize,
}

struct Log<D: Timed> {
    /// None outside a stage.
    since: Option<Instant>,
    /// Of a record, its start and its end, in the order in which they were asked for.
    open: VecDeque<(usize, [D::Tick; 2])>,
    records: Vec<Record>,
    places: HashMap<Action, usize>,
}

impl<D: Timed> Profiled<D> {
    pub fn new(device: Arc<D>) -> Self {
        let log = Log { since: None, open: VecDeque::new(), records: Vec::new(), places: HashMap::new() };
        Self { device, log: Mutex::new(log), used: AtomicUsize::new(0), peak: AtomicUsize::new(0) }
    }

    /// Waits for all work so far.
    pub fn settle(&self) -> Result<()> {
        let tick = self.device.tick()?;
        self.device.between(&tick, &tick).map(drop)
    }

    /// Waits for all work so far, and begins a stage.
    pub fn begin(&self) -> Result<()> {
        self.settle()?;
        self.peak.store(self.used.load(Ordering::Relaxed), Ordering::Relaxed);
        let mut log = self.log();
        log.records.clear();
        log.places.clear();
        log.open.clear();
        log.since = Some(Instant::now());
        Ok(())
    }

    /// Ends the stage with all that was asked for in it.
    pub fn end(&self) -> Result<Profile> {
        self.settle()?;
        let mut log = self.log();
        let wall = log.since.take().map_or(Duration::ZERO, |since| since.elapsed());
        while log.read_oldest(&self.device)? {}
        let records = std::mem::take(&mut log.records);
        Ok(Profile { wall, records, peak: self.peak.load(Ordering::Relaxed) })
    }

    /// Memory that is allocated.
    fn count(&self, bytes: usize) {
        let used = self.used.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.peak.fetch_max(used, Ordering::Relaxed);
    }

    fn log(&self) -> MutexGuard<'_, Log<D>> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn records(&self) -> bool {
        self.log().since.is_some()
    }

    /// Does what `start` asks the device for, between two ticks. What it did not do, it says with false.
    fn timed(&self, action: Action, work: Work, start: impl FnOnce(&D) -> Result<bool>) -> Result<bool> {
        if !self.records() {
            return start(&self.device);
        }
        let began = self.device.tick()?;
        if !start(&self.device)? {
            return Ok(false);
        }
        let ended = self.device.tick()?;
        self.log().add(&self.device, action, work, [began, ended])?;
        Ok(true)
    }
}

impl<D: Timed> Log<D> {
    fn add(&mut self, device: &D, action: Action, work: Work, ticks: [D::Tick; 2]) -> Result<()> {
        let next = self.records.len();
        let place = *self.places.entry(action).or_insert(next);
        if place == next {
            self.records.push(Record { action, calls: 0, time: Duration::ZERO, flops: 0, bytes: 0 });
        }
        let record = &mut self.records[place];
        record.calls += 1;
        record.flops += work.flops;
        record.bytes += work.bytes;
        self.open.push_back((place, ticks));
        if self.open.len() > MOST_OPEN {
            self.read_oldest(device)?;
        }
        Ok(())
    }

    /// False if none is open.
    fn read_oldest(&mut self, device: &D) -> Result<bool> {
        let Some((place, [start, end])) = self.open.pop_front() else { return Ok(false) };
        self.records[place].time += device.between(&start, &end)?;
        Ok(true)
    }
}

impl<D: Timed> Device for Profiled<D> {
    type Host = D::Host;
    type Mark = D::Mark;

    fn name(&self) -> String {
        self.device.name()
    }

    fn runs(&self, source: Source) -> bool {
        self.device.runs(source)
    }

    fn alloc(&self, bytes: usize) -> Result<Address> {
        let address = self.device.alloc(bytes)?;
        self.count(bytes);
        Ok(address)
    }

    fn free(&self, address: Address, bytes: usize) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
        self.device.free(address, bytes);
    }

    fn copy_in(&self, to: Address, from: &[u8]) -> Result<()> {
        let copy = |device: &D| device.copy_in(to, from).map(|()| true);
        self.timed(Action::CopyIn, Work::moving(from.len()), copy).map(drop)
    }

    fn copy_out(&self, from: Address, to: &mut [u8]) -> Result<()> {
        let work = Work::moving(to.len());
        self.timed(Action::CopyOut, work, |device| device.copy_out(from, to).map(|()| true)).map(drop)
    }

    fn copy(&self, to: Address, from: Address, bytes: usize) -> Result<()> {
        let copy = |device: &D| device.copy(to, from, bytes).map(|()| true);
        self.timed(Action::Copy, Work::moving(2 * bytes), copy).map(drop)
    }

    fn host(&self, bytes: usize) -> Result<D::Host> {
        self.device.host(bytes)
    }

    fn mark(&self) -> Result<D::Mark> {
        self.device.mark()
    }

    fn fetch(&self, to: Address, from: &D::Host, after: &D::Mark) -> Result<D::Mark> {
        if !self.records() {
            return self.device.fetch(to, from, after);
        }
        let (mark, ticks) = self.device.timed_fetch(to, from, after)?;
        self.log().add(&self.device, Action::Fetch, Work::moving(from.as_ref().len()), ticks)?;
        Ok(mark)
    }

    fn wait(&self, mark: &D::Mark) -> Result<()> {
        self.device.wait(mark)
    }

    /// Its time is not recorded: one device is profiled at a time.
    fn pull(&self, peer: &Self, from: Address, bytes: usize, after: &D::Mark) -> Result<(Address, D::Mark)> {
        let pulled = self.device.pull(&peer.device, from, bytes, after)?;
        self.count(bytes);
        Ok(pulled)
    }

    fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        let action = Action::Kernel(launch.kernel, launch.work.sizes);
        self.timed(action, launch.work, |device| device.launch(launch).map(|()| true)).map(drop)
    }

    fn matmul(&self, matmul: &Matmul) -> Result<bool> {
        let sizes = [matmul.rows, matmul.columns, matmul.inner];
        self.timed(Action::Vendor(matmul.dtype, sizes), matmul.work(), |device| device.matmul(matmul))
    }
}
