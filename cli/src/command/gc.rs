//! `farmctl gc`

use farm_core::api::{GcReport, GcRequest};
use indicatif::HumanBytes;

use crate::args::Gc;
use crate::client::Client;
use crate::error::{Error, Status};
use crate::output::{self, plural};

pub async fn run(client: &Client, args: Gc) -> Result<Status, Error> {
    let report = client.gc(&GcRequest { dry_run: args.dry_run }).await?;
    if args.output.json {
        output::json(&report)?;
    } else {
        let header = [if report.dry_run { "would remove" } else { "removed" }, "number", "size"];
        output::line(&output::table(header, rows(&report)))?;
        if report.errors > 0 {
            eprintln!("{} could not be removed; the scheduler's log says why", plural(report.errors, "object"));
        }
    }
    Ok(Status::Ok)
}

fn rows(report: &GcReport) -> [[String; 3]; 5] {
    let row = |what: &str, count: u64, size: Option<u64>| {
        [what.to_owned(), count.to_string(), size.map(|bytes| HumanBytes(bytes).to_string()).unwrap_or_default()]
    };
    [
        row("clips of attempts that were not accepted", report.clips, Some(report.clip_bytes)),
        row("latents of ended jobs", report.latents, Some(report.latent_bytes)),
        row("rows of logs", report.log_rows, None),
        row("rows of ended jobs", report.job_rows, None),
        row("rows of the audit trail", report.audit_rows, None),
    ]
}
