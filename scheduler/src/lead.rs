//! One scheduler leads, the others stand by: campaigns, reigns, and what ends them.
//!
//! A leader says each second that it is there. One that cannot for [`LEADER_TTL`], by its own clock, stops speaking, for
//! by then somebody else may lead. Whatever ends a reign, all that the core knew is dropped and loaded again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use farm_core::tiles::plan::Tiling;
use farm_core::wire::cluster::ClusterEvent;
use jiff::Timestamp;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::actor::{End, Reign, Scheduler};
use crate::core::events::{Time, USAGE_HOURS};
use crate::core::farm::{Farm, Limits};
use crate::link::NodeLink;
use crate::queue::store::{LEADER_TTL, QueueError, QueueStore};

/// How often one that stands by tries to lead.
const CAMPAIGN: Duration = Duration::from_millis(250);
/// How often it looks who leads.
const LOOK: Duration = Duration::from_secs(1);
/// How often a leader says that it is there.
const BEAT: Duration = Duration::from_secs(1);
/// Until a failed beat is tried again.
const BEAT_AGAIN: Duration = Duration::from_millis(200);
/// For a call of the store that people or other schedulers wait for.
const STORE_TIMEOUT: Duration = Duration::from_secs(5);
/// For reading a long queue.
const LOAD_TIMEOUT: Duration = Duration::from_secs(120);

/// What this process is at the moment.
#[derive(Clone)]
pub enum Standing {
    Leads(Scheduler),
    /// With the address of the leader, if there is one.
    StandsBy(Option<String>),
}

/// What a reign begins with.
pub struct Candidate {
    pub store: Arc<dyn QueueStore>,
    /// Other processes may lead this queue, so that the end of a reign is not the end of the process.
    pub is_shared: bool,
    pub link: Arc<dyn NodeLink>,
    /// Where this process is reached.
    pub address: String,
    pub limits: Limits,
    /// URL for results.
    pub results: String,
    pub tiling: Tiling,
}

impl Candidate {
    /// Campaigns and leads, again and again, until `stop`. An error if a queue that only this process can lead fails.
    pub async fn run(self, standing: watch::Sender<Standing>, stop: CancellationToken) -> anyhow::Result<()> {
        while let Some(reign) = self.campaign(&standing, &stop).await? {
            let epoch = reign.epoch();
            let end = self.reign(Arc::new(reign), &standing, &stop).await;
            standing.send_replace(Standing::StandsBy(None));
            // They dial again, and find who leads.
            self.link.disconnect_all();
            match end {
                End::Stopped => {
                    if let Err(error) = within(STORE_TIMEOUT, self.store.resign(epoch)).await {
                        tracing::warn!(%error, "cannot resign; others take over when the database notices");
                    }
                    return Ok(());
                }
                End::Superseded => tracing::warn!(%epoch, "deposed; standing by"),
                End::Failed(error) if self.is_shared => tracing::error!(%epoch, %error, "reign ended; standing by"),
                End::Failed(error) => {
                    return Err(error).context("the queue failed; start again, it is as it was last committed");
                }
            }
        }
        Ok(())
    }

    /// Stands by until it leads. `None` if it is told to stop.
    async fn campaign(
        &self,
        standing: &watch::Sender<Standing>,
        stop: &CancellationToken,
    ) -> anyhow::Result<Option<Reign>> {
        let mut looked: Option<Instant> = None;
        let mut trouble = String::new();
        loop {
            let begun = Instant::now();
            let attempt = within(LEADER_TTL + STORE_TIMEOUT, self.store.campaign(&self.address));
            let outcome = tokio::select! {
                () = stop.cancelled() => return Ok(None),
                outcome = attempt => outcome,
            };
            match outcome {
                Ok(Some(epoch)) if self.is_shared => return Ok(Some(Reign::contested(epoch, begun))),
                Ok(Some(epoch)) => return Ok(Some(Reign::alone(epoch))),
                Ok(None) => trouble.clear(),
                Err(error) if !self.is_shared => return Err(error).context("cannot begin with this queue"),
                Err(error) => {
                    // Said once, not four times a second.
                    let error = error.to_string();
                    if error != trouble {
                        tracing::warn!(error, "cannot reach the queue");
                        trouble = error;
                    }
                }
            }
            if looked.is_none_or(|at| at.elapsed() >= LOOK) {
                let leader = within(STORE_TIMEOUT, self.store.leader()).await.ok().flatten();
                let leader = leader.filter(|leader| leader.silent < LEADER_TTL && leader.address != self.address);
                standing.send_replace(Standing::StandsBy(leader.map(|leader| leader.address)));
                looked = Some(Instant::now());
            }
            tokio::select! {
                () = stop.cancelled() => return Ok(None),
                () = tokio::time::sleep(CAMPAIGN) => {}
            }
        }
    }

    async fn reign(&self, reign: Arc<Reign>, standing: &watch::Sender<Standing>, stop: &CancellationToken) -> End {
        if !self.is_shared {
            return self.lead(&reign, standing, stop).await;
        }
        // From here on, for a long queue takes longer to read than a leader may be silent.
        let beats = beat(&*self.store, &reign);
        tokio::select! {
            ended = self.lead(&reign, standing, stop) => ended,
            () = beats => End::Superseded,
        }
    }

    async fn lead(&self, reign: &Arc<Reign>, standing: &watch::Sender<Standing>, stop: &CancellationToken) -> End {
        let (scheduler, mut actor) = match self.load(reign).await {
            Ok(started) => started,
            Err(error) => return End::from(error),
        };
        // Ended with this future, whoever drops it.
        let _stops = StopOnDrop(scheduler.clone());
        standing.send_replace(Standing::Leads(scheduler.clone()));
        let ended = tokio::select! {
            ended = &mut actor => ended,
            () = stop.cancelled() => {
                scheduler.stop();
                actor.await
            }
        };
        ended.unwrap_or_else(|_| End::Failed(QueueError::Corrupt("the scheduler's actor has panicked".to_owned())))
    }

    async fn load(&self, reign: &Arc<Reign>) -> Result<(Scheduler, oneshot::Receiver<End>), QueueError> {
        let wall = Timestamp::now();
        let since = wall.as_second().div_euclid(3600) - USAGE_HOURS;
        let saved = within(LOAD_TIMEOUT, self.store.load(since)).await?;
        tracing::info!(epoch = %reign.epoch(), live_jobs = saved.jobs.len(), "this scheduler leads");
        let started = Instant::now();
        let (limits, results) = (self.limits.clone(), self.results.clone());
        let wall = Timestamp::now().as_millisecond();
        let farm = Farm::restore(limits, reign.epoch(), results, self.tiling, saved, wall, Time::default());
        Scheduler::start(farm, started, reign.clone(), self.store.clone(), self.link.clone())
            .await
            .map_err(|error| QueueError::Corrupt(format!("the scheduler's actor does not start: {error}")))
    }
}

struct StopOnDrop(Scheduler);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// Tells the store each second that the leader is there. Ends with the reign.
async fn beat(store: &dyn QueueStore, reign: &Reign) {
    loop {
        let lasts = reign.lasts();
        if lasts.is_zero() {
            return;
        }
        let begun = Instant::now();
        let wait = match within(lasts, store.beat(reign.epoch())).await {
            Ok(()) => {
                reign.beaten(begun);
                BEAT
            }
            Err(QueueError::Superseded(_) | QueueError::LeadLost(_)) => {
                reign.over();
                return;
            }
            Err(error) => {
                tracing::warn!(%error, "cannot tell the queue that this scheduler leads");
                BEAT_AGAIN.min(reign.lasts())
            }
        };
        tokio::time::sleep(wait).await;
    }
}

/// Brings what the nodes say to the actor. Nodes that come to one that does not lead are sent away.
pub async fn pump(
    mut events: mpsc::Receiver<ClusterEvent>,
    standing: watch::Receiver<Standing>,
    link: Arc<dyn NodeLink>,
) {
    while let Some(event) = events.recv().await {
        let now = standing.borrow().clone();
        let Standing::Leads(scheduler) = now else {
            if let ClusterEvent::Ready { peer } = event {
                link.disconnect(peer);
            }
            continue;
        };
        let taken = match event {
            ClusterEvent::Frame(bytes) => scheduler.frame(bytes).await,
            ClusterEvent::Closed { peer } => scheduler.session_closed(peer).await,
            ClusterEvent::Ready { peer } => {
                tracing::debug!(boot = %peer, "session open");
                Ok(())
            }
        };
        if let Err(error) = taken {
            tracing::debug!(%error, "an event of a node came too late for this reign");
        }
    }
}

async fn within<T>(timeout: Duration, stored: impl Future<Output = Result<T, QueueError>>) -> Result<T, QueueError> {
    tokio::time::timeout(timeout, stored).await.unwrap_or(Err(QueueError::Timeout(timeout)))
}
