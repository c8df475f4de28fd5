//! What goes to the terminal. Text from the server is untrusted: it passes [`clean`] first.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::{self, IsTerminal, Write};

use comfy_table::{ContentArrangement, Table, presets};
use farm_core::api::{BatchView, DeviceView, JobView};
use farm_core::job::state::{JobState, Progress};
use serde::Serialize;

use crate::error::Error;

/// One line to standard output.
pub fn line(text: &str) -> Result<(), Error> {
    let mut out = io::stdout().lock();
    writeln!(out, "{text}").and_then(|()| out.flush()).map_err(Error::Output)
}

/// One JSON value on a line of its own.
pub fn json(value: &impl Serialize) -> Result<(), Error> {
    line(&serde_json::to_string(value).map_err(|error| Error::Output(error.into()))?)
}

/// Text without control characters and without the marks that turn the direction of writing: neither can move the
/// cursor, colour the screen or make one name look like another.
pub fn clean(text: &str) -> Cow<'_, str> {
    let bad = |c: char| c.is_control() || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    match text.chars().any(bad) {
        true => text.chars().map(|c| if bad(c) { '\u{fffd}' } else { c }).collect::<String>().into(),
        false => text.into(),
    }
}

/// At most `chars` characters, the last an ellipsis if there were more.
pub fn cut(text: &str, chars: usize) -> Cow<'_, str> {
    match text.char_indices().nth(chars) {
        Some(_) => text.chars().take(chars.saturating_sub(1)).chain(['…']).collect::<String>().into(),
        None => text.into(),
    }
}

/// What people call a job: their own name for the line, or the short id.
pub fn name(job: &JobView) -> String {
    match &job.id {
        Some(id) => clean(&cut(id, 40)).into_owned(),
        None => job.job.short(),
    }
}

/// `batch     5a0c31f2  7 of 12 done, 4 running, 1 queued, about 40 s left`
pub fn batch(batch: &BatchView) -> String {
    format!("batch     {}  {}", batch.submission.short(), clean(&batch.summary))
}

/// What a device works for.
pub fn device_job(device: &DeviceView) -> String {
    match device.job {
        Some(job) if device.helps => format!("helps {}", job.short()),
        Some(job) => job.short(),
        None => "idle".to_owned(),
    }
}

/// `denoise 12/24, about 3 s left`
pub fn progress(progress: &Progress) -> String {
    let mut text = progress.stage.as_str().to_owned();
    if progress.total > 0 {
        text += &format!(" {}/{}", progress.done, progress.total);
    }
    if let Some(eta) = progress.eta_seconds {
        text += &format!(", about {} left", duration(eta));
    }
    text
}

/// Seconds in words that suit their size.
pub fn duration(seconds: f32) -> String {
    let seconds = if seconds.is_finite() { seconds.max(0.0).round() as u64 } else { return "unknown time".into() };
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", (seconds + 30) / 60),
        _ => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
    }
}

pub fn plural(count: u64, one: &str) -> String {
    if count == 1 { format!("1 {one}") } else { format!("{count} {one}s") }
}

/// `3 queued, 1 done`: states that occur.
pub fn counts(jobs: &BTreeMap<JobState, u64>) -> String {
    let parts: Vec<_> = jobs
        .iter()
        .filter(|(_, count)| **count > 0)
        .map(|(state, count)| format!("{count} {}", state.as_str()))
        .collect();
    parts.join(", ")
}

/// A plain table, as wide as the terminal or, in a pipe, as its text.
pub fn table<const N: usize>(header: [&str; N], rows: impl IntoIterator<Item = [String; N]>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header.map(str::to_uppercase));
    if io::stdout().is_terminal() {
        table.set_content_arrangement(ContentArrangement::Dynamic);
    }
    for row in rows {
        table.add_row(row.map(|cell| clean(&cell).into_owned()));
    }
    table.lines().map(|line| line.trim_end().to_owned()).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_from_the_server_can_control_the_terminal() {
        assert_eq!(
            clean("a\u{1b}[31mb\r\n\u{9b}\u{202e}c\t"),
            "a\u{fffd}[31mb\u{fffd}\u{fffd}\u{fffd}\u{fffd}c\u{fffd}"
        );
        assert_eq!(clean("rød €🦀"), "rød €🦀");
        let table = table(["name"], [["a\u{1b}[2Jb".to_owned()]]);
        assert!(!table.contains('\u{1b}'), "{table:?}");
    }

    #[test]
    fn durations_suit_their_size() {
        let words: Vec<_> = [0.4, 119.4, 150.0, 7260.0, -1.0, f32::NAN].into_iter().map(duration).collect();
        assert_eq!(words, ["0 s", "119 s", "3 min", "2 h 1 min", "0 s", "unknown time"]);
    }

    #[test]
    fn long_text_is_cut_by_characters() {
        assert_eq!(cut("äöü", 3), "äöü");
        assert_eq!(cut("äöüx", 3), "äö…");
    }

    #[test]
    fn only_states_that_occur_are_counted() {
        let jobs = BTreeMap::from([(JobState::Queued, 3), (JobState::Running, 0), (JobState::Done, 1)]);
        assert_eq!(counts(&jobs), "3 queued, 1 done");
    }
}
