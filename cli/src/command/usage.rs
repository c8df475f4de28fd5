//! `farmctl usage`

use farm_core::api::{UsageList, UsageRow};

use crate::args::Usage;
use crate::client::Client;
use crate::error::{Error, Status};
use crate::output::{self, clean};

pub async fn run(client: &Client, args: Usage) -> Result<Status, Error> {
    let list = client.usage(&args.by.0, args.since, args.until).await?;
    if args.output.json {
        output::json(&list)?;
    } else if args.csv {
        for line in csv(&list) {
            output::line(&line)?;
        }
    } else {
        output::line(&table(&list))?;
    }
    Ok(Status::Ok)
}

fn table(list: &UsageList) -> String {
    let what = list.by.strip_prefix("label:").unwrap_or(&list.by);
    let cost = list.currency.as_ref().map_or("cost".to_owned(), |currency| format!("cost in {currency}"));
    let header =
        [clean(what).into_owned(), "attempts".into(), "clips".into(), "device-seconds".into(), "lost".into(), cost];
    let header = header.each_ref().map(String::as_str);
    output::table(header, list.rows.iter().map(|row| cells(row, |seconds| format!("{seconds:.0}"))))
}

fn cells(row: &UsageRow, seconds: impl Fn(f64) -> String) -> [String; 6] {
    [
        row.name.clone(),
        row.attempts.to_string(),
        row.clips.to_string(),
        seconds(row.device_seconds),
        seconds(row.lost_device_seconds),
        row.cost.map(|cost| format!("{cost:.2}")).unwrap_or_default(),
    ]
}

/// As in RFC 4180: a header, then a line for each row.
fn csv(list: &UsageList) -> Vec<String> {
    let header = ["name", "attempts", "clips", "device_seconds", "lost_device_seconds", "cost", "currency"];
    let mut lines = vec![header.join(",")];
    for row in &list.rows {
        let cells = cells(row, |seconds| format!("{seconds:.3}"));
        let currency = row.cost.and(list.currency.clone()).unwrap_or_default();
        lines.push(cells.iter().chain([&currency]).map(|cell| quoted(cell)).collect::<Vec<_>>().join(","));
    }
    lines
}

/// Labels are anybody's text: control characters would break the terminal, and a formula would be run by a table
/// program that opens the file.
fn quoted(cell: &str) -> String {
    let cell = clean(cell);
    let formula = cell.starts_with(['=', '+', '-', '@']) && cell.parse::<f64>().is_err();
    let cell = if formula { format!("'{cell}") } else { cell.into_owned() };
    match cell.contains([',', '"', ' ']) {
        true => format!("\"{}\"", cell.replace('"', "\"\"")),
        false => cell,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn csv_keeps_its_columns_whatever_the_labels_are() {
        let row = |name: &str, cost| UsageRow {
            name: name.into(),
            attempts: 2,
            clips: 1,
            device_seconds: 12.5,
            lost_device_seconds: 0.0,
            cost,
        };
        let rows = vec![row("a,\"b\"\n", Some(1.239)), row("", None), row("=1+1", None), row("-7", None)];
        let list = UsageList { by: "label:shot".into(), rows, currency: Some("EUR".into()) };
        assert_eq!(
            csv(&list),
            [
                "name,attempts,clips,device_seconds,lost_device_seconds,cost,currency",
                "\"a,\"\"b\"\"\u{fffd}\",2,1,12.500,0.000,1.24,EUR",
                ",2,1,12.500,0.000,,",
                "'=1+1,2,1,12.500,0.000,,",
                "-7,2,1,12.500,0.000,,",
            ]
        );
        let table = table(&list);
        assert!(table.starts_with("SHOT") || table.contains("COST IN EUR"), "{table}");
    }
}
