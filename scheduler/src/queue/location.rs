//! Where a queue is.

use std::fmt;
use std::path::{Path, PathBuf, absolute};
use std::str::FromStr;

use url::Url;

use super::store::QueueError;

/// The queue's file in its folder.
pub const FILE: &str = "queue.sqlite";

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Location {
    /// A SQLite file. One scheduler at a time.
    File(PathBuf),
    /// A Postgres database. One scheduler leads, others stand by.
    Postgres(Url),
}

impl Location {
    /// The queue of a data folder.
    pub fn folder(folder: &Path) -> Self {
        Self::File(folder.join(FILE))
    }

    /// As the database driver wants it.
    pub(super) fn url(&self) -> Result<String, QueueError> {
        let file = match self {
            Self::Postgres(url) => return Ok(url.to_string()),
            Self::File(file) => file,
        };
        let bad = || QueueError::Location(format!("{} is not a path that a queue can have", file.display()));
        let path = absolute(file).map_err(|_| bad())?;
        let url = Url::from_file_path(path).map_err(|()| bad())?;
        Ok(format!("sqlite://{}?mode=rwc", url.path()))
    }
}

impl FromStr for Location {
    type Err = QueueError;

    /// A folder, a file that ends in `.sqlite`, or `postgres://USER@HOST/DATABASE`.
    fn from_str(place: &str) -> Result<Self, QueueError> {
        if place.starts_with("postgres:") || place.starts_with("postgresql:") {
            let url = Url::parse(place).map_err(|error| {
                QueueError::Location(format!("the queue's URL is none: {error}; write postgres://USER@HOST/DATABASE"))
            })?;
            if url.path().trim_start_matches('/').is_empty() {
                return Err(QueueError::Location(
                    "the queue's URL names no database; write postgres://USER@HOST/DATABASE".to_owned(),
                ));
            }
            return Ok(Self::Postgres(url));
        }
        if let Some((scheme, _)) = place.split_once("://") {
            return Err(QueueError::Location(format!(
                "queues are not kept in {scheme}; name a folder or postgres://USER@HOST/DATABASE"
            )));
        }
        match place {
            "" => Err(QueueError::Location("no queue is named; name a folder or a postgres:// URL".to_owned())),
            file if file.ends_with(".sqlite") => Ok(Self::File(file.into())),
            folder => Ok(Self::folder(Path::new(folder))),
        }
    }
}

/// Without a password.
impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(file) => write!(f, "{}", file.display()),
            Self::Postgres(url) => {
                let mut shown = url.clone();
                if shown.password().is_some() && shown.set_password(Some("…")).is_err() {
                    return f.write_str("postgres");
                }
                shown.set_query(None);
                write!(f, "{shown}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(place: &str) -> String {
        place.parse::<Location>().unwrap_err().to_string()
    }

    #[test]
    fn a_place_is_a_folder_a_file_or_a_postgres_database() {
        assert_eq!("data".parse::<Location>().unwrap(), Location::File("data/queue.sqlite".into()));
        assert_eq!("/a/b.sqlite".parse::<Location>().unwrap(), Location::File("/a/b.sqlite".into()));
        let odd = Location::folder(Path::new("/a b/c%?#é"));
        assert_eq!(odd.url().unwrap(), "sqlite:///a%20b/c%25%3F%23%C3%A9/queue.sqlite?mode=rwc");
        let url = "postgres://farm:secret@db/farm?sslmode=disable".parse::<Location>().unwrap();
        assert!(url.url().unwrap().contains("secret") && !url.to_string().contains("secret"), "{url}");
    }

    #[test]
    fn a_place_that_is_none_is_refused_with_what_to_write() {
        for (place, reason) in [
            ("", "no queue is named"),
            ("mysql://db/farm", "not kept in mysql"),
            ("postgres://db", "names no database"),
            ("postgres://[", "write postgres://USER@HOST/DATABASE"),
        ] {
            assert!(refusal(place).contains(reason), "{place}: {}", refusal(place));
        }
    }
}
