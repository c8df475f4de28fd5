//! The end of an attempt: one result per job, whatever else has happened.

use std::io::Read;
use std::path::Path;

use bytes::Bytes;
use farm_core::api::JobResult;
use farm_core::id::AttemptKey;
use farm_core::job::state::FailureKind;
use farm_core::store::artifact::Create;
use farm_core::store::key;
use farm_core::wire::to_scheduler::AttemptOutcome;
use sha2::{Digest, Sha256};

use super::{Failure, Workshop};

/// Largest `result.json` that is read. A report carries it, and an envelope has 256 KiB.
const MAX_RESULT_BYTES: usize = 192 * 1024;

/// The commit point: of all attempts of a job, one creates the result.
pub(super) async fn publish(
    workshop: &Workshop,
    attempt: AttemptKey,
    result: JobResult,
) -> Result<AttemptOutcome, Failure> {
    let result_json = serde_json::to_string(&result)
        .map_err(|e| Failure::new(FailureKind::Device, format!("the result does not encode: {e}")))?;
    let created =
        workshop.store.create(&key::result(attempt.job), Bytes::copy_from_slice(result_json.as_bytes())).await?;
    match created {
        Create::Created => {
            let accepted = attempt.attempt;
            Ok(AttemptOutcome::Completed { accepted, result_json, warnings: result.warnings })
        }
        Create::AlreadyExists => {
            let outcome = existing_result(workshop, attempt).await?;
            if let AttemptOutcome::Completed { accepted, .. } = &outcome
                && *accepted != attempt.attempt
                && let Err(error) = workshop.store.delete(&result.clip).await
            {
                // It takes space, no more.
                tracing::warn!(%attempt, %error, "cannot delete the clip of an attempt that was not accepted");
            }
            Ok(outcome)
        }
    }
}

/// Reports what the attempt that was first has made: perhaps this one, by a request that seemed to fail.
pub(super) async fn existing_result(workshop: &Workshop, attempt: AttemptKey) -> Result<AttemptOutcome, Failure> {
    let result_key = key::result(attempt.job);
    let bytes = workshop.store.get(&result_key, MAX_RESULT_BYTES).await?;
    let result: JobResult = serde_json::from_slice(&bytes).map_err(|e| {
        let at = workshop.store.url_of(&result_key);
        Failure::new(FailureKind::Store, format!("{at} is no result of this program: {e}; move it away"))
    })?;
    if result.job != attempt.job {
        let at = workshop.store.url_of(&result_key);
        return Err(Failure::new(FailureKind::Store, format!("{at} is about job {}; move it away", result.job)));
    }
    Ok(AttemptOutcome::Completed {
        accepted: result.attempt,
        result_json: String::from_utf8_lossy(&bytes).into_owned(),
        warnings: result.warnings,
    })
}

/// Length and sha-256 in hex.
pub(super) async fn hash_file(path: &Path) -> std::io::Result<(u64, String)> {
    let path = path.to_owned();
    let hashed = tokio::task::spawn_blocking(move || {
        let mut file = std::fs::File::open(path)?;
        let mut hash = Sha256::new();
        let mut buffer = vec![0; 1 << 16];
        let mut bytes = 0;
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok((bytes, format!("{:x}", hash.finalize()))),
                n => {
                    hash.update(&buffer[..n]);
                    bytes += n as u64;
                }
            }
        }
    });
    hashed.await.map_err(std::io::Error::other)?
}
