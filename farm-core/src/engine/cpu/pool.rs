//! The threads of one engine.

use rayon::prelude::*;

use crate::engine::{EngineError, Result};

/// Work below this many scalar operations stays on the calling thread: waking another one costs as much (some 10 µs).
const MIN_PARALLEL_WORK: usize = 1 << 16;
/// A task of an element-wise operation covers at least this many values, so that tasks outweigh their overhead.
const TASK_VALUES: usize = 1 << 13;

/// A rayon pool of its own, so that the devices of one process never use each other's threads.
///
/// Work is cut into tasks by shape alone, never by the number of threads, and each task's result depends on nothing
/// but its input: that is why results have the same bits for any number of threads.
pub(super) struct Pool {
    threads: usize,
    rayon: rayon::ThreadPool,
}

impl Pool {
    pub fn new(threads: usize) -> Result<Pool> {
        let rayon = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("cpu-engine-{i}"))
            .build()
            .map_err(|error| EngineError::Backend { op: "start threads", message: error.to_string() })?;
        Ok(Pool { threads, rayon })
    }

    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Runs `f` with its number on each thread of the pool, all at once.
    pub fn on_every_thread<R: Send>(&self, f: impl Fn(usize) -> R + Sync) -> Vec<R> {
        self.rayon.broadcast(|context| f(context.index()))
    }

    /// Runs `f` on a thread of the pool, where rayon's own functions use this pool.
    pub fn install<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        self.rayon.install(f)
    }

    /// Runs `f` on every task, in parallel if `work` (a rough count of scalar operations of all tasks) is worth it.
    pub fn run<T: Send>(&self, tasks: Vec<T>, work: usize, f: impl Fn(T) + Sync + Send) {
        if self.threads == 1 || tasks.len() < 2 || work < MIN_PARALLEL_WORK {
            tasks.into_iter().for_each(f);
        } else {
            self.rayon.install(|| tasks.into_par_iter().with_max_len(1).for_each(f));
        }
    }

    /// Hands out `out`, rows of `width` values, in runs of whole rows; `f` gets the first row's index and the run.
    /// `cost` is a rough count of scalar operations per value.
    pub fn rows(&self, out: &mut [f32], width: usize, cost: usize, f: impl Fn(usize, &mut [f32]) + Sync + Send) {
        if width == 0 || out.is_empty() {
            return;
        }
        let work = out.len() * cost;
        if self.threads == 1 || work < MIN_PARALLEL_WORK {
            return f(0, out);
        }
        let rows = TASK_VALUES.div_ceil(width);
        let tasks = out.chunks_mut(rows * width).enumerate().collect();
        self.run(tasks, work, |(i, run): (usize, &mut [f32])| f(i * rows, run));
    }
}
