//! The file that a command makes of a clip.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

use crate::encode::{self, FrameSink, Mp4Sink, RawSink};

/// What the ending of the output's name asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Mp4,
    Rgb,
    Latent,
}

impl Kind {
    fn of(path: &Path) -> anyhow::Result<Self> {
        match path.extension().and_then(|end| end.to_str()) {
            Some("mp4") => Ok(Self::Mp4),
            Some("rgb") => Ok(Self::Rgb),
            Some("safetensors") => Ok(Self::Latent),
            _ => bail!("{} has to end in .mp4, .rgb or .safetensors", path.display()),
        }
    }
}

/// The file that is being made. It lies beside its place until it is finished, so that it is moved and not copied, and
/// removed on any way out.
pub struct Target {
    pub kind: Kind,
    out: PathBuf,
    pub unfinished: tempfile::NamedTempFile,
}

impl Target {
    pub fn create(out: &Path) -> anyhow::Result<Self> {
        let kind = Kind::of(out)?;
        if kind == Kind::Mp4 {
            encode::check()?;
        }
        let folder = out.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let unfinished = tempfile::Builder::new()
            .prefix(".farm-node-")
            .tempfile_in(folder)
            .with_context(|| format!("cannot write to {}", folder.display()))?;
        Ok(Self { kind, out: out.to_owned(), unfinished })
    }

    /// Where frames go. None for a latent.
    pub fn sink(&self, width: u32, height: u32) -> std::io::Result<Option<Box<dyn FrameSink>>> {
        open_sink(self.kind, self.unfinished.path(), width, height)
    }

    pub fn publish(self) -> anyhow::Result<PathBuf> {
        publish(self.unfinished, &self.out)?;
        Ok(self.out)
    }
}

pub fn open_sink(kind: Kind, path: &Path, width: u32, height: u32) -> std::io::Result<Option<Box<dyn FrameSink>>> {
    Ok(match kind {
        Kind::Mp4 => Some(Box::new(Mp4Sink::create(path, width, height)?)),
        Kind::Rgb => Some(Box::new(RawSink::create(path, width, height)?)),
        Kind::Latent => None,
    })
}

/// Moves the finished file to its place. Temporary files are private; a clip gets the usual rights.
fn publish(unfinished: tempfile::NamedTempFile, out: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    // SAFETY: umask only swaps a number of the process; nothing else sets it.
    let umask = unsafe {
        let umask = libc::umask(0o077);
        libc::umask(umask);
        umask
    };
    let rights = std::fs::Permissions::from_mode(0o666 & !umask);
    std::fs::set_permissions(unfinished.path(), rights).with_context(|| out.display().to_string())?;
    unfinished.persist(out).map_err(|error| error.error).with_context(|| format!("cannot write {}", out.display()))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ending_of_the_output_decides_what_is_written() {
        assert_eq!(Kind::of(Path::new("a/b.mp4")).unwrap(), Kind::Mp4);
        assert_eq!(Kind::of(Path::new("b.rgb")).unwrap(), Kind::Rgb);
        assert_eq!(Kind::of(Path::new("b.safetensors")).unwrap(), Kind::Latent);
        assert!(Kind::of(Path::new("mp4")).is_err() && Kind::of(Path::new("b.mov")).is_err());
    }
}
