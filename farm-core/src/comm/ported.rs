//! Ranks whose devices have memories of their own, as threads of one process.

use std::sync::Arc;

use super::{Collective, CommError, Exchange};
use crate::engine::{EngineError, Port};

/// One rank's end of a group, and the way into the memory of its device and out of it.
pub struct Ported<T> {
    comm: Arc<dyn Collective<T>>,
    port: Arc<dyn Port<T>>,
}

impl<T> Ported<T> {
    pub fn new(comm: Arc<dyn Collective<T>>, port: Arc<dyn Port<T>>) -> Self {
        Self { comm, port }
    }

    fn failed(&self, error: EngineError) -> CommError {
        CommError::Transport(format!("rank {}: {error}", self.comm.rank()))
    }
}

impl<T> Collective<T> for Ported<T> {
    fn rank(&self) -> usize {
        self.comm.rank()
    }

    fn world(&self) -> usize {
        self.comm.world()
    }

    fn start(&self, sends: Vec<(usize, T)>, receives: Vec<(usize, Vec<usize>)>) -> Result<Exchange<'_, T>, CommError> {
        let hand = |(to, message): (usize, T)| Ok((to, self.port.hand(&message)?));
        let sends = sends.into_iter().map(hand).collect::<Result<_, _>>().map_err(|error| self.failed(error))?;
        let exchange = self.comm.start(sends, receives)?;
        Ok(Exchange::new(move || {
            let taken = exchange.wait()?.into_iter().map(|message| self.port.take(message));
            taken.collect::<Result<_, _>>().map_err(|error| self.failed(error))
        }))
    }

    fn barrier(&self) -> Result<(), CommError> {
        self.comm.barrier()
    }

    fn abort(&self, reason: &str) {
        self.comm.abort(reason);
    }

    fn bytes_sent(&self) -> u64 {
        self.comm.bytes_sent()
    }
}
