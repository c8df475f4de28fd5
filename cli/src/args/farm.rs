//! Options of the commands on the farm: its processes, nodes, tenants and books.

use std::num::NonZeroU32;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args as ClapArgs, ValueEnum};
use farm_core::api::SHARES;
use farm_core::id::TenantId;
use farm_core::tiles::plan::Tiling;
use jiff::Timestamp;
use jiff::civil::Date;
use jiff::tz::TimeZone;

use super::{DEFAULT_ADDRESS, Output};

#[derive(Debug, ClapArgs)]
pub struct Up {
    /// Number of node processes.
    #[arg(long, value_name = "N", default_value = "1")]
    pub nodes: NonZeroU32,
    /// Devices of each node.
    #[arg(long, value_name = "cpu:K", default_value = "cpu:1")]
    pub devices: String,
    /// Steps between two checkpoints of a latent; 0 for none. Left out: the nodes' own default.
    #[arg(long, value_name = "K")]
    pub checkpoint_steps: Option<u32>,
    /// How clips are decoded: auto, whole, exact, or tiles of HxW latent pixels. Left out: the scheduler's own default.
    #[arg(long, value_name = "TILING")]
    pub tiles: Option<Tiling>,
    /// Model folder; its name is the model's name. Left out: assets/mochi-tiny, if it is there.
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Where clips go: file:///DIR or s3://BUCKET/PREFIX. Left out: the folder `store` in the data folder.
    #[arg(long, value_name = "URL")]
    pub store: Option<String>,
    /// Folder for the queue.
    #[arg(long, value_name = "DIR", default_value = "farm-data")]
    pub data: PathBuf,
    /// Address of the scheduler; port 0 takes a free one.
    #[arg(long, value_name = "ADDR", default_value = DEFAULT_ADDRESS)]
    pub listen: String,
}

#[derive(Debug, ClapArgs)]
pub struct Drain {
    /// The node's name, as in `farmctl nodes`.
    pub node: String,
    /// Stay until nothing runs on the node any more.
    #[arg(long)]
    pub wait: bool,
    #[command(flatten)]
    pub output: Output,
}

#[derive(Debug, ClapArgs)]
pub struct Undrain {
    /// The node's name, as in `farmctl nodes`.
    pub node: String,
    #[command(flatten)]
    pub output: Output,
}

#[derive(Debug, ClapArgs)]
pub struct Quota {
    /// The tenant; one that does not exist is made.
    pub tenant: TenantId,
    /// Its part of the farm when others want it too, against their parts; 1 for a new tenant.
    #[arg(long, value_name = "S", value_parser = share)]
    pub share: Option<f64>,
    /// Devices at one time.
    #[arg(long, value_name = "N")]
    pub devices: Option<u32>,
    /// Jobs that wait or run.
    #[arg(long, value_name = "N")]
    pub queued: Option<u64>,
    /// Device-seconds in any 24 hours.
    #[arg(long, value_name = "N")]
    pub device_seconds: Option<u64>,
    /// Limits to lift.
    #[arg(long, value_name = "LIMIT", value_delimiter = ',')]
    pub clear: Vec<Limit>,
    #[command(flatten)]
    pub output: Output,
}

/// One of the limits of a quota.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Limit {
    Devices,
    Queued,
    DeviceSeconds,
}

#[derive(Debug, ClapArgs)]
pub struct Usage {
    /// What a row stands for: tenant, day, or label:NAME.
    #[arg(long, value_name = "WHAT", default_value = "tenant")]
    pub by: By,
    /// Only attempts that ended at this time or later: a date in UTC, or a time as 2026-11-27T08:00:00Z. Left out: 30
    /// days before the end.
    #[arg(long, value_name = "TIME", value_parser = moment)]
    pub since: Option<Timestamp>,
    /// Only attempts that ended before this time. Left out: now.
    #[arg(long, value_name = "TIME", value_parser = moment)]
    pub until: Option<Timestamp>,
    /// Print comma-separated values.
    #[arg(long, conflicts_with = "json")]
    pub csv: bool,
    #[command(flatten)]
    pub output: Output,
}

/// What a row of usage stands for, as the API has it.
#[derive(Clone, Debug, PartialEq)]
pub struct By(pub String);

#[derive(Debug, ClapArgs)]
pub struct Audit {
    /// Only entries after the one of this number.
    #[arg(long, value_name = "N", default_value = "0", hide_default_value = true)]
    pub after: u64,
    /// Stay, and print entries as they come.
    #[arg(long)]
    pub follow: bool,
    #[command(flatten)]
    pub output: Output,
}

#[derive(Debug, ClapArgs)]
pub struct Gc {
    /// Only say what would be removed.
    #[arg(long)]
    pub dry_run: bool,
    #[command(flatten)]
    pub output: Output,
}

impl FromStr for By {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let label = text.strip_prefix("label:").is_some_and(|name| !name.is_empty());
        match label || ["tenant", "day"].contains(&text) {
            true => Ok(Self(text.to_owned())),
            false => Err("it is none of tenant, day and label:NAME".to_owned()),
        }
    }
}

fn share(text: &str) -> Result<f64, String> {
    let (least, most) = SHARES;
    match text.parse::<f64>() {
        Ok(share) if (least..=most).contains(&share) => Ok(share),
        _ => Err(format!("a share is a number in {least}..={most}")),
    }
}

/// A day begins at midnight in UTC, as the days of usage do.
fn moment(text: &str) -> Result<Timestamp, String> {
    if let Ok(moment) = text.parse::<Timestamp>() {
        return Ok(moment);
    }
    let day = text.parse::<Date>().ok().filter(|_| text.len() == 10);
    day.and_then(|day| day.to_zoned(TimeZone::UTC).ok())
        .map(|start| start.timestamp())
        .ok_or_else(|| "write a date as 2026-11-27, or a time as 2026-11-27T08:00:00Z".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_dates_or_moments() {
        assert_eq!(moment("2026-11-27").unwrap().to_string(), "2026-11-27T00:00:00Z");
        assert_eq!(moment("2026-11-27T10:00:00+02:00").unwrap().to_string(), "2026-11-27T08:00:00Z");
        for bad in ["", "yesterday", "2026-13-01", "2026-11-27T10:00:00"] {
            assert!(moment(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn shares_are_positive_and_bounded() {
        assert_eq!(share("2.5").unwrap(), 2.5);
        for bad in ["0", "-1", "nan", "inf", "1e9", "many"] {
            assert!(share(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn usage_is_by_one_of_three() {
        assert_eq!("label:shot".parse(), Ok(By("label:shot".into())));
        for bad in ["label:", "node", ""] {
            assert!(bad.parse::<By>().is_err(), "{bad}");
        }
    }
}
