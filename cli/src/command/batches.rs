//! `farmctl batches`

use farm_core::api::BatchView;

use crate::args::Output;
use crate::client::Client;
use crate::error::{Error, Status};
use crate::output;

pub async fn run(client: &Client, args: Output) -> Result<Status, Error> {
    let list = client.batches().await?;
    if args.json {
        output::json(&list)?;
        return Ok(Status::Ok);
    }
    output::line(&output::table(["batch", "tenant", "submitted", "summary"], list.batches.iter().map(row)))?;
    Ok(Status::Ok)
}

fn row(batch: &BatchView) -> [String; 4] {
    [batch.submission.short(), batch.tenant.to_string(), format!("{:.0}", batch.submitted), batch.summary.clone()]
}
