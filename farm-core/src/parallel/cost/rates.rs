//! How fast the machines are.

use serde::{Deserialize, Serialize};

/// What one device sustains, not what its data sheet promises.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeviceRates {
    /// FLOP/s of the linear layers.
    pub linear: f64,
    /// FLOP/s of the attention.
    pub attention: f64,
    /// Bytes of memory.
    pub memory: f64,
    /// Bytes/s from or to memory.
    pub bandwidth: f64,
    /// Bytes of a value in weights, activations and messages.
    pub value_bytes: usize,
    /// The devices of a host share one copy of the weights, and `memory` is a device's part of the host's.
    pub shared_weights: bool,
}

/// A link between two devices, or between two hosts.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LinkRates {
    /// Bytes/s each way, both ways at once.
    pub bandwidth: f64,
    /// Seconds that an exchange takes on top of its bytes.
    pub latency: f64,
}

/// Devices of one kind in one or more hosts. Ranks fill the hosts one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Site {
    pub device: DeviceRates,
    /// Between the devices of a host; every device has one of its own.
    pub inside: LinkRates,
    /// Between hosts; the devices of a host share it.
    pub between: LinkRates,
    /// At least 1.
    pub devices_per_host: usize,
}

impl Site {
    /// One host with any number of devices.
    pub fn one_host(device: DeviceRates, inside: LinkRates) -> Self {
        Self { device, inside, between: inside, devices_per_host: usize::MAX }
    }

    pub(super) fn host(&self, rank: usize) -> usize {
        rank / self.devices_per_host.max(1)
    }
}
