//! Ranks as threads of one process. Nothing is copied: a message is a handle on the sender's tensor. Where devices have memories
//! of their own, [`super::ported`] stands before it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::inbox::Inboxes;
use super::{Collective, CommError, Exchange, Patience};
use crate::engine::Transfer;

/// The ends of a group of `world` ranks, in rank order, one for each thread.
pub fn ranks<T: Transfer>(world: usize, patience: Patience) -> Vec<LocalRank<T>> {
    let inboxes = Arc::new(Inboxes::new(world, 0..world, patience));
    (0..world).map(|rank| LocalRank { rank, inboxes: inboxes.clone(), sent: AtomicU64::new(0) }).collect()
}

/// One rank's end. The thread that works for the rank has to own it: when the thread panics, the drop tells the others.
pub struct LocalRank<T: Transfer> {
    rank: usize,
    inboxes: Arc<Inboxes<T>>,
    sent: AtomicU64,
}

impl<T: Transfer> Collective<T> for LocalRank<T> {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world(&self) -> usize {
        self.inboxes.world()
    }

    fn start(&self, sends: Vec<(usize, T)>, receives: Vec<(usize, Vec<usize>)>) -> Result<Exchange<'_, T>, CommError> {
        let (me, inboxes) = (self.rank, &self.inboxes);
        let receivers: Vec<usize> = sends.iter().map(|(to, _)| *to).collect();
        let tickets = inboxes.begin(me, &receivers, receives)?;
        for (to, message) in sends {
            self.sent.fetch_add(message.byte_len() as u64, Ordering::Relaxed);
            inboxes.deliver(me, to, message);
        }
        Ok(Exchange::new(move || inboxes.finish(me, tickets, &receivers, |to| inboxes.queued(me, to))))
    }

    fn barrier(&self) -> Result<(), CommError> {
        self.inboxes.check()?;
        self.inboxes.others(self.rank).for_each(|to| self.inboxes.deliver_barrier(self.rank, to));
        self.inboxes.take_barriers(self.rank)
    }

    fn abort(&self, reason: &str) {
        self.inboxes.fail(CommError::Aborted { rank: self.rank, reason: reason.to_owned() });
    }

    fn bytes_sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }
}

impl<T: Transfer> Drop for LocalRank<T> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.inboxes.fail(CommError::Lost { rank: self.rank, why: "its thread panicked".into() });
        }
        for to in self.inboxes.others(self.rank) {
            self.inboxes.leave(self.rank, to, "it left the group");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use candle_core::Tensor;

    use super::super::suite::{Rank, Transport, transport_suite};
    use super::*;
    use crate::engine::cpu::CpuEngine;
    use crate::engine::{Engine, SequenceOps};

    struct Local(CpuEngine);

    impl Transport for Local {
        type T = Tensor;

        fn form(&self, world: usize, patience: Patience) -> Vec<Rank<Tensor>> {
            ranks(world, patience).into_iter().map(|rank| Arc::new(rank) as Rank<Tensor>).collect()
        }

        fn tensor(&self, values: &[f32], shape: &[usize]) -> Tensor {
            self.0.upload(values, shape).unwrap()
        }

        fn values(&self, tensor: &Tensor) -> Vec<f32> {
            self.0.download(tensor).unwrap()
        }

        fn impatient(&self) -> Patience {
            Patience { silence: Duration::from_secs(60), stall: Duration::from_millis(300) }
        }
    }

    transport_suite!(Local(CpuEngine::new(1).unwrap()));

    #[test]
    fn a_message_shares_the_storage_of_its_sender() {
        let engine = CpuEngine::new(1).unwrap();
        let mut ranks = ranks(2, Patience::default());
        let (one, zero) = (ranks.pop().unwrap(), ranks.pop().unwrap());
        let sent = engine.upload(&[1.0, 2.0], &[2]).unwrap();
        zero.start(vec![(1, engine.reshape(&sent, &[2, 1]).unwrap())], Vec::new()).unwrap().wait().unwrap();
        let got = one.start(Vec::new(), vec![(0, vec![2, 1])]).unwrap().wait().unwrap();
        let address = |tensor: &Tensor| {
            let (storage, _) = tensor.storage_and_layout();
            let candle_core::Storage::Cpu(storage) = &*storage else { panic!("not on the CPU") };
            storage.as_slice::<f32>().unwrap().as_ptr()
        };
        assert_eq!(address(&got[0]), address(&sent));
    }
}
