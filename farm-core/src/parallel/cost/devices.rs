//! Devices and links by name: `config/devices.toml`, which is part of the program, and files of the same form over it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{DeviceRates, LinkRates};

const EMBEDDED: &str = include_str!("../../../../config/devices.toml");
/// A file of rates has some kilobytes; a larger one is something else.
const MAX_FILE: u64 = 1 << 20;

/// Why rates cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum DevicesError {
    #[error("unknown device {name:?}; known are {}", known.join(", "))]
    UnknownDevice { name: String, known: Vec<String> },
    #[error("unknown link {name:?}; known are {}", known.join(", "))]
    UnknownLink { name: String, known: Vec<String> },
    #[error("devices file {}: {message}", path.display())]
    File { path: PathBuf, message: String },
    #[error("{kind} {name}: {message}")]
    Entry { kind: &'static str, name: String, message: String },
}

/// A file of devices and links, as it is written.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Devices {
    #[serde(default, rename = "default", skip_serializing_if = "Option::is_none")]
    pub defaults: Option<Defaults>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub device: BTreeMap<String, DeviceEntry>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub link: BTreeMap<String, LinkEntry>,
}

/// For devices that do not say.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Defaults {
    pub efficiency: f64,
    pub source: String,
}

/// A device: `peak` and perhaps `efficiency` from a data sheet, or `linear` and `attention` as measured. Units as in
/// [`DeviceRates`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceEntry {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub efficiency: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub linear: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attention: Option<f64>,
    pub memory: f64,
    pub bandwidth: f64,
    pub value_bytes: usize,
    #[serde(default)]
    pub shared_weights: bool,
    pub source: String,
}

/// A link. Units as in [`LinkRates`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkEntry {
    pub bandwidth: f64,
    pub latency: f64,
    pub source: String,
}

impl Devices {
    /// What the program knows by itself.
    pub fn embedded() -> Result<Self, DevicesError> {
        Self::parse(EMBEDDED, Path::new("config/devices.toml"))
    }

    /// What the program knows by itself, with the entries of a file over it.
    pub fn with_file(path: &Path) -> Result<Self, DevicesError> {
        let error = |message: String| DevicesError::File { path: path.to_owned(), message };
        let size = std::fs::metadata(path).map_err(|e| error(e.to_string()))?.len();
        if size > MAX_FILE {
            return Err(error(format!("{size} bytes are too many for a file of rates, at most {MAX_FILE}")));
        }
        let text = std::fs::read_to_string(path).map_err(|e| error(e.to_string()))?;
        let file = Self::parse(&text, path)?;
        let mut all = Self::embedded()?;
        all.defaults = file.defaults.or(all.defaults);
        all.device.extend(file.device);
        all.link.extend(file.link);
        Ok(all)
    }

    /// Every entry is checked, also those that nobody asks for. `path` is for the error.
    pub fn parse(text: &str, path: &Path) -> Result<Self, DevicesError> {
        let error = |message: String| DevicesError::File { path: path.to_owned(), message };
        let devices: Self = toml::from_str(text).map_err(|e| error(e.to_string().trim_end().to_owned()))?;
        if let Some(defaults) = &devices.defaults {
            share("default", "", "efficiency", defaults.efficiency).map_err(|e| error(e.to_string()))?;
        }
        let efficiency = devices.defaults.as_ref().map_or(1.0, |defaults| defaults.efficiency);
        for (name, entry) in &devices.device {
            entry.rates(name, efficiency).map_err(|e| error(e.to_string()))?;
        }
        for (name, entry) in &devices.link {
            entry.rates(name).map_err(|e| error(e.to_string()))?;
        }
        Ok(devices)
    }

    /// Errors with the known names if there is no such device.
    pub fn device(&self, name: &str) -> Result<DeviceRates, DevicesError> {
        let Some(entry) = self.device.get(name) else {
            let known = self.device.keys().cloned().collect();
            return Err(DevicesError::UnknownDevice { name: name.to_owned(), known });
        };
        entry.rates(name, self.defaults.as_ref().map_or(1.0, |defaults| defaults.efficiency))
    }

    /// Errors with the known names if there is no such link.
    pub fn link(&self, name: &str) -> Result<LinkRates, DevicesError> {
        let Some(entry) = self.link.get(name) else {
            let known = self.link.keys().cloned().collect();
            return Err(DevicesError::UnknownLink { name: name.to_owned(), known });
        };
        entry.rates(name)
    }
}

impl DeviceEntry {
    fn rates(&self, name: &str, default_efficiency: f64) -> Result<DeviceRates, DevicesError> {
        let positive = |key, value| positive("device", name, key, value);
        let [linear, attention] = match (self.peak, self.linear, self.attention) {
            (Some(peak), None, None) => {
                let efficiency = self.efficiency.unwrap_or(default_efficiency);
                [positive("peak", peak)? * share("device", name, "efficiency", efficiency)?; 2]
            }
            (None, Some(linear), Some(attention)) if self.efficiency.is_none() => {
                [positive("linear", linear)?, positive("attention", attention)?]
            }
            _ => {
                let message = "needs either peak (and perhaps efficiency) or both linear and attention".into();
                return Err(DevicesError::Entry { kind: "device", name: name.to_owned(), message });
            }
        };
        if !(1..=8).contains(&self.value_bytes) {
            let message = format!("value_bytes {} is not in 1..=8", self.value_bytes);
            return Err(DevicesError::Entry { kind: "device", name: name.to_owned(), message });
        }
        Ok(DeviceRates {
            linear,
            attention,
            memory: positive("memory", self.memory)?,
            bandwidth: positive("bandwidth", self.bandwidth)?,
            value_bytes: self.value_bytes,
            shared_weights: self.shared_weights,
        })
    }
}

impl LinkEntry {
    fn rates(&self, name: &str) -> Result<LinkRates, DevicesError> {
        let bandwidth = positive("link", name, "bandwidth", self.bandwidth)?;
        if !(0.0..=60.0).contains(&self.latency) {
            let message = format!("latency {} is not in 0..=60 seconds", self.latency);
            return Err(DevicesError::Entry { kind: "link", name: name.to_owned(), message });
        }
        Ok(LinkRates { bandwidth, latency: self.latency })
    }
}

fn positive(kind: &'static str, name: &str, key: &str, value: f64) -> Result<f64, DevicesError> {
    // Times stay finite however small a rate is.
    if (1.0..=1e30).contains(&value) {
        return Ok(value);
    }
    Err(DevicesError::Entry { kind, name: name.to_owned(), message: format!("{key} {value} is not in 1..=1e30") })
}

fn share(kind: &'static str, name: &str, key: &str, value: f64) -> Result<f64, DevicesError> {
    if value > 0.0 && value <= 1.0 {
        return Ok(value);
    }
    Err(DevicesError::Entry { kind, name: name.to_owned(), message: format!("{key} {value} is not a part of 1") })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Devices, DevicesError> {
        Devices::parse(text, Path::new("x.toml"))
    }

    #[test]
    fn every_entry_of_the_program_is_usable_and_has_a_source() {
        let devices = Devices::embedded().unwrap();
        for (name, entry) in &devices.device {
            assert!(devices.device(name).unwrap().linear > 0.0 && !entry.source.is_empty());
        }
        for (name, entry) in &devices.link {
            assert!(devices.link(name).unwrap().bandwidth > 0.0 && !entry.source.is_empty());
        }
        assert_eq!(devices.device("h100").unwrap().linear, 0.5 * 989e12, "no efficiency of its own: the default");
    }

    #[test]
    fn an_unknown_name_is_answered_with_the_known_ones() {
        let devices = Devices::embedded().unwrap();
        let error = devices.device("l41").unwrap_err().to_string();
        assert!(error.contains("\"l41\"") && error.contains("l40, rtx4090"), "{error}");
        let error = devices.link("wifi").unwrap_err().to_string();
        assert!(error.contains("pcie4, pcie5"), "{error}");
    }

    #[test]
    fn a_file_goes_over_what_the_program_knows() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("devices.toml");
        let text = "[device.here]\nlinear = 2e9\nattention = 1e9\nmemory = 4e9\nbandwidth = 5e9\nvalue_bytes = 4\n\
                    source = \"measured\"\n[link.pcie4]\nbandwidth = 20e9\nlatency = 0\nsource = \"measured\"\n";
        std::fs::write(&path, text).unwrap();
        let devices = Devices::with_file(&path).unwrap();
        assert_eq!(devices.device("here").unwrap().attention, 1e9);
        assert_eq!(devices.link("pcie4").unwrap(), LinkRates { bandwidth: 20e9, latency: 0.0 });
        assert!(devices.device("l40").is_ok());
        assert!(Devices::with_file(&dir.path().join("none.toml")).unwrap_err().to_string().contains("none.toml"));
    }

    #[test]
    fn what_is_written_is_read_back() {
        let devices = Devices::embedded().unwrap();
        assert_eq!(parse(&toml::to_string(&devices).unwrap()).unwrap(), devices);
    }

    #[test]
    fn a_bad_entry_is_named_with_its_key() {
        let device = |rest: &str| format!("[device.x]\nmemory = 1e9\nbandwidth = 1e9\nsource = \"\"\n{rest}\n");
        let error = |text: &str| parse(text).unwrap_err().to_string();
        let needs = "device x: needs either peak";
        assert!(error(&device("value_bytes = 2")).contains(needs));
        assert!(error(&device("value_bytes = 2\npeak = 1e12\nlinear = 1e12")).contains(needs));
        assert!(error(&device("value_bytes = 2\nlinear = 1e12")).contains(needs));
        assert!(error(&device("value_bytes = 2\npeak = 1e12\nefficiency = 1.5")).contains("efficiency 1.5"));
        assert!(error(&device("value_bytes = 2\npeak = nan")).contains("peak NaN"));
        assert!(error(&device("value_bytes = 2\npeak = 0.0")).contains("peak 0"));
        assert!(error(&device("value_bytes = 0\npeak = 1e12")).contains("value_bytes 0"));
        assert!(error(&device("value_bytes = 2\npeak = 1e12\ncolour = 1")).contains("colour"));
        assert!(error("[link.x]\nbandwidth = 1e9\nlatency = -1.0\nsource = \"\"").contains("link x: latency -1"));
        assert!(error("[link.x]\nbandwidth = 1e9\n").contains("latency"));
        assert!(error("x").contains("x.toml"));
    }
}
