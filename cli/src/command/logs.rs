//! `farmctl logs`

use farm_core::api::LogPage;

use crate::args::OneJob;
use crate::client::Client;
use crate::error::{Error, Status};
use crate::output::{self, clean};

pub async fn run(client: &Client, args: OneJob) -> Result<Status, Error> {
    let job = client.job(&args.id).await?.view.job;
    let mut all = LogPage { lines: Vec::new(), next: 0 };
    loop {
        let page = client.log(job, all.next).await?;
        let end = page.lines.is_empty() || page.next <= all.next;
        all.next = page.next;
        if args.output.json {
            all.lines.extend(page.lines);
        } else {
            for line in &page.lines {
                let attempt = line.attempt.map(|attempt| format!("attempt {attempt}  ")).unwrap_or_default();
                output::line(&format!("{:.3}  {attempt}{}", line.at, clean(&line.line)))?;
            }
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
