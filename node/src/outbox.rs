//! The node's reports on its own disk, from before they are sent until they are acknowledged.
//!
//! One file of lines: a checksum, a space, and a [`Record`] as JSON. Reports are appended and synced, acknowledged ones are
//! crossed out by a line of their own, and the file is written anew when it has become long or nothing is left in it. A
//! file that was cut off, or damaged, holds what its whole lines before that say.
//!
//! What it is for: a report survives the node's process, so one that has ended well is told of even if the node dies before
//! the scheduler has heard it. A new process is proof to the scheduler that the old one's attempts are over, and their
//! leases with them, so a late report changes nothing there: it is counted, and acknowledged. The clip is not lost by that:
//! `result.json` in the store is the truth, and the job's next attempt finds it and renders nothing.
//!
//! A disk that is full or broken is no reason to stop rendering: reports stay in memory, and the file is written whole as
//! soon as that works again.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use anyhow::Context;
use farm_core::wire::to_scheduler::AttemptReport;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Commands that wait for the disk.
const QUEUE: usize = 1024;
/// A file that is longer than this and mostly crossed out is written anew.
const LONG: u64 = 4 << 20;
/// A file is never longer than this; reports that have no room in it stay in memory.
const MAX_FILE: u64 = 64 << 20;
/// Reports in a file; more are no node's.
const MAX_REPORTS: usize = 4096;
/// A disk that failed is tried again after this.
const RETRY: Duration = Duration::from_secs(5);
/// Hex digits of a line's checksum.
const CHECKSUM: usize = 16;

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Record {
    Report { number: u64, report: AttemptReport },
    Gone { number: u64 },
}

impl Record {
    fn line(&self) -> io::Result<Vec<u8>> {
        let json = serde_json::to_string(self)?;
        Ok(format!("{} {json}\n", checksum(json.as_bytes())).into_bytes())
    }

    /// None if the line is not whole.
    fn of_line(line: &[u8]) -> Option<Self> {
        let (sum, json) = line.split_at_checked(CHECKSUM)?;
        let json = json.strip_prefix(b" ")?;
        if sum != checksum(json).as_bytes() {
            return None;
        }
        serde_json::from_slice(json).ok()
    }
}

fn checksum(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    digest[..CHECKSUM / 2].iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What the file says, or should say.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outbox(BTreeMap<u64, AttemptReport>);

impl Outbox {
    fn apply(&mut self, record: Record) {
        match record {
            Record::Report { number, report } => drop(self.0.insert(number, report)),
            Record::Gone { number } => drop(self.0.remove(&number)),
        }
    }

    /// Of a file: what its lines say up to the first that is not whole, and how many bytes those are.
    fn read(bytes: &[u8]) -> (Self, usize) {
        let (mut outbox, mut whole) = (Self::default(), 0);
        for line in bytes.split_inclusive(|byte| *byte == b'\n') {
            let Some(record) = line.strip_suffix(b"\n").and_then(Record::of_line) else { break };
            outbox.apply(record);
            whole += line.len();
            if outbox.0.len() > MAX_REPORTS {
                outbox.0.pop_first();
            }
        }
        (outbox, whole)
    }

    /// A file that says this and nothing else.
    fn lines(&self) -> io::Result<Vec<u8>> {
        let mut lines = Vec::new();
        for (number, report) in &self.0 {
            lines.extend(Record::Report { number: *number, report: report.clone() }.line()?);
        }
        Ok(lines)
    }
}

/// The file, and what it says.
pub struct OutboxFile {
    path: PathBuf,
    outbox: Outbox,
    /// Open for appending, with this many bytes; none if it has to be written anew.
    file: Option<(File, u64)>,
}

impl OutboxFile {
    /// Reads what is there. The folder is this process's own.
    pub fn open(data: &Path) -> anyhow::Result<Self> {
        let path = data.join("outbox");
        let mut bytes = Vec::new();
        match File::open(&path) {
            Ok(file) => {
                file.take(MAX_FILE)
                    .read_to_end(&mut bytes)
                    .with_context(|| format!("cannot read {}", path.display()))?;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        }
        let (outbox, whole) = Outbox::read(&bytes);
        if whole < bytes.len() {
            tracing::warn!(file = %path.display(), lost = bytes.len() - whole, "the end of the outbox is damaged");
        }
        let mut file = Self { path, outbox, file: None };
        // In one piece again, and without what is crossed out.
        file.rewrite();
        Ok(file)
    }

    /// Reports that are not acknowledged, by number.
    pub fn pending(&self) -> Vec<(u64, AttemptReport)> {
        self.outbox.0.iter().map(|(number, report)| (*number, report.clone())).collect()
    }

    fn keep(&mut self, number: u64, report: AttemptReport) {
        let record = Record::Report { number, report };
        let written = self.append(&record, true);
        self.outbox.apply(record);
        self.settle(written);
    }

    fn forget(&mut self, number: u64) {
        let record = Record::Gone { number };
        // Not synced: if it is lost, a report is sent once more.
        let written = self.append(&record, false);
        self.outbox.apply(record);
        self.settle(written);
    }

    fn append(&mut self, record: &Record, sync: bool) -> io::Result<()> {
        let Some((file, bytes)) = &mut self.file else { return Ok(()) };
        let line = record.line()?;
        if *bytes + line.len() as u64 > MAX_FILE {
            return Err(io::Error::other("the outbox is full"));
        }
        file.write_all(&line)?;
        *bytes += line.len() as u64;
        if sync { file.sync_data() } else { Ok(()) }
    }

    /// After a change: writes the file anew if it is no good any more, or longer than it has to be.
    fn settle(&mut self, written: io::Result<()>) {
        if let Err(error) = written {
            tracing::error!(file = %self.path.display(), %error, "cannot write to the outbox; reports stay in memory");
            // Half a line may be in it.
            self.file = None;
        }
        let long = |bytes: u64| bytes > LONG || (self.outbox.0.is_empty() && bytes > 0);
        if self.file.as_ref().is_none_or(|(_, bytes)| long(*bytes)) {
            self.rewrite();
        }
    }

    fn rewrite(&mut self) {
        let failed = self.file.is_none();
        self.file = match self.try_rewrite() {
            Ok(file) => {
                if failed {
                    tracing::debug!(file = %self.path.display(), reports = self.outbox.0.len(), "the outbox is written");
                }
                Some(file)
            }
            Err(error) => {
                tracing::warn!(file = %self.path.display(), %error, "the outbox cannot be written; trying again");
                None
            }
        };
    }

    fn try_rewrite(&self) -> io::Result<(File, u64)> {
        let lines = self.outbox.lines()?;
        if lines.len() as u64 > MAX_FILE {
            return Err(io::Error::other("more reports than the outbox may hold"));
        }
        let new = self.path.with_extension("new");
        let mut file = File::options().create(true).append(true).open(&new)?;
        file.set_len(0)?;
        file.write_all(&lines)?;
        file.sync_data()?;
        std::fs::rename(&new, &self.path)?;
        Ok((file, lines.len() as u64))
    }

    /// Starts the thread that writes. `kept` is told each report that is on disk, or that the disk cannot take.
    pub fn start(self, kept: impl Fn(u64) + Send + 'static) -> io::Result<Writer> {
        let (commands, inbox) = sync_channel(QUEUE);
        thread::Builder::new().name("outbox".to_owned()).spawn(move || write_all(self, &inbox, kept))?;
        Ok(Writer { commands })
    }
}

enum Command {
    Keep(u64, AttemptReport),
    Forget(u64),
}

/// The way to the thread that writes: whoever has something to write does not wait for a disk.
pub struct Writer {
    commands: SyncSender<Command>,
}

impl Writer {
    pub fn keep(&self, number: u64, report: AttemptReport) {
        self.command(Command::Keep(number, report));
    }

    pub fn forget(&self, number: u64) {
        self.command(Command::Forget(number));
    }

    fn command(&self, command: Command) {
        if self.commands.try_send(command).is_err() {
            tracing::error!("the outbox does not keep up; a change stays in memory");
        }
    }
}

fn write_all(mut file: OutboxFile, inbox: &Receiver<Command>, kept: impl Fn(u64)) {
    loop {
        match inbox.recv_timeout(RETRY) {
            Ok(Command::Keep(number, report)) => {
                file.keep(number, report);
                kept(number);
            }
            Ok(Command::Forget(number)) => file.forget(number),
            Err(RecvTimeoutError::Timeout) if file.file.is_none() => file.rewrite(),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use farm_core::id::{AttemptKey, AttemptNo, Epoch, JobId};
    use farm_core::wire::to_scheduler::AttemptOutcome;
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;

    fn report(step: u32) -> AttemptReport {
        let key = AttemptKey { job: JobId(Uuid::from_u128(9)), attempt: AttemptNo(step), epoch: Epoch(5) };
        AttemptReport { key, outcome: AttemptOutcome::Interrupted { step } }
    }

    fn reopened(data: &Path) -> Vec<u64> {
        OutboxFile::open(data).unwrap().pending().into_iter().map(|(number, _)| number).collect()
    }

    #[test]
    fn reports_survive_a_restart_until_they_are_acknowledged() {
        let data = tempfile::tempdir().unwrap();
        let mut file = OutboxFile::open(data.path()).unwrap();
        (1..=3).for_each(|number| file.keep(number, report(number as u32)));
        file.forget(2);
        assert_eq!(OutboxFile::open(data.path()).unwrap().pending(), [(1, report(1)), (3, report(3))]);
        let mut file = OutboxFile::open(data.path()).unwrap();
        file.forget(1);
        file.forget(3);
        assert!(reopened(data.path()).is_empty());
        assert_eq!(std::fs::metadata(data.path().join("outbox")).unwrap().len(), 0, "nothing is left behind");
    }

    #[test]
    fn a_disk_that_fails_loses_nothing_and_is_tried_again() {
        let data = tempfile::tempdir().unwrap();
        let mut file = OutboxFile::open(data.path()).unwrap();
        file.keep(1, report(1));
        // Neither appended to nor written anew.
        let blocked = data.path().join("outbox.new");
        std::fs::create_dir(&blocked).unwrap();
        file.settle(Err(io::ErrorKind::StorageFull.into()));
        file.keep(2, report(2));
        file.forget(1);
        assert!(file.file.is_none());
        assert_eq!(file.pending(), [(2, report(2))]);
        std::fs::remove_dir(&blocked).unwrap();
        file.rewrite();
        file.keep(3, report(3));
        assert_eq!(reopened(data.path()), [2, 3]);
    }

    #[test]
    fn whoever_keeps_a_report_hears_when_it_is_on_disk() {
        let data = tempfile::tempdir().unwrap();
        let (tell, told) = std::sync::mpsc::channel();
        let writer = OutboxFile::open(data.path()).unwrap().start(move |number| tell.send(number).unwrap()).unwrap();
        writer.keep(7, report(7));
        assert_eq!(told.recv_timeout(Duration::from_secs(20)), Ok(7));
        assert_eq!(reopened(data.path()), [7]);
    }

    /// Numbers from 1 are kept in order; `forget` crosses some of those out.
    fn records() -> impl Strategy<Value = Vec<Record>> {
        let forgets = prop::collection::vec(prop::option::of(0..30u64), 0..40);
        forgets.prop_map(|forgets| {
            let mut last = 0;
            let mut record = |forget| match forget {
                Some(number) => Record::Gone { number },
                None => {
                    last += 1;
                    Record::Report { number: last, report: report(last as u32) }
                }
            };
            forgets.into_iter().map(&mut record).collect()
        })
    }

    proptest! {
        #[test]
        fn any_prefix_of_a_file_recovers_what_its_whole_lines_say(
            records in records(), cut in 0.0..1.0f64, damage in prop::option::of((0.0..1.0f64, 1..=255u8)),
        ) {
            // After each line: the length so far, and what is to be recovered there.
            let (mut file, mut outbox, mut states) = (Vec::new(), Outbox::default(), vec![(0, Outbox::default())]);
            for record in records {
                file.extend(record.line().unwrap());
                outbox.apply(record);
                states.push((file.len(), outbox.clone()));
            }
            let at = |share: f64| (share * file.len() as f64) as usize;
            let (cut, mut good) = (at(cut), at(cut));
            let mut read = file[..cut].to_vec();
            if let Some((share, bits)) = damage && let Some(byte) = read.get_mut(at(share)) {
                *byte ^= bits;
                good = good.min(at(share));
            }
            let (whole, expected) = states.iter().rev().find(|(length, _)| *length <= good).unwrap();
            prop_assert_eq!(Outbox::read(&read), (expected.clone(), *whole));
            prop_assert_eq!(&Outbox::read(&expected.lines().unwrap()).0, expected, "a file written anew says the same");
        }
    }
}
