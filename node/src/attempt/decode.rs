//! The decode of an attempt's clip: asks for hands, lets those of this node and of others join, and stitches.

use std::future::pending;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use farm_core::id::DeviceIndex;
use farm_core::job::spec::RenderSpec;
use farm_core::job::state::{FailureKind, Progress, Stage};
use farm_core::model::latent::LatentCheckpoint;
use farm_core::tiles::crew::Counters;
use farm_core::tiles::shape::Shape;
use farm_core::wire::to_node::StartAttempt;
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::{Failure, Hands, HandsWanted, Lease, Workshop};
use crate::decode::local::DEPTH;
use crate::decode::max_message;
use crate::decode::stitcher::{Arrival, OpenSink, StitchError, Stitched, Surroundings, stitch};
use crate::device_thread::{Decode, Monitor};
use crate::encode::{FrameSink, Mp4Sink};
use crate::link;

/// Devices of other nodes that may join a decode.
const MAX_HELPERS: usize = 256;

pub(super) struct ClipDecode<'a> {
    pub workshop: &'a Arc<Workshop>,
    pub start: &'a StartAttempt,
    pub spec: &'a RenderSpec,
    pub shape: Arc<Shape>,
    /// Where the mp4 goes, and the folder that has to be there until it is written.
    pub clip: PathBuf,
    pub folder: Arc<TempDir>,
    pub monitor: &'a Monitor,
}

impl ClipDecode<'_> {
    /// `stored` is the latent's file.
    pub async fn run(
        &self,
        latent: Arc<LatentCheckpoint>,
        stored: Bytes,
        lease: Lease,
        mut answers: mpsc::Receiver<Hands>,
    ) -> Result<Stitched, Failure> {
        let spec = self.spec;
        let sink: OpenSink = {
            let (path, folder, [width, height]) = (self.clip.clone(), self.folder.clone(), [spec.width, spec.height]);
            Box::new(move || {
                let sink = Mp4Sink::create(&path, width, height)?;
                Ok(Box::new(Kept { sink, _folder: folder }) as Box<dyn FrameSink>)
            })
        };
        let mut open = self.workshop.data.open(stored, max_message(spec), MAX_HELPERS);
        let (arrive, arrivals) = mpsc::channel(DEPTH);
        let (expect, expected) = mpsc::channel(1);
        let (ask, mut asked) = mpsc::unbounded_channel();

        let (monitor, total) = (self.monitor, spec.num_frames);
        let progress = |done| {
            monitor.advance(Progress { stage: Stage::Decode, done, total, eta_seconds: None });
        };
        begin(spec, monitor);
        let around = Surroundings {
            want_hands: Box::new(move |round| {
                // The foreman is there as long as the stitcher.
                let _ = ask.send(round);
            }),
            expected,
            arrivals,
            progress: Box::new(progress),
            stop: monitor.orders.stop_flag(),
            log: Box::new(|line| monitor.log(line)),
        };
        let tiles = self.shape.plan.tiles.len() as u32;
        let (url, token) = (open.url.clone(), open.token.clone());
        let remote = arrive.clone();
        let welcome = async {
            while let Some(joined) = open.joined.recv().await {
                if remote.send(Arrival { name: joined.name, link: joined.link }).await.is_err() {
                    break;
                }
            }
            pending::<()>().await
        };
        let foreman = async {
            let mut lease = lease;
            let mut local = JoinSet::new();
            while let Some(round) = asked.recv().await {
                let wanted = HandsWanted { round, tiles, url: url.clone(), token: token.clone() };
                (self.workshop.want_hands)(self.start.key, wanted);
                let Hands { keep, helpers, .. } = answer(round, &mut answers, &lease, self.workshop.alone_after).await;
                // What is not kept is given back here.
                lease.retain(|device, _| keep.contains(device));
                let kept = std::mem::take(&mut lease);
                let hands = kept.len() + helpers as usize;
                // Before they arrive: they are waited for by number.
                let _ = expect.send(hands).await;
                for (device, reservation) in kept {
                    let Some(handle) = self.workshop.devices.get(device.0 as usize).cloned() else { continue };
                    let (crew, link) = link::pair(DEPTH);
                    let work = Decode {
                        model: self.start.model.clone(),
                        shape: spec.latent_shape(),
                        latent: latent.clone(),
                        link,
                        stop: monitor.orders.stop_flag(),
                    };
                    local.spawn(async move { handle.decode(work, reservation).await });
                    let name = format!("{} {device}", self.workshop.node);
                    if arrive.send(Arrival { name, link: crew }).await.is_err() {
                        break;
                    }
                }
            }
            pending::<()>().await
        };
        let stitched = tokio::select! {
            stitched = stitch(self.shape.clone(), sink, around) => stitched,
            () = welcome => return Err(Failure::new(FailureKind::Device, "the data plane ended")),
            () = foreman => return Err(Failure::new(FailureKind::Device, "the decode's foreman ended")),
        };
        let (counted, network) = (stitched.as_ref().map(|stitched| stitched.counters), self.workshop.data.counters());
        if counted.as_ref().is_ok_and(|counted| *counted != Default::default()) {
            let Counters { duplicates, refused, lost, hedges } = counted.unwrap_or_default();
            monitor.log(format!(
                "decode: {lost} hands lost, {refused} of them refused, {hedges} tiles decoded twice, {duplicates} repeats \
                 passed over"
            ));
        }
        tracing::debug!(attempt = %self.start.key, ?network, "the data plane so far");
        stitched.map_err(|error| match error {
            // Whoever stopped it does not wait for this.
            StitchError::Stopped => Failure::new(FailureKind::Device, "stopped"),
            error => Failure::new(FailureKind::Device, error),
        })
    }
}

/// From here on the attempt decodes.
pub(super) fn begin(spec: &RenderSpec, monitor: &Monitor) {
    monitor.advance(Progress { stage: Stage::Decode, done: 0, total: spec.num_frames, eta_seconds: None });
}

/// Who decodes, as the scheduler says, or as has to do without it.
async fn answer(round: u32, answers: &mut mpsc::Receiver<Hands>, lease: &Lease, alone_after: Duration) -> Hands {
    let of_round = async {
        loop {
            match answers.recv().await {
                Some(hands) if hands.round == round => return hands,
                // Late, for a round that went on without it.
                Some(_) => {}
                // The pool is gone, and with it this attempt.
                None => pending().await,
            }
        }
    };
    let alone: Vec<DeviceIndex> = lease.keys().take(1).copied().collect();
    if alone.is_empty() {
        return of_round.await;
    }
    match timeout(alone_after, of_round).await {
        Ok(hands) => hands,
        Err(_) => {
            tracing::warn!("no word from the scheduler on who decodes; a device of the lease begins");
            Hands { round, keep: alone, helpers: 0 }
        }
    }
}

/// Keeps the folder until the encoder's thread has let go of the file.
struct Kept {
    sink: Mp4Sink,
    _folder: Arc<TempDir>,
}

impl FrameSink for Kept {
    fn frames(&mut self, rgb24: &[u8]) -> std::io::Result<()> {
        self.sink.frames(rgb24)
    }

    fn finish(&mut self) -> std::io::Result<()> {
        self.sink.finish()
    }
}
