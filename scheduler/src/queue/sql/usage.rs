//! What ended attempts used, out of the ledger: it keeps their sums when their rows are gone.

use std::collections::{BTreeMap, HashMap};

use jiff::Timestamp;
use jiff::tz::TimeZone;

use super::super::store::{QueueError, UsageBy, Used};
use super::changes::HOUR_MS;
use super::rows::{corrupt, get_json, get_text, get_u64};
use super::{SqlQueue, query};

/// Hours of a day.
const DAY: i64 = 24;

#[derive(Default)]
struct Sum {
    attempts: u64,
    clips: u64,
    device_ms: u64,
    lost_device_ms: u64,
}

impl SqlQueue {
    pub(super) async fn read_usage(
        &self,
        by: UsageBy,
        since: Timestamp,
        until: Timestamp,
    ) -> Result<Vec<Used>, QueueError> {
        // In UTC, days are whole numbers of hours. Division rounds towards zero, and there is nothing before 1970.
        let name = match by {
            UsageBy::Tenant => "tenant".to_owned(),
            UsageBy::Day => format!("CAST(hour / {DAY} AS TEXT)"),
            UsageBy::Label(_) => "labels".to_owned(),
        };
        let text = format!(
            "SELECT {name} AS name, device, CAST(SUM(attempts) AS BIGINT) AS attempts, CAST(SUM(clips) AS BIGINT) AS clips, \
             CAST(SUM(device_ms) AS BIGINT) AS device_ms, CAST(SUM(lost_ms) AS BIGINT) AS lost_ms FROM ledger \
             WHERE hour >= $1 AND hour * {HOUR_MS} < $2 GROUP BY {name}, device"
        );
        let rows = query(text)
            .bind(since.as_millisecond().div_euclid(HOUR_MS))
            .bind(until.as_millisecond())
            .fetch_all(&self.readers)
            .await?;
        let labels = match &by {
            UsageBy::Label(label) => Some(self.label_values(label).await?),
            UsageBy::Tenant | UsageBy::Day => None,
        };
        let mut sums: BTreeMap<(String, String), Sum> = BTreeMap::new();
        for row in &rows {
            let stored = get_text(row, "name")?;
            let name = match (&by, &labels) {
                (UsageBy::Day, _) => day(&stored)?,
                (UsageBy::Label(_), Some(values)) => values.get(&stored).cloned().unwrap_or_default(),
                _ => stored,
            };
            let sum = sums.entry((name, get_text(row, "device")?)).or_default();
            sum.attempts += get_u64(row, "attempts")?;
            sum.clips += get_u64(row, "clips")?;
            sum.device_ms += get_u64(row, "device_ms")?;
            sum.lost_device_ms += get_u64(row, "lost_ms")?;
        }
        let used = |((name, device), sum): ((String, String), Sum)| {
            let Sum { attempts, clips, device_ms, lost_device_ms } = sum;
            Used { name, device, attempts, clips, device_ms, lost_device_ms }
        };
        Ok(sums.into_iter().map(used).collect())
    }

    /// What each set of labels says for one label.
    async fn label_values(&self, label: &str) -> Result<HashMap<String, String>, QueueError> {
        let mut values = HashMap::new();
        let text = "SELECT s.id, s.labels FROM label_sets s WHERE s.id IN (SELECT l.labels FROM ledger l)";
        for row in &query(text).fetch_all(&self.readers).await? {
            let mut labels: BTreeMap<String, String> = get_json(row, "labels")?;
            if let Some(value) = labels.remove(label) {
                values.insert(get_text(row, "id")?, value);
            }
        }
        Ok(values)
    }
}

/// The date of a day since 1970.
fn day(days: &str) -> Result<String, QueueError> {
    let days: i64 = days.parse().map_err(|error| corrupt("hour", error))?;
    let at = Timestamp::from_millisecond(days.saturating_mul(DAY * HOUR_MS)).map_err(|error| corrupt("hour", error))?;
    Ok(at.to_zoned(TimeZone::UTC).date().to_string())
}

#[cfg(test)]
mod tests {
    #[test]
    fn days_are_named_by_their_date() {
        assert_eq!(super::day("0").unwrap(), "1970-01-01");
        assert_eq!(super::day("20000").unwrap(), "2024-10-04");
    }
}
