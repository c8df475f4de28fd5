//! The queue and its history: the truth that everything else is rebuilt from.
//!
//! | module | subject |
//! |---|---|
//! | [`store`] | what the scheduler asks of its queue store |
//! | [`sql`] | the store in SQLite, for one scheduler, and in Postgres, for several |
//! | [`location`] | where a queue is: a folder or a URL |

pub mod location;
pub mod sql;
pub mod store;

#[cfg(any(test, feature = "testing"))]
pub mod testing;

#[cfg(test)]
mod suite;

use std::sync::Arc;

use self::location::Location;
use self::sql::SqlQueue;
use self::store::{QueueError, QueueStore};

/// Opens the queue, makes it if it is absent, and brings its tables up to date.
pub async fn open(location: &Location) -> Result<Arc<dyn QueueStore>, QueueError> {
    Ok(Arc::new(SqlQueue::open(location).await?))
}
