//! Pictures of a small farm.

use std::collections::BTreeMap;

use farm_core::api::{FarmInfo, JobPage, ModelView, NodeList, QueueView, Quota, TenantList, TenantSpec, WaitCode};
use farm_core::id::{AttemptNo, Epoch, JobId, NodeId};
use farm_core::job::state::{JobState, Stage};
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use uuid::Uuid;

use super::*;

fn job(number: u128, state: JobState) -> JobView {
    let running = state == JobState::Running;
    JobView {
        job: JobId(Uuid::from_u128(number)),
        id: number.is_multiple_of(2).then(|| format!("shot-{number}")),
        state,
        prompt: String::new(),
        model: None,
        priority: 100,
        tenant: "films".parse().unwrap(),
        submitted: jiff::Timestamp::UNIX_EPOCH,
        finished: None,
        attempt: AttemptNo(1),
        node: running.then(|| NodeId("node-1".into())),
        progress: running.then_some(Progress { stage: Stage::Denoise, done: 12, total: 24, eta_seconds: Some(70.0) }),
        reason: (!running).then(|| "devices are busy, and 3 jobs of films go first".into()),
        clip: None,
        warnings: Vec::new(),
    }
}

fn node(name: &str, jobs: [Option<u128>; 2], closed: Option<&str>, alive: bool) -> NodeView {
    let devices = jobs.into_iter().zip(0..).map(|(number, index)| DeviceView {
        name: format!("cpu:{index}"),
        job: number.map(|number| JobId(Uuid::from_u128(number))),
        helps: index == 1,
        progress: number.and_then(|number| job(number, JobState::Running).progress),
    });
    NodeView {
        node: NodeId(name.into()),
        version: "0.1.0".into(),
        roles: vec!["denoise".into(), "decode".into()],
        devices: devices.collect(),
        models: Vec::new(),
        last_heartbeat_seconds: 7.0,
        alive,
        labels: BTreeMap::new(),
        closed: closed.map(Into::into),
    }
}

fn snapshot() -> Snapshot {
    let waiting =
        BTreeMap::from([(WaitCode::Turn, 3), (WaitCode::Busy, 1), (WaitCode::Share, 0), (WaitCode::After, 8)]);
    let tenant = TenantView {
        tenant: "films".parse().unwrap(),
        spec: TenantSpec { share: 2.0, quota: Quota { devices: Some(4), ..Quota::default() } },
        paused: false,
        queued: 12,
        running: 1,
        devices: 2,
        usage: 99.0,
        day: 1234.4,
    };
    Snapshot {
        leader: "10.0.0.1:7070".into(),
        farm: FarmInfo {
            version: "0.1.0".into(),
            epoch: Epoch(7),
            store: "file:///farm".into(),
            models: vec![ModelView { name: "mochi-tiny".into(), hash: String::new() }],
            jobs: BTreeMap::from([(JobState::Queued, 12), (JobState::Running, 1), (JobState::Failed, 0)]),
            nodes: 3,
            devices: 6,
            idle_devices: 4,
        },
        queue: QueueView {
            queued: 12,
            running: 1,
            waiting,
            paused: false,
            eta_seconds: Some(800.0),
            clips_last_hour: 41,
        },
        nodes: NodeList {
            nodes: vec![
                node("node-1", [Some(1), Some(1)], None, true),
                node("node-2", [None, None], Some("drained"), true),
                node("node-3", [None, None], None, false),
            ],
        },
        tenants: TenantList { tenants: vec![tenant] },
        running: JobPage { jobs: vec![job(1, JobState::Running)], next: None },
        waiting: JobPage { jobs: (2..14).map(|number| job(number, JobState::Queued)).collect(), next: None },
    }
}

fn picture(width: u16, height: u16, look: &mut Look, trouble: Option<&str>) -> Vec<String> {
    let snapshot = snapshot();
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    look.clamp(rows(&snapshot, look.tab));
    terminal.draw(|frame| draw(frame, &snapshot, look, trouble)).unwrap();
    let cells = terminal.backend().buffer().content();
    let lines = cells.chunks(usize::from(width.max(1)));
    lines.map(|line| line.iter().map(|cell| cell.symbol()).collect::<String>().trim_end().to_owned()).collect()
}

#[test]
fn devices_on_a_small_terminal() {
    assert_eq!(
        picture(80, 14, &mut Look::default(), None),
        [
            "farm 0.1.0 at 10.0.0.1:7070, epoch 7: 3 nodes, 2 of 6 devices busy",
            "12 queued, 1 running · 41 clips/h · queue empty in about 13 min",
            "waiting: after other jobs 8, not their turn 3, devices busy 1",
            " devices 6 │ running 1 │ waiting 12 │ tenants 1",
            "NODE           DEVICE     JOB            PROGRESS                 STATE",
            "node-1         cpu:0      00000001       █████░░░░░ denoise 12/24",
            "node-1         cpu:1      helps 00000001 █████░░░░░ denoise 12/24",
            "node-2         cpu:0      idle                                    drained",
            "node-2         cpu:1      idle                                    drained",
            "node-3         cpu:0      idle                                    silent 7 s",
            "node-3         cpu:1      idle                                    silent 7 s",
            "",
            "",
            "q leaves · ←→ other table · ↑↓ rows",
        ]
    );
}

#[test]
fn an_old_picture_says_so() {
    let shown = picture(80, 7, &mut Look { tab: Tab::Running, ..Look::default() }, Some("no scheduler answers at a:1"));
    assert_eq!(
        shown[4..],
        [
            "JOB                   TENANT      NODE       PROGRESS                 LEFT",
            "00000001              films       node-1     █████░░░░░ denoise 12/24 70 s",
            "no scheduler answers at a:1",
        ]
    );
}

#[test]
fn the_marked_job_is_in_sight_with_its_reason() {
    let mut look = Look { tab: Tab::Waiting, ..Look::default() };
    look.table.select(Some(7));
    let shown = picture(80, 9, &mut look, None);
    assert_eq!(
        shown[4..8],
        [
            "JOB              TENANT   PRIO WHY",
            "00000007         films    100  devices are busy, and 3 jobs of films go first",
            "shot-8           films    100  devices are busy, and 3 jobs of films go first",
            "00000009         films    100  devices are busy, and 3 jobs of films go first",
        ]
    );
    // One up: the mark moves, the rows stay.
    look.table.select(Some(6));
    assert_eq!(picture(80, 9, &mut look, None)[5..8], shown[5..8]);
    look.table.select(Some(0));
    assert!(picture(80, 9, &mut look, None)[5].starts_with("shot-2 "));
}

#[test]
fn tenants_show_what_they_have_and_may_have() {
    let shown = picture(80, 7, &mut Look { tab: Tab::Tenants, ..Look::default() }, None);
    assert_eq!(
        shown[4..6],
        [
            "TENANT            SHARE  USAGE     DEVICES  QUEUED  RUNNING 24 H",
            "films             2      99        2/4      12      1       1234",
        ]
    );
}

#[test]
fn text_of_a_farm_cannot_control_the_terminal() {
    let mut snapshot = snapshot();
    snapshot.nodes.nodes[0].node = NodeId("a\u{1b}[2Jb".into());
    snapshot.leader = "\u{202e}".into();
    let mut terminal = Terminal::new(TestBackend::new(80, 8)).unwrap();
    terminal.draw(|frame| draw(frame, &snapshot, &mut Look::default(), Some("\u{9b}1m"))).unwrap();
    let shown = terminal.backend().to_string();
    assert!(shown.contains("a\u{fffd}[2Jb"), "{shown}");
    assert!(!shown.contains(['\u{1b}', '\u{202e}', '\u{9b}']), "{shown}");
}

#[test]
fn any_terminal_is_large_enough() {
    for tab in Tab::ALL {
        for (width, height) in [(0, 0), (1, 1), (2, 3), (5, 5), (20, 4), (300, 2), (10, 100)] {
            let mut look = Look { tab, ..Look::default() };
            look.table.select(Some(usize::MAX));
            picture(width, height, &mut look, Some("no scheduler answers"));
        }
    }
}
