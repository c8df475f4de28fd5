//! A few schedulers of a pretended farm, each answering as it is told.

use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::json;

use super::*;
use crate::pretended::{Pretended, Reply, nowhere, pretend};

/// How a pretended scheduler answers calls.
#[derive(Clone, Debug)]
enum Role {
    Leads,
    StandsBy {
        leader: Option<String>,
    },
    Frozen,
    /// Does what it is asked and dies before it has said so.
    DiesAnswering,
    Refuses,
}

struct Running {
    role: Arc<Mutex<Role>>,
    calls: Arc<AtomicU32>,
    address: String,
    _server: Pretended,
}

impl Running {
    fn turn(&self, role: Role) {
        *self.role.lock().unwrap() = role;
    }

    fn calls(&self) -> u32 {
        self.calls.load(Ordering::SeqCst)
    }
}

async fn start(role: Role) -> Running {
    let role = Arc::new(Mutex::new(role));
    let calls = Arc::<AtomicU32>::default();
    let (its_role, its_calls) = (role.clone(), calls.clone());
    let server = pretend(move |_, _| {
        its_calls.fetch_add(1, Ordering::SeqCst);
        let mut role = its_role.lock().unwrap();
        match role.clone() {
            Role::Leads => Reply::Json(200, json!({})),
            Role::StandsBy { leader } => Reply::Json(503, json!({"error": "said so", "leader": leader})),
            Role::Frozen => Reply::Silence,
            Role::DiesAnswering => {
                *role = Role::StandsBy { leader: None };
                Reply::Broken
            }
            Role::Refuses => Reply::Json(409, json!({"error": "said so"})),
        }
    })
    .await;
    Running { role, calls, address: server.address.clone(), _server: server }
}

fn reach(addresses: &[&str]) -> Reach {
    Reach::new(&addresses.join(","), None, HeaderValue::from_static("ada@lab")).unwrap()
}

fn ask() -> Ask {
    Ask::new(Method::GET, &["farm"], Duration::from_secs(30))
}

async fn leader(reach: &Reach) -> String {
    reach.whole(&ask()).await.unwrap().from.text
}

#[tokio::test]
async fn the_leader_is_found_behind_dead_addresses_and_standbys() {
    let standby = start(Role::StandsBy { leader: None }).await;
    let leads = start(Role::Leads).await;
    let reach = reach(&[&nowhere().await, &standby.address, &leads.address]);
    assert_eq!(leader(&reach).await, leads.address);
    assert_eq!(reach.address(), leads.address);
    // From now on it is asked first.
    assert_eq!(leader(&reach).await, leads.address);
    assert_eq!((standby.calls(), leads.calls()), (1, 2));
}

#[tokio::test]
async fn a_standby_names_a_leader_that_is_not_in_the_list() {
    let leads = start(Role::Leads).await;
    let standby = start(Role::StandsBy { leader: Some(leads.address.clone()) }).await;
    assert_eq!(leader(&reach(&[&standby.address])).await, leads.address);
}

#[tokio::test]
async fn standbys_that_name_each_other_are_not_asked_for_ever() {
    let (one, two) = (start(Role::Leads).await, start(Role::Leads).await);
    one.turn(Role::StandsBy { leader: Some(two.address.clone()) });
    two.turn(Role::StandsBy { leader: Some(one.address.clone()) });
    let failed = reach(&[&one.address]).impatient().whole(&ask()).await.unwrap_err();
    let Error::Unreachable { tried } = failed.error else { panic!("{failed:?}") };
    assert_eq!(tried, format!("{} (said so), {} (said so)", one.address, two.address));
    assert_eq!((one.calls(), two.calls()), (1, 1));
}

#[tokio::test]
async fn a_takeover_is_waited_for() {
    let (old, new) = (start(Role::Leads).await, start(Role::StandsBy { leader: None }).await);
    let reach = reach(&[&old.address, &new.address]);
    assert_eq!(leader(&reach).await, old.address);
    old.turn(Role::StandsBy { leader: None });
    let found = async { leader(&reach).await };
    let takeover = async {
        // Both have been asked in vain before the new one leads.
        while new.calls() < 2 {
            tokio::task::yield_now().await;
        }
        new.turn(Role::Leads);
    };
    let (found, ()) = tokio::join!(found, takeover);
    assert_eq!(found, new.address);
}

#[tokio::test]
async fn a_call_whose_answer_was_lost_is_repeated_and_says_so() {
    let (old, new) = (start(Role::DiesAnswering).await, start(Role::Refuses).await);
    let failed = reach(&[&old.address, &new.address]).whole(&ask()).await.unwrap_err();
    assert!(matches!(failed, Failed { error: Error::Refused { status: 409, .. }, repeated: true }), "{failed:?}");
    // Nothing was lost here.
    let failed = reach(&[&nowhere().await, &new.address]).whole(&ask()).await.unwrap_err();
    assert!(matches!(failed, Failed { error: Error::Refused { status: 409, .. }, repeated: false }), "{failed:?}");
}

#[tokio::test]
async fn a_frozen_leader_is_left_when_another_leads() {
    let (frozen, new) = (start(Role::Frozen).await, start(Role::Leads).await);
    let began = Instant::now();
    assert_eq!(leader(&reach(&[&frozen.address, &new.address])).await, new.address);
    assert!(began.elapsed() < ask().timeout, "only the call's own timeout ended the wait");
}

#[tokio::test]
async fn a_single_address_that_was_never_there_is_an_error_at_once() {
    let address = nowhere().await;
    let began = Instant::now();
    let failed = reach(&[&address]).whole(&ask()).await.unwrap_err();
    assert_eq!(failed.error.to_string(), format!("no scheduler answers at {address} (connection refused)"));
    assert!(!failed.repeated && began.elapsed() < PATIENCE);
}

#[tokio::test]
async fn patience_ends_and_all_addresses_are_named() {
    let (one, two) = (nowhere().await, nowhere().await);
    let patience = 3 * ROUND_WAITS.0;
    let reach = Reach { patience, ..reach(&[&one, &two]) };
    let began = Instant::now();
    let failed = reach.whole(&ask()).await.unwrap_err();
    let expected = format!("no scheduler answers at {one} (connection refused), {two} (connection refused)");
    assert_eq!(failed.error.to_string(), expected);
    assert!(began.elapsed() >= ROUND_WAITS.0, "there was one round only");
}

#[tokio::test]
async fn a_scheduler_that_was_there_is_waited_for_at_its_one_address() {
    let leads = start(Role::Leads).await;
    let address = leads.address.clone();
    let reach = reach(&[&address]);
    assert_eq!(leader(&reach).await, address);
    leads.turn(Role::StandsBy { leader: None });
    let restart = async {
        while leads.calls() < 3 {
            tokio::task::yield_now().await;
        }
        leads.turn(Role::Leads);
    };
    let (found, ()) = tokio::join!(leader(&reach), restart);
    assert_eq!(found, address);
}

#[test]
fn paths_keep_a_prefix_and_queries_are_escaped() {
    let reach = reach(&["http://farm:1/prefix/"]);
    let ask =
        Ask::new(Method::GET, &["jobs", "a/b"], SIGN_OF_LIFE).query("after", Some("x&y")).query("limit", None::<u32>);
    let request = reach.request(&reach.addresses[0], &ask).build().unwrap();
    assert_eq!(request.url().as_str(), "http://farm:1/prefix/v1/jobs/a%2Fb?after=x%26y");
}

#[test]
fn too_many_addresses_are_refused() {
    let many = vec!["a:1"; MAX_ADDRESSES + 1].join(",");
    assert!(Reach::new(&many, None, HeaderValue::from_static("x")).is_err());
}
