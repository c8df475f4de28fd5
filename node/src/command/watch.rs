//! What a person sees of a command that takes long, and how it is stopped.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use farm_core::job::state::{Progress, Stage};
use indicatif::{ProgressBar, ProgressStyle};

/// Set by Ctrl-C or SIGTERM; looked at after every step. A second signal ends the process at once.
pub fn stop_on_signals() -> anyhow::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = stop.clone();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        runtime.block_on(async {
            use tokio::signal::unix::{SignalKind, signal};
            let (Ok(mut interrupt), Ok(mut terminate)) =
                (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
            else {
                return;
            };
            for _ in 0..2 {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                }
                if flag.swap(true, Ordering::Relaxed) {
                    std::process::exit(130);
                }
            }
        });
    })?;
    Ok(stop)
}

pub fn progress_bar() -> ProgressBar {
    let style = ProgressStyle::with_template("{prefix:8} {wide_bar} {pos}/{len} {msg}");
    ProgressBar::new(1).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// Shows progress on a terminal as a bar, in a log as lines.
pub struct Show {
    bar: ProgressBar,
    /// The last line for those who see no bar.
    shown: Option<(Stage, u32)>,
}

impl Show {
    pub fn new(bar: ProgressBar) -> Self {
        Self { bar, shown: None }
    }

    pub fn progress(&mut self, progress: Progress) {
        // A log gets a line for every step, and for the beginning of the other stages.
        let line = (progress.stage, if progress.stage == Stage::Denoise { progress.done } else { 0 });
        if self.bar.is_hidden() && self.shown != Some(line) {
            self.shown = Some(line);
            match progress.stage {
                Stage::Denoise => eprintln!("denoise {}/{}", progress.done, progress.total),
                stage => eprintln!("{}", stage.as_str()),
            }
        }
        self.bar.set_prefix(progress.stage.as_str());
        self.bar.set_length(progress.total.into());
        self.bar.set_position(progress.done.into());
        let unit = match progress.stage {
            Stage::Denoise => "steps",
            Stage::Decode => "frames",
            Stage::Starting | Stage::Text | Stage::Upload => "",
        };
        let left = progress.eta_seconds.map(|eta| format!(", about {eta:.0} s left")).unwrap_or_default();
        self.bar.set_message(format!("{unit}{left}"));
    }

    pub fn warning(&self, message: &str) {
        self.bar.suspend(|| eprintln!("warning: {message}"));
    }
}
