//! The node's folder on local disk: clips on their way from the encoder to the store.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use tempfile::TempDir;

/// A folder that this process owns while it runs.
pub struct Scratch {
    clips: PathBuf,
    // Held locked; the lock ends with the process, however that ends.
    _lock: File,
}

impl Scratch {
    /// Takes `data` for this process, making it if it is absent, and removes what a killed process left in it.
    pub fn open(data: &Path) -> anyhow::Result<Self> {
        std::fs::create_dir_all(data).with_context(|| format!("cannot make data folder {}", data.display()))?;
        let lock_path = data.join("lock");
        let lock = File::create(&lock_path).with_context(|| format!("cannot write {}", lock_path.display()))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => bail!(
                "data folder {} belongs to a node that is running; give this one another --name or --data",
                data.display()
            ),
            Err(TryLockError::Error(e)) => {
                return Err(e).with_context(|| format!("cannot lock {}", lock_path.display()));
            }
        }
        let clips = data.join("clips");
        let scratch = Self { clips, _lock: lock };
        scratch.clear()?;
        std::fs::create_dir(&scratch.clips)
            .with_context(|| format!("cannot make scratch folder {}", scratch.clips.display()))?;
        Ok(scratch)
    }

    /// A folder for one attempt, removed when dropped.
    pub fn attempt(&self) -> std::io::Result<TempDir> {
        TempDir::new_in(&self.clips)
    }

    /// Removes everything, also what is in use.
    pub fn clear(&self) -> anyhow::Result<()> {
        match std::fs::remove_dir_all(&self.clips) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(e).with_context(|| format!("cannot clear scratch folder {}", self.clips.display()))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_data_folder_has_one_node_and_starts_without_a_dead_nodes_files() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("node-a");
        let first = Scratch::open(&data).unwrap();
        let left_over = first.attempt().unwrap().keep();
        let error = Scratch::open(&data).err().unwrap().to_string();
        assert!(error.contains("belongs to a node that is running"), "{error}");
        assert!(left_over.is_dir(), "a refused second node deletes nothing");

        drop(first);
        let second = Scratch::open(&data).unwrap();
        assert!(!left_over.exists());
        let attempt = second.attempt().unwrap();
        let path = attempt.path().to_owned();
        assert!(path.is_dir());
        drop(attempt);
        assert!(!path.exists());
    }
}
