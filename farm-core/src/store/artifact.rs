//! Put, get and create-once over `object_store`. The only module that knows that crate.

use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    BackoffConfig, Error as DriverError, GetResult, MultipartUpload, ObjectStore, ObjectStoreExt, PutMode, PutPayload,
    RetryConfig,
};
use tokio::io::AsyncReadExt;
use url::Url;

/// Bytes of one part of a multipart upload, and the largest file that goes up in one request. S3 takes at most 10,000
/// parts, so a file may have 80 GiB.
const PART_BYTES: usize = 8 << 20;
/// Waits between tries of one operation, on top of the client's own retries of single requests.
const RETRY_WAITS: &[Duration] = &[Duration::from_millis(500), Duration::from_secs(2)];

/// What an operation on the store can end with; variants are what a caller branches on.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("bad store address {url:?}: {reason}")]
    Address { url: String, reason: String },
    #[error("{key} is not in {store}")]
    NotFound { key: String, store: String },
    #[error("{key} in {store} has {bytes} bytes, more than the {limit} expected at most")]
    TooLarge { key: String, store: String, bytes: u64, limit: u64 },
    #[error("cannot {operation} {key} in {store}: {}", chain(.source.as_ref()))]
    Failed { operation: &'static str, key: String, store: String, source: Box<dyn std::error::Error + Send + Sync> },
    #[error("store {store} cannot be used: {reason}")]
    Unusable { store: String, reason: String },
}

/// The message with those of its causes that say something new: the driver's outermost one often leaves the point out.
fn chain(error: &(dyn std::error::Error + Send + Sync + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

/// How a create-once put ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Create {
    Created,
    /// Somebody was first. After a retried request that may have been this very caller: read it and see.
    AlreadyExists,
}

/// The farm's object storage, below one prefix. Cloning shares the connections.
///
/// Every operation is retried a few times with growing waits and then fails with the key and the store in the message.
#[derive(Clone)]
pub struct ArtifactStore {
    driver: Arc<dyn ObjectStore>,
    /// Prepended to every key; empty unless the store is S3 (a local store is rooted at its folder).
    prefix: Path,
    url: String,
    waits: &'static [Duration],
}

impl std::fmt::Debug for ArtifactStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ArtifactStore({})", self.url)
    }
}

impl ArtifactStore {
    /// Opens `file:///folder`, a plain path of a folder (made if it is absent), `s3://bucket/prefix` (endpoint, region
    /// and keys from the environment's `AWS_…` variables) or `memory:` (this process only). Touches no network.
    pub fn open(url: &str) -> Result<Self, StoreError> {
        Self::open_with(
            url,
            std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?))),
        )
    }

    /// [`ArtifactStore::open`] with other variables than the environment's.
    pub fn open_with(url: &str, variables: impl IntoIterator<Item = (String, String)>) -> Result<Self, StoreError> {
        let bad = |reason: String| StoreError::Address { url: url.into(), reason };
        if url == "memory:" {
            return Ok(Self {
                driver: Arc::new(InMemory::new()),
                prefix: Path::default(),
                url: url.into(),
                waits: RETRY_WAITS,
            });
        }
        if url.starts_with("s3:") {
            return Self::open_s3(&Url::parse(url).map_err(|e| bad(e.to_string()))?, variables);
        }
        let folder = if url.starts_with("file:") {
            let parsed = Url::parse(url).map_err(|e| bad(e.to_string()))?;
            // `file:relative` parses as `/relative`, which nobody means.
            if !url.starts_with("file:///") {
                return Err(bad("write file:///absolute/path, or a plain path".into()));
            }
            parsed.to_file_path().map_err(|()| bad("write file:///absolute/path, or a plain path".into()))?
        } else if url.contains("://") {
            return Err(bad("known kinds are file:///folder, s3://bucket/prefix and memory:".into()));
        } else if url.is_empty() {
            return Err(bad("it is empty; give a folder or s3://bucket/prefix".into()));
        } else {
            PathBuf::from(url)
        };
        Self::open_folder(url, &folder)
    }

    fn open_folder(url: &str, folder: &FilePath) -> Result<Self, StoreError> {
        let unusable = |what: &str, e: &dyn std::fmt::Display| StoreError::Unusable {
            store: url.into(),
            reason: format!("cannot {what} folder {}: {e}", folder.display()),
        };
        std::fs::create_dir_all(folder).map_err(|e| unusable("make", &e))?;
        let folder = folder.canonicalize().map_err(|e| unusable("open", &e))?;
        // Synced, because a created result is the commit point of a job and has to outlive a power cut.
        let driver = LocalFileSystem::new_with_prefix(&folder).map_err(|e| unusable("open", &e))?.with_fsync(true);
        let url = Url::from_file_path(&folder).map_err(|()| unusable("open", &"its path is not absolute"))?;
        Ok(Self { driver: Arc::new(driver), prefix: Path::default(), url: url.into(), waits: RETRY_WAITS })
    }

    fn open_s3(url: &Url, variables: impl IntoIterator<Item = (String, String)>) -> Result<Self, StoreError> {
        let bad = |reason: String| StoreError::Address { url: url.to_string(), reason };
        let bucket = url.host_str().filter(|b| !b.is_empty()).ok_or_else(|| bad("write s3://bucket/prefix".into()))?;
        if url.query().is_some() || url.fragment().is_some() || url.port().is_some() || !url.username().is_empty() {
            return Err(bad("write s3://bucket/prefix; endpoint and keys come from AWS_… variables".into()));
        }
        let prefix = Path::from_url_path(url.path()).map_err(|e| bad(e.to_string()))?;
        let mut builder = AmazonS3Builder::new();
        for (name, value) in variables {
            if name.starts_with("AWS_")
                && let Ok(key) = name.to_ascii_lowercase().parse::<AmazonS3ConfigKey>()
            {
                // An endpoint that says http is taken at its word.
                let endpoint = matches!(key, AmazonS3ConfigKey::Endpoint | AmazonS3ConfigKey::S3Endpoint);
                if endpoint && value.starts_with("http://") {
                    builder = builder.with_allow_http(true);
                }
                builder = builder.with_config(key, value);
            }
        }
        // Short enough that a node can give a clip up and another can try before a user despairs.
        let retry = RetryConfig {
            max_retries: 4,
            retry_timeout: Duration::from_secs(30),
            backoff: BackoffConfig {
                init_backoff: Duration::from_millis(100),
                max_backoff: Duration::from_secs(5),
                base: 2.0,
            },
        };
        let driver = builder.with_bucket_name(bucket).with_retry(retry).build().map_err(|e| bad(e.to_string()))?;
        let url = if prefix.as_ref().is_empty() { format!("s3://{bucket}") } else { format!("s3://{bucket}/{prefix}") };
        Ok(Self { driver: Arc::new(driver), prefix, url, waits: RETRY_WAITS })
    }

    /// The canonical address: equal for the scheduler and a node exactly if both put results in one place. (S3 endpoints
    /// are not part of it: one bucket may have an inner and an outer name.)
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Where an artifact is, for people.
    pub fn url_of(&self, key: &str) -> String {
        format!("{}/{key}", self.url.trim_end_matches('/'))
    }

    fn path(&self, key: &str) -> Result<Path, StoreError> {
        let joined = if self.prefix.as_ref().is_empty() { key.to_owned() } else { format!("{}/{key}", self.prefix) };
        Path::parse(joined).map_err(|e| self.failed("name", key, e.into()))
    }

    fn failed(&self, operation: &'static str, key: &str, source: DriverError) -> StoreError {
        match source {
            DriverError::NotFound { .. } if operation != "write" => {
                StoreError::NotFound { key: key.into(), store: self.url.clone() }
            }
            source => StoreError::Failed { operation, key: key.into(), store: self.url.clone(), source: source.into() },
        }
    }

    /// Runs `attempt` until it succeeds, fails for a reason that stays, or the waits are used up.
    async fn retried<T, F, R>(&self, operation: &'static str, key: &str, mut attempt: F) -> Result<T, StoreError>
    where
        F: FnMut() -> R,
        // Spelled out, because an async closure could not promise `Send`.
        R: Future<Output = Result<T, DriverError>> + Send,
    {
        let mut waits = self.waits.iter();
        loop {
            let error = match attempt().await {
                Ok(value) => return Ok(value),
                Err(error) => error,
            };
            match waits.next().filter(|_| is_transient(&error)) {
                Some(wait) => tokio::time::sleep(*wait).await,
                None => return Err(self.failed(operation, key, error)),
            }
        }
    }

    /// Stores a small object, replacing what is there.
    pub async fn put(&self, key: &str, bytes: Bytes) -> Result<(), StoreError> {
        let path = self.path(key)?;
        self.retried("write", key, || async { self.driver.put(&path, bytes.clone().into()).await.map(drop) }).await
    }

    /// Stores a file, replacing what is there; the object appears whole or not at all. Holds two parts of 8 MiB at most.
    pub async fn put_file(&self, key: &str, file: &FilePath) -> Result<(), StoreError> {
        let path = self.path(key)?;
        self.retried("write", key, || async { self.put_file_once(&path, file).await }).await
    }

    async fn put_file_once(&self, path: &Path, file: &FilePath) -> Result<(), DriverError> {
        let unreadable = |e: std::io::Error| DriverError::Generic {
            store: "local file",
            source: format!("cannot read {}: {e}", file.display()).into(),
        };
        let mut reader = tokio::fs::File::open(file).await.map_err(unreadable)?;
        let mut part = read_part(&mut reader).await.map_err(unreadable)?;
        if part.len() < PART_BYTES {
            return self.driver.put(path, part.into()).await.map(drop);
        }
        let mut upload = self.driver.put_multipart(path).await?;
        let sent = async {
            while !part.is_empty() {
                // One part goes up while the next is read.
                let (put, next) = tokio::join!(upload.put_part(PutPayload::from_bytes(part)), read_part(&mut reader));
                put?;
                part = next.map_err(unreadable)?;
            }
            upload.complete().await
        }
        .await;
        if sent.is_err() {
            // Best effort: what stays behind is invisible, and a bucket's lifecycle rule removes it.
            let _ = upload.abort().await;
        }
        sent.map(drop)
    }

    /// Stores a small object only if the key is free: the farm's commit point. Of any number of concurrent calls with
    /// one key exactly one gets [`Create::Created`].
    pub async fn create(&self, key: &str, bytes: Bytes) -> Result<Create, StoreError> {
        let path = self.path(key)?;
        self.retried("create", key, || async {
            match self.driver.put_opts(&path, bytes.clone().into(), PutMode::Create.into()).await {
                Ok(_) => Ok(Create::Created),
                // S3 also answers so while another create is under way, which may yet fail: only what can be read exists.
                Err(DriverError::AlreadyExists { source, .. }) => match self.driver.head(&path).await {
                    Ok(_) => Ok(Create::AlreadyExists),
                    Err(DriverError::NotFound { .. }) => Err(DriverError::Generic { store: "conflict", source }),
                    Err(error) => Err(error),
                },
                Err(error) => Err(error),
            }
        })
        .await
    }

    /// The whole object, which may have `max_bytes` at most.
    pub async fn get(&self, key: &str, max_bytes: usize) -> Result<Bytes, StoreError> {
        let path = self.path(key)?;
        let limit = max_bytes as u64;
        let read: Result<Bytes, u64> = self
            .retried("read", key, || async {
                let found = self.driver.get(&path).await?;
                // Checked before a byte is read: the object may be anything.
                let bytes = found.meta.size;
                if bytes > limit { Ok(Err(bytes)) } else { found.bytes().await.map(Ok) }
            })
            .await?;
        read.map_err(|bytes| StoreError::TooLarge { key: key.into(), store: self.url.clone(), bytes, limit })
    }

    /// The object's length and its bytes in order. A stream that breaks off ends with an error.
    pub async fn get_stream(
        &self,
        key: &str,
    ) -> Result<(u64, BoxStream<'static, Result<Bytes, StoreError>>), StoreError> {
        let path = self.path(key)?;
        let found: GetResult = self.retried("read", key, || self.driver.get(&path)).await?;
        let (store, key) = (self.clone(), key.to_owned());
        let length = found.meta.size;
        let bytes = found.into_stream().map(move |chunk| chunk.map_err(|e| store.failed("read", &key, e)));
        Ok((length, bytes.boxed()))
    }

    /// The object's length in bytes, or `None` if there is no such object.
    pub async fn head(&self, key: &str) -> Result<Option<u64>, StoreError> {
        let path = self.path(key)?;
        self.retried("look up", key, || async {
            match self.driver.head(&path).await {
                Ok(meta) => Ok(Some(meta.size)),
                Err(DriverError::NotFound { .. }) => Ok(None),
                Err(error) => Err(error),
            }
        })
        .await
    }

    /// Keys of objects in the folder `prefix` and those below it, `most` of them at most, in no order.
    pub async fn list(&self, prefix: &str, most: usize) -> Result<Vec<String>, StoreError> {
        Ok(self.list_sizes(prefix, most).await?.into_iter().map(|(key, _)| key).collect())
    }

    /// As [`ArtifactStore::list`], each key with the object's bytes.
    pub async fn list_sizes(&self, prefix: &str, most: usize) -> Result<Vec<(String, u64)>, StoreError> {
        let path = self.path(prefix)?;
        let own = self.prefix.parts().count();
        self.retried("list", prefix, || async {
            let found = self.driver.list(Some(&path)).take(most);
            let key = |location: &Path| location.parts().skip(own).collect::<Path>().into();
            found.map_ok(|meta| (key(&meta.location), meta.size)).try_collect().await
        })
        .await
    }

    pub async fn delete(&self, key: &str) -> Result<(), StoreError> {
        let path = self.path(key)?;
        self.retried("delete", key, || async {
            match self.driver.delete(&path).await {
                // A local file's absence is an error, a bucket's is not; deleted is deleted.
                Err(DriverError::NotFound { .. }) => Ok(()),
                done => done,
            }
        })
        .await
    }

    /// Tries the store out at a program's start: writes, reads and deletes one small object below `probe/`, and checks
    /// that a second create of it is refused, without which two attempts of a job could both be accepted.
    pub async fn probe(&self) -> Result<(), StoreError> {
        // A wrong address is told at once.
        let store = Self { waits: &[], ..self.clone() };
        let key = format!("probe/{}", uuid::Uuid::new_v4().simple());
        let unusable = |reason: String| StoreError::Unusable { store: self.url.clone(), reason };
        let explained = |e: StoreError| unusable(format!("{e}\n  hint: {}", self.hint()));
        let value = Bytes::from_static(b"may be deleted");
        let first = store.create(&key, value.clone()).await.map_err(explained)?;
        let second = store.create(&key, value.clone()).await.map_err(explained)?;
        let read = store.get(&key, 1024).await.map_err(explained)?;
        store.delete(&key).await.map_err(explained)?;
        if (first, second) != (Create::Created, Create::AlreadyExists) {
            return Err(unusable(
                "it does not honour create-only puts (If-None-Match: *), so two attempts could both be accepted".into(),
            ));
        }
        if read != value {
            return Err(unusable("it gives back other bytes than were written".into()));
        }
        Ok(())
    }

    fn hint(&self) -> &'static str {
        if self.url.starts_with("s3:") {
            "the bucket has to exist; set AWS_ENDPOINT (unless it is Amazon's), AWS_REGION, AWS_ACCESS_KEY_ID and \
             AWS_SECRET_ACCESS_KEY, and allow put, get and delete"
        } else {
            "the folder has to be writable for this user and have space left"
        }
    }
}

/// Whether the same call may work a moment later.
fn is_transient(error: &DriverError) -> bool {
    matches!(error, DriverError::Generic { .. } | DriverError::JoinError { .. })
}

/// The next [`PART_BYTES`] of a file, fewer only at its end.
async fn read_part(reader: &mut tokio::fs::File) -> std::io::Result<Bytes> {
    let mut part = BytesMut::with_capacity(PART_BYTES);
    let mut rest = reader.take(PART_BYTES as u64);
    while rest.read_buf(&mut part).await? > 0 {}
    Ok(part.freeze())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(url: &str) -> Result<ArtifactStore, StoreError> {
        ArtifactStore::open_with(url, [])
    }

    #[test]
    fn every_spelling_of_a_folder_has_one_canonical_url() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let plain = root.join("a store");
        let url = open(plain.to_str().unwrap()).unwrap().url().to_owned();
        assert_eq!(url, format!("file://{}/a%20store", root.display()));
        for spelling in [
            format!("file://{}/a%20store", root.display()),
            format!("file://{}/a%20store/", root.display()),
            format!("{}/./a store/../a store", root.display()),
        ] {
            assert_eq!(open(&spelling).unwrap().url(), url, "{spelling}");
        }
        assert_eq!(open(&url).unwrap().url_of("jobs/x"), format!("{url}/jobs/x"));
    }

    #[test]
    fn an_s3_url_is_bucket_and_prefix_without_the_endpoint() {
        let keys = [
            ("AWS_ENDPOINT", "http://127.0.0.1:9"),
            ("AWS_ACCESS_KEY_ID", "a"),
            ("AWS_SECRET_ACCESS_KEY", "b"),
            ("AWS_REGION", "here"),
        ]
        .map(|(k, v)| (k.to_owned(), v.to_owned()));
        for (url, canonical) in
            [("s3://clips", "s3://clips"), ("s3://clips/", "s3://clips"), ("s3://clips/a/b/", "s3://clips/a/b")]
        {
            assert_eq!(ArtifactStore::open_with(url, keys.clone()).unwrap().url(), canonical);
        }
    }

    #[test]
    fn a_bad_address_says_what_to_write() {
        for (url, hint) in [
            ("", "it is empty"),
            ("ftp://x/y", "file:///folder, s3://bucket/prefix"),
            ("file:relative", "file:///absolute/path"),
            ("file://host/x", "file:///absolute/path"),
            ("s3://", "s3://bucket/prefix"),
            ("s3:///x", "s3://bucket/prefix"),
            ("s3://user:pw@bucket/x", "AWS_"),
        ] {
            let error = open(url).unwrap_err().to_string();
            assert!(error.contains(hint), "{url}: {error}");
        }
    }

    #[tokio::test]
    async fn an_unwritable_store_is_noticed_by_the_probe_or_before() {
        let dir = tempfile::tempdir().unwrap();
        let blocked = dir.path().join("file");
        std::fs::write(&blocked, "x").unwrap();
        let error = open(blocked.join("sub").to_str().unwrap()).unwrap_err().to_string();
        assert!(error.contains("cannot make folder"), "{error}");

        // A store whose `probe` is a file can be opened, and fails its first write. (Permissions would not do: tests
        // may run as root.)
        let store = open(dir.path().to_str().unwrap()).unwrap();
        std::fs::write(dir.path().join("probe"), "x").unwrap();
        let error = store.probe().await.unwrap_err().to_string();
        assert!(error.contains("cannot be used") && error.contains("hint: the folder has to be writable"), "{error}");
    }
}
