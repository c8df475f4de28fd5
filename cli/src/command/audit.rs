//! `farmctl audit`

use std::time::Duration;

use farm_core::api::{AuditEntry, AuditPage};
use tokio::time::sleep;

use crate::args::Audit;
use crate::client::Client;
use crate::error::{Error, Status};
use crate::follow::persist;
use crate::output::{self, clean};

const POLL: Duration = Duration::from_secs(1);

pub async fn run(client: &Client, args: Audit) -> Result<Status, Error> {
    if args.follow {
        return tokio::select! {
            outcome = follow(client, args.after, args.output.json) => outcome,
            _ = tokio::signal::ctrl_c() => Ok(Status::Interrupted),
        };
    }
    let mut all = AuditPage { entries: Vec::new(), next: args.after };
    loop {
        let page = client.audit(all.next).await?;
        let end = page.entries.is_empty() || page.next <= all.next;
        all.next = all.next.max(page.next);
        if args.output.json {
            all.entries.extend(page.entries);
        } else {
            page.entries.iter().try_for_each(|entry| output::line(&line(entry)))?;
        }
        if end {
            break;
        }
    }
    if args.output.json {
        output::json(&all)?;
    }
    Ok(Status::Ok)
}

/// Never ends by itself but for an error.
async fn follow(client: &Client, mut after: u64, json: bool) -> Result<Status, Error> {
    let client = &client.impatient();
    loop {
        let page = persist(|text| eprintln!("{text}"), async || client.audit(after).await).await?;
        for entry in &page.entries {
            if json { output::json(entry)? } else { output::line(&line(entry))? }
        }
        let more = !page.entries.is_empty() && page.next > after;
        after = after.max(page.next);
        if !more {
            sleep(POLL).await;
        }
    }
}

fn line(entry: &AuditEntry) -> String {
    let AuditEntry { number, at, by, action, subject, detail } = entry;
    let text = format!("{number:>6}  {at:.0}  {by}  {action} {subject}");
    let text = if detail.is_empty() { text } else { format!("{text}: {detail}") };
    clean(&text).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_one_line_whatever_it_says() {
        let entry = AuditEntry {
            number: 7,
            at: jiff::Timestamp::UNIX_EPOCH,
            by: "ada@lab".into(),
            action: "quota".into(),
            subject: "films".into(),
            detail: "share 1 → 2\n8 done".into(),
        };
        assert_eq!(line(&entry), "     7  1970-01-01T00:00:00Z  ada@lab  quota films: share 1 → 2\u{fffd}8 done");
    }
}
