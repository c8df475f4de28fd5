//! Delivers what [`super::state`] decides.

use std::sync::Arc;
use std::time::{Duration, Instant};

use farm_core::id::{BootId, NodeId};
use farm_core::wire::cluster::{Cluster, ClusterError, ClusterEvent};
use farm_core::wire::to_scheduler::ToScheduler;
use farm_core::wire::{Envelope, codec};
use ractor::{Actor, ActorProcessingErr, ActorRef};

use super::dialer::{Dialer, Missed};
use super::events::{Action, Event, Offer};
use super::messages::SessionMessage;
use super::state::Session;
use crate::device_pool::messages::PoolMessage;
use crate::evidence::Evidence;
use crate::outbox::{self, OutboxFile};

/// How exactly timers are kept.
const TICK: Duration = Duration::from_millis(50);

pub struct SessionActor;

/// Whom the node belongs to: schedulers of which one leads.
pub struct Schedulers {
    /// `host:port` each
    pub addresses: Vec<String>,
    pub secret: Option<String>,
}

pub struct Arguments {
    pub cluster: Cluster,
    pub schedulers: Arc<Schedulers>,
    pub node: NodeId,
    pub boot: BootId,
    pub offer: Offer,
    pub outbox: OutboxFile,
    pub evidence: Arc<Evidence>,
}

pub struct State {
    cluster: Cluster,
    schedulers: Arc<Schedulers>,
    node: NodeId,
    boot: BootId,
    session: Session,
    outbox: outbox::Writer,
    evidence: Arc<Evidence>,
    /// Of the last message sent.
    seq: u64,
    /// Known from its first message on; nothing starts before.
    pool: Option<ActorRef<PoolMessage>>,
}

impl Actor for SessionActor {
    type Msg = SessionMessage;
    type State = State;
    type Arguments = Arguments;

    async fn pre_start(&self, me: ActorRef<SessionMessage>, arguments: Arguments) -> Result<State, ActorProcessingErr> {
        let Arguments { cluster, schedulers, node, boot, offer, outbox, evidence } = arguments;
        me.send_interval(TICK, || SessionMessage::Tick);
        let earlier = outbox.pending();
        if !earlier.is_empty() {
            tracing::info!(reports = earlier.len(), "reports of an earlier process are sent again");
        }
        let dialer = Dialer::new(schedulers.addresses.len(), rand::random());
        let session = Session::new(boot, offer, earlier, dialer, Instant::now());
        // Fails only when the process ends.
        let outbox = outbox.start(move |number| drop(me.cast(SessionMessage::Kept { number })))?;
        Ok(State { cluster, schedulers, node, boot, session, outbox, evidence, seq: 0, pool: None })
    }

    async fn handle(
        &self,
        me: ActorRef<SessionMessage>,
        message: SessionMessage,
        state: &mut State,
    ) -> Result<(), ActorProcessingErr> {
        let event = match message {
            SessionMessage::Pool(pool) => {
                state.pool = Some(pool);
                return Ok(());
            }
            SessionMessage::Cluster(ClusterEvent::Ready { peer }) => Event::Ready(peer),
            SessionMessage::Cluster(ClusterEvent::Closed { peer }) => Event::Closed(peer),
            SessionMessage::Cluster(ClusterEvent::Frame(bytes)) => match codec::decode(&bytes) {
                Ok(envelope) => Event::Received(envelope),
                Err(error) => Event::Undecodable(error.to_string()),
            },
            SessionMessage::Dialed(dialed) => Event::Dialed(dialed.map_err(|error| state.missed(error))),
            SessionMessage::Ended { key, outcome } => Event::Ended { key, outcome },
            SessionMessage::WantHands { key, round, tiles, url, token } => {
                Event::WantHands { key, round, tiles, url, token }
            }
            SessionMessage::Released { key, keep } => Event::Released { key, keep },
            SessionMessage::HelpEnded { key, device } => Event::HelpEnded { key, device },
            SessionMessage::Log { key, line } => Event::Log { key, line },
            SessionMessage::Tick => Event::Tick,
            SessionMessage::Kept { number } => Event::Kept { number },
            SessionMessage::Leave { reason, patience } => Event::Leave { reason, patience },
        };
        let mut actions = Vec::new();
        state.session.on(event, Instant::now(), &mut actions);
        for action in actions {
            match action {
                Action::Dial(scheduler) => state.dial(scheduler, me.clone()),
                Action::Disconnect(peer) => state.cluster.disconnect(peer),
                Action::Send(body) => state.send(body),
                Action::Start { start, progress } => state.tell_pool(PoolMessage::Start { start, progress })?,
                Action::Abort(key) => state.tell_pool(PoolMessage::Abort(key))?,
                Action::Yield(key) => state.tell_pool(PoolMessage::Yield(key))?,
                Action::CrashKnown => state.evidence.crash_known(),
                Action::Keep { number, report } => state.outbox.keep(number, report),
                Action::Forget { number } => state.outbox.forget(number),
                Action::Hands { key, round, keep, helpers } => {
                    state.tell_pool(PoolMessage::Hands { key, round, keep, helpers })?;
                }
                Action::Help(help) => state.tell_pool(PoolMessage::Help(help))?,
                Action::Dismiss { key, device } => state.tell_pool(PoolMessage::Dismiss { key, device })?,
                Action::Exit => me.stop(None),
            }
        }
        Ok(())
    }
}

impl State {
    fn dial(&self, scheduler: usize, me: ActorRef<SessionMessage>) {
        let (cluster, schedulers) = (self.cluster.clone(), self.schedulers.clone());
        // Beside the mailbox: it takes seconds where nobody answers.
        tokio::spawn(async move {
            let address = schedulers.addresses.get(scheduler).map(String::as_str).unwrap_or_default();
            let dialed = cluster.dial(address, schedulers.secret.as_deref()).await;
            // Fails only when the process ends.
            let _ = me.cast(SessionMessage::Dialed(dialed));
        });
    }

    /// What the error means for whom to dial next. Only addresses that the node was given are dialled.
    fn missed(&self, error: ClusterError) -> Missed {
        match error {
            ClusterError::Standby { leader, .. } => {
                let leads = |address: &String| leader.as_ref() == Some(address);
                Missed::Standby { leader: self.schedulers.addresses.iter().position(leads) }
            }
            error => Missed::Unreachable(error.to_string()),
        }
    }

    fn send(&mut self, body: ToScheduler) {
        self.seq += 1;
        let epoch = self.session.epoch();
        let envelope = Envelope { epoch, node: self.node.clone(), boot: self.boot, seq: self.seq, body };
        let sent = codec::encode(&envelope)
            .map_err(|error| error.to_string())
            .and_then(|frame| self.cluster.send_to_scheduler(frame).map_err(|error| error.to_string()));
        // What matters is repeated.
        if let Err(error) = sent {
            tracing::warn!(%error, "message not sent");
        }
    }

    fn tell_pool(&self, message: PoolMessage) -> Result<(), ActorProcessingErr> {
        match &self.pool {
            Some(pool) => Ok(pool.cast(message)?),
            None => Err("the session started before the device pool".into()),
        }
    }
}
