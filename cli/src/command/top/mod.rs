//! `farmctl top`: the farm as it works, in a terminal.
//!
//! [`snapshot`] asks, [`screen`] draws a snapshot, [`keys`] changes what is looked at, and this file ties them to a
//! terminal. Without one, a snapshot is printed as text.

mod keys;
mod screen;
mod snapshot;
mod text;

use std::io::{self, IsTerminal};
use std::pin::Pin;
use std::time::Duration;

use crossterm::event::EventStream;
use futures::StreamExt;
use ratatui::DefaultTerminal;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, sleep};

use self::keys::Look;
use self::snapshot::Snapshot;
use crate::args::Output;
use crate::client::Client;
use crate::error::{Error, Status};
use crate::output;

const REFRESH: Duration = Duration::from_secs(1);

pub async fn run(client: &Client, args: Output) -> Result<Status, Error> {
    let first = snapshot::fetch(client).await?;
    if args.json {
        output::json(&first)?;
    } else if io::stdout().is_terminal() {
        let mut terminal = Screen::open()?;
        return live(&mut terminal.0, &client.impatient(), first).await;
    } else {
        text::lines(&first).iter().try_for_each(|line| output::line(line))?;
    }
    Ok(Status::Ok)
}

/// The terminal, given back as it was however we leave: at the end, with an error, or in a panic, for which ratatui
/// sets a hook.
struct Screen(DefaultTerminal);

impl Screen {
    fn open() -> Result<Self, Error> {
        ratatui::try_init().map(Self).map_err(Error::Output)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        ratatui::restore();
    }
}

async fn live(terminal: &mut DefaultTerminal, client: &Client, first: Snapshot) -> Result<Status, Error> {
    let signals = |kind| signal(kind).map_err(Error::Output);
    let mut terminate = signals(SignalKind::terminate())?;
    let mut hangup = signals(SignalKind::hangup())?;
    // The terminal gives Ctrl-C as a key; a signal comes from elsewhere.
    let mut interrupt = signals(SignalKind::interrupt())?;
    let mut events = EventStream::new();
    let mut look = Look::default();
    let mut snapshot = first;
    let mut taken = Instant::now();
    let mut trouble = None;
    let mut news: Pin<Box<dyn Future<Output = Result<Snapshot, Error>>>> = Box::pin(later(client));
    loop {
        let stale =
            trouble.as_ref().map(|error| format!("{error}; shown as it was {} s ago", taken.elapsed().as_secs()));
        look.clamp(screen::rows(&snapshot, look.tab));
        terminal.draw(|frame| screen::draw(frame, &snapshot, &mut look, stale.as_deref())).map_err(Error::Output)?;
        tokio::select! {
            outcome = &mut news => {
                match outcome {
                    Ok(new) => (snapshot, taken, trouble) = (new, Instant::now(), None),
                    // A scheduler that restarts or hands over comes back, and the screen says meanwhile how old it is.
                    Err(error @ Error::Unreachable { .. }) => trouble = Some(error),
                    Err(error) => return Err(error),
                }
                news = Box::pin(later(client));
            }
            event = events.next() => match event {
                Some(Ok(event)) if look.take(&event) => return Ok(Status::Ok),
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(Error::Output(error)),
                None => return Ok(Status::Ok),
            },
            _ = terminate.recv() => return Ok(Status::Ok),
            _ = hangup.recv() => return Ok(Status::Ok),
            _ = interrupt.recv() => return Ok(Status::Ok),
        }
    }
}

async fn later(client: &Client) -> Result<Snapshot, Error> {
    sleep(REFRESH).await;
    snapshot::fetch(client).await
}
