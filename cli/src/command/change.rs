//! `farmctl cancel` and `farmctl retry`.

use crate::args::Jobs;
use crate::client::{Change, Client};
use crate::error::{Error, Status};
use crate::output::{self, name};

pub async fn run(client: &Client, args: Jobs, change: Change) -> Result<Status, Error> {
    let mut changed = Vec::new();
    let mut refused = None;
    for id in &args.ids {
        let outcome = match client.job(id).await {
            Ok(job) => client.change(job.view.job, change).await,
            Err(error) => Err(error),
        };
        match outcome {
            Ok(job) => {
                if !args.output.json {
                    output::line(&format!("{:<9} {}", job.state.as_str(), name(&job)))?;
                }
                changed.push(job);
            }
            // One job that is done already does not stop the others.
            Err(error @ Error::Refused { .. }) => {
                if let Some(earlier) = refused.replace(error) {
                    eprintln!("{earlier}");
                }
            }
            Err(error) => return Err(error),
        }
    }
    if args.output.json {
        output::json(&changed)?;
        if let Some(error) = refused {
            // The answer is printed already; one JSON value is all there is.
            return Err(Error::usage(error.to_string()));
        }
        return Ok(Status::Ok);
    }
    refused.map_or(Ok(Status::Ok), Err)
}
