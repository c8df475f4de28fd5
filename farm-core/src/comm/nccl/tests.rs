use cudarc::driver::CudaContext;

use super::*;
use crate::comm::local;
use crate::comm::suite::{PATIENT, Rank, Transport, all_failed, together, transport_suite};
use crate::comm::tcp;

/// The suite forms groups of up to this many ranks, each of which needs a GPU of its own.
const GPUS: usize = 5;

struct Gpus(Vec<Arc<CudaContext>>);

impl Transport for Gpus {
    type T = DeviceBuffer;

    fn form(&self, world: usize, patience: Patience) -> Vec<Rank<DeviceBuffer>> {
        let controls = local::ranks::<Token>(world, patience);
        std::thread::scope(|scope| {
            let join = |(context, control)| {
                scope.spawn(move || {
                    let rank = join(context, Arc::new(control), 4, patience).unwrap();
                    Arc::new(rank) as Rank<DeviceBuffer>
                })
            };
            let threads: Vec<_> = self.0.iter().zip(controls).map(join).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    fn tensor(&self, values: &[f32], shape: &[usize]) -> DeviceBuffer {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let slice = (!bytes.is_empty()).then(|| Arc::new(self.0[0].default_stream().clone_htod(&bytes).unwrap()));
        DeviceBuffer::new(slice, shape.to_vec(), 4).unwrap()
    }

    fn values(&self, tensor: &DeviceBuffer) -> Vec<f32> {
        let Some(values) = tensor.values() else { return Vec::new() };
        let stream = values.stream();
        let bytes = stream.clone_dtoh(&**values).unwrap();
        stream.synchronize().unwrap();
        bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
    }

    fn impatient(&self) -> Patience {
        Patience { stall: Duration::from_millis(1500), ..PATIENT }
    }
}

/// All rules but those about ranks that start exchanges in different orders, which NCCL does not have.
#[test]
fn the_suite_where_there_are_gpus() {
    let version = match available() {
        Ok(version) => version,
        Err(why) => return println!("skipped: {why}"),
    };
    let count = CudaContext::device_count().unwrap_or(0) as usize;
    if count < GPUS {
        return println!("skipped: NCCL {version} is there, but {count} GPUs, and the suite needs {GPUS}");
    }
    transport_suite!(run Gpus((0..GPUS).map(|gpu| CudaContext::new(gpu).unwrap()).collect());
        every_collective_gives_the_obvious_result,
        messages_arrive_in_the_order_they_were_sent,
        a_message_goes_out_while_its_receiver_computes,
        a_barrier_waits_for_every_rank,
        an_abort_ends_every_rank_also_one_that_waits,
        the_first_error_is_the_last,
        a_rank_that_leaves_early_is_lost_to_all,
        a_panicking_rank_is_lost_to_all,
        another_shape_names_its_sender,
        a_stall_blames_the_end_of_the_chain,
        a_cycle_of_waits_ends,
        nonsense_is_refused,
        a_new_group_works_after_a_failed_one,
    );
}

#[test]
fn a_machine_without_nccl_says_what_is_missing() {
    match available() {
        Ok(version) => assert!(version.starts_with("2."), "{version}"),
        Err(error) => {
            let text = error.to_string();
            assert!(
                text.contains(crate::engine::cuda::driver::libraries::FOLDERS) || text.contains("no driver"),
                "{text}"
            );
            println!("{text}");
        }
    }
}

#[test]
fn a_buffer_has_the_bytes_of_its_shape() {
    assert_eq!(DeviceBuffer::new(None, vec![3, 0], 2).unwrap().byte_len(), 0);
    let error = DeviceBuffer::new(None, vec![3, 2], 2).err().unwrap().to_string();
    assert_eq!(error, "[3, 2] with elements of 2 bytes needs 12 bytes, not 0");
    assert!(DeviceBuffer::new(None, vec![usize::MAX, 2], 2).is_err());
}

/// The part beside NCCL, over both transports that carry it.
#[test]
fn tokens_tell_shapes_and_carry_the_id() {
    let threads = local::ranks::<Token>(2, PATIENT).into_iter().map(|rank| Arc::new(rank) as Rank<Token>).collect();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let peers = vec![listener.local_addr().unwrap().to_string(), "127.0.0.1:1".to_owned()];
    let options = |rank| tcp::TcpOptions {
        rank,
        peers: peers.clone(),
        listen: None,
        group: "tokens".into(),
        patience: PATIENT,
        connect_within: Duration::from_secs(20),
        tls: None,
        cancel: Arc::default(),
    };
    let processes = std::thread::scope(|scope| {
        let connect = |(rank, listener)| {
            let options = options(rank);
            scope.spawn(|| Arc::new(tcp::connect_on(Arc::new(Tokens), options, listener).unwrap()) as Rank<Token>)
        };
        [(0, Some(listener)), (1, None)].map(connect).map(|thread| thread.join().unwrap())
    });
    for ranks in [threads, Vec::from(processes)] {
        let error = all_failed(together(ranks, |rank| {
            let (me, group) = (rank.rank(), Group::new(rank.clone(), vec![0, 1]).unwrap());
            let id = group.broadcast(0, (me == 0).then(|| Token::bytes(vec![7; 128])), &[128]).unwrap();
            assert_eq!(id.into_bytes().unwrap(), [7; 128]);
            let token = Token::of(&DeviceBuffer::new(None, vec![me, 0], 2).unwrap());
            // Rank 1 expects another shape.
            rank.start(vec![(1 - me, token)], vec![(1 - me, vec![1, 0])])?.wait().map(|_| ())?;
            rank.barrier()
        }));
        assert_eq!(error, CommError::Mismatch { rank: 0, expected: "[1, 0]".into(), got: "[0, 0]".into() });
    }
}
