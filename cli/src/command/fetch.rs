//! `farmctl fetch`, and the fetching that `submit --out` does.

use std::fs::{File, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use farm_core::api::JobView;
use farm_core::id::{JobId, SubmissionId};
use farm_core::job::state::JobState;
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::args::Fetch;
use crate::client::{Client, JobQuery, Named};
use crate::error::{Error, Status};
use crate::output::{self, clean, name};

const MAX_NAME_BYTES: usize = 120;

/// A clip that lies in a folder, checked.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Fetched {
    pub job: JobId,
    pub file: PathBuf,
    pub bytes: u64,
    pub sha256: String,
}

/// What a command has fetched so far.
struct Haul {
    files: Vec<Fetched>,
    status: Status,
}

pub async fn run(client: &Client, args: Fetch) -> Result<Status, Error> {
    create_folder(&args.out)?;
    let mut haul = Haul { files: Vec::new(), status: Status::Ok };
    for id in &args.ids {
        match client.find(id).await? {
            Named::Job(detail) => haul.take(client, &detail.view, &args).await?,
            Named::Batch(batch) => haul.take_batch(client, batch.submission, &args).await?,
        }
    }
    if args.output.json {
        output::json(&haul.files)?;
    }
    Ok(haul.status)
}

impl Haul {
    async fn take(&mut self, client: &Client, job: &JobView, args: &Fetch) -> Result<(), Error> {
        match fetch_clip(client, job, &args.out).await {
            Ok(file) => {
                if !args.output.json {
                    output::line(&clean(&file.file.to_string_lossy()))?;
                }
                self.files.push(file);
            }
            // The other clips may well be there.
            Err(error @ (Error::Refused { .. } | Error::Usage { .. })) => {
                eprintln!("{}: {error}", name(job));
                self.status = Status::ClipFailed;
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// All clips of the batch that are there; the others are not missed.
    async fn take_batch(&mut self, client: &Client, batch: SubmissionId, args: &Fetch) -> Result<(), Error> {
        let mut query = JobQuery { state: Some(JobState::Done), submission: Some(batch), ..JobQuery::default() };
        loop {
            let page = client.jobs(query).await?;
            for job in &page.jobs {
                self.take(client, job, args).await?;
            }
            match page.next {
                Some(next) => query.after = Some(next),
                None => return Ok(()),
            }
        }
    }
}

pub fn create_folder(dir: &Path) -> Result<(), Error> {
    std::fs::create_dir_all(dir).map_err(Error::file("create the folder", dir))
}

/// Copies a job's clip to `dir`, checks its sha-256 and gives it a name that no other job's file has. A clip that is
/// there already is left as it is.
pub async fn fetch_clip(client: &Client, job: &JobView, dir: &Path) -> Result<Fetched, Error> {
    let mut clip = client.clip(job.job).await?;
    let expected = clip.sha256.clone();
    let fetched = |file: PathBuf, bytes| Fetched { job: job.job, file, bytes, sha256: expected.clone() };

    let mut part = None;
    for file in file_names(job).into_iter().map(|name| dir.join(name)) {
        match File::open(&file) {
            Ok(existing) => {
                // A folder of that name cannot be read, and a file of another job has other content: try the next.
                match hash_file(existing) {
                    Ok((sha256, bytes)) if sha256 == expected => return Ok(fetched(file, bytes)),
                    _ => continue,
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(_) => continue,
        }
        let (temporary, bytes) = match part.take() {
            Some(part) => part,
            None => download(&mut clip, job, dir).await?,
        };
        // Two farmctl may fetch to one folder: whoever comes second takes another name.
        match temporary.persist_noclobber(&file) {
            Ok(_) => return Ok(fetched(file, bytes)),
            Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => part = Some((error.file, bytes)),
            Err(error) => return Err(Error::file("write", &file)(error.error)),
        }
    }
    Err(Error::with_help(
        format!("{} holds other files under every name of clip {}", dir.display(), name(job)),
        "give another folder with --out",
    ))
}

async fn download(
    clip: &mut crate::client::Clip,
    job: &JobView,
    dir: &Path,
) -> Result<(tempfile::NamedTempFile, u64), Error> {
    let mut temporary = tempfile::Builder::new()
        .prefix(".farmctl-")
        .suffix(".part")
        // As any new file; the process's mask narrows it.
        .permissions(Permissions::from_mode(0o666))
        .tempfile_in(dir)
        .map_err(Error::file("write to", dir))?;
    let mut hash = Sha256::new();
    let mut bytes = 0;
    while let Some(chunk) = clip.chunk().await? {
        hash.update(&chunk);
        bytes += chunk.len() as u64;
        temporary.write_all(&chunk).map_err(Error::file("write to", dir))?;
    }
    let found = hex(&hash.finalize());
    if found != clip.sha256 {
        return Err(Error::with_help(
            format!("clip {} arrived damaged: sha-256 {found}, expected {}", name(job), clip.sha256),
            format!("try `farmctl fetch {}` again", job.job.short()),
        ));
    }
    // The name must never show a file whose content a power cut can still take.
    temporary.as_file().sync_all().map_err(Error::file("write to", dir))?;
    Ok((temporary, bytes))
}

fn hash_file(mut file: File) -> io::Result<(String, u64)> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    let mut bytes = 0;
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok((hex(&hash.finalize()), bytes)),
            read => {
                hash.update(&buffer[..read]);
                bytes += read as u64;
            }
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The names a clip may have, best first: the user's own, then with the job's id.
fn file_names(job: &JobView) -> Vec<String> {
    let whole = job.job.to_string();
    match job.id.as_deref().and_then(file_stem) {
        Some(stem) => {
            vec![format!("{stem}.mp4"), format!("{stem}-{}.mp4", job.job.short()), format!("{stem}-{whole}.mp4")]
        }
        None => vec![format!("{}.mp4", job.job.short()), format!("{whole}.mp4")],
    }
}

/// A name from the server as part of a file name: no separators, no leading dot, no control characters.
fn file_stem(name: &str) -> Option<String> {
    let mut stem: String =
        name.chars().map(|c| if c.is_alphanumeric() || matches!(c, '-' | '_' | '.' | ' ') { c } else { '_' }).collect();
    stem.truncate(stem.floor_char_boundary(MAX_NAME_BYTES));
    let stem = stem.trim();
    match stem.strip_prefix(['.', '-']) {
        Some(rest) => Some(format!("_{rest}")),
        None if stem.is_empty() => None,
        None => Some(stem.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_leave_the_folder_or_hide() {
        let stems: Vec<_> =
            ["../../etc/passwd", ".hidden", "-rf", "a\u{1b}[2Jb/c\\d", "", " ", "røde bold", "..", "\0"]
                .into_iter()
                .map(|name| file_stem(name).unwrap_or_else(|| "none".into()))
                .collect();
        assert_eq!(stems, ["_._.._etc_passwd", "_hidden", "_rf", "a__2Jb_c_d", "none", "none", "røde bold", "_.", "_"]);
        assert!(file_stem(&"ø".repeat(500)).unwrap().len() <= MAX_NAME_BYTES);
    }

    #[test]
    fn existing_content_is_recognised_by_its_hash() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.mp4");
        std::fs::write(&path, "abc").unwrap();
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(hash_file(File::open(path).unwrap()).unwrap(), (expected.into(), 3));
    }
}
