//! What several tests over real processes and servers need.

pub mod clip;
pub mod dice;
pub mod farm;
pub mod network;
pub mod postgres;
pub mod proxy;
pub mod s3;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The top folder of the sources.
pub fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// The folder of the built programs, of the profile of this program or test.
pub fn programs() -> PathBuf {
    let own = std::env::current_exe().unwrap();
    let folder = own.parent().unwrap();
    let folder = if folder.ends_with("deps") { folder.parent().unwrap() } else { folder }.to_owned();
    for program in ["farmctl", "farm-scheduler", "farm-node"] {
        assert!(
            folder.join(program).exists(),
            "{program} is not built; run `cargo build --workspace` before this test"
        );
    }
    folder
}

/// Looks again and again until `condition` holds. Panics with `what` if it does not within `limit`.
pub fn wait_until(limit: Duration, what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + limit;
    while !condition() {
        assert!(Instant::now() < deadline, "not within {limit:?}: {what}");
        std::thread::park_timeout(Duration::from_millis(50));
    }
}
