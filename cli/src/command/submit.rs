//! `farmctl submit`

use std::fs::File;
use std::io::{self, IsTerminal, Read};
use std::path::Path;

use bytes::Bytes;
use farm_core::api::{CommitSubmission, LineError, MAX_SUBMISSION_BYTES, OpenSubmission, PAGE_BYTES, SubmissionReply};
use farm_core::id::SubmissionId;
use indicatif::{ProgressBar, ProgressStyle};

use super::fetch;
use crate::args::Submit;
use crate::board::Board;
use crate::client::Client;
use crate::error::{Error, Status};
use crate::follow::{self, persist};
use crate::output::{self, clean, plural};

/// From this size on, an upload is worth a bar.
const BAR_BYTES: u64 = 8 * PAGE_BYTES as u64;

pub async fn run(client: &Client, args: Submit) -> Result<Status, Error> {
    let json = args.output.json;
    let stdin = args.file.as_os_str() == "-";
    let shown_name = if stdin { "standard input".into() } else { args.file.display().to_string() };
    let (mut input, length): (Box<dyn Read>, Option<u64>) = if stdin {
        (Box::new(io::stdin()), None)
    } else {
        let file = File::open(&args.file).map_err(Error::file("open", &args.file))?;
        let length = file.metadata().map_err(Error::file("open", &args.file))?.len();
        (Box::new(file), Some(length))
    };
    if let Some(dir) = &args.out {
        // A folder that cannot be made is better known before the farm has worked for it.
        fetch::create_folder(dir)?;
    }

    let open = OpenSubmission {
        model: args.model,
        priority: args.priority,
        tenant: args.tenant.unwrap_or_default(),
        after: args.after,
        max_failures: args.max_failures,
    };
    let submission = client.open_submission(&open).await?.submission;
    // Pages and commits may be sent again: from here on the file survives a scheduler that restarts or hands over.
    let persistent = &client.impatient();
    let bytes = upload(persistent, submission, &mut input, length, &args.file).await?;
    let commit = CommitSubmission { bytes, skip_invalid: args.skip_invalid, again: args.again };
    let reply = match persist(note, async || persistent.commit(submission, &commit).await).await {
        Ok(reply) => reply,
        Err(error) => {
            if let Error::Refused { answer, .. } = &error
                && !json
            {
                print_bad_lines(&shown_name, &answer.lines, answer.bad_lines);
            }
            return Err(error);
        }
    };
    if json {
        output::json(&reply)?;
    } else {
        print_bad_lines(&shown_name, &reply.lines, reply.bad_lines);
        output::line(&summary(&reply))?;
    }
    if !args.wait && args.out.is_none() {
        return Ok(Status::Ok);
    }
    wait(client, submission, args.out.as_deref(), json).await
}

async fn wait(client: &Client, submission: SubmissionId, out: Option<&Path>, json: bool) -> Result<Status, Error> {
    let mut board = Board::new(json);
    let outcome = tokio::select! {
        outcome = follow::submission(client, submission, &mut board, out) => Some(outcome?),
        _ = tokio::signal::ctrl_c() => None,
    };
    drop(board);
    match outcome {
        Some(outcome) => Ok(outcome.report(json)),
        None => {
            eprintln!(
                "stopped waiting; the farm goes on with the jobs. `farmctl watch {id}` shows them, `farmctl list --batch {id}` \
                 names them, `farmctl cancel {id}` stops them",
                id = submission.short()
            );
            Ok(Status::Interrupted)
        }
    }
}

/// Sends the input page by page and says how long it was.
async fn upload(
    client: &Client,
    submission: SubmissionId,
    input: &mut dyn Read,
    length: Option<u64>,
    path: &Path,
) -> Result<u64, Error> {
    let mut bar: Option<ProgressBar> = None;
    let mut sent = 0;
    for number in 0.. {
        let mut page = Vec::new();
        input.take(PAGE_BYTES as u64).read_to_end(&mut page).map_err(Error::file("read", path))?;
        if page.is_empty() {
            break;
        }
        sent += page.len() as u64;
        if sent > MAX_SUBMISSION_BYTES as u64 {
            return Err(Error::with_help(
                format!("a prompt file may have {} MiB", MAX_SUBMISSION_BYTES >> 20),
                "split it into several files of whole lines",
            ));
        }
        let page = Bytes::from(page);
        persist(note, async || client.put_page(submission, number, page.clone()).await).await?;
        if io::stderr().is_terminal() && length.unwrap_or(sent) >= BAR_BYTES {
            bar.get_or_insert_with(|| upload_bar(length)).set_position(sent);
        }
    }
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    Ok(sent)
}

fn note(text: &str) {
    eprintln!("{text}");
}

fn upload_bar(length: Option<u64>) -> ProgressBar {
    match length {
        Some(length) => {
            let style = ProgressStyle::with_template("sending {bytes}/{total_bytes} [{bar:30}]");
            ProgressBar::new(length).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        }
        None => ProgressBar::no_length(),
    }
}

fn print_bad_lines(file: &str, lines: &[LineError], bad_lines: u64) {
    for line in bad_line_texts(file, lines, bad_lines) {
        eprintln!("{line}");
    }
}

/// `FILE:LINE:COLUMN: reason`, the form that editors jump to.
fn bad_line_texts(file: &str, lines: &[LineError], bad_lines: u64) -> Vec<String> {
    let mut texts: Vec<String> = lines
        .iter()
        .map(|bad| format!("{}:{}:{}: {}", clean(file), bad.line, bad.column, clean(&bad.reason)))
        .collect();
    let more = bad_lines.saturating_sub(lines.len() as u64);
    if more > 0 {
        texts.push(format!("… and {more} more"));
    }
    texts
}

fn summary(reply: &SubmissionReply) -> String {
    let mut parts = vec![format!("{} queued", plural(reply.new, "job"))];
    if reply.existing > 0 {
        parts.push(format!("{} known from before (--again makes new ones)", reply.existing));
    }
    if reply.requeued > 0 {
        parts.push(format!("{} queued again", reply.requeued));
    }
    if reply.bad_lines > 0 {
        parts.push(format!("{} skipped", plural(reply.bad_lines, "bad line")));
    }
    let mut text = format!("batch     {}  {}", reply.submission.short(), parts.join(", "));
    if let Some(waiting) = &reply.waiting {
        text += &format!("; waiting: {}", clean(waiting));
    }
    text
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::{Arc, Mutex};

    use clap::Parser;
    use serde_json::json;

    use super::*;
    use crate::args::{Args, Command};
    use crate::pretended::{Reply, pretend};

    #[test]
    fn bad_lines_are_named_and_the_rest_is_counted() {
        let lines = [LineError { line: 3, column: 7, reason: "unknown key \"a\u{1b}\"".into() }];
        assert_eq!(bad_line_texts("p.jsonl", &lines, 3), ["p.jsonl:3:7: unknown key \"a\u{fffd}\"", "… and 2 more"]);
        assert_eq!(bad_line_texts("p.jsonl", &lines, 1).len(), 1);
    }

    #[test]
    fn the_summary_tells_new_from_known() {
        let reply = SubmissionReply {
            submission: SubmissionId(uuid::Uuid::nil()),
            new: 1,
            existing: 2,
            requeued: 3,
            lines: Vec::new(),
            bad_lines: 4,
            waiting: Some("no node has registered model x".into()),
        };
        assert_eq!(
            summary(&reply),
            "batch     00000000  1 job queued, 2 known from before (--again makes new ones), 3 queued again, 4 bad lines skipped; \
             waiting: no node has registered model x"
        );
    }

    /// Two schedulers with one queue. Who leads changes after a page and after the commit, and both answers are lost.
    #[derive(Default)]
    struct Queue {
        leader: usize,
        pages: BTreeMap<u64, Vec<u8>>,
        commits: u32,
    }

    fn answer(queue: &Mutex<Queue>, own: usize, call: &str, body: &[u8]) -> Reply {
        let mut queue = queue.lock().unwrap();
        if queue.leader != own {
            return Reply::Json(503, json!({"error": "stands by"}));
        }
        let submission = SubmissionId(uuid::Uuid::nil());
        if let Some((_, page)) = call.split_once("/pages/") {
            let known = queue.pages.insert(page.parse().unwrap(), body.to_vec()).is_some();
            if page == "1" && !known {
                queue.leader = 1 - own;
                return Reply::Broken;
            }
            return Reply::Json(200, json!(null));
        }
        if call.ends_with("/commit") {
            queue.commits += 1;
            if queue.commits == 1 {
                queue.leader = 1 - own;
                return Reply::Broken;
            }
            let bytes: usize = queue.pages.values().map(Vec::len).sum();
            assert_eq!(serde_json::from_slice::<CommitSubmission>(body).unwrap().bytes, bytes as u64);
            return Reply::Json(200, json!({"submission": submission, "new": 3, "existing": 0, "requeued": 0}));
        }
        assert_eq!(call, "POST /v1/submissions");
        let open: OpenSubmission = serde_json::from_slice(body).unwrap();
        assert_eq!(
            (open.tenant.as_str(), open.after, open.max_failures),
            ("films", vec!["5a0c31f2".to_owned()], Some(2))
        );
        Reply::Json(200, json!({"submission": submission}))
    }

    #[tokio::test]
    async fn a_file_survives_two_takeovers() {
        let queue = Arc::new(Mutex::new(Queue::default()));
        let scheduler = async |own| {
            let queue = queue.clone();
            pretend(move |call, body| answer(&queue, own, call, body)).await
        };
        let (one, two) = (scheduler(0).await, scheduler(1).await);
        let client = Client::new(&format!("{},{}", one.address, two.address), None).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("prompts.jsonl");
        let content: Vec<u8> = (0..PAGE_BYTES * 5 / 2).map(|at| (at % 251) as u8).collect();
        std::fs::write(&file, &content).unwrap();

        let line = ["farmctl", "submit", file.to_str().unwrap(), "--tenant", "films"];
        let line = line.into_iter().chain(["--after", "5a0c31f2", "--max-failures", "2", "--json"]);
        let Command::Submit(args) = Args::try_parse_from(line).unwrap().command else { panic!("no submit") };
        assert_eq!(run(&client, args).await.unwrap(), Status::Ok);
        let queue = queue.lock().unwrap();
        assert_eq!(queue.pages.values().flatten().copied().collect::<Vec<_>>(), content);
        assert_eq!((queue.commits, queue.leader), (2, 0));
    }
}
