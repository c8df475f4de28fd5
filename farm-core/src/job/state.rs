//! The states of a job and of its attempts, and the moves between them.

use serde::{Deserialize, Serialize};

/// Where a job stands. `Queued → Running → Done | Failed | Cancelled`; a lost attempt takes it back to `Queued`, and
/// so does a retry of a failed or cancelled job. `Done` is final.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    Queued,
    Running,
    Done,
    Failed,
    Cancelled,
}

impl JobState {
    pub const ALL: [JobState; 5] = [Self::Queued, Self::Running, Self::Done, Self::Failed, Self::Cancelled];

    /// Nothing more happens to the job unless a user asks for a retry.
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Done | Self::Failed | Self::Cancelled)
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    pub fn can_become(self, next: JobState) -> bool {
        use JobState::*;
        matches!(
            (self, next),
            (Queued, Running)
                | (Queued, Cancelled)
                | (Queued, Failed) // its left-out values do not fit the checkpoint's defaults
                | (Running, Queued)
                | (Running, Done)
                | (Running, Failed)
                | (Running, Cancelled)
                | (Failed, Queued)
                | (Cancelled, Queued)
        )
    }
}

impl std::str::FromStr for JobState {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|state| state.as_str() == s).ok_or_else(|| format!("unknown job state {s:?}"))
    }
}

/// What an attempt is doing on its node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Waiting for its device thread or loading weights.
    Starting,
    /// Encoding the prompt with T5.
    Text,
    /// Euler steps of the DiT.
    Denoise,
    /// VAE decode, streamed to the encoder.
    Decode,
    /// Uploading the clip and creating the result.
    Upload,
}

impl Stage {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Text => "text",
            Self::Denoise => "denoise",
            Self::Decode => "decode",
            Self::Upload => "upload",
        }
    }
}

/// How far an attempt is. `done` and `total` count the stage's own units: steps when denoising, frames when decoding.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    pub stage: Stage,
    pub done: u32,
    pub total: u32,
    /// Predicted seconds until the clip is uploaded, once enough steps were timed.
    pub eta_seconds: Option<f32>,
}

/// Why an attempt ended without a clip. Decides what happens to the job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// The same input fails everywhere: a bad request for this checkpoint. The job fails at once.
    Input,
    /// The device or the program failed; another try may work.
    Device,
    /// Object storage refused or was unreachable; another try may work.
    Store,
    /// The device had too little memory for the clip. Another try gets more devices, or decodes in smaller tiles.
    OutOfMemory,
    /// The node went away or restarted. Counted apart from the failures that are the job's own.
    NodeLost,
}

impl FailureKind {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Input => "input",
            Self::Device => "device",
            Self::Store => "store",
            Self::OutOfMemory => "out_of_memory",
            Self::NodeLost => "node_lost",
        }
    }
}
