//! What an operator may say in a file: prices of devices, and how long what has ended is kept.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, ensure};
use jiff::{Span, SpanRelativeTo};
use serde::Deserialize;

use crate::queue::store::Retention;

/// Objects of an attempt that may still be at it are never removed: nodes stop by themselves long before this.
const LEAST_LEFTOVERS: Duration = Duration::from_secs(10 * 60);

/// Prices and retention; the default has no prices.
#[derive(Clone, Debug, Default)]
pub struct Config {
    pub prices: Prices,
    pub keep: Keep,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    prices: Prices,
    #[serde(default)]
    keep: KeepFile,
}

/// What an hour of a device costs.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prices {
    pub currency: Option<String>,
    /// By name of the device; `*` stands for any characters.
    #[serde(default)]
    device_hour: BTreeMap<String, f64>,
}

impl Prices {
    /// By the exact name, else by the pattern with most characters that fits.
    pub fn of_hour(&self, device: &str) -> Option<f64> {
        let exact = self.device_hour.get(device);
        let fitting = || self.device_hour.iter().filter(|(pattern, _)| fits(pattern, device));
        exact.or_else(|| Some(fitting().max_by_key(|(pattern, _)| pattern.len())?.1)).copied()
    }
}

/// Whether `text` is of the form of `pattern`, in which `*` stands for any characters.
fn fits(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = text.strip_prefix(first) else { return false };
    let mut parts: Vec<&str> = parts.collect();
    let Some(last) = parts.pop() else { return rest.is_empty() };
    for part in parts {
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    rest.ends_with(last)
}

/// [`Retention`] with the farm's defaults.
#[derive(Clone, Copy, Debug)]
pub struct Keep(pub Retention);

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

impl Default for Keep {
    fn default() -> Self {
        Self(Retention { leftovers: Duration::from_secs(60 * 60), logs: 30 * DAY, jobs: 365 * DAY, audit: 365 * DAY })
    }
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct KeepFile {
    leftovers: Option<Span>,
    logs: Option<Span>,
    jobs: Option<Span>,
    audit: Option<Span>,
}

impl KeepFile {
    fn read(self) -> anyhow::Result<Keep> {
        let Keep(Retention { leftovers, logs, jobs, audit }) = Keep::default();
        let read = |name: &str, span: Option<Span>, default: Duration| {
            let Some(span) = span else { return Ok(default) };
            let span = span.to_duration(SpanRelativeTo::days_are_24_hours());
            span.and_then(Duration::try_from)
                .with_context(|| format!("keep.{name} is no span of time; write it as in \"12h\" or \"30d\""))
        };
        let keep = Retention {
            leftovers: read("leftovers", self.leftovers, leftovers)?,
            logs: read("logs", self.logs, logs)?,
            jobs: read("jobs", self.jobs, jobs)?,
            audit: read("audit", self.audit, audit)?,
        };
        ensure!(
            keep.leftovers >= LEAST_LEFTOVERS,
            "keep.leftovers is less than {} min, in which an attempt may still be at it",
            LEAST_LEFTOVERS.as_secs() / 60
        );
        ensure!(
            keep.jobs >= keep.leftovers,
            "keep.jobs is less than keep.leftovers: their objects would stay for ever"
        );
        Ok(Keep(keep))
    }
}

impl Config {
    pub fn read(file: &Path) -> anyhow::Result<Self> {
        let name = file.display();
        let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {name}"))?;
        Self::parse(&text).with_context(|| format!("{name} is not right"))
    }

    pub(crate) fn parse(text: &str) -> anyhow::Result<Self> {
        let File { prices, keep } = toml::from_str(text)?;
        for (device, price) in &prices.device_hour {
            ensure!(price.is_finite() && *price >= 0.0, "the price of {device:?} is {price}");
        }
        Ok(Self { prices, keep: keep.read()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_is_right_and_says_the_defaults() {
        let config = Config::parse(include_str!("../../config/farm.toml")).unwrap();
        assert_eq!(config.keep.0, Keep::default().0);
        assert!(config.prices.of_hour("NVIDIA H100 80GB HBM3").is_some());
    }

    #[test]
    fn the_exact_name_goes_before_patterns_and_long_ones_before_short_ones() {
        let text = r#"
            [prices]
            currency = "EUR"
            device_hour = { "*" = 1, "NVIDIA*" = 2, "NVIDIA*80GB*" = 3, "NVIDIA L4" = 4 }
        "#;
        let prices = Config::parse(text).unwrap().prices;
        for (device, price) in [("cpu 0", 1.0), ("NVIDIA L40", 2.0), ("NVIDIA A100-SXM4-80GB", 3.0), ("NVIDIA L4", 4.0)]
        {
            assert_eq!(prices.of_hour(device), Some(price), "{device}");
        }
        assert_eq!(Prices::default().of_hour("cpu 0"), None);
    }

    #[test]
    fn a_star_is_any_characters() {
        for (pattern, text, is_fit) in [
            ("", "", true),
            ("a", "ab", false),
            ("a*", "a", true),
            ("a*a", "a", false),
            ("*b*d", "abcd", true),
            ("*b*b", "ab", false),
            ("**", "x", true),
        ] {
            assert_eq!(fits(pattern, text), is_fit, "{pattern} {text}");
        }
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        for (text, hint) in [
            ("price = 1", "unknown field"),
            ("[prices]\ndevice_hour = { cpu = -1 }", "price of \"cpu\""),
            ("[keep]\nleftovers = \"1m\"", "less than 10 min"),
            ("[keep]\njobs = \"30m\"", "less than keep.leftovers"),
            ("[keep]\nlogs = \"long\"", "logs"),
            ("[keep]\nlogs = \"-3d\"", "keep.logs"),
        ] {
            let error = format!("{:#}", Config::parse(text).unwrap_err());
            assert!(error.contains(hint), "{text}: {error}");
        }
    }
}
