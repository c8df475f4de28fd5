//! What the rows say against the farm's invariants.
//!
//! That no device is in two live attempts is not among them: an attempt gives devices back one by one while it goes on, and
//! that is no row.

use super::super::store::QueueError;
use super::changes::HOUR_MS;
use super::rows::get_text;
use super::{SqlQueue, query};

/// Violations shown of each kind.
const SHOWN: usize = 5;

/// Each gives a text for each violation. None looks at a job more than once, so that large queues can be checked too.
fn rules() -> Vec<String> {
    let job = "'job ' || j.id || ";
    let count = |outcome: &str| format!("SUM(CASE WHEN a.outcome = '{outcome}' THEN 1 ELSE 0 END)");
    // Each job with its attempts.
    let counted = format!(
        "(SELECT o.id, o.state, o.attempt, {} AS running, {} AS completed, COUNT(a.attempt) AS attempts, \
         COALESCE(MAX(a.attempt), 0) AS newest FROM jobs o LEFT JOIN attempts a ON a.job = o.seq \
         GROUP BY o.id, o.state, o.attempt) AS j",
        count("running"),
        count("completed")
    );
    vec![
        format!(
            "SELECT {job}' is ' || j.state || ' and has ' || CAST(j.completed AS TEXT) || ' completed attempts' AS violation \
             FROM {counted} WHERE j.completed <> CASE WHEN j.state = 'done' THEN 1 ELSE 0 END"
        ),
        format!(
            "SELECT {job}' is ' || j.state || ' and has ' || CAST(j.running AS TEXT) || ' running attempts' AS violation \
             FROM {counted} WHERE j.running <> CASE WHEN j.state = 'running' THEN 1 ELSE 0 END"
        ),
        format!(
            "SELECT {job}' says attempt ' || CAST(j.attempt AS TEXT) || ', its ' || CAST(j.attempts AS TEXT) || \
             ' attempts ' || CAST(j.newest AS TEXT) AS violation FROM {counted} \
             WHERE j.attempt <> j.newest OR j.attempt <> j.attempts"
        ),
        format!(
            "SELECT {job}' has attempt ' || CAST(b.attempt AS TEXT) || ' of epoch ' || CAST(b.epoch AS TEXT) || \
             ' after one of epoch ' || CAST(a.epoch AS TEXT) AS violation FROM attempts a \
             JOIN attempts b ON b.job = a.job AND b.attempt = a.attempt + 1 JOIN jobs j ON j.seq = a.job \
             WHERE b.epoch < a.epoch"
        ),
        format!(
            "SELECT {job}' has an attempt of epoch ' || CAST(a.epoch AS TEXT) || ', which has not begun' AS violation \
             FROM attempts a JOIN jobs j ON j.seq = a.job WHERE a.epoch > (SELECT r.epoch FROM reign r)"
        ),
        format!(
            "SELECT {job}' failed without a reason' AS violation FROM jobs j \
             WHERE j.state = 'failed' AND COALESCE(j.reason, '') = ''"
        ),
        format!(
            "SELECT {job}' is ' || j.state || ' before job ' || o.id || ', which it comes after, is done' AS violation \
             FROM dependencies d JOIN jobs j ON j.seq = d.job JOIN jobs o ON o.seq = d.on_job \
             WHERE j.state IN ('running', 'done') AND o.state <> 'done'"
        ),
        format!(
            "SELECT {job}' is of no batch' AS violation FROM jobs j \
             WHERE NOT EXISTS (SELECT 1 FROM submission_jobs m WHERE m.job = j.seq)"
        ),
        "SELECT 'batch ' || s.id || ' had ' || CAST(s.jobs AS TEXT) || ' jobs, of which ' || CAST(s.pruned AS TEXT) || \
         ' were removed and ' || CAST((SELECT COUNT(*) FROM submission_jobs m WHERE m.submission = s.n) AS TEXT) || ' are there' \
         AS violation FROM submissions s WHERE s.reply IS NOT NULL \
         AND s.jobs - s.pruned <> (SELECT COUNT(*) FROM submission_jobs m WHERE m.submission = s.n)"
            .to_owned(),
        ledger_rule(),
    ]
}

/// The ledger, less what removed attempts used, is the sum over the attempts that are there: for each hour, tenant, device
/// and set of labels.
fn ledger_rule() -> String {
    format!(
        "SELECT 'the ledger of hour ' || CAST(x.hour AS TEXT) || ', tenant ' || x.tenant || ', device ' || x.device || \
         ' differs from its attempts by ' || CAST(CAST(SUM(x.attempts) AS BIGINT) AS TEXT) || ' attempts, ' || \
         CAST(CAST(SUM(x.clips) AS BIGINT) AS TEXT) || ' clips and ' || CAST(CAST(SUM(x.device_ms) AS BIGINT) AS TEXT) || ' ms' \
         AS violation FROM ( \
         SELECT l.hour, l.tenant, l.device, l.labels, l.attempts - l.pruned AS attempts, \
         CASE WHEN l.pruned = 0 THEN l.clips ELSE 0 END AS clips, l.device_ms - l.pruned_ms AS device_ms FROM ledger l \
         UNION ALL SELECT a.ended / {HOUR_MS}, a.tenant, a.device, j.labels, -1, \
         CASE WHEN a.outcome = 'completed' AND NOT EXISTS (SELECT 1 FROM ledger p WHERE p.hour = a.ended / {HOUR_MS} \
         AND p.tenant = a.tenant AND p.device = a.device AND p.labels = j.labels AND p.pruned > 0) THEN -1 ELSE 0 END, \
         -a.device_ms FROM attempts a JOIN jobs j ON j.seq = a.job WHERE a.outcome <> 'running') AS x \
         GROUP BY x.hour, x.tenant, x.device, x.labels \
         HAVING SUM(x.attempts) <> 0 OR SUM(x.clips) <> 0 OR SUM(x.device_ms) <> 0"
    )
}

impl SqlQueue {
    pub(super) async fn check_rows(&self) -> Result<Vec<String>, QueueError> {
        let mut tx = self.begin_read().await?;
        let mut violations = Vec::new();
        for rule in rules() {
            let rows = query(format!("{rule} LIMIT {}", SHOWN + 1)).fetch_all(&mut *tx).await?;
            for row in rows.iter().take(SHOWN) {
                violations.push(get_text(row, "violation")?);
            }
            if rows.len() > SHOWN {
                violations.push("and more of that kind".to_owned());
            }
        }
        tx.rollback().await?;
        Ok(violations)
    }
}
