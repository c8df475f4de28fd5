//! What follows from an event. The shell commits `changes` in one transaction, and only then sends and answers.

use std::sync::Arc;

use farm_core::api::TenantSpec;
use farm_core::id::{AttemptKey, AttemptNo, BootId, DeviceIndex, JobId, NodeId, TenantId};
use farm_core::job::state::FailureKind;
use farm_core::wire::to_node::{StartAttempt, ToNode};

use super::events::{Counts, Scope};

/// In three lists rather than one, because their order is fixed: commit, then send, then load.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Effects {
    pub changes: Vec<Change>,
    pub sends: Vec<Send>,
    /// Read the requests of these jobs and come back with [`super::events::Event::Loaded`].
    pub load: Vec<JobId>,
    /// For the operator's log.
    pub notes: Vec<String>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Send {
    pub node: NodeId,
    pub boot: BootId,
    pub message: ToNode,
}

/// One change of the queue store. Each names the state it expects, and the store refuses the whole transaction if a
/// row is in another: the core's picture would be wrong, and a wrong picture must not be acted on.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// Queued → running; a new attempt row. `device` names its devices; `base` is the seconds that it would take by the
    /// devices' rates alone, before what was measured of such attempts is taken into account.
    Started {
        start: Arc<StartAttempt>,
        node: NodeId,
        boot: BootId,
        device: String,
        base: f64,
    },
    /// A running attempt's row gets its end, and the ledger what its devices and its helpers were held for.
    AttemptEnded {
        key: AttemptKey,
        outcome: Outcome,
        message: Option<String>,
        device_ms: u64,
    },
    /// Running → done. `result_json` is the manifest, checked to be this job's.
    Done {
        job: JobId,
        result_json: String,
        warnings: Vec<String>,
    },
    /// Running → queued.
    Requeued {
        job: JobId,
        counts: Counts,
    },
    /// New evidence against a queued or running job.
    Counted {
        job: JobId,
        counts: Counts,
    },
    /// Queued or running → failed.
    Failed {
        job: JobId,
        reason: String,
    },
    /// Queued or running → cancelled.
    Cancelled {
        job: JobId,
    },
    /// Failed or cancelled → queued, by a user.
    Retried {
        job: JobId,
    },
    Paused {
        scope: Scope,
        paused: bool,
    },
    Drained {
        node: NodeId,
        drained: bool,
    },
    /// A tenant's row, new or changed.
    Tenant {
        tenant: TenantId,
        spec: TenantSpec,
    },
    /// A line of the audit trail.
    Audit {
        by: String,
        action: &'static str,
        subject: String,
        detail: String,
    },
    /// A line for the job's log.
    Log {
        job: JobId,
        attempt: Option<AttemptNo>,
        line: String,
    },
}

/// How an attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Completed,
    Aborted,
    Interrupted,
    Failed(FailureKind),
}

impl Outcome {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::Aborted => "aborted",
            Self::Interrupted => "interrupted",
            Self::Failed(kind) => kind.as_str(),
        }
    }
}

impl Effects {
    pub(super) fn send(&mut self, node: &NodeId, boot: BootId, message: ToNode) {
        self.sends.push(Send { node: node.clone(), boot, message });
    }

    pub(super) fn log(&mut self, job: JobId, attempt: Option<AttemptNo>, line: impl Into<String>) {
        self.changes.push(Change::Log { job, attempt, line: line.into() });
    }

    pub(super) fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }
}

/// The devices of a lease, for people.
pub(super) fn devices_text(devices: &[DeviceIndex]) -> String {
    devices.iter().map(ToString::to_string).collect::<Vec<_>>().join("+")
}
