//! What was used, who did what, and what is kept of it.

use std::collections::BTreeMap;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::Uri;
use farm_core::api::{AuditPage, GcReport, GcRequest, MAX_LIST, UsageList, UsageRow};
use jiff::{SignedDuration, Timestamp};
use serde::Deserialize;

use super::{Api, Failure, body};
use crate::config::Prices;
use crate::queue::store::{UsageBy, Used};

/// What is summed if nobody says since when.
const USAGE_SPAN: SignedDuration = SignedDuration::from_hours(24 * 30);
const MAX_LABEL_BYTES: usize = 256;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UsageQuery {
    by: Option<String>,
    since: Option<Timestamp>,
    until: Option<Timestamp>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AuditQuery {
    #[serde(default)]
    after: u64,
}

pub async fn usage(State(api): State<Api>, uri: Uri) -> Result<Json<UsageList>, Failure> {
    let UsageQuery { by, since, until } = body::query(&uri)?;
    let by = by.unwrap_or_else(|| "tenant".to_owned());
    let grouped = match by.split_once(':') {
        None if by == "tenant" => UsageBy::Tenant,
        None if by == "day" => UsageBy::Day,
        Some(("label", name)) if (1..=MAX_LABEL_BYTES).contains(&name.len()) => UsageBy::Label(name.to_owned()),
        _ => return Err(Failure::bad_request(format!("by is {by:?}, not tenant, day or label:NAME"))),
    };
    let until = until.unwrap_or_else(Timestamp::now);
    let since = since.unwrap_or_else(|| until.checked_sub(USAGE_SPAN).unwrap_or(Timestamp::MIN));
    if since >= until {
        return Err(Failure::bad_request(format!("since {since} is not before until {until}")));
    }
    let rows = rows(api.queue.usage(grouped, since, until).await?, &api.prices);
    Ok(Json(UsageList { by, rows, currency: api.prices.currency.clone() }))
}

/// Sums over kinds of devices, by name.
fn rows(used: Vec<Used>, prices: &Prices) -> Vec<UsageRow> {
    let mut rows: BTreeMap<String, UsageRow> = BTreeMap::new();
    for Used { name, device, attempts, clips, device_ms, lost_device_ms } in used {
        let seconds = |ms: u64| ms as f64 / 1000.0;
        let row = rows.entry(name.clone()).or_insert(UsageRow {
            name,
            attempts: 0,
            clips: 0,
            device_seconds: 0.0,
            lost_device_seconds: 0.0,
            cost: Some(0.0),
        });
        row.attempts += attempts;
        row.clips += clips;
        row.device_seconds += seconds(device_ms);
        row.lost_device_seconds += seconds(lost_device_ms);
        let cost = prices.of_hour(&device).map(|price| price * seconds(device_ms) / 3600.0);
        // A sum without one of its parts would be a lie.
        row.cost = row.cost.zip(cost).map(|(sum, cost)| sum + cost);
    }
    rows.into_values().collect()
}

pub async fn audit(State(api): State<Api>, uri: Uri) -> Result<Json<AuditPage>, Failure> {
    let AuditQuery { after } = body::query(&uri)?;
    Ok(Json(api.queue.audit(after, MAX_LIST).await?))
}

pub async fn gc(State(api): State<Api>, body: Body) -> Result<Json<GcReport>, Failure> {
    let GcRequest { dry_run } = body::read_json(body).await?;
    Ok(Json(api.gc.step(&api.scheduler()?, dry_run).await?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn a_sum_has_a_cost_if_all_its_devices_have_a_price() {
        let used = |name: &str, device: &str, device_ms: u64| Used {
            name: name.to_owned(),
            device: device.to_owned(),
            attempts: 2,
            clips: 1,
            device_ms,
            lost_device_ms: device_ms / 2,
        };
        let config = Config::parse("[prices]\ndevice_hour = { \"gpu*\" = 3, \"cpu*\" = 1 }").unwrap();
        let all = [used("a", "gpu 0", 3_600_000), used("a", "cpu 0", 1_800_000), used("b", "tpu", 1000)];
        let rows = rows(all.to_vec(), &config.prices);
        assert_eq!((rows[0].cost, rows[1].cost), (Some(3.5), None));
        assert_eq!((rows[0].attempts, rows[0].clips, rows[0].device_seconds), (4, 2, 5400.0));
        assert_eq!(rows[0].lost_device_seconds, 2700.0);
    }
}
