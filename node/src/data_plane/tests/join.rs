//! Who is let in.

use std::net::Ipv4Addr;

use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

use super::*;

#[tokio::test]
async fn a_wrong_token_is_refused_and_counted() {
    let plane = plane(patience()).await;
    let decode = plane.open(Bytes::new(), MAX, 1);
    let other = plane.open(Bytes::new(), MAX, 1);
    let peer = address(&plane).to_string();
    for (tried, token) in [&other.token, "", &decode.token[1..]].into_iter().enumerate() {
        let refused = soon(plane.join(&decode.url, token, "a hand", 100, MAX)).await.err();
        assert_eq!(refused, Some(JoinError::Token { peer: peer.clone() }));
        assert_eq!(plane.counters().refused_tokens, tried as u64 + 1);
    }
}

#[tokio::test]
async fn what_is_no_decode_here_is_said_so() {
    let plane = plane(patience()).await;
    let decode = plane.open(Bytes::new(), MAX, 1);
    let unknown = format!("{}/v1/decodes/{}", plane.base(), uuid::Uuid::nil());
    let refused = soon(plane.join(&unknown, &decode.token, "a hand", 100, MAX)).await.err();
    assert!(matches!(refused, Some(JoinError::Gone { .. })), "{refused:?}");
    let (url, token) = (decode.url.clone(), decode.token.clone());
    drop(decode);
    let refused = soon(plane.join(&url, &token, "a hand", 100, MAX)).await.err();
    assert!(matches!(refused, Some(JoinError::Gone { .. })), "{refused:?}");
    let nonsense = format!("{}/v1/decodes/x", plane.base());
    let refused = soon(plane.join(&nonsense, &token, "a hand", 100, MAX)).await.err();
    assert!(matches!(refused, Some(JoinError::Refused { status: 400, .. })), "{refused:?}");
    for url in ["", "a/b", "ftp://a:1/b", "http://a/b", "http://:1/b", "https://a:1/b", "http://a:1/b?c"] {
        let refused = soon(plane.join(url, &token, "a hand", 100, MAX)).await.err();
        assert!(matches!(refused, Some(JoinError::Url { .. })), "{url}: {refused:?}");
    }
    let refused = soon(plane.join("http://127.0.0.1:1/v1/decodes/x", "bad\ntoken", "a hand", 100, MAX)).await.err();
    assert!(matches!(refused, Some(JoinError::Unreachable { .. } | JoinError::Url { .. })), "{refused:?}");
}

#[tokio::test]
async fn a_hand_is_known_by_its_name_or_else_by_its_address() {
    let plane = plane(patience()).await;
    let mut decode = plane.open(Bytes::new(), MAX, 4);
    for (name, known) in [("node-b 3", true), ("", false), (&"n".repeat(129)[..], false)] {
        let _hand = soon(plane.join(&decode.url, &decode.token, name, 100, MAX)).await.unwrap();
        let joined = soon(decode.joined.recv()).await.unwrap();
        assert_eq!(joined.name == name, known, "{}", joined.name);
        assert!(known || joined.name.starts_with("127.0.0.1:"), "{}", joined.name);
    }
}

#[tokio::test]
async fn hands_over_the_limit_are_refused_until_one_has_left() {
    let plane = plane(patience()).await;
    let mut decode = plane.open(Bytes::new(), MAX, 2);
    let join = || async { soon(plane.join(&decode.url, &decode.token, "a hand", 100, MAX)).await };
    let (first, _second) = (join().await.unwrap(), join().await.unwrap());
    assert!(matches!(join().await.err(), Some(JoinError::Full { .. })));
    assert_eq!(plane.counters().over_limits, 1);
    drop((first, soon(decode.joined.recv()).await));
    until(|| plane.hands() == 1).await;
    assert!(soon(plane.join(&decode.url, &decode.token, "a hand", 100, MAX)).await.is_ok());
}

#[tokio::test]
async fn joined_hands_live_on_and_come_back_after_the_decode_is_closed() {
    let mut pair = pair(patience()).await;
    let url = pair.proxy.of(&pair.decode.url);
    let token = pair.decode.token.clone();
    pair.decode = pair.serving.open(Bytes::new(), MAX, 1);
    converse(&mut pair, 3).await;
    pair.proxy.set(Weather::Frozen);
    converse(&mut pair, 3).await;
    assert!(pair.joining.counters().reconnects >= 1);
    let refused = soon(pair.joining.join(&url, &token, "a hand", 100, MAX)).await.err();
    assert!(matches!(refused, Some(JoinError::Gone { .. })), "{refused:?}");
}

#[tokio::test]
async fn a_node_that_has_forgotten_a_hand_says_so_and_the_hand_ends_before_the_grace() {
    let mut pair = pair(Patience { grace: Duration::from_secs(600), ..patience() }).await;
    pair.serving.forget_hands();
    pair.proxy.cut();
    assert_eq!(soon(pair.hand.from.recv()).await, None);
    assert_eq!(pair.joining.counters().lost_channels, 1);
}

#[tokio::test]
async fn connections_that_ask_for_nothing_are_closed() {
    let plane = plane(Patience { connect: Duration::from_millis(100), ..patience() }).await;
    let mut idle = TcpStream::connect(address(&plane)).await.unwrap();
    let mut greeting = Vec::new();
    // The server's settings, and the end.
    soon(idle.read_to_end(&mut greeting)).await.unwrap();
    assert!(greeting.len() < 200);
}

#[tokio::test]
async fn one_peer_cannot_take_all_connections() {
    let plane = plane(patience()).await;
    let mut open = Vec::new();
    for _ in 0..200 {
        open.push(TcpStream::connect(address(&plane)).await.unwrap());
    }
    until(|| plane.counters().over_limits > 0).await;
    // Others are served.
    let decode = plane.open(Bytes::from_static(b"latent"), MAX, 1);
    let from = std::net::SocketAddr::from((Ipv4Addr::new(127, 0, 0, 2), 0));
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind(from).unwrap();
    let mut other = socket.connect(address(&plane)).await.unwrap();
    let mut settings = [0; 9];
    soon(other.read_exact(&mut settings)).await.unwrap();
    drop(open);
    let join = async {
        while plane.join(&decode.url, &decode.token, "a hand", 100, MAX).await.is_err() {
            tokio::task::yield_now().await;
        }
    };
    soon(join).await;
}
