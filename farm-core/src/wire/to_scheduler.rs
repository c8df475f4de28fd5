//! Node → scheduler.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::StopNo;
use crate::id::{AttemptKey, AttemptNo, DeviceIndex};
use crate::job::state::{FailureKind, Progress};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum ToScheduler {
    /// First message of a session, repeated until `Welcome` or `Refused`.
    Register(Registration),
    /// Sent on a timer of its own, so that no device can delay it, and at once when a device is given back. Lists every
    /// attempt that the node holds and every device that helps another's. `heard` is the newest command to stop that it has
    /// had.
    Heartbeat { running: Vec<RunningAttempt>, helping: Vec<Helping>, heard: StopNo },
    /// The attempt's latent is finished and stored, and its decode has this many tiles: which devices may do it?
    /// Repeated until `Hands` answers this round. Further rounds follow where all hands were lost.
    WantHands { key: AttemptKey, round: u32, tiles: u32, url: String, token: String },
    /// The end of an attempt. Kept in the node's outbox and repeated until `Acknowledged`.
    Report { number: u64, report: AttemptReport },
    /// The node stops soon, because a person or its cloud says so: no new work. Its attempts are handed back one by one.
    /// Repeated until the node is gone.
    Leaving { reason: String },
    /// A line for the job's log. Best effort.
    Log { key: AttemptKey, line: String },
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Registration {
    pub version: String,
    pub devices: Vec<DeviceInfo>,
    /// How fast the devices are, alone and together: [`crate::parallel::cost::Site`] as JSON. Without it every clip
    /// gets one device.
    pub site_json: Option<String>,
    pub models: Vec<ModelInfo>,
    /// Where the node puts results; has to be the scheduler's own store.
    pub store: String,
    /// What the devices are for.
    pub roles: Roles,
    /// What jobs may require of the node that renders them, for example `gpu` = `h100`.
    pub labels: BTreeMap<String, String>,
    /// What the node found of its own process before this one, if that did not end in good order.
    pub crash: Option<Crash>,
    /// Attempts that survived a lost session or a scheduler restart.
    pub running: Vec<RunningAttempt>,
    pub helping: Vec<Helping>,
    /// As in a heartbeat.
    pub heard: StopNo,
}

/// A process of the node that died while it ran attempts, by the evidence that it left on the node's disk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Crash {
    /// What it ran when it died.
    pub attempts: Vec<AttemptKey>,
    /// For people, for example `signal 11 (SIGSEGV)`.
    pub cause: String,
    /// The process did it itself: a fatal signal, a panic, too little memory. Else it was killed from outside, or its
    /// machine went down, which says nothing of its attempts.
    pub own_fault: bool,
}

/// What a node's devices are for; at least one of both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Roles {
    /// Clips are started here: text and denoising.
    pub denoise: bool,
    /// Tiles of any node's clips are decoded here.
    pub decode: bool,
}

impl Roles {
    pub const ALL: Self = Self { denoise: true, decode: true };

    /// As people write and read them.
    pub fn names(self) -> Vec<&'static str> {
        let all = [(self.denoise, "denoise"), (self.decode, "decode")];
        all.into_iter().filter(|(set, _)| *set).map(|(_, name)| name).collect()
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeviceInfo {
    /// For people, for example `cpu, 1 thread`.
    pub name: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelInfo {
    pub name: String,
    /// sha-256 over the checkpoint's files.
    pub hash: String,
    /// [`crate::job::spec::GenerationDefaults`] as JSON.
    pub defaults_json: String,
    /// Sizes of the transformer: [`crate::parallel::cost::ModelShape`] as JSON.
    pub shape_json: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunningAttempt {
    pub key: AttemptKey,
    pub progress: Progress,
    /// Devices of its lease that it has not given back.
    pub devices: Vec<DeviceIndex>,
}

/// A device that decodes tiles for an attempt of any node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Helping {
    pub key: AttemptKey,
    pub device: DeviceIndex,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AttemptReport {
    pub key: AttemptKey,
    pub outcome: AttemptOutcome,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum AttemptOutcome {
    /// `result.json` exists and names `accepted`, which is another attempt's number if that one was first.
    Completed {
        accepted: AttemptNo,
        /// The manifest ([`crate::api::JobResult`]) as JSON.
        result_json: String,
        /// For example that the prompt was cut to 255 tokens.
        warnings: Vec<String>,
    },
    /// Handed back on purpose: the node leaves, or the scheduler asked for it. Its latent is stored as of `step`, 0 if
    /// there is none yet.
    Interrupted {
        step: u32,
    },
    Failed {
        kind: FailureKind,
        message: String,
    },
}
