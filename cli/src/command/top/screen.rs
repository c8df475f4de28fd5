//! Draws a snapshot. The same snapshot gives the same picture, on any terminal of its size.

use farm_core::api::{DeviceView, JobView, NodeView, TenantView};
use farm_core::job::state::Progress;
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style, Stylize};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Paragraph, Row, Table, TableState, Tabs};

use super::keys::{Look, Tab};
use super::snapshot::{Snapshot, words};
use crate::output::{self, clean, name};

const BAR_CELLS: u32 = 10;
const KEYS: &str = "q leaves · ←→ other table · ↑↓ rows";

/// `trouble`: why the snapshot is old.
pub fn draw(frame: &mut Frame, snapshot: &Snapshot, look: &mut Look, trouble: Option<&str>) {
    let reasons = reasons(snapshot);
    let reason_lines = u16::from(!reasons.is_empty());
    let [head, work, waiting, tabs, table, foot] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(1),
        Constraint::Length(reason_lines),
        Constraint::Length(1),
        Constraint::Min(0),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    frame.render_widget(Line::from(plain(&snapshot.headline())).bold(), head);
    frame.render_widget(Line::from(plain(&snapshot.work())), work);
    frame.render_widget(Line::from(plain(&reasons)).yellow(), waiting);
    let titles = Tab::ALL.map(|tab| format!("{} {}", tab.title(), rows(snapshot, tab)));
    frame.render_widget(Tabs::new(titles).select(look.tab.index()).highlight_style(Modifier::REVERSED), tabs);
    look.page = usize::from(table.height).saturating_sub(1);
    draw_table(frame, table, snapshot, look);
    frame.render_widget(
        match trouble {
            Some(trouble) => Paragraph::new(plain(trouble)).style(Color::Red),
            None => Paragraph::new(KEYS).style(Modifier::DIM),
        },
        foot,
    );
}

/// Rows of a table.
pub fn rows(snapshot: &Snapshot, tab: Tab) -> usize {
    match tab {
        Tab::Devices => snapshot.nodes.nodes.iter().map(|node| node.devices.len().max(1)).sum(),
        Tab::Running => snapshot.running.jobs.len(),
        Tab::Waiting => snapshot.waiting.jobs.len(),
        Tab::Tenants => snapshot.tenants.tenants.len(),
    }
}

fn draw_table(frame: &mut Frame, area: Rect, snapshot: &Snapshot, look: &mut Look) {
    use Constraint::{Fill, Length};
    let (header, widths): (&[&str], &[Constraint]) = match look.tab {
        Tab::Devices => {
            (&["node", "device", "job", "progress", "state"], &[Fill(1), Length(10), Length(14), Length(24), Fill(1)])
        }
        Tab::Running => {
            (&["job", "tenant", "node", "progress", "left"], &[Fill(2), Fill(1), Fill(1), Length(24), Length(10)])
        }
        Tab::Waiting => (&["job", "tenant", "prio", "why"], &[Fill(2), Fill(1), Length(4), Fill(6)]),
        Tab::Tenants => (
            &["tenant", "share", "usage", "devices", "queued", "running", "24 h", ""],
            &[Fill(1), Length(6), Length(9), Length(8), Length(7), Length(7), Length(13), Length(6)],
        ),
    };
    // Only what can be seen is made: a farm may have 80,000 devices.
    let seen = usize::from(area.height);
    let first = match look.table.selected() {
        // Far enough down that the mark is the last row, or as far up as the mark is.
        Some(row) => look.table.offset().clamp((row + 1).saturating_sub(look.page.max(1)), row),
        None => 0,
    };
    let made: Vec<Row> = match look.tab {
        Tab::Devices => {
            devices(snapshot).skip(first).take(seen).map(|(node, device)| device_row(node, device)).collect()
        }
        Tab::Running => snapshot.running.jobs.iter().skip(first).take(seen).map(running_row).collect(),
        Tab::Waiting => snapshot.waiting.jobs.iter().skip(first).take(seen).map(waiting_row).collect(),
        Tab::Tenants => snapshot.tenants.tenants.iter().skip(first).take(seen).map(tenant_row).collect(),
    };
    *look.table.offset_mut() = first;
    let header = Row::new(header.iter().map(|title| title.to_uppercase())).style(Modifier::DIM);
    let table = Table::new(made, widths).header(header).row_highlight_style(Modifier::REVERSED);
    // The rows made are a window on the table, and the mark is shown within it.
    let mut window = TableState::default().with_selected(look.table.selected().map(|row| row - first));
    frame.render_stateful_widget(table, area, &mut window);
}

fn reasons(snapshot: &Snapshot) -> String {
    let reasons = snapshot.reasons();
    if reasons.is_empty() {
        return String::new();
    }
    let reasons = reasons.into_iter().map(|(code, count)| format!("{} {count}", words(code)));
    format!("waiting: {}", reasons.collect::<Vec<_>>().join(", "))
}

/// Every device with its node; a node without devices has one row too.
fn devices(snapshot: &Snapshot) -> impl Iterator<Item = (&NodeView, Option<&DeviceView>)> {
    snapshot.nodes.nodes.iter().flat_map(|node| {
        let none = node.devices.is_empty().then_some((node, None));
        node.devices.iter().map(move |device| (node, Some(device))).chain(none)
    })
}

fn device_row<'a>(node: &'a NodeView, device: Option<&'a DeviceView>) -> Row<'a> {
    let (state, style) = match (&node.closed, node.alive) {
        (_, false) => (format!("silent {}", output::duration(node.last_heartbeat_seconds)), Color::Red.into()),
        (Some(closed), true) => (closed.clone(), Color::Yellow.into()),
        (None, true) if device.is_some_and(|device| device.job.is_some()) => (String::new(), Style::new()),
        (None, true) => (String::new(), Style::new().add_modifier(Modifier::DIM)),
    };
    let (name, job, progress) = match device {
        Some(device) => (device.name.as_str(), output::device_job(device), device.progress.as_ref()),
        None => ("none", String::new(), None),
    };
    Row::new([plain(&node.node.0), plain(name), Span::from(job), progress.map(bar).unwrap_or_default(), plain(&state)])
        .style(style)
}

fn running_row(job: &JobView) -> Row<'_> {
    let left = job.progress.and_then(|progress| progress.eta_seconds).map(output::duration).unwrap_or_default();
    Row::new([
        Span::from(name(job)),
        plain(job.tenant.as_str()),
        job.node.as_ref().map(|node| plain(&node.0)).unwrap_or_default(),
        job.progress.as_ref().map_or(Span::from("starting"), bar),
        Span::from(left),
    ])
}

fn waiting_row(job: &JobView) -> Row<'_> {
    Row::new([
        Span::from(name(job)),
        plain(job.tenant.as_str()),
        Span::from(job.priority.to_string()),
        plain(job.reason.as_deref().unwrap_or_default()),
    ])
}

fn tenant_row(view: &TenantView) -> Row<'_> {
    let quota = &view.spec.quota;
    let of = |now: String, limit: Option<String>| limit.map_or(now.clone(), |limit| format!("{now}/{limit}"));
    let row = Row::new([
        plain(view.tenant.as_str()),
        Span::from(view.spec.share.to_string()),
        Span::from(format!("{:.0}", view.usage)),
        Span::from(of(view.devices.to_string(), quota.devices.map(|n| n.to_string()))),
        Span::from(view.queued.to_string()),
        Span::from(view.running.to_string()),
        Span::from(of(format!("{:.0}", view.day), quota.device_seconds.map(|n| n.to_string()))),
        Span::from(if view.paused { "paused" } else { "" }),
    ]);
    if view.paused { row.style(Color::Yellow) } else { row }
}

/// `██████░░░░ denoise 14/24`
fn bar(progress: &Progress) -> Span<'static> {
    let Progress { stage, done, total, .. } = *progress;
    let stage = stage.as_str();
    if total == 0 {
        return Span::from(stage);
    }
    // In u64: the product of two u32 may not fit into one.
    let full = (u64::from(BAR_CELLS) * u64::from(done.min(total)) / u64::from(total)) as usize;
    let bar = "█".repeat(full) + &"░".repeat(BAR_CELLS as usize - full);
    Span::from(format!("{bar} {stage} {done}/{total}"))
}

/// Text from the farm: it may not control the terminal.
fn plain(text: &str) -> Span<'static> {
    Span::from(clean(text).into_owned())
}

#[cfg(test)]
mod tests;
