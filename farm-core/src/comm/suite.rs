//! What every transport does, as tests over any of them: [`transport_suite!`] makes them for one.

use std::fmt::Debug;
use std::sync::{Arc, Barrier, mpsc};
use std::time::Duration;

use super::inbox::WINDOW;
use super::{Collective, CommError, Group, Patience};
use crate::engine::Transfer;

/// Nobody in these tests waits for so long unless the test is about waiting.
pub(super) const PATIENT: Patience = Patience { silence: Duration::from_secs(20), stall: Duration::from_secs(60) };

pub(super) trait Transport: Sync {
    type T: Transfer;
    /// The ends of a new group, in rank order.
    fn form(&self, world: usize, patience: Patience) -> Vec<Rank<Self::T>>;
    fn tensor(&self, values: &[f32], shape: &[usize]) -> Self::T;
    fn values(&self, tensor: &Self::T) -> Vec<f32>;
    /// A patience that ends within a test.
    fn impatient(&self) -> Patience;
}

pub(super) type Rank<T> = Arc<dyn Collective<T>>;

/// Every rank on a thread of its own, which drops it at the end.
pub(super) fn together<T: 'static, R: Send>(ranks: Vec<Rank<T>>, work: impl Fn(Rank<T>) -> R + Sync) -> Vec<R> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = ranks.into_iter().map(|rank| scope.spawn(|| work(rank))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Tests of every rule below for the transport that `$transport` makes; or runs the rules that are named.
macro_rules! transport_suite {
    (run $transport:expr; $($rule:ident),* $(,)?) => {{
        let transport = $transport;
        $($crate::comm::suite::$rule(&transport);)*
    }};
    ($transport:expr; $($rule:ident),* $(,)?) => {
        $(#[test]
        fn $rule() {
            $crate::comm::suite::$rule(&$transport)
        })*
    };
    ($transport:expr) => {
        $crate::comm::suite::transport_suite!($transport;
            every_collective_gives_the_obvious_result,
            messages_arrive_in_the_order_they_were_sent,
            exchanges_overlap_and_are_waited_for_in_any_order,
            a_message_goes_out_while_its_receiver_computes,
            one_way_traffic_beyond_the_window_arrives,
            a_barrier_waits_for_every_rank,
            an_abort_ends_every_rank_also_one_that_waits,
            the_first_error_is_the_last,
            a_rank_that_leaves_early_is_lost_to_all,
            a_panicking_rank_is_lost_to_all,
            a_rank_that_is_done_may_leave,
            another_shape_names_its_sender,
            a_stall_blames_the_end_of_the_chain,
            a_cycle_of_waits_ends,
            nonsense_is_refused,
            a_new_group_works_after_a_failed_one,
        );
    };
}
pub(super) use transport_suite;

/// The shape and values of the message from `from` to `to`: uneven, some of them empty.
fn message(from: usize, to: usize) -> (Vec<usize>, Vec<f32>) {
    let rows = (2 * from + 3 * to + 3) % 4;
    ((vec![rows, 3]), (0..rows * 3).map(|i| (100 * from + 10 * to) as f32 + i as f32 * 0.25).collect())
}

fn send<X: Transport>(x: &X, from: usize, to: usize) -> X::T {
    let (shape, values) = message(from, to);
    x.tensor(&values, &shape)
}

#[track_caller]
fn expect_message<X: Transport>(x: &X, got: &X::T, from: usize, to: usize) {
    let (shape, values) = message(from, to);
    assert_eq!((got.sizes(), x.values(got)), (shape, values), "from {from} to {to}");
}

/// Every rank failed, and with the same error.
#[track_caller]
pub(super) fn all_failed<R: Debug>(results: Vec<Result<R, CommError>>) -> CommError {
    let mut errors: Vec<_> = results.into_iter().map(Result::unwrap_err).collect();
    let first = errors.remove(0);
    errors.iter().for_each(|error| assert_eq!(*error, first));
    first
}

/// Waits for a message of `from` that never comes.
fn wait_for<T>(rank: &Rank<T>, from: usize) -> Result<Vec<T>, CommError> {
    rank.start(Vec::new(), vec![(from, vec![1])])?.wait()
}

pub(super) fn every_collective_gives_the_obvious_result<X: Transport>(x: &X) {
    for world in 1..=5 {
        together(x.form(world, PATIENT), |rank| {
            assert_eq!(rank.world(), world);
            // Of all ranks in turn, of them in another order, and of some.
            let me = rank.rank();
            let halves = if me % 2 == 0 { (0..world).step_by(2) } else { (1..world).step_by(2) };
            let mut bytes = 0;
            for members in [(0..world).collect(), (0..world).rev().collect(), halves.collect::<Vec<_>>()] {
                let size = members.len();
                let group = Group::new(rank.clone(), members.clone()).unwrap();
                let at = group.me();
                assert_eq!((members[at], group.size()), (me, size));

                let sends = members.iter().map(|to| send(x, me, *to)).collect();
                let shapes: Vec<_> = members.iter().map(|from| message(*from, me).0).collect();
                let got = group.all_to_all_v(sends, &shapes).unwrap();
                members.iter().zip(&got).for_each(|(from, got)| expect_message(x, got, *from, me));
                bytes += members.iter().filter(|to| **to != me).map(|to| 4 * message(me, *to).1.len()).sum::<usize>();

                let shapes: Vec<_> = members.iter().map(|from| message(*from, 7).0).collect();
                let got = group.all_gather_v(send(x, me, 7), &shapes).unwrap();
                members.iter().zip(&got).for_each(|(from, got)| expect_message(x, got, *from, 7));
                bytes += (size - 1) * 4 * message(me, 7).1.len();

                for (root, sender) in members.iter().enumerate() {
                    let given = (root == at).then(|| send(x, me, 8));
                    let got = group.broadcast(root, given, &message(*sender, 8).0).unwrap();
                    expect_message(x, &got, *sender, 8);
                }
                bytes += (size - 1) * 4 * message(me, 8).1.len();

                if size > 1 {
                    let (next, last) = ((at + 1) % size, (at + size - 1) % size);
                    let shape = message(members[last], me).0;
                    let got = group.start_pass(next, send(x, me, members[next]), last, shape).unwrap().wait().unwrap();
                    expect_message(x, &got[0], members[last], me);
                    bytes += 4 * message(me, members[next]).1.len();
                }
            }
            assert_eq!(rank.bytes_sent(), bytes as u64);
            rank.barrier().unwrap();
        });
    }
}

pub(super) fn messages_arrive_in_the_order_they_were_sent<X: Transport>(x: &X) {
    together(x.form(3, PATIENT), |rank| {
        let me = rank.rank();
        let peers: Vec<_> = (0..3).filter(|peer| *peer != me).collect();
        // Several exchanges, some of them with several messages to the same rank.
        for round in 0..50 {
            let number = |i: usize| (round * 3 + i) as f32;
            let sends = (0..3).flat_map(|i| peers.iter().map(move |peer| (*peer, i)));
            let sends = sends.map(|(to, i)| (to, x.tensor(&[number(i), me as f32], &[2]))).collect();
            let receives = (0..3).flat_map(|_| peers.iter().map(|peer| (*peer, vec![2]))).collect();
            let got = rank.start(sends, receives).unwrap().wait().unwrap();
            let got: Vec<_> = got.iter().map(|got| x.values(got)).collect();
            let expected: Vec<_> =
                (0..3).flat_map(|i| peers.iter().map(move |peer| vec![number(i), *peer as f32])).collect();
            assert_eq!(got, expected);
        }
    });
}

pub(super) fn exchanges_overlap_and_are_waited_for_in_any_order<X: Transport>(x: &X) {
    together(x.form(2, PATIENT), |rank| {
        let (me, other) = (rank.rank(), 1 - rank.rank());
        let start = |number: usize| {
            let give = x.tensor(&[me as f32, number as f32], &[2]);
            (number, rank.start(vec![(other, give)], vec![(other, vec![2])]).unwrap())
        };
        let mut exchanges: Vec<_> = (0..5).map(start).collect();
        rank.barrier().unwrap();
        // One is dropped after its message came, and one of a second group of exchanges before it was sent.
        drop(exchanges.remove(2));
        let early = rank.start(Vec::new(), vec![(other, vec![2])]).unwrap();
        exchanges.push((6, rank.start(Vec::new(), vec![(other, vec![2])]).unwrap()));
        drop(early);
        rank.barrier().unwrap();
        for number in [5, 6] {
            let give = x.tensor(&[me as f32, number as f32], &[2]);
            rank.start(vec![(other, give)], Vec::new()).unwrap().wait().unwrap();
        }
        for index in [2, 0, 2, 0, 0] {
            let (number, exchange) = exchanges.remove(index);
            assert_eq!(x.values(&exchange.wait().unwrap()[0]), [other as f32, number as f32]);
        }
    });
}

pub(super) fn a_message_goes_out_while_its_receiver_computes<X: Transport>(x: &X) {
    // Rank 1 "computes" until rank 0 has finished its exchange.
    let sent = Barrier::new(2);
    together(x.form(2, PATIENT), |rank| {
        if rank.rank() == 0 {
            rank.start(vec![(1, send(x, 0, 1))], Vec::new()).unwrap().wait().unwrap();
            sent.wait();
        } else {
            sent.wait();
            let got = rank.start(Vec::new(), vec![(0, message(0, 1).0)]).unwrap().wait().unwrap();
            expect_message(x, &got[0], 0, 1);
        }
    });
}

pub(super) fn one_way_traffic_beyond_the_window_arrives<X: Transport>(x: &X) {
    // Both send three windows before either receives.
    let len = WINDOW / 32;
    let big = x.tensor(&vec![0.5; len], &[len]);
    let count = 24;
    together(x.form(2, PATIENT), |rank| {
        let other = 1 - rank.rank();
        for _ in 0..count {
            rank.start(vec![(other, big.clone())], Vec::new()).unwrap().wait().unwrap();
        }
        let start = |_| rank.start(Vec::new(), vec![(other, vec![len])]).unwrap();
        // The last one first: it comes behind all the others.
        for exchange in (0..count).map(start).collect::<Vec<_>>().into_iter().rev() {
            assert_eq!(exchange.wait().unwrap()[0].byte_len(), 4 * len);
        }
    });
}

pub(super) fn a_barrier_waits_for_every_rank<X: Transport>(x: &X) {
    for world in 1..=4 {
        let reached = std::sync::atomic::AtomicUsize::new(0);
        together(x.form(world, PATIENT), |rank| {
            for round in 1..=20 {
                reached.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                rank.barrier().unwrap();
                assert!(reached.load(std::sync::atomic::Ordering::SeqCst) >= world * round);
            }
        });
    }
}

pub(super) fn an_abort_ends_every_rank_also_one_that_waits<X: Transport>(x: &X) {
    for culprit in 0..3 {
        // One of the others waits for a message, the other in the barrier; the culprit aborts beside them.
        let error = all_failed(together(x.form(3, PATIENT), |rank| {
            let me = rank.rank();
            if me == culprit {
                rank.abort("the device is too hot");
                return rank.barrier();
            }
            if me == (culprit + 1) % 3 { wait_for(&rank, culprit).map(|_| ()) } else { rank.barrier() }
        }));
        assert_eq!(error, CommError::Aborted { rank: culprit, reason: "the device is too hot".into() });
    }
}

pub(super) fn the_first_error_is_the_last<X: Transport>(x: &X) {
    together(x.form(2, PATIENT), |rank| {
        let first = if rank.rank() == 0 {
            rank.abort("first");
            rank.abort("second");
            rank.barrier().unwrap_err()
        } else {
            let error = rank.barrier().unwrap_err();
            rank.abort("third");
            error
        };
        assert_eq!(first, CommError::Aborted { rank: 0, reason: "first".into() });
        // Every further call ends the same way, also one that needs nothing of the others.
        assert_eq!(rank.barrier().unwrap_err(), first);
        assert_eq!(wait_for(&rank, 1 - rank.rank()).err().unwrap(), first);
        assert_eq!(rank.start(Vec::new(), Vec::new()).err().unwrap(), first);
    });
}

pub(super) fn a_rank_that_leaves_early_is_lost_to_all<X: Transport>(x: &X) {
    for early in 0..3 {
        let results = together(x.form(3, PATIENT), |rank| {
            let me = rank.rank();
            if me == early {
                return None;
            }
            // One needs the lost rank, the other needs that one.
            Some(wait_for(&rank, if me == (early + 1) % 3 { early } else { (early + 1) % 3 }).map(|_| ()))
        });
        let error = all_failed(results.into_iter().flatten().collect());
        assert!(matches!(&error, CommError::Lost { rank, .. } if *rank == early), "{error}");
    }
}

pub(super) fn a_panicking_rank_is_lost_to_all<X: Transport>(x: &X) {
    let ranks = x.form(3, PATIENT);
    let results = std::thread::scope(|scope| {
        let threads: Vec<_> = ranks
            .into_iter()
            .map(|rank| {
                scope.spawn(move || {
                    assert_ne!(rank.rank(), 1, "a test of a rank that panics");
                    // Neither waits for the rank that panics.
                    wait_for(&rank, 2 - rank.rank()).map(|_| ())
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join()).collect::<Vec<_>>()
    });
    assert!(results[1].is_err());
    let error = all_failed(results.into_iter().flatten().collect());
    assert!(matches!(&error, CommError::Lost { rank: 1, .. }), "{error}");
}

pub(super) fn a_rank_that_is_done_may_leave<X: Transport>(x: &X) {
    // Rank 0 sends and leaves. Rank 1 takes the message, and exchanges more with rank 2, only after that.
    let (left, gone) = mpsc::channel();
    let gone = std::sync::Mutex::new(gone);
    together(x.form(3, PATIENT), |rank| {
        let me = rank.rank();
        if me == 0 {
            rank.start(vec![(1, send(x, 0, 1))], Vec::new()).unwrap().wait().unwrap();
            drop(rank);
            left.send(()).unwrap();
            return;
        }
        if me == 1 {
            gone.lock().unwrap().recv().unwrap();
            let got = rank.start(Vec::new(), vec![(0, message(0, 1).0)]).unwrap().wait().unwrap();
            expect_message(x, &got[0], 0, 1);
        }
        let other = 3 - me;
        let exchange = rank.start(vec![(other, send(x, me, other))], vec![(other, message(other, me).0)]).unwrap();
        expect_message(x, &exchange.wait().unwrap()[0], other, me);
    });
}

pub(super) fn another_shape_names_its_sender<X: Transport>(x: &X) {
    let error = all_failed(together(x.form(3, PATIENT), |rank| match rank.rank() {
        0 => {
            rank.start(vec![(1, x.tensor(&[1.0; 6], &[2, 3]))], Vec::new())?.wait()?;
            rank.barrier()
        }
        1 => rank.start(Vec::new(), vec![(0, vec![3, 2])])?.wait().map(|_| ()),
        _ => rank.barrier(),
    }));
    assert_eq!(error, CommError::Mismatch { rank: 0, expected: "[3, 2]".into(), got: "[2, 3]".into() });
}

pub(super) fn a_stall_blames_the_end_of_the_chain<X: Transport>(x: &X) {
    // 0 waits for 1, 1 for 2, 2 for 3, and 3 computes until all of them gave up.
    let given_up = Barrier::new(4);
    let patience = x.impatient();
    let error = all_failed(together(x.form(4, patience), |rank| {
        let me = rank.rank();
        let result = if me < 3 { wait_for(&rank, me + 1).map(|_| ()) } else { Ok(()) };
        given_up.wait();
        result.and_then(|()| rank.barrier())
    }));
    assert_eq!(error, CommError::Stalled { rank: 3, after: patience.stall });
}

pub(super) fn a_cycle_of_waits_ends<X: Transport>(x: &X) {
    let results = together(x.form(2, x.impatient()), |rank| wait_for(&rank, 1 - rank.rank()).map(|_| ()));
    for error in results.into_iter().map(Result::unwrap_err) {
        assert!(matches!(error, CommError::Stalled { .. }), "{error}");
    }
}

pub(super) fn nonsense_is_refused<X: Transport>(x: &X) {
    // Oneself, and a rank that does not exist; on groups of their own, because it ends them.
    for peer in [1, 2] {
        let mut ranks = x.form(2, PATIENT);
        let one = ranks.pop().unwrap();
        let error = wait_for(&one, peer).err().unwrap();
        assert_eq!(error.to_string(), format!("rank 1 of 2 cannot exchange a message with rank {peer}"));
    }
    let error = Group::new(x.form(2, PATIENT).remove(0), vec![1]).err().unwrap();
    assert_eq!(error.to_string(), "rank 0 is not among the ranks [1]");
}

pub(super) fn a_new_group_works_after_a_failed_one<X: Transport>(x: &X) {
    all_failed(together(x.form(3, PATIENT), |rank| {
        if rank.rank() == 1 {
            rank.abort("once");
        }
        rank.barrier()
    }));
    every_collective_gives_the_obvious_result(x);
}
