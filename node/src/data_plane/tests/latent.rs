//! Latents, from nodes that can be trusted and from others.

use axum::Router;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;

use super::*;

/// A node that lets anybody join and answers `answer` where the latent is.
async fn liar(answer: impl Fn() -> Response + Clone + Send + Sync + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let joined = || async {
        // Nothing is ever said.
        let (says, body) = channel::Stream::outgoing();
        tokio::spawn(async move { says.closed().await });
        body
    };
    let router = Router::new()
        .route("/decode/latent", get(move || std::future::ready(answer())))
        .route("/decode/hands/{hand}", post(joined));
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let service = TowerToHyperService::new(router.clone());
            let http = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            tokio::spawn(http.serve_connection(TokioIo::new(stream), service));
        }
    });
    format!("http://{address}/decode")
}

fn says(length: usize, sha256: &str, latent: &'static [u8]) -> Response {
    // Of unknown length, so that nobody sees through it here.
    let (pieces, receiver) = mpsc::channel(1);
    pieces.try_send(Bytes::from_static(latent)).unwrap();
    ([("content-length", length.to_string()), (CONTENT_SHA256, sha256.to_owned())], body(receiver)).into_response()
}

async fn fetched(url: &str) -> (Result<Bytes, LatentError>, Counters) {
    let plane = plane(patience()).await;
    let hand = soon(plane.join(url, "token", "a hand", 100, MAX)).await.unwrap();
    (hand.latent, plane.counters())
}

#[tokio::test]
async fn a_latent_of_many_pieces_is_fetched_whole() {
    let plane = plane(patience()).await;
    let latent: Bytes = (0..9_000_000u32).map(|i| (i * 31) as u8).collect::<Vec<_>>().into();
    let decode = plane.open(latent.clone(), MAX, 1);
    let hand = soon(plane.join(&decode.url, &decode.token, "a hand", latent.len(), MAX)).await.unwrap();
    assert!(hand.latent.unwrap() == latent);
}

#[tokio::test]
async fn what_a_node_announces_is_what_it_has_to_send() {
    let hash = server::hex(&<sha2::Sha256 as sha2::Digest>::digest(b"latent"));
    let honest = hash.clone();
    let url = liar(move || says(6, &honest, b"latent")).await;
    assert_eq!(fetched(&url).await.0.unwrap(), &b"latent"[..]);

    for length in [5, 7] {
        let hash = hash.clone();
        let url = liar(move || says(length, &hash, b"latent")).await;
        let (latent, counters) = fetched(&url).await;
        assert!(matches!(latent, Err(LatentError::LyingLength { length: said, .. }) if said == length), "{latent:?}");
        assert_eq!(counters.lying_lengths, 1);
    }

    let other = hash.replace(&hash[..1], if hash.starts_with('0') { "1" } else { "0" });
    let url = liar(move || says(6, &other, b"latent")).await;
    let (latent, counters) = fetched(&url).await;
    assert!(matches!(latent, Err(LatentError::WrongHash { .. })), "{latent:?}");
    // It might have been the network, so it was tried again.
    assert_eq!((counters.wrong_hashes, counters.missed_latents), (3, 1));

    let unasked = hash.clone();
    let url = liar(move || says(101, &unasked, b"latent")).await;
    let (latent, counters) = fetched(&url).await;
    assert!(matches!(latent, Err(LatentError::TooLong { length: 101, max: 100, .. })), "{latent:?}");
    assert_eq!(counters.over_limits, 1);

    let url = liar(|| "latent".into_response()).await;
    assert!(matches!(fetched(&url).await.0, Err(LatentError::Unannounced { .. })));

    let url = liar(|| (StatusCode::IM_A_TEAPOT, "no ".repeat(1000)).into_response()).await;
    let (latent, _) = fetched(&url).await;
    let Err(LatentError::Refused(JoinError::Refused { status: 418, reason, .. })) = latent else {
        panic!("{latent:?}")
    };
    assert!(reason.len() <= 512);
}
