//! Uploads.

use farm_core::api::OpenSubmission;
use farm_core::id::SubmissionId;
use jiff::Timestamp;
use sqlx::Row;

use super::super::store::{MAX_OPEN_SUBMISSIONS, QueueError, STALE_SUBMISSION_MS, Submission};
use super::changes::conflict_or;
use super::rows::{
    get_i64, get_json, get_optional, get_optional_json, get_optional_text, get_tenant, get_u32, get_u64, json, text,
};
use super::{SqlQueue, query};

impl SqlQueue {
    pub(super) async fn write_submission(
        &self,
        submission: SubmissionId,
        open: OpenSubmission,
        at: Timestamp,
    ) -> Result<(), QueueError> {
        let mut tx = self.begin().await?;
        let at = at.as_millisecond();
        let stale = at - STALE_SUBMISSION_MS;
        query(
            "DELETE FROM submission_pages WHERE submission IN \
             (SELECT n FROM submissions WHERE reply IS NULL AND opened < $1)",
        )
        .bind(stale)
        .execute(&mut *tx)
        .await?;
        query("DELETE FROM submissions WHERE reply IS NULL AND opened < $1").bind(stale).execute(&mut *tx).await?;
        let count = query("SELECT COUNT(*) AS open FROM submissions WHERE reply IS NULL").fetch_one(&mut *tx).await?;
        let count = get_i64(&count, "open")?;
        if count >= MAX_OPEN_SUBMISSIONS {
            return Err(QueueError::TooManySubmissions(count));
        }
        let OpenSubmission { model, priority, tenant, after, max_failures } = open;
        query(
            "INSERT INTO submissions (id, tenant, model, priority, after, max_failures, opened) \
             VALUES ($1, $2, $3, $4, $5, $6, $7)",
        )
        .bind(submission.to_string())
        .bind(tenant.to_string())
        .bind(model.map(|model| text(&model).into_owned()))
        .bind(priority.map(i64::from))
        .bind(json(&after)?)
        .bind(max_failures.map(i64::from))
        .bind(at)
        .execute(&mut *tx)
        .await
        .map_err(conflict_or)?;
        Ok(tx.commit().await?)
    }

    pub(super) async fn read_submission(&self, submission: SubmissionId) -> Result<Option<Submission>, QueueError> {
        let text = "SELECT tenant, model, priority, after, max_failures, reply FROM submissions WHERE id = $1";
        let row = query(text).bind(submission.to_string()).fetch_optional(&self.readers).await?;
        let Some(row) = row else { return Ok(None) };
        Ok(Some(Submission {
            model: get_optional_text(&row, "model")?,
            priority: get_optional(&row, "priority")?,
            tenant: get_tenant(&row, "tenant")?,
            after: get_json(&row, "after")?,
            max_failures: get_optional(&row, "max_failures")?,
            reply: get_optional_json(&row, "reply")?,
        }))
    }

    pub(super) async fn write_page(
        &self,
        submission: SubmissionId,
        page: u32,
        bytes: Vec<u8>,
    ) -> Result<bool, QueueError> {
        // The lock keeps a commit from coming between.
        let mut tx = self.begin().await?;
        let open = format!("SELECT n FROM submissions WHERE id = $1 AND reply IS NULL{}", self.dialect.for_update());
        let Some(row) = query(open).bind(submission.to_string()).fetch_optional(&mut *tx).await? else {
            return Ok(false);
        };
        query(
            "INSERT INTO submission_pages (submission, page, bytes) VALUES ($1, $2, $3) \
             ON CONFLICT (submission, page) DO UPDATE SET bytes = excluded.bytes",
        )
        .bind(get_i64(&row, "n")?)
        .bind(i64::from(page))
        .bind(bytes)
        .execute(&mut *tx)
        .await?;
        tx.commit().await?;
        Ok(true)
    }

    pub(super) async fn read_pages(&self, submission: SubmissionId) -> Result<Vec<(u32, u64)>, QueueError> {
        let text = "SELECT p.page, CAST(length(p.bytes) AS BIGINT) AS length FROM submission_pages p \
                    JOIN submissions s ON s.n = p.submission WHERE s.id = $1 ORDER BY p.page";
        let rows = query(text).bind(submission.to_string()).fetch_all(&self.readers).await?;
        rows.iter().map(|row| Ok((get_u32(row, "page")?, get_u64(row, "length")?))).collect()
    }

    pub(super) async fn read_page(&self, submission: SubmissionId, page: u32) -> Result<Option<Vec<u8>>, QueueError> {
        let text = "SELECT p.bytes FROM submission_pages p JOIN submissions s ON s.n = p.submission \
                    WHERE s.id = $1 AND p.page = $2";
        let row = query(text).bind(submission.to_string()).bind(i64::from(page)).fetch_optional(&self.readers).await?;
        Ok(row.map(|row| row.try_get("bytes")).transpose()?)
    }
}
