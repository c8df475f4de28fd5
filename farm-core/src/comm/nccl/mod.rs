//! Ranks as NVIDIA GPUs, over NCCL. One rank is one GPU; ranks are threads, processes, or processes on several hosts.
//!
//! **Not run on hardware yet.** It is compiled and its library is found and asked for its version; what it does with
//! two GPUs follows the documentation of NCCL and CUDA. The suite of all transports runs where there are enough GPUs.
//!
//! NCCL cannot tell a rank that computes from one that is dead, and waits for either for ever. So a group has a second,
//! small transport among the same ranks, threads or TCP, that carries a [`Token`] for every tensor. Tokens say who is
//! late, gone or out of step, by the rules of that transport; only when all tokens of an exchange are there does a rank
//! wait for the GPU. When the group ends, in whatever way, the communicator is aborted, which frees the GPU from kernels
//! that wait for a peer.
//!
//! Two things differ from the other transports. The GPU carries out exchanges in the order in which a rank started
//! them, so all ranks have to start those that belong together in the same order (they run the same program); a rank
//! that sends much before its peer receives is held up there. And `start` returns when NCCL has put the exchange on its
//! stream, which for a healthy group is at once.

mod library;
#[cfg(test)]
mod tests;
mod token;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cudarc::driver::{CudaContext, CudaEvent, CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DriverError};
use cudarc::nccl::sys::{ncclComm_t, ncclUniqueId};

use self::library::{Library, Progress, library};
pub use self::token::{Token, Tokens};
use super::{Collective, CommError, Exchange, Group, Patience};
use crate::engine::Transfer;

/// How often a rank that waits for its GPU looks at it: at first, and at most.
const LOOKS: [Duration; 2] = [Duration::from_micros(20), Duration::from_millis(1)];

/// The version of NCCL on this machine, or what is missing. Never panics.
pub fn available() -> Result<String, CommError> {
    Ok(library()?.version())
}

/// A tensor on a GPU: contiguous, row-major.
#[derive(Clone)]
pub struct DeviceBuffer {
    /// None if it has no elements: CUDA allocates no memory of no bytes.
    values: Option<Arc<CudaSlice<u8>>>,
    shape: Vec<usize>,
    /// Bytes of an element.
    element: usize,
}

impl DeviceBuffer {
    /// `values` are those of the shape, elements of `element` bytes; none for an empty shape.
    pub fn new(values: Option<Arc<CudaSlice<u8>>>, shape: Vec<usize>, element: usize) -> Result<Self, CommError> {
        let (expected, got) = (bytes_of(&shape, element)?, values.as_ref().map_or(0, |values| values.len()));
        if expected != got {
            let text = format!("{shape:?} with elements of {element} bytes needs {expected} bytes, not {got}");
            return Err(CommError::Transport(text));
        }
        Ok(Self { values, shape, element })
    }

    /// None if the shape is empty.
    pub fn values(&self) -> Option<&Arc<CudaSlice<u8>>> {
        self.values.as_ref()
    }
}

impl Transfer for DeviceBuffer {
    fn sizes(&self) -> Vec<usize> {
        self.shape.clone()
    }

    fn byte_len(&self) -> usize {
        self.values.as_ref().map_or(0, |values| values.len())
    }
}

fn bytes_of(shape: &[usize], element: usize) -> Result<usize, CommError> {
    let bytes = shape.iter().try_fold(element, |bytes, size| bytes.checked_mul(*size));
    bytes.ok_or_else(|| CommError::Transport(format!("{shape:?} does not fit any memory")))
}

/// One rank's end of a group of GPUs.
pub struct NcclRank {
    control: Arc<dyn Collective<Token>>,
    patience: Patience,
    library: &'static Library,
    context: Arc<CudaContext>,
    /// Exchanges are on a stream of their own, beside those that compute.
    stream: Arc<CudaStream>,
    /// Bytes of an element of every message.
    element: usize,
    state: Mutex<State>,
    sent: AtomicU64,
}

struct State {
    /// None in a group of one, and after it was given up.
    comm: Option<Communicator>,
    /// Exchanges whose buffers the GPU may still read, in the order it carries them out.
    under_way: VecDeque<(Arc<CudaEvent>, Vec<DeviceBuffer>)>,
}

struct Communicator(ncclComm_t);

// SAFETY: NCCL lets any thread call on a communicator, one at a time; the lock around it sees to that.
unsafe impl Send for Communicator {}

/// Forms a group of the GPU of `context` and those of the other ranks of `control`, which all call this.
///
/// Messages have elements of `element` bytes. `control` is for this group alone. Errors if NCCL is not on this machine,
/// if two ranks have the same GPU, and with the group.
pub fn join(
    context: &Arc<CudaContext>,
    control: Arc<dyn Collective<Token>>,
    element: usize,
    patience: Patience,
) -> Result<NcclRank, CommError> {
    let formed = form(context, control.clone(), element, patience);
    // Nobody waits for a rank that has given up.
    formed.inspect_err(|error| control.abort(&error.to_string()))
}

fn form(
    context: &Arc<CudaContext>,
    control: Arc<dyn Collective<Token>>,
    element: usize,
    patience: Patience,
) -> Result<NcclRank, CommError> {
    let (me, world) = (control.rank(), control.world());
    let library = library()?;
    let failed = |error: DriverError| CommError::Transport(format!("rank {me}: {error}"));
    let broken = |text: String| CommError::Transport(format!("rank {me}: {text}"));
    let stream = context.new_stream().map_err(failed)?;
    let state = Mutex::new(State { comm: None, under_way: VecDeque::new() });
    let sent = AtomicU64::new(0);
    let rank = NcclRank { control, patience, library, context: context.clone(), stream, element, state, sent };
    if world == 1 {
        return Ok(rank);
    }

    let everybody = Group::new(rank.control.clone(), (0..world).collect())?;
    let own = if me == 0 {
        Some(Token::bytes(library.unique_id().map_err(broken)?.internal.map(|byte| byte as u8).into()))
    } else {
        None
    };
    let id: [u8; 128] = everybody.broadcast(0, own, &[128])?.into_bytes()?;
    context.bind_to_thread().map_err(failed)?;
    let id = ncclUniqueId { internal: id.map(|byte| byte as _) };
    let comm = library.init(world, id, me).map_err(broken)?;
    rank.lock().comm = Some(Communicator(comm));
    rank.until(|| rank.is_ready())?;

    // The first message between two GPUs opens their connection and waits for both. All of them now, so that no later
    // exchange waits for that in an order of its own.
    let others = || (0..world).filter(|other| *other != me);
    let byte = DeviceBuffer {
        values: Some(Arc::new(rank.stream.alloc_zeros(element).map_err(failed)?)),
        shape: vec![1],
        element,
    };
    let sends = others().map(|to| (to, byte.clone())).collect();
    rank.start(sends, others().map(|from| (from, vec![1])).collect())?.wait()?;
    rank.sent.store(0, Ordering::Relaxed);
    Ok(rank)
}

impl NcclRank {
    /// The stream that exchanges are on. Buffers that were received belong to it.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Puts an exchange on the stream.
    fn launch(
        &self,
        sends: Vec<(usize, DeviceBuffer)>,
        receives: &[(usize, Vec<usize>)],
    ) -> Result<(Arc<CudaEvent>, Vec<DeviceBuffer>), CommError> {
        let failed = |error: DriverError| self.fail(error.to_string());
        self.context.bind_to_thread().map_err(failed)?;
        let mut slices = Vec::with_capacity(receives.len());
        for (_, shape) in receives {
            let bytes = bytes_of(shape, self.element)?;
            // SAFETY: NCCL writes all of it before anybody reads: readers wait for the event that is recorded below.
            slices.push(if bytes == 0 { None } else { Some(unsafe { self.stream.alloc(bytes) }.map_err(failed)?) });
        }
        {
            // Getting a pointer makes the stream wait for what was written there before; dropping its guard records that
            // the buffer is used up to then. So the guards live until NCCL has put its work on the stream.
            let mut guards = Vec::new();
            let mut calls = Vec::new();
            for (to, buffer) in &sends {
                if let Some(values) = &buffer.values {
                    let (pointer, guard) = values.device_ptr(&self.stream);
                    guards.push(guard);
                    calls.push((true, pointer, values.len(), *to));
                }
            }
            for (slice, (from, _)) in slices.iter_mut().zip(receives) {
                if let Some(slice) = slice {
                    let len = slice.len();
                    let (pointer, guard) = slice.device_ptr_mut(&self.stream);
                    guards.push(guard);
                    calls.push((false, pointer, len, *from));
                }
            }
            if !calls.is_empty() {
                self.group(&calls).map_err(|text| self.fail(text))?;
                self.until(|| self.is_ready())?;
            }
        }
        let event = Arc::new(self.stream.record_event(None).map_err(failed)?);
        let mut state = self.lock();
        while state.under_way.front().is_some_and(|(event, _)| event.is_complete()) {
            state.under_way.pop_front();
        }
        state.under_way.push_back((event.clone(), sends.into_iter().map(|(_, buffer)| buffer).collect()));
        drop(state);
        let buffer = |(slice, (_, shape)): (Option<CudaSlice<u8>>, &(usize, Vec<usize>))| DeviceBuffer {
            values: slice.map(Arc::new),
            shape: shape.clone(),
            element: self.element,
        };
        Ok((event, slices.into_iter().zip(receives).map(buffer).collect()))
    }

    /// Sends (`true`) and receives all at once: `(which, pointer, bytes, peer)`.
    fn group(&self, calls: &[(bool, u64, usize, usize)]) -> Result<(), String> {
        let state = self.lock();
        let Some(Communicator(comm)) = state.comm else { return Err("the communicator was given up".into()) };
        self.library.group_start()?;
        let called = calls.iter().try_for_each(|(sends, pointer, len, peer)| {
            let stream = self.stream.cu_stream();
            // SAFETY: `comm` was not given up, which the lock keeps so; the memory is that of buffers in `launch`, which
            // are kept until the stream is past this.
            let result = unsafe {
                if *sends {
                    self.library.send(*pointer, *len, *peer, comm, stream)
                } else {
                    self.library.receive(*pointer, *len, *peer, comm, stream)
                }
            };
            result.map(|_| ())
        });
        // A group that was started has to be ended, also after an error.
        let ended = self.library.group_end().map(|_| ());
        called.and(ended)
    }

    /// Whether NCCL has done what it was last told to, short of what is on the stream.
    fn is_ready(&self) -> Result<bool, CommError> {
        let state = self.lock();
        let progress = match state.comm {
            // SAFETY: it was not given up, which the lock keeps so.
            Some(Communicator(comm)) => unsafe { self.library.progress(comm) },
            None => Err("the communicator was given up".into()),
        };
        drop(state);
        progress.map(|progress| progress == Progress::Done).map_err(|text| self.fail(text))
    }

    /// Waits for something on this rank's own side, and ends with the group.
    fn until(&self, mut done: impl FnMut() -> Result<bool, CommError>) -> Result<(), CommError> {
        let start = Instant::now();
        let [mut pause, longest] = LOOKS;
        while !done()? {
            self.check()?;
            if start.elapsed() >= self.patience.stall {
                let waited = start.elapsed().as_secs_f32();
                return Err(self.fail(format!("an exchange was not carried out within {waited:.1} s")));
            }
            std::thread::sleep(pause);
            pause = (2 * pause).min(longest);
        }
        Ok(())
    }

    /// Fails when the group has.
    fn check(&self) -> Result<(), CommError> {
        self.control.start(Vec::new(), Vec::new()).map(drop).inspect_err(|_| self.give_up())
    }

    /// Ends the group for a reason of this rank.
    fn fail(&self, why: String) -> CommError {
        self.control.abort(&why);
        self.give_up();
        let aborted = CommError::Aborted { rank: self.control.rank(), reason: why };
        self.control.start(Vec::new(), Vec::new()).err().unwrap_or(aborted)
    }

    /// Frees the GPU of what waits for others.
    fn give_up(&self) {
        if let Some(Communicator(comm)) = self.lock().comm.take() {
            // SAFETY: it was not given up before, and is not used after.
            unsafe { self.library.abort(comm) };
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets what was sent go out and takes leave.
    fn leave(&self) -> Result<(), CommError> {
        let last = self.lock().under_way.back().map(|(event, _)| event.clone());
        if let Some(event) = last {
            self.until(|| event.try_is_complete().map_err(|error| self.fail(error.to_string())))?;
        }
        let state = self.lock();
        let Some(Communicator(comm)) = state.comm else { return Ok(()) };
        // SAFETY: it was not given up, which the lock keeps so.
        let finalized = unsafe { self.library.finalize(comm) };
        drop(state);
        finalized.map_err(|text| self.fail(text))?;
        self.until(|| self.is_ready())?;
        if let Some(Communicator(comm)) = self.lock().comm.take() {
            // SAFETY: it was not given up before, and is not used after.
            unsafe { self.library.destroy(comm) };
        }
        Ok(())
    }
}

impl Collective<DeviceBuffer> for NcclRank {
    fn rank(&self) -> usize {
        self.control.rank()
    }

    fn world(&self) -> usize {
        self.control.world()
    }

    fn start(
        &self,
        sends: Vec<(usize, DeviceBuffer)>,
        receives: Vec<(usize, Vec<usize>)>,
    ) -> Result<Exchange<'_, DeviceBuffer>, CommError> {
        if let Some((_, other)) = sends.iter().find(|(_, buffer)| buffer.element != self.element) {
            let (got, expected) = (other.element, self.element);
            return Err(self.fail(format!("a message has elements of {got} bytes, this group's have {expected}")));
        }
        let tokens = sends.iter().map(|(to, buffer)| (*to, Token::of(buffer))).collect();
        let tokens = self.control.start(tokens, receives.clone()).inspect_err(|_| self.give_up())?;
        let bytes: usize = sends.iter().map(|(_, buffer)| buffer.byte_len()).sum();
        self.sent.fetch_add(bytes as u64, Ordering::Relaxed);
        let (event, received) = self.launch(sends, &receives)?;
        Ok(Exchange::new(move || {
            tokens.wait().inspect_err(|_| self.give_up())?;
            if !received.is_empty() {
                self.until(|| event.try_is_complete().map_err(|error| self.fail(error.to_string())))?;
            }
            Ok(received)
        }))
    }

    fn barrier(&self) -> Result<(), CommError> {
        self.control.barrier().inspect_err(|_| self.give_up())
    }

    fn abort(&self, reason: &str) {
        self.control.abort(reason);
        self.give_up();
    }

    fn bytes_sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }
}

impl Drop for NcclRank {
    fn drop(&mut self) {
        // A thread that panics is noticed by the control transport, which is dropped next.
        if std::thread::panicking() || self.leave().is_err() {
            self.give_up();
        }
    }
}
