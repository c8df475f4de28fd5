//! `farmctl cancel`, `retry`, `pause` and `resume`.

use farm_core::api::{BatchView, JobView};
use serde::Serialize;

use crate::args::{Jobs, Scope, Several};
use crate::client::{Change, Client, Named};
use crate::error::{Error, Status};
use crate::output::{self, clean, name};

/// What was changed, as the API shows it.
#[derive(Serialize)]
#[serde(untagged)]
enum Changed {
    Job(Box<JobView>),
    Batch(BatchView),
}

pub async fn retry(client: &Client, args: Jobs) -> Result<Status, Error> {
    let change = async |id: &str| {
        let job = client.job(id).await?.view.job;
        Ok(Changed::Job(Box::new(client.change(job, Change::Retry).await?)))
    };
    each(&args.ids, args.output.json, change).await
}

pub async fn cancel(client: &Client, args: Several) -> Result<Status, Error> {
    each(&args.ids, args.output.json, async |id| change_one(client, id, Change::Cancel).await).await
}

/// Pauses or resumes.
pub async fn hold(client: &Client, args: Scope, change: Change) -> Result<Status, Error> {
    let json = args.output.json;
    let verb = if change == Change::Pause { "paused" } else { "goes on" };
    if args.all {
        let queue = client.change_farm(change).await?;
        if json {
            output::json(&queue)?;
        } else {
            output::line(&format!("{verb:<9} the farm, {} queued, {} running", queue.queued, queue.running))?;
        }
        return Ok(Status::Ok);
    }
    if let Some(tenant) = &args.tenant {
        let view = client.change_tenant(tenant, change).await?;
        if json {
            output::json(&view)?;
        } else {
            output::line(&format!("{verb:<9} tenant {tenant}, {} queued, {} running", view.queued, view.running))?;
        }
        return Ok(Status::Ok);
    }
    each(&args.ids, json, async |id| change_one(client, id, change).await).await
}

async fn change_one(client: &Client, id: &str, change: Change) -> Result<Changed, Error> {
    Ok(match client.find(id).await? {
        Named::Job(detail) => Changed::Job(Box::new(client.change(detail.view.job, change).await?)),
        Named::Batch(batch) => Changed::Batch(client.change_batch(batch.submission, change).await?),
    })
}

async fn each(
    ids: &[String],
    json: bool,
    change: impl AsyncFn(&str) -> Result<Changed, Error>,
) -> Result<Status, Error> {
    let mut all = Vec::new();
    let mut refused: Option<Error> = None;
    for id in ids {
        match change(id).await {
            Ok(changed) => {
                if !json {
                    output::line(&line(&changed))?;
                }
                all.push(changed);
            }
            // One job that is done already does not stop the others.
            Err(error @ (Error::Refused { .. } | Error::Usage { .. })) => {
                if let Some(earlier) = refused.replace(error) {
                    eprintln!("{earlier}");
                }
            }
            Err(error) => return Err(error),
        }
    }
    if json {
        output::json(&all)?;
        if let Some(error) = refused {
            // The answer is printed already; one JSON value is all there is.
            return Err(Error::usage(error.to_string()));
        }
        return Ok(Status::Ok);
    }
    refused.map_or(Ok(Status::Ok), Err)
}

fn line(changed: &Changed) -> String {
    match changed {
        Changed::Job(job) => {
            let reason = job.reason.as_deref().map(|reason| format!("  {}", clean(reason))).unwrap_or_default();
            format!("{:<9} {}{reason}", job.state.as_str(), name(job))
        }
        Changed::Batch(batch) => output::batch(batch),
    }
}
