//! The actor as others see it: what goes into one turn, and how it ends.

use std::collections::BTreeSet;

use farm_core::api::TenantSpec;
use farm_core::tiles::plan::Tiling;

use super::turn::tests::Starts;
use super::*;
use crate::core::farm::Limits;
use crate::core::fixture::{STORE, tenant};
use crate::queue::location::Location;

fn set_tenant(n: usize) -> Wish {
    Wish::SetTenant(tenant(&format!("t{n}")), TenantSpec::default())
}

struct Reigns {
    scheduler: Scheduler,
    ended: oneshot::Receiver<End>,
    store: Arc<dyn QueueStore>,
    _folder: tempfile::TempDir,
}

impl Reigns {
    async fn begin() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = crate::queue::open(&Location::folder(folder.path())).await.unwrap();
        let epoch = store.campaign("x").await.unwrap().unwrap();
        let saved = store.load(0).await.unwrap();
        let limits = Limits::default();
        let farm = Farm::restore(limits, epoch, STORE.to_owned(), Tiling::AUTO, saved, 0, Time::default());
        let reign = Arc::new(Reign::alone(epoch));
        let (scheduler, ended) =
            Scheduler::start(farm, Instant::now(), reign, store.clone(), Arc::new(Starts::default())).await.unwrap();
        Self { scheduler, ended, store, _folder: folder }
    }

    async fn order(&self, n: usize) -> Result<(), CallError> {
        self.scheduler.wish(set_tenant(n), "ada".to_owned()).await.map(Result::unwrap)
    }
}

#[tokio::test]
async fn what_has_arrived_is_one_turn() {
    let reigns = Reigns::begin().await;
    // More than have a place at a time.
    let orders = MAILBOX + 500;
    let mut answers = Vec::new();
    for n in 0..orders {
        let (reply, answer) = oneshot::channel();
        let order = Order::Wish(Box::new(set_tenant(n)));
        reigns.scheduler.send(Message::Order { order, by: "ada".to_owned(), reply, permit: None }).await.unwrap();
        answers.push(answer);
    }
    for answer in answers {
        answer.await.unwrap().unwrap();
    }
    let mut entries = Vec::new();
    while entries.len() < orders {
        let after = entries.len() as u64;
        let page = reigns.store.audit(after, 1000).await.unwrap();
        assert!(!page.entries.is_empty(), "only {after} entries");
        entries.extend(page.entries);
    }
    assert!(entries.iter().enumerate().all(|(n, entry)| entry.subject == format!("t{n}")), "in order");
    // Those of one transaction were written at the same moment.
    let moments: BTreeSet<Timestamp> = entries.iter().map(|entry| entry.at).collect();
    println!("{orders} orders in {} transactions", moments.len());
    assert!(moments.len() <= 8 * orders / TURN, "{} transactions", moments.len());
}

#[tokio::test]
async fn a_reign_ends_by_order_by_another_and_by_a_panic_and_then_nobody_waits() {
    for how in 0..3 {
        let mut reigns = Reigns::begin().await;
        match how {
            0 => reigns.scheduler.stop(),
            1 => {
                reigns.store.campaign("y").await.unwrap().unwrap();
                assert_eq!(reigns.order(1).await, Err(CallError::Stopped));
            }
            _ => {
                let asked = reigns.scheduler.ask(|_| -> () { panic!("as planned") }).await;
                assert_eq!(asked, Err(CallError::Stopped));
            }
        }
        let end = (&mut reigns.ended).await;
        let is_right = match how {
            0 => matches!(end, Ok(End::Stopped)),
            1 => matches!(end, Ok(End::Superseded)),
            _ => end.is_err(),
        };
        assert!(is_right, "{how}: {end:?}");
        assert_eq!(reigns.order(2).await, Err(CallError::Stopped));
    }
}
