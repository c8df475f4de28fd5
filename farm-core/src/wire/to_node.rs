//! Scheduler → node.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::StopNo;
use crate::id::{AttemptKey, DeviceIndex};
use crate::parallel::topology::Topology;
use crate::tiles::plan::Tiling;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum ToNode {
    /// Answer to `Register`: the node is known and may be given work. The envelope's epoch is the reign that holds now.
    Welcome { heartbeat_ms: u64 },
    /// Answer to a `Register` that cannot be accepted. The node shows `reason` and dials again later.
    Refused { reason: String },
    /// The scheduler has no such node on its books (it restarted): register again.
    Reregister,
    /// Render a clip on the leased devices. Repeated until a heartbeat lists the attempt; a repeat is a no-op.
    Start(Box<StartAttempt>),
    /// Stop the attempt and report nothing for it. Repeated until the node has heard it and lists the attempt no more.
    Abort { key: AttemptKey, stop: StopNo, reason: String },
    /// Hand the attempt back: store its latent at the next step border and report `Interrupted`. Past the last step, and
    /// in a decode or upload, it runs to its end. Repeated while heartbeats list the attempt; a repeat is a no-op.
    Yield { key: AttemptKey, reason: String },
    /// Answer to `WantHands`: of the attempt's own devices decode on `keep` and give the others back; `helpers` more,
    /// of other nodes or of this one, have been told to join.
    Hands { key: AttemptKey, round: u32, keep: Vec<DeviceIndex>, helpers: u32 },
    /// Decode tiles of another attempt's clip on a device that is idle. Repeated until a heartbeat lists it; a repeat is
    /// a no-op.
    Help(Box<HelpDecode>),
    /// Stop helping the attempt on this device.
    Dismiss { key: AttemptKey, device: DeviceIndex, stop: StopNo },
    /// The report with this number is committed; drop it from the outbox.
    Acknowledged { report: u64 },
    /// Answer to every `Heartbeat`. ractor_cluster never notices a dead link, so a node that has not seen this for
    /// [`SCHEDULER_SILENCE`] drops the session and dials again.
    HeartbeatSeen,
}

/// How long a node keeps a session on which no heartbeat is answered.
pub const SCHEDULER_SILENCE: Duration = Duration::from_secs(10);

/// A lease and what to do with it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StartAttempt {
    pub key: AttemptKey,
    /// The gang: devices of this node that are leased together. All or none.
    pub devices: Vec<DeviceIndex>,
    /// How the clip is spread over the gang: rank i is on `devices[i]`.
    pub topology: Topology,
    pub model: String,
    /// Content hash of the checkpoint the spec was resolved for; a node that has another refuses.
    pub model_hash: String,
    /// The [`crate::job::spec::RenderSpec`] as JSON: it carries its own check, and bincode is positional.
    pub spec_json: String,
    /// How the farm decodes clips.
    pub tiling: Tiling,
}

/// A device lent to an attempt of a clip, on any node, for its decode. The attempt's node says which tiles.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HelpDecode {
    pub key: AttemptKey,
    /// That of the `WantHands` it follows: a device may help an attempt again in a later one.
    pub round: u32,
    pub device: DeviceIndex,
    pub model: String,
    pub model_hash: String,
    /// As [`StartAttempt::spec_json`].
    pub spec_json: String,
    /// Where the attempt's node lets hands join, and what they have to show for it.
    pub url: String,
    pub token: String,
}
