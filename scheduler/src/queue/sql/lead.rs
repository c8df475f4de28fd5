//! Who leads.
//!
//! In Postgres the leader holds an advisory lock in a session of its own, outside the pools. The lock ends with the
//! session, so a standby takes over as soon as the leader's process is dead; there is no lease to time out. A leader that is
//! paused or cut off keeps its session, and is told by its beat: whoever finds it too old ends all sessions of that leader.
//! A lead found wrongly does no harm, because every write checks the epoch in its own transaction.

use std::future::Future;
use std::time::Duration;

use farm_core::id::Epoch;
use sqlx::{AnyConnection, Connection};
use tokio::sync::Mutex;
use tokio::time::{sleep, timeout};

use super::super::store::{LEADER_TTL, Leader, QueueError};
use super::rows::{get_i64, get_text, get_u64};
use super::{SqlQueue, WAIT, postgres_session, query, set_session};

/// The lock's two numbers: "farm", and the queue.
const LOCK: (i32, i32) = (0x6661_726d, 1);
/// A session that does not answer for so long is as good as dead.
const ANSWER: Duration = Duration::from_secs(3);
/// Asked for the lock so often after its holder was ended.
const TRIES: u32 = 20;
const TRY_AGAIN: Duration = Duration::from_millis(50);

pub(super) enum Seat {
    /// Nobody else can have the queue.
    Always,
    Contested {
        url: String,
        /// Name of all sessions of this store.
        owner: String,
        /// The session that holds the lock, or asks for it.
        session: Mutex<Option<AnyConnection>>,
    },
}

impl Seat {
    pub(super) fn contested(url: String, owner: String) -> Self {
        Self::Contested { url, owner, session: Mutex::new(None) }
    }
}

impl SqlQueue {
    pub(super) async fn run_for_leader(&self, address: &str) -> Result<Option<Epoch>, QueueError> {
        match &self.seat {
            Seat::Always => {
                let mut connection = self.writer.acquire().await?;
                self.begin_reign(&mut connection, address, "").await.map(Some)
            }
            Seat::Contested { url, owner, session } => {
                let mut session = session.lock().await;
                // Taken out: what is cut short or fails must not be used again.
                let mut connection = match session.take() {
                    Some(connection) => connection,
                    None => answered(connect(url, owner)).await?,
                };
                let contest = self.contest(&mut connection, address, owner);
                let epoch = timeout(WAIT, contest).await.map_err(|_| QueueError::Timeout(WAIT))??;
                *session = Some(connection);
                Ok(epoch)
            }
        }
    }

    async fn contest(
        &self,
        connection: &mut AnyConnection,
        address: &str,
        owner: &str,
    ) -> Result<Option<Epoch>, QueueError> {
        if !try_lock(connection).await? {
            if !self.depose(connection).await? {
                return Ok(None);
            }
            let mut tries = 0;
            while !try_lock(connection).await? {
                tries += 1;
                if tries == TRIES {
                    return Ok(None);
                }
                sleep(TRY_AGAIN).await;
            }
        }
        // A predecessor that is paused in the middle of a write would hold the row that the new reign needs.
        answered(
            query(
                "SELECT CAST(COUNT(pg_terminate_backend(a.pid)) AS BIGINT) AS ended FROM pg_stat_activity a \
                 JOIN leader l ON l.owner = a.application_name WHERE l.owner <> $1 AND a.pid <> pg_backend_pid()",
            )
            .bind(owner.to_owned())
            .execute(&mut *connection),
        )
        .await?;
        self.begin_reign(connection, address, owner).await.map(Some)
    }

    /// Ends the session that holds the lock, if neither it nor the leader has said anything for too long. (Who has just
    /// won the lock has not beaten yet, but its session is fresh.)
    async fn depose(&self, connection: &mut AnyConnection) -> Result<bool, QueueError> {
        let text = format!(
            "SELECT CAST(COUNT(pg_terminate_backend(a.pid)) AS BIGINT) AS ended \
             FROM pg_locks k JOIN pg_stat_activity a ON a.pid = k.pid \
             WHERE k.locktype = 'advisory' AND k.granted AND k.classid = {} AND k.objid = {} AND k.objsubid = 2 \
             AND k.database = (SELECT oid FROM pg_database WHERE datname = current_database()) \
             AND COALESCE(a.state_change, '-infinity') < clock_timestamp() - interval '{ttl} milliseconds' \
             AND (SELECT beat FROM leader) < {} - {ttl}",
            LOCK.0,
            LOCK.1,
            self.dialect.now_ms(),
            ttl = LEADER_TTL.as_millis()
        );
        let row = answered(query(text).fetch_one(connection)).await?;
        Ok(get_i64(&row, "ended")? > 0)
    }

    async fn begin_reign(
        &self,
        connection: &mut AnyConnection,
        address: &str,
        owner: &str,
    ) -> Result<Epoch, QueueError> {
        let mut tx = connection.begin_with(self.dialect.begin_write()).await?;
        let row = query("UPDATE reign SET epoch = epoch + 1 RETURNING epoch").fetch_one(&mut *tx).await?;
        let epoch = get_i64(&row, "epoch")?;
        query(format!("UPDATE leader SET epoch = $1, address = $2, owner = $3, beat = {}", self.dialect.now_ms()))
            .bind(epoch)
            .bind(address.to_owned())
            .bind(owner.to_owned())
            .execute(&mut *tx)
            .await?;
        tx.commit().await?;
        Ok(Epoch(epoch.cast_unsigned()))
    }

    pub(super) async fn say_alive(&self, epoch: Epoch) -> Result<(), QueueError> {
        let beat = query(format!("UPDATE leader SET beat = {} WHERE epoch = $1", self.dialect.now_ms()))
            .bind(epoch.0.cast_signed());
        let beaten = match &self.seat {
            Seat::Always => beat.execute(&self.writer).await?,
            // In the session that holds the lock: an answer proves that the lead is still ours.
            Seat::Contested { session, .. } => {
                let mut session = session.lock().await;
                let lost = |why: String| QueueError::LeadLost(why);
                let mut connection = session.take().ok_or_else(|| lost("it was never there".to_owned()))?;
                let beaten = answered(beat.execute(&mut connection)).await.map_err(|error| lost(error.to_string()))?;
                *session = Some(connection);
                beaten
            }
        };
        if beaten.rows_affected() == 0 { Err(QueueError::Superseded(epoch)) } else { Ok(()) }
    }

    pub(super) async fn step_down(&self, epoch: Epoch) -> Result<(), QueueError> {
        if let Seat::Contested { session, .. } = &self.seat
            && let Some(connection) = session.lock().await.take()
        {
            // The lock ends with the session, whatever the server is told of its end.
            tracing::debug!(%epoch, "resigned");
            answered(connection.close()).await?;
        }
        Ok(())
    }

    pub(super) async fn read_leader(&self) -> Result<Option<Leader>, QueueError> {
        let text = format!("SELECT address, epoch, {} - beat AS silent FROM leader", self.dialect.now_ms());
        let row = query(text).fetch_one(&self.readers).await?;
        let epoch = get_u64(&row, "epoch")?;
        let silent = Duration::from_millis(get_i64(&row, "silent")?.max(0).cast_unsigned());
        Ok((epoch > 0).then_some(Leader { address: get_text(&row, "address")?, epoch: Epoch(epoch), silent }))
    }
}

async fn connect(url: &str, owner: &str) -> sqlx::Result<AnyConnection> {
    let mut connection = AnyConnection::connect(url).await?;
    set_session(&mut connection, postgres_session(owner, ANSWER)).await?;
    Ok(connection)
}

async fn try_lock(connection: &mut AnyConnection) -> Result<bool, QueueError> {
    let text = format!("SELECT CAST(pg_try_advisory_lock({}, {}) AS INT) AS got", LOCK.0, LOCK.1);
    let row = answered(query(text).fetch_one(connection)).await?;
    Ok(get_i64(&row, "got")? != 0)
}

async fn answered<T>(work: impl Future<Output = sqlx::Result<T>>) -> Result<T, QueueError> {
    Ok(timeout(ANSWER, work).await.map_err(|_| QueueError::Timeout(ANSWER))??)
}
