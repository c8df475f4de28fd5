//! A long file of prompts, end to end: this program is started as a scheduler, and the file goes in over HTTP in pages, as
//! `farmctl submit` sends it, until the commit is answered.

use std::fmt::Write;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, ensure};
use bytes::Bytes;
use farm_core::api::{CommitSubmission, OpenSubmission, PAGE_BYTES, SubmissionOpened, SubmissionReply};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use uuid::Uuid;

use super::clock::memory_mib;
use super::report::{Limit, Report};
use super::world::PROMPT;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[arg(long, default_value_t = 100_000)]
    pub lines: usize,
    /// Folder for the scheduler's data [default: the system's for temporary files]
    #[arg(long, value_name = "DIR")]
    pub folder: Option<PathBuf>,
}

/// The scheduler and its folder, both gone at the end.
struct Scheduler {
    child: Child,
    folder: PathBuf,
    address: String,
}

impl Scheduler {
    fn start(base: &Path) -> anyhow::Result<Self> {
        let folder = base.join(format!("farm-bench-{}", Uuid::new_v4().simple()));
        let program = std::env::current_exe()?;
        let mut command = Command::new(program);
        command.arg("--data").arg(&folder).arg("--store").arg(folder.join("results"));
        command.args(["--listen", "127.0.0.1:0"]).env("RUST_LOG", "warn").stdout(Stdio::piped());
        let child = command.spawn().context("this program cannot be started as a scheduler")?;
        let mut scheduler = Self { child, folder, address: String::new() };
        let out = scheduler.child.stdout.take().context("its output is piped")?;
        let mut line = String::new();
        BufReader::new(out).read_line(&mut line)?;
        let address = line.trim().strip_prefix("listening on http://");
        scheduler.address = address.context("the scheduler does not start")?.to_owned();
        Ok(scheduler)
    }
}

impl Drop for Scheduler {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

pub fn run(args: &Args) -> anyhow::Result<Report> {
    let mut file = String::new();
    for n in 0..args.lines {
        writeln!(file, "{{\"prompt\":\"{PROMPT} Take {n}.\",\"seed\":{n}}}")?;
    }
    let scheduler = Scheduler::start(&args.folder.clone().unwrap_or_else(std::env::temp_dir))?;
    let process = Some(scheduler.child.id());
    let before = memory_mib(process);
    let bytes = file.len();
    let (reply, seconds) = Runtime::new()?.block_on(submit(&scheduler.address, file))?;
    ensure!(reply.new == args.lines as u64, "{} of {} lines became jobs", reply.new, args.lines);
    let mut report = Report::new("submit");
    report.figure("lines", args.lines as f64, "");
    report.figure("bytes", bytes as f64, "");
    if let (Some((before, _)), Some((now, most))) = (before, memory_mib(process)) {
        report.figure("the scheduler's memory before", before, "MiB");
        report.figure("the scheduler's memory after", now, "MiB");
        report.goal("the scheduler's peak memory", most, "MiB", Limit::AtMost(512.0));
    }
    report.goal("from the first byte to the reply", seconds, "s", Limit::AtMost(10.0));
    Ok(report)
}

async fn submit(address: &str, file: String) -> anyhow::Result<(SubmissionReply, f64)> {
    let stream = TcpStream::connect(address).await?;
    let (sender, connection) = handshake(TokioIo::new(stream)).await?;
    let connection = tokio::spawn(connection);
    let mut http = Http { sender, host: address.to_owned() };
    let begun = Instant::now();
    let opened: SubmissionOpened = http.post("/v1/submissions", &OpenSubmission::default()).await?;
    let path = format!("/v1/submissions/{}", opened.submission);
    let (length, file) = (file.len() as u64, Bytes::from(file));
    for (n, from) in (0..file.len()).step_by(PAGE_BYTES).enumerate() {
        let page = file.slice(from..file.len().min(from + PAGE_BYTES));
        http.call(Method::PUT, &format!("{path}/pages/{n}"), page, "application/octet-stream").await?;
    }
    let commit = CommitSubmission { bytes: length, ..CommitSubmission::default() };
    let reply = http.post(&format!("{path}/commit"), &commit).await?;
    let seconds = begun.elapsed().as_secs_f64();
    drop(http);
    connection.await??;
    Ok((reply, seconds))
}

/// One connection.
struct Http {
    sender: SendRequest<Full<Bytes>>,
    host: String,
}

impl Http {
    async fn post<T: DeserializeOwned>(&mut self, path: &str, body: &impl Serialize) -> anyhow::Result<T> {
        let body = Bytes::from(serde_json::to_vec(body)?);
        let answer = self.call(Method::POST, path, body, "application/json").await?;
        serde_json::from_slice(&answer).with_context(|| format!("answer to {path}"))
    }

    async fn call(&mut self, method: Method, path: &str, body: Bytes, kind: &str) -> anyhow::Result<Bytes> {
        self.sender.ready().await?;
        let request =
            Request::builder().method(method).uri(path).header("host", &self.host).header("content-type", kind);
        let answer = self.sender.send_request(request.body(Full::new(body))?).await?;
        let status = answer.status();
        let body = answer.into_body().collect().await?.to_bytes();
        ensure!(status.is_success(), "{path}: {status}: {}", String::from_utf8_lossy(&body));
        Ok(body)
    }
}
