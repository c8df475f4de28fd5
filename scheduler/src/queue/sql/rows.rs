//! Rows to values and back.

use std::borrow::Cow;

use farm_core::id::{AttemptNo, BootId, JobId, NodeId, SubmissionId, TenantId};
use farm_core::job::state::JobState;
use jiff::Timestamp;
use serde::Serialize;
use serde::de::DeserializeOwned;
use sqlx::Row;
use sqlx::any::AnyRow;

use super::super::store::QueueError;
use crate::core::events::Ask;

/// Digits of an id's end that the `tail` column has, backwards.
const TAIL: usize = 12;

pub(super) fn tail_of(hex: &str) -> String {
    hex.chars().rev().take(TAIL).collect()
}

pub(super) fn corrupt(what: &str, error: impl std::fmt::Display) -> QueueError {
    QueueError::Corrupt(format!("{what}: {error}"))
}

/// Free text as both databases can have it: Postgres has no character zero.
pub(super) fn text(text: &str) -> Cow<'_, str> {
    if text.contains('\0') { text.replace('\0', "\u{FFFD}").into() } else { text.into() }
}

pub(super) fn json<T: Serialize + ?Sized>(value: &T) -> Result<String, QueueError> {
    serde_json::to_string(value).map_err(|error| corrupt("a value to write", error))
}

pub(super) fn get_text(row: &AnyRow, column: &str) -> Result<String, QueueError> {
    Ok(row.try_get(column)?)
}

pub(super) fn get_optional_text(row: &AnyRow, column: &str) -> Result<Option<String>, QueueError> {
    Ok(row.try_get(column)?)
}

fn parsed<T: std::str::FromStr>(row: &AnyRow, column: &str) -> Result<T, QueueError>
where
    T::Err: std::fmt::Display,
{
    let text: &str = row.try_get(column)?;
    text.parse().map_err(|error| corrupt(column, error))
}

pub(super) fn get_job_id(row: &AnyRow, column: &str) -> Result<JobId, QueueError> {
    parsed(row, column)
}

pub(super) fn get_submission_id(row: &AnyRow, column: &str) -> Result<SubmissionId, QueueError> {
    parsed(row, column).map(SubmissionId)
}

pub(super) fn get_boot(row: &AnyRow, column: &str) -> Result<BootId, QueueError> {
    parsed(row, column).map(BootId)
}

pub(super) fn get_state(row: &AnyRow, column: &str) -> Result<JobState, QueueError> {
    parsed(row, column)
}

pub(super) fn get_tenant(row: &AnyRow, column: &str) -> Result<TenantId, QueueError> {
    parsed(row, column)
}

pub(super) fn get_json<T: DeserializeOwned>(row: &AnyRow, column: &str) -> Result<T, QueueError> {
    let text: &str = row.try_get(column)?;
    serde_json::from_str(text).map_err(|error| corrupt(column, error))
}

pub(super) fn get_optional_json<T: DeserializeOwned>(row: &AnyRow, column: &str) -> Result<Option<T>, QueueError> {
    let text: Option<&str> = row.try_get(column)?;
    text.map(|text| serde_json::from_str(text).map_err(|error| corrupt(column, error))).transpose()
}

/// A map that is mostly empty; then nothing is parsed.
pub(super) fn get_map<T: DeserializeOwned + Default>(row: &AnyRow, column: &str) -> Result<T, QueueError> {
    match row.try_get::<&str, _>(column)? {
        "{}" => Ok(T::default()),
        text => serde_json::from_str(text).map_err(|error| corrupt(column, error)),
    }
}

pub(super) fn get_i64(row: &AnyRow, column: &str) -> Result<i64, QueueError> {
    Ok(row.try_get(column)?)
}

pub(super) fn get_optional_i64(row: &AnyRow, column: &str) -> Result<Option<i64>, QueueError> {
    Ok(row.try_get(column)?)
}

fn narrowed<T: TryFrom<i64>>(column: &str, value: i64) -> Result<T, QueueError>
where
    T::Error: std::fmt::Display,
{
    T::try_from(value).map_err(|error| corrupt(column, error))
}

pub(super) fn get_u32(row: &AnyRow, column: &str) -> Result<u32, QueueError> {
    narrowed(column, get_i64(row, column)?)
}

pub(super) fn get_u64(row: &AnyRow, column: &str) -> Result<u64, QueueError> {
    narrowed(column, get_i64(row, column)?)
}

pub(super) fn get_i32(row: &AnyRow, column: &str) -> Result<i32, QueueError> {
    narrowed(column, get_i64(row, column)?)
}

pub(super) fn get_optional<T: TryFrom<i64>>(row: &AnyRow, column: &str) -> Result<Option<T>, QueueError>
where
    T::Error: std::fmt::Display,
{
    get_optional_i64(row, column)?.map(|value| narrowed(column, value)).transpose()
}

pub(super) fn get_flag(row: &AnyRow, column: &str) -> Result<bool, QueueError> {
    Ok(get_i64(row, column)? != 0)
}

/// Integers are signed; a seed is stored as the same 64 bits.
pub(super) fn get_seed(row: &AnyRow) -> Result<u64, QueueError> {
    Ok(get_i64(row, "seed")?.cast_unsigned())
}

pub(super) fn get_attempt(row: &AnyRow, column: &str) -> Result<AttemptNo, QueueError> {
    get_u32(row, column).map(AttemptNo)
}

pub(super) fn get_optional_node(row: &AnyRow, column: &str) -> Result<Option<NodeId>, QueueError> {
    Ok(get_optional_text(row, column)?.map(NodeId))
}

pub(super) fn get_time(row: &AnyRow, column: &str) -> Result<Timestamp, QueueError> {
    Timestamp::from_millisecond(get_i64(row, column)?).map_err(|error| corrupt(column, error))
}

pub(super) fn get_optional_time(row: &AnyRow, column: &str) -> Result<Option<Timestamp>, QueueError> {
    let millis = get_optional_i64(row, column)?;
    millis.map(|millis| Timestamp::from_millisecond(millis).map_err(|error| corrupt(column, error))).transpose()
}

type StoredAsk = (Option<u32>, Option<u32>, Option<u32>, Option<u32>, u32, u32);

pub(super) fn ask_json(ask: &Ask) -> Result<String, QueueError> {
    let Ask { width, height, num_frames, num_inference_steps, text: [prompt, negative] } = *ask;
    let stored: StoredAsk = (width, height, num_frames, num_inference_steps, prompt, negative);
    json(&stored)
}

pub(super) fn get_ask(row: &AnyRow) -> Result<Ask, QueueError> {
    let (width, height, num_frames, num_inference_steps, prompt, negative): StoredAsk = get_json(row, "ask")?;
    Ok(Ask { width, height, num_frames, num_inference_steps, text: [prompt, negative] })
}
