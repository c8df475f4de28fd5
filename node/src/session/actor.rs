//! Delivers what [`super::state`] decides.

use std::sync::Arc;
use std::time::{Duration, Instant};

use farm_core::id::{BootId, NodeId};
use farm_core::wire::cluster::{Cluster, ClusterEvent};
use farm_core::wire::to_scheduler::ToScheduler;
use farm_core::wire::{Envelope, codec};
use ractor::{Actor, ActorProcessingErr, ActorRef};

use super::messages::SessionMessage;
use super::state::{Action, Event, Offer, Session};
use crate::device_pool::messages::PoolMessage;

/// How exactly timers are kept.
const TICK: Duration = Duration::from_millis(50);

pub struct SessionActor;

/// Whom the node belongs to.
pub struct Scheduler {
    /// `host:port`
    pub address: String,
    pub secret: Option<String>,
}

pub struct Arguments {
    pub cluster: Cluster,
    pub scheduler: Arc<Scheduler>,
    pub node: NodeId,
    pub boot: BootId,
    pub offer: Offer,
}

pub struct State {
    cluster: Cluster,
    scheduler: Arc<Scheduler>,
    node: NodeId,
    boot: BootId,
    session: Session,
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
        let Arguments { cluster, scheduler, node, boot, offer } = arguments;
        me.send_interval(TICK, || SessionMessage::Tick);
        let session = Session::new(boot, offer, rand::random(), Instant::now());
        Ok(State { cluster, scheduler, node, boot, session, seq: 0, pool: None })
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
            SessionMessage::Dialed(dialed) => Event::Dialed(dialed.map_err(|error| error.to_string())),
            SessionMessage::Ended { key, outcome } => Event::Ended { key, outcome },
            SessionMessage::WantHands { key, round, tiles, url, token } => {
                Event::WantHands { key, round, tiles, url, token }
            }
            SessionMessage::Released { key, keep } => Event::Released { key, keep },
            SessionMessage::HelpEnded { key, device } => Event::HelpEnded { key, device },
            SessionMessage::Log { key, line } => Event::Log { key, line },
            SessionMessage::Tick => Event::Tick,
            SessionMessage::Stop => Event::Stop,
        };
        let mut actions = Vec::new();
        state.session.on(event, Instant::now(), &mut actions);
        for action in actions {
            match action {
                Action::Dial => state.dial(me.clone()),
                Action::Disconnect(peer) => state.cluster.disconnect(peer),
                Action::Send(body) => state.send(body),
                Action::Start { start, progress } => state.tell_pool(PoolMessage::Start { start, progress })?,
                Action::Abort(key) => state.tell_pool(PoolMessage::Abort(key))?,
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
    fn dial(&self, me: ActorRef<SessionMessage>) {
        let (cluster, scheduler) = (self.cluster.clone(), self.scheduler.clone());
        // Beside the mailbox: it takes seconds where nobody answers.
        tokio::spawn(async move {
            let dialed = cluster.dial(&scheduler.address, scheduler.secret.as_deref()).await;
            // Fails only when the process ends.
            let _ = me.cast(SessionMessage::Dialed(dialed));
        });
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
