//! `farmctl watch`

use crate::args::Watch;
use crate::board::Board;
use crate::client::Client;
use crate::error::{Error, Status};
use crate::follow;

pub async fn run(client: &Client, args: Watch) -> Result<Status, Error> {
    let json = args.output.json;
    let job = match &args.id {
        Some(id) => Some(client.job(id).await?.view.job),
        None => None,
    };
    let mut board = Board::new(json);
    let outcome = match job {
        Some(job) => follow::job(client, job, &mut board).await?,
        None => follow::farm(client, &mut board).await?,
    };
    drop(board);
    Ok(outcome.report(json))
}
