//! Bodies and queries, bounded in size and in time.

use std::time::Duration;

use axum::body::Body;
use axum::extract::Query;
use axum::http::{StatusCode, Uri};
use bytes::Bytes;
use farm_core::api::MAX_LIST;
use serde::de::DeserializeOwned;

use super::Failure;

/// A client that takes longer for a page of a megabyte is better told than waited for.
const READ_TIMEOUT: Duration = Duration::from_secs(60);
/// JSON bodies are options, never files.
const MAX_JSON: usize = 16 << 10;

pub async fn read(body: Body, limit: usize) -> Result<Bytes, Failure> {
    use http_body_util::{BodyExt, LengthLimitError, Limited};
    let collected = tokio::time::timeout(READ_TIMEOUT, Limited::new(body, limit).collect()).await.map_err(|_| {
        Failure::new(
            StatusCode::REQUEST_TIMEOUT,
            format!("the body did not arrive within {} s", READ_TIMEOUT.as_secs()),
        )
    })?;
    match collected {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => {
            Err(Failure::new(StatusCode::PAYLOAD_TOO_LARGE, format!("the body has more than {limit} bytes")))
        }
        Err(error) => Err(Failure::bad_request(format!("the body broke off: {error}"))),
    }
}

/// An empty body means all defaults.
pub async fn read_json<T: DeserializeOwned + Default>(body: Body) -> Result<T, Failure> {
    let bytes = read(body, MAX_JSON).await?;
    if bytes.is_empty() {
        return Ok(T::default());
    }
    serde_json::from_slice(&bytes).map_err(|error| Failure::bad_request(format!("the body is not right: {error}")))
}

/// Length of a page of a listing.
pub fn limit(asked: Option<u32>) -> Result<u32, Failure> {
    let limit = asked.unwrap_or(MAX_LIST);
    if (1..=MAX_LIST).contains(&limit) {
        Ok(limit)
    } else {
        Err(Failure::bad_request(format!("limit {limit} is not in 1..={MAX_LIST}")))
    }
}

pub fn query<T: DeserializeOwned>(uri: &Uri) -> Result<T, Failure> {
    Query::try_from_uri(uri)
        .map(|Query(query)| query)
        .map_err(|error| Failure::bad_request(format!("the query is not right: {}", error.body_text())))
}
