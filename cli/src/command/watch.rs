//! `farmctl watch`

use crate::args::Watch;
use crate::board::Board;
use crate::client::{Client, Named};
use crate::error::{Error, Status};
use crate::follow;

pub async fn run(client: &Client, args: Watch) -> Result<Status, Error> {
    let json = args.output.json;
    let named = match &args.id {
        Some(id) => Some(client.find(id).await?),
        None => None,
    };
    let mut board = Board::new(json);
    let outcome = match named {
        Some(Named::Job(detail)) => follow::job(client, detail.view.job, &mut board).await?,
        Some(Named::Batch(batch)) => follow::submission(client, batch.submission, &mut board, None).await?,
        None => follow::farm(client, &mut board).await?,
    };
    drop(board);
    Ok(outcome.report(json))
}
