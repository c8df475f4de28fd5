//! The node's supervision tree: root owns the session and the device pool, and ends with either of them.
//!
//! Neither is restarted in place: the other holds its address and half of its state. The process ends with an error
//! and whatever started it starts it again; the scheduler sees a new boot id and knows that the old attempts are dead.

use std::sync::Arc;
use std::time::Duration;

use farm_core::wire::cluster::ClusterEvent;
use ractor::{Actor, ActorProcessingErr, ActorRef, SupervisionEvent};
use ractor_cluster::RactorMessage;
use tokio::sync::{mpsc, oneshot};

use crate::attempt::Workshop;
use crate::device_pool::actor::{self as device_pool, DevicePool};
use crate::session::actor::{self as session, SessionActor};
use crate::session::messages::SessionMessage;

pub struct Root;

#[derive(RactorMessage)]
pub enum RootMessage {
    /// Leave the farm in good order, within the time.
    Leave { reason: String, patience: Duration },
}

pub struct Arguments {
    pub session: session::Arguments,
    pub events: mpsc::Receiver<ClusterEvent>,
    /// Makes the workshop, given where log lines go.
    pub workshop: Box<dyn FnOnce(ActorRef<SessionMessage>) -> Workshop + Send>,
    /// Told how it ended.
    pub ended: oneshot::Sender<Result<(), String>>,
}

pub struct State {
    session: ActorRef<SessionMessage>,
    ended: Option<oneshot::Sender<Result<(), String>>>,
}

impl Actor for Root {
    type Msg = RootMessage;
    type State = State;
    type Arguments = Arguments;

    async fn pre_start(&self, me: ActorRef<RootMessage>, arguments: Arguments) -> Result<State, ActorProcessingErr> {
        let Arguments { session, mut events, workshop, ended } = arguments;
        let (session, _) = Actor::spawn_linked(None, SessionActor, session, me.get_cell()).await?;
        let workshop = Arc::new(workshop(session.clone()));
        let arguments = device_pool::Arguments { workshop, session: session.clone() };
        let (pool, _) = Actor::spawn_linked(None, DevicePool, arguments, me.get_cell()).await?;
        session.cast(SessionMessage::Pool(pool))?;
        let inbound = session.clone();
        tokio::spawn(async move {
            while let Some(event) = events.recv().await {
                if inbound.cast(SessionMessage::Cluster(event)).is_err() {
                    return;
                }
            }
        });
        Ok(State { session, ended: Some(ended) })
    }

    async fn handle(
        &self,
        _: ActorRef<RootMessage>,
        message: RootMessage,
        state: &mut State,
    ) -> Result<(), ActorProcessingErr> {
        let RootMessage::Leave { reason, patience } = message;
        Ok(state.session.cast(SessionMessage::Leave { reason, patience })?)
    }

    async fn handle_supervisor_evt(
        &self,
        me: ActorRef<RootMessage>,
        event: SupervisionEvent,
        state: &mut State,
    ) -> Result<(), ActorProcessingErr> {
        let end = match event {
            // The session stops when the node has left; the pool never stops by itself.
            SupervisionEvent::ActorTerminated(who, ..) if who.get_id() == state.session.get_id() => Ok(()),
            SupervisionEvent::ActorTerminated(who, ..) => Err(format!("actor {} ended unasked", who.get_id())),
            SupervisionEvent::ActorFailed(who, error) => Err(format!("actor {} failed: {error}", who.get_id())),
            _ => return Ok(()),
        };
        if let Some(ended) = state.ended.take() {
            // The receiver only goes away with the process.
            let _ = ended.send(end);
        }
        me.stop(None);
        Ok(())
    }
}
