//! What the session is told, what it has done, and what the node offers.

use std::collections::BTreeMap;
use std::time::Duration;

use farm_core::id::{AttemptKey, BootId, DeviceIndex};
use farm_core::wire::Envelope;
use farm_core::wire::to_node::{HelpDecode, StartAttempt, ToNode};
use farm_core::wire::to_scheduler::{AttemptOutcome, AttemptReport, Crash, DeviceInfo, ModelInfo, Roles, ToScheduler};

use super::dialer::Missed;
use crate::progress::ProgressCell;

#[derive(Debug)]
pub enum Event {
    Dialed(Result<(), Missed>),
    /// A session with this peer can carry frames.
    Ready(BootId),
    Closed(BootId),
    Received(Envelope<ToNode>),
    /// The peer sent what cannot be read.
    Undecodable(String),
    Ended {
        key: AttemptKey,
        outcome: AttemptOutcome,
    },
    /// An attempt's latent is finished: which devices may decode its tiles, that others reach at `url` with `token`?
    /// Takes the place of earlier rounds.
    WantHands {
        key: AttemptKey,
        round: u32,
        tiles: u32,
        url: String,
        token: String,
    },
    /// A running attempt has given back all its devices but these.
    Released {
        key: AttemptKey,
        keep: Vec<DeviceIndex>,
    },
    /// The device has stopped helping the attempt and is idle.
    HelpEnded {
        key: AttemptKey,
        device: DeviceIndex,
    },
    Log {
        key: AttemptKey,
        line: String,
    },
    /// A report is on disk, or the disk cannot take it.
    Kept {
        number: u64,
    },
    Tick,
    /// Hand everything back and exit, within the time.
    Leave {
        reason: String,
        patience: Duration,
    },
}

#[derive(Debug)]
pub enum Action {
    /// The scheduler with this number.
    Dial(usize),
    Disconnect(BootId),
    Send(ToScheduler),
    Start {
        start: Box<StartAttempt>,
        progress: ProgressCell,
    },
    /// Stop the attempt; its end is of no interest any more.
    Abort(AttemptKey),
    /// End the attempt at its next step border with its latent in the store; past the last one let it be.
    Yield(AttemptKey),
    /// The crash that the node's evidence tells of is known to the scheduler.
    CrashKnown,
    /// Write the report to disk, then say [`Event::Kept`].
    Keep {
        number: u64,
        report: AttemptReport,
    },
    /// Nobody needs this report any more.
    Forget {
        number: u64,
    },
    /// The answer to the attempt's wish, once a round: it keeps these devices, and so many others will join.
    Hands {
        key: AttemptKey,
        round: u32,
        keep: Vec<DeviceIndex>,
        helpers: u32,
    },
    Help(Box<HelpDecode>),
    /// Stop helping. The device counts as helping until [`Event::HelpEnded`].
    Dismiss {
        key: AttemptKey,
        device: DeviceIndex,
    },
    /// The node has left the farm: end the process.
    Exit,
}

/// What the node offers; sent with every registration.
#[derive(Clone, Debug)]
pub struct Offer {
    pub devices: Vec<DeviceInfo>,
    /// How fast they are, as the registration says it.
    pub site_json: Option<String>,
    pub models: Vec<ModelInfo>,
    pub store: String,
    pub roles: Roles,
    pub labels: BTreeMap<String, String>,
    /// Of the process before this one.
    pub crash: Option<Crash>,
}
