//! `farmctl gc`

use farm_core::api::{GcReport, GcRequest};
use indicatif::HumanBytes;

use crate::args::Gc;
use crate::client::Client;
use crate::error::{Error, Status};
use crate::output::{self, plural};

pub async fn run(client: &Client, args: Gc) -> Result<Status, Error> {
    let request = GcRequest { dry_run: args.dry_run };
    let mut report = client.gc(&request).await?;
    // Each call does a bounded amount of work. One that removes nothing would not remove more the next time.
    while report.more && !args.dry_run {
        let step = client.gc(&request).await?;
        let idle = removed(&step) == 0;
        add(&mut report, step);
        if idle {
            break;
        }
    }
    if args.output.json {
        output::json(&report)?;
    } else {
        let header = [if report.dry_run { "would remove" } else { "removed" }, "number", "size"];
        output::line(&output::table(header, rows(&report)))?;
        if report.more {
            eprintln!("there is more; this is what one step finds");
        }
        if report.errors > 0 {
            eprintln!("{} could not be removed; the scheduler's log says why", plural(report.errors, "object"));
        }
    }
    Ok(Status::Ok)
}

fn removed(report: &GcReport) -> u64 {
    report.clips + report.latents + report.log_rows + report.job_rows + report.audit_rows
}

fn add(sum: &mut GcReport, step: GcReport) {
    let GcReport { dry_run: _, clips, clip_bytes, latents, latent_bytes, log_rows, job_rows, audit_rows, errors, more } =
        step;
    sum.clips += clips;
    sum.clip_bytes += clip_bytes;
    sum.latents += latents;
    sum.latent_bytes += latent_bytes;
    sum.log_rows += log_rows;
    sum.job_rows += job_rows;
    sum.audit_rows += audit_rows;
    // What cannot be removed fails in every step: the last one counts.
    sum.errors = errors;
    sum.more = more;
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use serde_json::json;

    use super::*;
    use crate::args::Output;
    use crate::pretended::{Reply, pretend};

    /// Calls until the end, of a farm with so much to remove that there are `steps`, and something that cannot be.
    async fn calls(steps: u64, dry_run: bool) -> u64 {
        let calls = Arc::new(AtomicU64::new(0));
        let counted = calls.clone();
        let scheduler = pretend(move |_, _| {
            let call = counted.fetch_add(1, Ordering::SeqCst);
            let clips = u64::from(call < steps);
            let report = GcReport { dry_run, clips, errors: 1, more: true, ..GcReport::default() };
            Reply::Json(200, json!(report))
        })
        .await;
        let client = Client::new(&scheduler.address, None).unwrap();
        run(&client, Gc { dry_run, output: Output { json: true } }).await.unwrap();
        calls.load(Ordering::SeqCst)
    }

    #[tokio::test]
    async fn all_that_can_be_removed_is_and_the_rest_does_not_keep_us() {
        assert_eq!(calls(3, false).await, 4);
        assert_eq!(calls(3, true).await, 1);
    }
}
