//! Shows jobs as they go: bars on a terminal, lines elsewhere, JSON lines for programs.
//!
//! Results go to standard output, everything that only says how it goes to standard error.

use std::collections::HashMap;
use std::io::{self, IsTerminal};
use std::path::Path;
use std::time::Duration;

use farm_core::api::JobView;
use farm_core::id::{AttemptNo, JobId};
use farm_core::job::state::{JobState, Stage};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::command::fetch::Fetched;
use crate::error::Error;
use crate::output::{self, clean, name};

pub struct Board(Mode);

enum Mode {
    Bars {
        screen: MultiProgress,
        total: ProgressBar,
        rows: HashMap<JobId, ProgressBar>,
    },
    Lines {
        shown: HashMap<JobId, Mark>,
        note: String,
    },
    /// Each job as it was last printed.
    Json {
        shown: HashMap<JobId, JobView>,
    },
}

/// What a plain line was last printed for: a stage is worth a line, and each quarter of a stage.
type Mark = (AttemptNo, Option<(Stage, u32)>);

impl Board {
    pub fn new(json: bool) -> Self {
        if json {
            return Self(Mode::Json { shown: HashMap::new() });
        }
        if !io::stderr().is_terminal() {
            return Self(Mode::Lines { shown: HashMap::new(), note: String::new() });
        }
        let screen = MultiProgress::new();
        let total = screen.add(ProgressBar::no_length().with_style(style("{spinner} {msg}")));
        // The display lives on while the scheduler is silent.
        total.enable_steady_tick(Duration::from_millis(200));
        Self(Mode::Bars { screen, total, rows: HashMap::new() })
    }

    /// The jobs that run now. One that is no longer among them loses its row.
    pub fn running(&mut self, jobs: &[JobView]) -> Result<(), Error> {
        match &mut self.0 {
            Mode::Bars { screen, total, rows } => {
                rows.retain(|id, bar| {
                    let keep = jobs.iter().any(|job| job.job == *id);
                    if !keep {
                        bar.finish_and_clear();
                        screen.remove(bar);
                    }
                    keep
                });
                for job in jobs {
                    let bar = rows.entry(job.job).or_insert_with(|| {
                        let bar = ProgressBar::new(1).with_style(style("  {prefix:24!} [{bar:24}] {msg}"));
                        screen.insert_before(total, bar.with_prefix(name(job)))
                    });
                    if let Some(progress) = &job.progress {
                        bar.set_length(u64::from(progress.total.max(1)));
                        bar.set_position(u64::from(progress.done));
                    }
                    bar.set_message(describe(job));
                }
            }
            Mode::Lines { shown, .. } => {
                shown.retain(|id, _| jobs.iter().any(|job| job.job == *id));
                for job in jobs {
                    let mark = (job.attempt, job.progress.map(|p| (p.stage, 4 * p.done / p.total.max(1))));
                    if shown.insert(job.job, mark) != Some(mark) {
                        eprintln!("{:<9} {}  {}", "running", name(job), describe(job));
                    }
                }
            }
            Mode::Json { shown } => {
                shown.retain(|id, _| jobs.iter().any(|job| job.job == *id));
                for job in jobs {
                    if shown.get(&job.job) != Some(job) {
                        output::json(job)?;
                        shown.insert(job.job, job.clone());
                    }
                }
            }
        }
        Ok(())
    }

    /// How it stands with all jobs, and why nothing runs if that is so.
    pub fn totals(&mut self, summary: &str, waiting: Option<&str>) {
        let waiting = waiting.map(clean);
        match &mut self.0 {
            Mode::Bars { total, .. } => {
                let mut text = clean(summary).into_owned();
                if let Some(waiting) = waiting {
                    text += &format!(" — {waiting}");
                }
                total.set_message(text);
            }
            Mode::Lines { note, .. } => {
                let waiting = waiting.unwrap_or_default();
                if *note != waiting && !waiting.is_empty() {
                    eprintln!("{:<9} {waiting}", "waiting");
                }
                *note = waiting.into_owned();
            }
            Mode::Json { .. } => {}
        }
    }

    /// The end of a job: a done one with the place of its clip, another with the reason.
    pub fn finished(&mut self, job: &JobView, file: Option<&Fetched>) -> Result<(), Error> {
        if let Mode::Json { .. } = self.0 {
            output::json(job)?;
            return file.map_or(Ok(()), output::json);
        }
        let what = match (job.state, file) {
            (JobState::Done, Some(file)) => printable(&file.file),
            (JobState::Done, None) => clean(job.clip.as_deref().unwrap_or("")).into_owned(),
            (_, _) => clean(job.reason.as_deref().unwrap_or("")).into_owned(),
        };
        self.line(&format!("{:<9} {}  {what}", job.state.as_str(), name(job)))?;
        for warning in &job.warnings {
            self.note(&format!("{:<9} {}  {}", "warning", name(job), clean(warning)));
        }
        Ok(())
    }

    /// A remark for people.
    pub fn note(&self, text: &str) {
        match &self.0 {
            Mode::Bars { screen, .. } => screen.suspend(|| eprintln!("{text}")),
            Mode::Lines { .. } | Mode::Json { .. } => eprintln!("{text}"),
        }
    }

    fn line(&self, text: &str) -> Result<(), Error> {
        match &self.0 {
            Mode::Bars { screen, .. } => screen.suspend(|| output::line(text)),
            Mode::Lines { .. } | Mode::Json { .. } => output::line(text),
        }
    }
}

impl Drop for Board {
    fn drop(&mut self) {
        if let Mode::Bars { screen, total, .. } = &self.0 {
            total.finish_and_clear();
            // A screen that cannot be cleared is not worth an error at the end.
            let _ = screen.clear();
        }
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar()) // the templates above are right, a test builds them
        .progress_chars("=> ")
}

fn describe(job: &JobView) -> String {
    let node = job.node.as_ref().map(|node| format!("on {}", clean(&node.0)));
    let progress = job.progress.as_ref().map_or("starting".to_owned(), output::progress);
    [Some(progress), node].into_iter().flatten().collect::<Vec<_>>().join(", ")
}

fn printable(path: &Path) -> String {
    clean(&path.to_string_lossy()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bar_templates_are_valid() {
        for template in ["{spinner} {msg}", "  {prefix:24!} [{bar:24}] {msg}"] {
            ProgressStyle::with_template(template).unwrap();
        }
    }
}
