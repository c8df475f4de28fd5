//! A scheduler for tests: it takes HTTP calls and answers them as it is told.

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::Request;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

/// Largest body that a test sends.
const MAX_BODY: usize = 2 << 20;

pub enum Reply {
    Json(u16, Value),
    /// The call was taken, and the connection breaks before all of the answer is sent.
    Broken,
    /// As a stopped process: the connection stays, and nothing comes.
    Silence,
}

pub struct Pretended {
    pub address: String,
    server: JoinHandle<()>,
}

impl Drop for Pretended {
    fn drop(&mut self) {
        self.server.abort();
    }
}

/// `answer` gets the method and the path, as in `GET /v1/farm`, and the body.
pub async fn pretend(answer: impl Fn(&str, &[u8]) -> Reply + Clone + Send + Sync + 'static) -> Pretended {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let router = Router::new().fallback(async move |request: Request| {
        let call = format!("{} {}", request.method(), request.uri());
        let body = axum::body::to_bytes(request.into_body(), MAX_BODY).await.unwrap();
        respond(answer(&call, &body)).await
    });
    let server = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    Pretended { address, server }
}

async fn respond(reply: Reply) -> Response {
    match reply {
        Reply::Json(status, body) => (StatusCode::from_u16(status).unwrap(), axum::Json(body)).into_response(),
        Reply::Broken => {
            let broken = futures::stream::once(async { Err::<Bytes, _>(std::io::Error::other("gone")) });
            Body::from_stream(broken).into_response()
        }
        Reply::Silence => std::future::pending().await,
    }
}

/// Nobody listens there.
pub async fn nowhere() -> String {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().to_string()
}
