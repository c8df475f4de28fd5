//! An S3 server in this process: the real protocol over a socket, objects in a temporary folder.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Context;
use hyper::Request;
use hyper::body::Incoming;
use hyper::header::IF_NONE_MATCH;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;
use s3s_fs::FileSystem;
use tokio::sync::{Mutex, oneshot};

const ACCESS_KEY: &str = "farm-tests";
const SECRET_KEY: &str = "not a secret";

/// Listens on a free port of the loopback until dropped; the objects go with it.
pub struct S3Server {
    address: SocketAddr,
    _objects: tempfile::TempDir,
    // Dropping it ends the server's thread.
    _stop: oneshot::Sender<()>,
}

impl S3Server {
    /// Starts a server that has the given buckets. It runs on a thread of its own, so that it serves child processes
    /// and tests without a runtime as well.
    pub fn start(buckets: &[&str]) -> anyhow::Result<Self> {
        let objects = tempfile::tempdir()?;
        for bucket in buckets {
            std::fs::create_dir(objects.path().join(bucket))?;
        }
        let file_system =
            FileSystem::new(objects.path()).map_err(|e| anyhow::anyhow!("cannot open the object folder: {e:?}"))?;
        let mut builder = S3ServiceBuilder::new(file_system);
        builder.set_auth(SimpleAuth::from_single(ACCESS_KEY, SECRET_KEY));
        let service = builder.build();
        let creating = Arc::new(Mutex::new(()));

        let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).context("cannot bind a loopback port")?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (stop, stopped) = oneshot::channel();
        std::thread::spawn(move || {
            let serve = async move {
                let listener = tokio::net::TcpListener::from_std(listener).expect("a bound listener");
                loop {
                    let Ok((socket, _)) = listener.accept().await else { continue };
                    let (service, creating) = (service.clone(), creating.clone());
                    let service = service_fn(move |request: Request<Incoming>| {
                        let (service, creating) = (service.clone(), creating.clone());
                        async move {
                            // s3s-fs looks whether an object exists and then writes it, so that of several concurrent
                            // create-only puts more than one may succeed. The real service guarantees one.
                            let create_only = request.headers().contains_key(IF_NONE_MATCH);
                            let _alone = if create_only { Some(creating.lock().await) } else { None };
                            Service::call(&service, request).await
                        }
                    });
                    tokio::spawn(async move {
                        // A client that goes away is its own business.
                        let _ =
                            Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(socket), service).await;
                    });
                }
            };
            runtime.block_on(async {
                tokio::select! {
                    () = serve => {}
                    _ = stopped => {}
                }
            });
        });
        Ok(Self { address, _objects: objects, _stop: stop })
    }

    /// What a program that uses the server has to have in its environment.
    pub fn environment(&self) -> Vec<(String, String)> {
        [
            ("AWS_ENDPOINT", format!("http://{}", self.address)),
            ("AWS_REGION", "us-east-1".into()),
            ("AWS_ACCESS_KEY_ID", ACCESS_KEY.into()),
            ("AWS_SECRET_ACCESS_KEY", SECRET_KEY.into()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into()
    }
}
