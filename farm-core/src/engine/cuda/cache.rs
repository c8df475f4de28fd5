//! Compiled kernels on disk, by what they were compiled from.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use uuid::Uuid;

/// The file with this name's `inputs`, made if it is not there yet. `make` writes to the path that it gets; what it has
/// written appears under its name whole or not at all, so processes may do this at the same time.
///
/// The folder is `$MOCHI_FARM_CACHE`, or `mochi-farm/kernels` in the user's cache folder. If it cannot be written, so in a
/// container without a home, a folder of this user's in the temporary one is taken.
pub fn file<E: From<io::Error>>(
    name: &str,
    inputs: &[&[u8]],
    make: impl FnOnce(&Path) -> Result<(), E>,
) -> Result<PathBuf, E> {
    let mut digest = Sha256::new();
    for input in inputs {
        digest.update((input.len() as u64).to_le_bytes());
        digest.update(input);
    }
    let dir = folder()?;
    let path = dir.join(format!("{:.32}-{name}", format!("{:x}", digest.finalize())));
    if path.exists() {
        return Ok(path);
    }
    let draft = dir.join(format!(".{}-{name}", Uuid::now_v7()));
    let made = make(&draft).and_then(|()| Ok(fs::rename(&draft, &path)?));
    if made.is_err() {
        // What it left, if anything, is of no use.
        let _ = fs::remove_file(&draft);
    }
    made.map(|()| path)
}

fn folder() -> io::Result<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(dir) = set("MOCHI_FARM_CACHE") {
        fs::create_dir_all(&dir)?;
        return Ok(dir);
    }
    let user = set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache")));
    if let Some(dir) = user.map(|dir| dir.join("mochi-farm").join("kernels"))
        && fs::create_dir_all(&dir).is_ok()
    {
        return Ok(dir);
    }
    // What is loaded from here becomes part of this program, so nobody else may write to it.
    // SAFETY: it only asks for a number.
    let user = unsafe { libc::geteuid() };
    let dir = std::env::temp_dir().join(format!("mochi-farm-{user}"));
    match fs::DirBuilder::new().mode(0o700).create(&dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let found = fs::symlink_metadata(&dir)?;
    if !found.is_dir() || found.uid() != user || found.mode() & 0o022 != 0 {
        let text = format!("{} is not a folder of this user's alone; set MOCHI_FARM_CACHE", dir.display());
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
    }
    Ok(dir)
}
