use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream as StdStream};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use candle_core::Tensor;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tempfile::TempDir;

use super::frame::{Frame, PART};
use super::handshake::Identity;
use super::*;
use crate::comm::inbox::WINDOW;
use crate::comm::suite::{PATIENT, Rank, Transport, all_failed, together, transport_suite};
use crate::engine::Engine;
use crate::engine::cpu::CpuEngine;

/// A rank that sends nothing for so long is silent, in tests about that.
const SILENCE: Duration = Duration::from_millis(1000);
const WATCHFUL: Patience = Patience { silence: SILENCE, stall: Duration::from_secs(60) };

fn engine() -> Arc<CpuEngine> {
    Arc::new(CpuEngine::new(1).unwrap())
}

/// Open ports of this machine for all ranks, and where they are.
fn ports(world: usize) -> (Vec<Option<TcpListener>>, Vec<String>) {
    let listeners: Vec<_> = (0..world).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    let peers = listeners.iter().map(|listener| listener.local_addr().unwrap().to_string()).collect();
    (listeners.into_iter().map(Some).collect(), peers)
}

fn options(rank: usize, peers: &[String], patience: Patience) -> TcpOptions {
    TcpOptions {
        rank,
        peers: peers.to_vec(),
        listen: None,
        group: "a clip".into(),
        patience,
        connect_within: Duration::from_secs(20),
        tls: None,
        cancel: Arc::default(),
    }
}

/// Connects ranks on threads of their own, each with its options.
fn connect_all(
    engine: &Arc<CpuEngine>,
    ranks: Vec<(TcpOptions, Option<TcpListener>)>,
) -> Vec<Result<Rank<Tensor>, CommError>> {
    std::thread::scope(|scope| {
        let connect = |(options, listener)| {
            scope
                .spawn(move || connect_on(engine.clone(), options, listener).map(|rank| Arc::new(rank) as Rank<Tensor>))
        };
        let threads: Vec<_> = ranks.into_iter().map(connect).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

struct Tcp {
    engine: Arc<CpuEngine>,
    tls: Option<TlsFiles>,
}

impl Transport for Tcp {
    type T = Tensor;

    fn form(&self, world: usize, patience: Patience) -> Vec<Rank<Tensor>> {
        let (listeners, peers) = ports(world);
        let options = (0..world).map(|rank| TcpOptions { tls: self.tls.clone(), ..options(rank, &peers, patience) });
        connect_all(&self.engine, options.zip(listeners).collect()).into_iter().map(Result::unwrap).collect()
    }

    fn tensor(&self, values: &[f32], shape: &[usize]) -> Tensor {
        self.engine.upload(values, shape).unwrap()
    }

    fn values(&self, tensor: &Tensor) -> Vec<f32> {
        self.engine.download(tensor).unwrap()
    }

    fn impatient(&self) -> Patience {
        Patience { silence: Duration::from_secs(20), stall: Duration::from_millis(1500) }
    }
}

mod plain {
    use super::*;

    transport_suite!(Tcp { engine: engine(), tls: None });
}

mod encrypted {
    use super::*;

    struct Encrypted(Tcp, TempDir);

    impl Encrypted {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let tls = Some(Authority::new().certificate(&folder, "rank"));
            Self(Tcp { engine: engine(), tls }, folder)
        }
    }

    impl Transport for Encrypted {
        type T = Tensor;

        fn form(&self, world: usize, patience: Patience) -> Vec<Rank<Tensor>> {
            assert!(self.1.path().exists());
            self.0.form(world, patience)
        }

        fn tensor(&self, values: &[f32], shape: &[usize]) -> Tensor {
            self.0.tensor(values, shape)
        }

        fn values(&self, tensor: &Tensor) -> Vec<f32> {
            self.0.values(tensor)
        }

        fn impatient(&self) -> Patience {
            self.0.impatient()
        }
    }

    transport_suite!(Encrypted::new());
}

/// Signs certificates for 127.0.0.1.
struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    fn certificate(&self, folder: &TempDir, name: &str) -> TlsFiles {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        let write = |kind: &str, pem: String| {
            let path = folder.path().join(format!("{name}-{kind}.pem"));
            std::fs::write(&path, pem).unwrap();
            path
        };
        TlsFiles {
            certificate: write("certificate", certificate.pem()),
            key: write("key", key.serialize_pem()),
            ca: write("ca", self.0.pem()),
        }
    }
}

/// The last rank of a group, played over bare sockets: it is through the handshake and says what it is told to.
struct Puppet(Vec<StdStream>);

impl Puppet {
    fn connect(peers: &[String]) -> Self {
        let rank = peers.len() - 1;
        let me = Identity { rank, world: peers.len(), group: "a clip".into() };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let streams = peers[..rank].iter().enumerate().map(|(to, address)| {
            runtime.block_on(async {
                let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
                handshake::dial(&mut stream, &me, to).await.unwrap();
                let stream = stream.into_std().unwrap();
                stream.set_nonblocking(false).unwrap();
                stream
            })
        });
        let mut puppet = Self(streams.collect());
        // A group has formed when all ranks have reached a barrier.
        puppet.say(&Frame::Barrier.encode());
        puppet
    }

    fn say(&mut self, bytes: &[u8]) {
        self.0.iter_mut().for_each(|stream| stream.write_all(bytes).unwrap());
    }
}

/// Two ranks and a puppet as the third.
fn with_puppet(patience: Patience) -> (Vec<Rank<Tensor>>, Puppet) {
    let (mut listeners, peers) = ports(3);
    let ranks = (0..2).map(|rank| (options(rank, &peers, patience), listeners[rank].take())).collect();
    std::thread::scope(|scope| {
        let puppet = scope.spawn(|| Puppet::connect(&peers));
        let ranks = connect_all(&engine(), ranks).into_iter().map(Result::unwrap).collect();
        (ranks, puppet.join().unwrap())
    })
}

#[test]
fn a_silent_rank_is_named_by_all_within_the_deadline() {
    let (ranks, _puppet) = with_puppet(WATCHFUL);
    let start = Instant::now();
    assert_eq!(all_failed(together(ranks, |rank| rank.barrier())), CommError::Silent { rank: 2, after: SILENCE },);
    assert!(start.elapsed() < 2 * SILENCE, "{:?}", start.elapsed());
}

#[test]
fn garbage_ends_the_group_and_names_its_sender() {
    let unknown = [77, 1, 0, 0, 0, 1].to_vec();
    let part = [Frame::Part { bytes: 1 }.encode(), vec![0]].concat();
    let waits = Frame::Alive { waits_for: Some(3) }.encode();
    let blames = Frame::End(CommError::Aborted { rank: 3, reason: String::new() }).encode();
    let long = [3, 0xff, 0xff, 0xff, 0xff].to_vec();
    let head = Frame::Message { shape: vec![1], bytes: 4 }.encode();
    let nested = [head.clone(), head.clone()].concat();
    let overflow = [head, Frame::Part { bytes: 5 }.encode(), vec![0; 5]].concat();
    for bytes in [unknown, part, waits, blames, long, nested, overflow] {
        let (ranks, mut puppet) = with_puppet(WATCHFUL);
        puppet.say(&bytes);
        let error = all_failed(together(ranks, |rank| rank.barrier()));
        let CommError::Lost { rank: 2, why } = error else { panic!("{error}") };
        assert!(why.starts_with("it sent garbage: "), "{why}");
    }
}

#[test]
fn a_message_of_the_wrong_length_names_its_sender() {
    let (ranks, mut puppet) = with_puppet(WATCHFUL);
    let head = Frame::Message { shape: vec![2], bytes: 4 }.encode();
    puppet.say(&[head, Frame::Part { bytes: 4 }.encode(), vec![0; 4]].concat());
    let error = all_failed(together(ranks, |rank| rank.start(Vec::new(), vec![(2, vec![2])])?.wait().map(|_| ())));
    assert!(matches!(error, CommError::Mismatch { rank: 2, .. }), "{error}");
}

#[test]
fn an_end_in_the_middle_of_a_message_is_heard() {
    let (ranks, mut puppet) = with_puppet(WATCHFUL);
    let head = Frame::Message { shape: vec![2], bytes: 8 }.encode();
    let error = CommError::Lost { rank: 1, why: "the puppet says so".into() };
    puppet.say(&[head, Frame::Part { bytes: 4 }.encode(), vec![0; 4], Frame::End(error.clone()).encode()].concat());
    assert_eq!(all_failed(together(ranks, |rank| rank.barrier())), error);
}

#[test]
fn a_closed_connection_is_a_lost_rank() {
    let (ranks, puppet) = with_puppet(PATIENT);
    drop(puppet);
    let error = all_failed(together(ranks, |rank| rank.barrier()));
    assert_eq!(error, CommError::Lost { rank: 2, why: "its connection ended".into() });
}

#[test]
fn a_slow_message_is_a_sign_of_life() {
    let (ranks, mut puppet) = with_puppet(WATCHFUL);
    let parts = 12;
    let (received, all) = mpsc::channel::<()>();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            puppet.say(&Frame::Message { shape: vec![parts], bytes: 4 * parts as u64 }.encode());
            // A part now and then, twice the time of silence in all. The pause is the slow network that this is about.
            for _ in 0..parts {
                assert!(all.recv_timeout(SILENCE / 6).is_err());
                puppet.say(&[Frame::Part { bytes: 4 }.encode(), vec![0; 4]].concat());
            }
            puppet.say(&Frame::Bye.encode());
            // Ranks that have left close their connections.
            puppet.0.iter_mut().for_each(|stream| _ = stream.read_to_end(&mut Vec::new()));
        });
        together(ranks, |rank| {
            let got = rank.start(Vec::new(), vec![(2, vec![parts])]).unwrap().wait().unwrap();
            assert_eq!(got[0].dims(), [parts]);
        });
        drop(received);
    });
}

#[test]
fn a_receiver_that_takes_nothing_for_long_loses_nobody() {
    let tcp = Tcp { engine: engine(), tls: None };
    let big = tcp.tensor(&vec![0.5; WINDOW], &[WINDOW]);
    let (computed, computing) = mpsc::channel::<()>();
    let computing = Mutex::new(computing);
    together(tcp.form(2, WATCHFUL), |rank| {
        if rank.rank() == 0 {
            // Four windows each: the second is not even read while the receiver computes.
            let sends = || vec![(1, big.clone())];
            let exchanges = [rank.start(sends(), Vec::new()).unwrap(), rank.start(sends(), Vec::new()).unwrap()];
            exchanges.into_iter().for_each(|exchange| assert!(exchange.wait().unwrap().is_empty()));
        } else {
            // It computes for twice the time of silence; that time has to pass is the point.
            assert!(computing.lock().unwrap().recv_timeout(2 * SILENCE).is_err());
            for _ in 0..2 {
                rank.start(Vec::new(), vec![(0, vec![WINDOW])]).unwrap().wait().unwrap();
            }
        }
        rank.barrier().unwrap();
    });
    drop(computed);
}

#[test]
fn strangers_neither_stop_nor_break_the_forming_of_a_group() {
    let (listeners, peers) = ports(2);
    let dial = |words: &[u8]| {
        let mut stream = StdStream::connect(&peers[0]).unwrap();
        stream.write_all(words).unwrap();
        stream
    };
    // More silent ones than may be in a handshake at once, and some that talk; all before anybody listens to them.
    let mut strangers: Vec<_> = (0..100).map(|_| dial(b"")).collect();
    strangers.extend([dial(b"GET / HTTP/1.1\r\n\r\n"), dial(b"mochicom"), dial(&[0xff; 4096])]);
    drop(dial(b"mochicom\x01\x00"));
    let options = (0..2).map(|rank| options(rank, &peers, PATIENT));
    let ranks = connect_all(&engine(), options.zip(listeners).collect()).into_iter().map(Result::unwrap).collect();
    together(ranks, |rank| rank.barrier().unwrap());
}

#[test]
fn another_group_is_refused_and_both_sides_say_why() {
    let (listeners, peers) = ports(2);
    let mut options: Vec<_> = (0..2).map(|rank| options(rank, &peers, PATIENT)).collect();
    options[1].group = "another clip".into();
    options[0].connect_within = Duration::from_millis(500);
    let outcomes = connect_all(&engine(), options.into_iter().zip(listeners).collect());
    let errors: Vec<_> = outcomes.into_iter().map(|outcome| outcome.err().unwrap().to_string()).collect();
    let why = r#"rank 1 is of the group "another clip", rank 0 of the group "a clip""#;
    let expected = "the group did not form within 0.5 s: rank 0 has not met ranks [1]; 127.0.0.1:";
    assert!(errors[0].starts_with(expected) && errors[0].ends_with(&format!(" dialled: {why}")), "{}", errors[0]);
    assert_eq!(errors[1], format!("rank 0 at {} refused: {why}", peers[0]));
}

#[test]
fn an_absent_rank_is_named_by_all_that_are_there() {
    let (mut listeners, peers) = ports(3);
    // Rank 1 is there but not heard: its port is open and nobody answers.
    let _port = listeners[1].take();
    let options = [0, 2].map(|rank| {
        let connect_within = Duration::from_millis(if rank == 0 { 300 } else { 20_000 });
        (TcpOptions { connect_within, ..options(rank, &peers, PATIENT) }, listeners[rank].take())
    });
    for outcome in connect_all(&engine(), options.into()) {
        let error = outcome.err().unwrap().to_string();
        assert_eq!(error, "the group did not form within 0.3 s: rank 0 has not met ranks [1]");
    }
}

#[test]
fn a_cancelled_rank_stops_waiting_for_its_group() {
    let (mut listeners, peers) = ports(2);
    let mut options = options(0, &peers, PATIENT);
    options.cancel = Arc::new(AtomicBool::new(true));
    let error = connect_on(engine(), options, listeners[0].take()).err().unwrap();
    assert_eq!(error.to_string(), "rank 0 was cancelled while the group formed");
}

#[test]
fn options_that_make_no_group_are_refused() {
    let (_, peers) = ports(2);
    let good = options(0, &peers, PATIENT);
    for (options, expected) in [
        (TcpOptions { rank: 2, ..good.clone() }, "rank 2 is not among 2 peers; ranks count from 0"),
        (
            TcpOptions { group: "x".repeat(1025), ..good.clone() },
            "a group's name of 1025 bytes; at most 1024 are taken",
        ),
        (TcpOptions { peers: vec!["here".into(), "there".into()], ..good.clone() }, "\"here\" is not host:port"),
    ] {
        assert_eq!(connect(engine(), options).err().unwrap().to_string(), expected);
    }
    let port: SocketAddr = peers[0].parse().unwrap();
    let _taken = TcpListener::bind(port).unwrap();
    let error = connect(engine(), TcpOptions { listen: Some(peers[0].clone()), ..good }).err().unwrap().to_string();
    assert!(error.starts_with(&format!("cannot listen on {port}: ")), "{error}");
}

#[test]
fn a_port_is_free_again_once_its_group_has_formed() {
    let (listeners, peers) = ports(2);
    drop(listeners);
    for _ in 0..3 {
        let ranks = std::thread::scope(|scope| {
            let connect = |rank| {
                let options = options(rank, &peers, PATIENT);
                scope.spawn(|| Arc::new(connect(engine(), options).unwrap()) as Rank<Tensor>)
            };
            [0, 1].map(connect).map(|thread| thread.join().unwrap())
        });
        together(ranks.into(), |rank| rank.barrier().unwrap());
    }
}

#[test]
fn a_certificate_of_another_authority_is_no_rank() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let good = authority.certificate(&folder, "good");
    let other = Authority::new().certificate(&folder, "other");
    // It believes the others, but they do not believe it.
    let stranger = TlsFiles { ca: good.ca.clone(), ..other };
    for tls in [Some(stranger), None] {
        let (listeners, peers) = ports(2);
        let connect_within = Duration::from_millis(500);
        let both = [Some(good.clone()), tls];
        let options = both.into_iter().enumerate().map(|(rank, tls)| TcpOptions {
            tls,
            connect_within,
            ..options(rank, &peers, PATIENT)
        });
        for outcome in connect_all(&engine(), options.zip(listeners).collect()) {
            let error = outcome.err().unwrap().to_string();
            assert!(error.contains("tls") || error.contains("TLS"), "{error}");
        }
    }
    let missing = TlsFiles { key: folder.path().join("nothing.pem"), ..good };
    let (_, peers) = ports(1);
    let error = connect(engine(), TcpOptions { tls: Some(missing), ..options(0, &peers, PATIENT) }).err().unwrap();
    assert!(error.to_string().contains("nothing.pem cannot be used for tls"), "{error}");
}

// ---- ranks that are processes ----

const PEERS: &str = "COMM_TEST_PEERS";

/// A rank in a process of its own, if the tests below have started one.
#[test]
#[ignore = "is the other process of tests here"]
fn the_last_rank_as_a_process() {
    let Ok(peers) = std::env::var(PEERS) else { return };
    let peers: Vec<String> = peers.split(',').map(Into::into).collect();
    let rank = connect(engine(), options(peers.len() - 1, &peers, WATCHFUL)).unwrap();
    // Until the others are gone.
    let _ = rank.start(Vec::new(), vec![(0, vec![1])]).unwrap().wait();
}

struct Process(Child);

impl Process {
    fn signal(&self, signal: libc::c_int) {
        // SAFETY: a system call without memory; the child is ours and was not waited for, so its id is still its own.
        assert_eq!(unsafe { libc::kill(self.0.id() as libc::pid_t, signal) }, 0);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may be stopped, or gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Two ranks here and the third in another process.
fn with_process() -> (Vec<Rank<Tensor>>, Process) {
    let (mut listeners, peers) = ports(3);
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "comm::tcp::tests::the_last_rank_as_a_process", "--ignored", "--nocapture"]);
    let child = command.env(PEERS, peers.join(",")).stdout(Stdio::null()).spawn().unwrap();
    let process = Process(child);
    let ranks = (0..2).map(|rank| (options(rank, &peers, WATCHFUL), listeners[rank].take())).collect();
    (connect_all(&engine(), ranks).into_iter().map(Result::unwrap).collect(), process)
}

#[test]
fn a_stopped_process_is_silent() {
    let (ranks, process) = with_process();
    process.signal(libc::SIGSTOP);
    let start = Instant::now();
    let error = all_failed(together(ranks, |rank| rank.barrier()));
    assert_eq!(error, CommError::Silent { rank: 2, after: SILENCE });
    assert!(start.elapsed() < 2 * SILENCE, "{:?}", start.elapsed());
}

#[test]
fn a_killed_process_is_lost_at_once() {
    let (ranks, process) = with_process();
    process.signal(libc::SIGKILL);
    let start = Instant::now();
    let error = all_failed(together(ranks, |rank| rank.barrier()));
    assert_eq!(error, CommError::Lost { rank: 2, why: "its connection ended".into() });
    assert!(start.elapsed() < SILENCE, "{:?}", start.elapsed());
}

#[test]
fn a_part_is_small_beside_the_window() {
    // Signs of life and the end of the group go between parts.
    const { assert!(PART <= WINDOW / 8) };
}
