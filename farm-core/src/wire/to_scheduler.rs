//! Node → scheduler.

use serde::{Deserialize, Serialize};

use crate::id::{AttemptKey, AttemptNo};
use crate::job::state::{FailureKind, Progress};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum ToScheduler {
    /// First message of a session, repeated until `Welcome` or `Refused`.
    Register(Registration),
    /// Sent on a timer of its own, so that no device can delay it. Lists every attempt the node holds.
    Heartbeat { running: Vec<RunningAttempt> },
    /// The end of an attempt. Kept in the node's outbox and repeated until `Acknowledged`.
    Report { number: u64, report: AttemptReport },
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
    /// Attempts that survived a lost session or a scheduler restart.
    pub running: Vec<RunningAttempt>,
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
    Failed {
        kind: FailureKind,
        message: String,
    },
}
