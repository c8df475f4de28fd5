//! A queue store beside a simulated world: what the core asks for is committed as in a real scheduler.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use farm_core::api::{OpenSubmission, SubmissionReply};
use farm_core::id::{Epoch, SubmissionId};
use jiff::Timestamp;
use tokio::runtime::Runtime;
use uuid::Uuid;

use super::world::World;
use crate::core::effects::Change;
use crate::queue::location::Location;
use crate::queue::store::{Batch, NewJob, QueueStore};

/// Where the store is.
#[derive(Clone, Debug, clap::Args)]
pub struct Place {
    /// An empty database, postgres://USER@HOST/DATABASE; without it, SQLite in a folder that is removed afterwards
    #[arg(long, value_name = "URL", conflicts_with = "postgres")]
    queue: Option<Location>,
    /// A Postgres server of its own, from Debian's package, with durable commits. Needs the feature `testing`
    #[arg(long)]
    postgres: bool,
    /// Folder for SQLite's, on the disk that is to be measured [default: the system's for temporary files]
    #[arg(long, value_name = "DIR")]
    folder: Option<PathBuf>,
}

/// A new store that this process leads.
pub struct Stored {
    runtime: Runtime,
    store: Arc<dyn QueueStore>,
    epoch: Epoch,
    pub kind: &'static str,
    // The store is closed before what it is in goes.
    _home: Home,
}

enum Home {
    Folder(PathBuf),
    #[cfg(feature = "testing")]
    Server {
        _server: crate::queue::testing::Postgres,
    },
    Elsewhere,
}

impl Drop for Home {
    fn drop(&mut self) {
        if let Self::Folder(folder) = self {
            let _ = std::fs::remove_dir_all(folder);
        }
    }
}

impl Place {
    pub fn open(&self) -> anyhow::Result<Stored> {
        let (home, location) = self.home()?;
        let kind = if matches!(location, Location::File(_)) { "SQLite" } else { "Postgres" };
        let runtime = Runtime::new()?;
        let (store, epoch) = runtime.block_on(async {
            let store = crate::queue::open(&location).await?;
            let epoch = store.campaign("127.0.0.1:1").await?.context("somebody else leads in this queue")?;
            anyhow::Ok((store, epoch))
        })?;
        ensure!(epoch == Epoch(1), "the queue is not new: this is reign {epoch} over it");
        Ok(Stored { runtime, store, epoch, kind, _home: home })
    }

    fn home(&self) -> anyhow::Result<(Home, Location)> {
        if let Some(location) = &self.queue {
            return Ok((Home::Elsewhere, location.clone()));
        }
        if self.postgres {
            return postgres();
        }
        let base = self.folder.clone().unwrap_or_else(std::env::temp_dir);
        let folder = base.join(format!("farm-bench-{}", Uuid::new_v4().simple()));
        std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let location = Location::folder(&folder);
        Ok((Home::Folder(folder), location))
    }
}

#[cfg(feature = "testing")]
fn postgres() -> anyhow::Result<(Home, Location)> {
    use crate::queue::testing::{Postgres, Setup};
    let server = Postgres::start(&Setup { durable: true, ..Setup::default() });
    let location = server.database().parse()?;
    Ok((Home::Server { _server: server }, location))
}

#[cfg(not(feature = "testing"))]
fn postgres() -> anyhow::Result<(Home, Location)> {
    anyhow::bail!("this program is built without the feature `testing`; name a database with --queue")
}

impl Stored {
    /// Queues all jobs of the world as the store has them after a submission. Gives how long that took.
    pub fn submit(&self, world: &World, page: usize) -> anyhow::Result<Duration> {
        let begun = Instant::now();
        let jobs: Vec<NewJob> = (0..world.items.len()).map(|ix| world.new_job(ix)).collect();
        for (n, jobs) in jobs.chunks(page).enumerate() {
            let submission = SubmissionId(Uuid::from_u128(n as u128 + 1));
            let reply = SubmissionReply {
                submission,
                new: 0,
                existing: 0,
                requeued: 0,
                lines: Vec::new(),
                bad_lines: 0,
                waiting: None,
            };
            let (tenant, jobs) = (Default::default(), jobs.to_vec());
            let batch = Batch { submission, tenant, max_queued: None, max_failures: None, jobs, reply };
            self.runtime.block_on(async {
                let now = Timestamp::now();
                self.store.open_submission(submission, OpenSubmission::default(), now).await?;
                self.store.commit_submission(self.epoch, batch, now).await
            })?;
        }
        Ok(begun.elapsed())
    }

    /// Commits what the core asks for, and reads the requests that starts had to have. Gives the seconds of both.
    pub fn commit(&self, changes: &[Change]) -> anyhow::Result<(f64, f64)> {
        let started = changes.iter().filter_map(|change| match change {
            Change::Started { start, .. } => Some(start.key.job),
            _ => None,
        });
        let started: Vec<_> = started.collect();
        self.runtime.block_on(async {
            let begun = Instant::now();
            if !started.is_empty() {
                let found = self.store.requests(&started).await?;
                ensure!(found.len() == started.len(), "the store has lost requests");
            }
            let read = begun.elapsed();
            if !changes.is_empty() {
                self.store.apply(self.epoch, changes, Timestamp::now()).await?;
            }
            Ok((read.as_secs_f64(), (begun.elapsed() - read).as_secs_f64()))
        })
    }
}
