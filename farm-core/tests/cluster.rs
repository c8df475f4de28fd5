//! Two real processes over `wire::cluster`: ractor's registries are process-global, so one process cannot show this.
#![cfg(feature = "cluster")]

use std::convert::Infallible;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use farm_core::id::BootId;
use farm_core::wire::cluster::{
    BOOT_HEADER, Cluster, ClusterError, ClusterEvent, PROTOCOL_HEADER, Role, VERSION_HEADER, check_protocol,
};
use http_body_util::{Empty, Full};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::time::timeout;
use uuid::Uuid;

const PATIENCE: Duration = Duration::from_secs(20);
const SCHEDULER_ADDR: &str = "CLUSTER_TEST_SCHEDULER_ADDR";

/// The other process: this test binary again, told to run only [`node_process`].
fn spawn_node(addr: &str) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "node_process", "--nocapture"])
        .env(SCHEDULER_ADDR, addr)
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

/// Echoes every frame back with a `!` until it is killed. Does nothing when run as an ordinary test.
#[test]
fn node_process() {
    let Ok(addr) = std::env::var(SCHEDULER_ADDR) else { return };
    runtime().block_on(async {
        let (cluster, mut events) =
            Cluster::start(Role::Node, BootId(Uuid::new_v4()), Some("a secret of the farm")).await.unwrap();
        cluster.dial(&addr, Some("a secret of the farm")).await.unwrap();
        while let Some(event) = events.recv().await {
            match event {
                ClusterEvent::Ready { .. } => cluster.send_to_scheduler(b"hello".to_vec()).unwrap(),
                ClusterEvent::Frame(mut bytes) => {
                    bytes.push(b'!');
                    cluster.send_to_scheduler(bytes).unwrap();
                }
                ClusterEvent::Closed { .. } => return,
            }
        }
    });
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

async fn serve(listener: TcpListener, cluster: Cluster) {
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let cluster = cluster.clone();
        tokio::spawn(async move {
            let service = service_fn(move |mut request: Request<Incoming>| {
                let cluster = cluster.clone();
                async move {
                    let boot = request.headers()[BOOT_HEADER].to_str().unwrap().parse().map(BootId).unwrap();
                    tokio::spawn(async move {
                        let upgraded = hyper::upgrade::on(&mut request).await.unwrap();
                        cluster.accept(upgraded, boot).unwrap();
                    });
                    let reply =
                        Response::builder().status(StatusCode::SWITCHING_PROTOCOLS).header("upgrade", "mochi-farm");
                    Ok::<_, Infallible>(reply.header("connection", "upgrade").body(Empty::<Bytes>::new()).unwrap())
                }
            });
            let http = hyper::server::conn::http1::Builder::new();
            let _ = http.serve_connection(TokioIo::new(stream), service).with_upgrades().await;
        });
    }
}

async fn next(events: &mut mpsc::Receiver<ClusterEvent>) -> ClusterEvent {
    timeout(PATIENCE, events.recv()).await.expect("no event in time").expect("cluster ended")
}

/// Answers the first requests of as many connections, in order, and checks that the node says what it speaks.
async fn answer(listener: TcpListener, answers: Vec<(StatusCode, &'static str)>) {
    for (status, body) in answers {
        let (stream, _) = listener.accept().await.unwrap();
        let service = service_fn(move |request: Request<Incoming>| async move {
            assert_eq!(check_protocol(request.headers()), Ok(()));
            Ok::<_, Infallible>(Response::builder().status(status).body(Full::<Bytes>::from(body)).unwrap())
        });
        tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service));
    }
}

#[test]
fn a_node_that_is_not_let_in_learns_why_and_who_leads() {
    runtime().block_on(async {
        let (cluster, _events) = Cluster::start(Role::Node, BootId(Uuid::new_v4()), None).await.unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap().to_string();
        let answers = vec![
            (StatusCode::SERVICE_UNAVAILABLE, r#"{"error":"stands by","leader":"there:7070"}"#),
            (StatusCode::SERVICE_UNAVAILABLE, "<html>"),
            (StatusCode::CONFLICT, r#"{"error":"speaks protocol 9"}"#),
            (StatusCode::NOT_FOUND, "<html>"),
        ];
        tokio::spawn(answer(listener, answers));
        let mut errors = Vec::new();
        for _ in 0..4 {
            errors.push(timeout(PATIENCE, cluster.dial(&addr, None)).await.unwrap().unwrap_err());
        }
        let leader = |error: &ClusterError| match error {
            ClusterError::Standby { leader, .. } => leader.clone(),
            error => panic!("{error}"),
        };
        assert_eq!((leader(&errors[0]).as_deref(), leader(&errors[1])), (Some("there:7070"), None));
        assert!(errors[2].to_string().contains("speaks protocol 9"), "{}", errors[2]);
        assert!(errors[3].to_string().contains("is this a farm-scheduler"), "{}", errors[3]);
    });
}

#[test]
fn a_node_of_another_protocol_is_told_both_versions() {
    let request = Request::builder().header(PROTOCOL_HEADER, "3").header(VERSION_HEADER, "0.0.9").body(()).unwrap();
    let refusal = check_protocol(request.headers()).unwrap_err();
    let ours = format!("version {} and speaks protocol {}", farm_core::VERSION, farm_core::wire::PROTOCOL);
    assert!(refusal.contains("version 0.0.9 and speaks protocol 3") && refusal.contains(&ours), "{refusal}");
    assert!(check_protocol(Request::new(()).headers()).unwrap_err().contains("protocol unknown"));
}

#[test]
fn frames_pass_both_ways_and_a_killed_peer_closes_its_session() {
    runtime().block_on(async {
        let (cluster, mut events) =
            Cluster::start(Role::Scheduler, BootId(Uuid::new_v4()), Some("a secret of the farm")).await.unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap().to_string();
        tokio::spawn(serve(listener, cluster.clone()));

        for _ in 0..2 {
            let mut node = spawn_node(&addr);
            let ClusterEvent::Ready { peer } = next(&mut events).await else { panic!("expected a session") };
            assert_eq!(next(&mut events).await, ClusterEvent::Frame(b"hello".to_vec()));
            cluster.send_to_node(peer, b"ping".to_vec()).unwrap();
            assert_eq!(next(&mut events).await, ClusterEvent::Frame(b"ping!".to_vec()));

            let oversize = vec![0; farm_core::wire::MAX_ENVELOPE_BYTES + 1];
            assert!(matches!(cluster.send_to_node(peer, oversize), Err(ClusterError::TooLarge { .. })));

            node.kill().unwrap();
            node.wait().unwrap();
            assert_eq!(next(&mut events).await, ClusterEvent::Closed { peer });
            assert!(matches!(cluster.send_to_node(peer, b"ping".to_vec()), Err(ClusterError::NoSession(_))));
        }
    });
}
