//! A few schedulers of a pretended farm, each answering as it is told.

use std::sync::atomic::{AtomicU32, Ordering};

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode as Http;
use axum::response::{IntoResponse, Response as Reply};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use super::*;

/// How a pretended scheduler answers calls.
#[derive(Clone, Debug, PartialEq)]
enum Role {
    Leads,
    StandsBy {
        leader: Option<String>,
    },
    /// Takes connections and says nothing, as a stopped process does.
    Frozen,
    /// Does what it is asked and dies before it has said so.
    DiesAnswering,
    Refuses,
}

#[derive(Clone)]
struct Pretended {
    role: Arc<Mutex<Role>>,
    calls: Arc<AtomicU32>,
}

struct Running {
    pretended: Pretended,
    address: String,
    server: JoinHandle<()>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Running {
    fn become_(&self, role: Role) {
        *self.pretended.role.lock().unwrap() = role;
    }

    fn calls(&self) -> u32 {
        self.pretended.calls.load(Ordering::SeqCst)
    }
}

async fn answer(State(pretended): State<Pretended>) -> Reply {
    pretended.calls.fetch_add(1, Ordering::SeqCst);
    let role = pretended.role.lock().unwrap().clone();
    let error = |leader: Option<&str>| {
        let leader = leader.map(|leader| format!(r#","leader":"{leader}""#)).unwrap_or_default();
        format!(r#"{{"error":"said so"{leader}}}"#)
    };
    match role {
        Role::Leads => "{}".into_response(),
        Role::StandsBy { leader } => (Http::SERVICE_UNAVAILABLE, error(leader.as_deref())).into_response(),
        Role::Frozen => pending().await,
        Role::DiesAnswering => {
            *pretended.role.lock().unwrap() = Role::StandsBy { leader: None };
            let broken = futures::stream::once(async { Err::<Bytes, _>(std::io::Error::other("gone")) });
            axum::body::Body::from_stream(broken).into_response()
        }
        Role::Refuses => (Http::CONFLICT, error(None)).into_response(),
    }
}

async fn start(role: Role) -> Running {
    let pretended = Pretended { role: Arc::new(Mutex::new(role)), calls: Arc::default() };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let router = Router::new().fallback(answer).with_state(pretended.clone());
    let server = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    Running { pretended, address, server }
}

/// Nobody listens there.
async fn nowhere() -> String {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().to_string()
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
    one.become_(Role::StandsBy { leader: Some(two.address.clone()) });
    two.become_(Role::StandsBy { leader: Some(one.address.clone()) });
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
    old.become_(Role::StandsBy { leader: None });
    let found = async { leader(&reach).await };
    let takeover = async {
        // Both have been asked in vain before the new one leads.
        while new.calls() < 2 {
            tokio::task::yield_now().await;
        }
        new.become_(Role::Leads);
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
    leads.become_(Role::StandsBy { leader: None });
    let restart = async {
        while leads.calls() < 3 {
            tokio::task::yield_now().await;
        }
        leads.become_(Role::Leads);
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
