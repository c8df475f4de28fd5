//! The farm's shared secret, wanted as a bearer token on every call.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, ensure};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};

use super::{Api, Failure};

const MIN_BYTES: usize = 16;
const MAX_BYTES: usize = 1024;

#[derive(Clone)]
pub struct Secret(String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

impl Secret {
    /// Reads a secret from a file that others cannot read. White space around it does not count.
    pub fn read(file: &Path) -> anyhow::Result<Self> {
        let name = file.display();
        let mut open = File::open(file).with_context(|| format!("cannot open secret file {name}"))?;
        let mode = open.metadata().with_context(|| format!("cannot read secret file {name}"))?.permissions().mode();
        ensure!(mode & 0o007 == 0, "secret file {name} is open to everybody; run `chmod 600 {name}`");
        let mut text = String::new();
        // One byte more than allowed, to see that there is more.
        open.by_ref()
            .take(MAX_BYTES as u64 + 1)
            .read_to_string(&mut text)
            .with_context(|| format!("cannot read secret file {name}"))?;
        ensure!(text.len() <= MAX_BYTES, "secret file {name} has more than {MAX_BYTES} bytes");
        let secret = text.trim();
        ensure!(
            secret.len() >= MIN_BYTES,
            "the secret in {name} has {} bytes, less than {MIN_BYTES}; \
             make one with `head -c 24 /dev/urandom | base64 > {name}`",
            secret.len()
        );
        ensure!(
            secret.bytes().all(|byte| byte.is_ascii_graphic()),
            "the secret in {name} has characters that an HTTP header cannot carry; use printable ASCII without spaces"
        );
        Ok(Self(secret.to_owned()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn is_in(&self, headers: &HeaderMap) -> bool {
        let Some(value) = headers.get(header::AUTHORIZATION) else { return false };
        let Some((scheme, token)) = value.to_str().ok().and_then(|value| value.split_once(' ')) else { return false };
        scheme.eq_ignore_ascii_case("bearer") && same(self.0.as_bytes(), token.trim().as_bytes())
    }
}

/// Compares digests, all of them: the time it takes tells nothing about the secret.
fn same(a: &[u8], b: &[u8]) -> bool {
    let (a, b) = (Sha256::digest(a), Sha256::digest(b));
    a.iter().zip(b).fold(0, |difference, (a, b)| difference | (a ^ b)) == 0
}

pub async fn check(State(api): State<Api>, request: Request, next: Next) -> Response {
    match &api.secret {
        Some(secret) if !secret.is_in(request.headers()) => {
            let failure = Failure::new(
                StatusCode::UNAUTHORIZED,
                "this farm wants its secret: send `authorization: Bearer SECRET` (--secret-file)",
            );
            ([(header::WWW_AUTHENTICATE, "Bearer")], failure).into_response()
        }
        _ => next.run(request).await,
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{Permissions, set_permissions, write};

    use super::*;

    fn secret(text: &str, mode: u32) -> anyhow::Result<Secret> {
        let file = tempfile::NamedTempFile::new().unwrap();
        write(file.path(), text).unwrap();
        set_permissions(file.path(), Permissions::from_mode(mode)).unwrap();
        Secret::read(file.path())
    }

    #[test]
    fn a_secret_file_is_long_enough_printable_and_private() {
        assert_eq!(secret("0123456789abcdef\n", 0o600).unwrap().as_str(), "0123456789abcdef");
        assert!(secret("0123456789abcde\n", 0o600).unwrap_err().to_string().contains("less than 16"));
        assert!(secret("0123456789abcdef", 0o644).unwrap_err().to_string().contains("chmod 600"));
        assert!(secret("0123456789 abcdefgh", 0o600).unwrap_err().to_string().contains("printable"));
        assert!(secret(&"x".repeat(2000), 0o600).unwrap_err().to_string().contains("more than"));
    }

    #[test]
    fn only_the_whole_secret_opens() {
        let secret = secret("0123456789abcdef", 0o600).unwrap();
        let is_in =
            |value: &str| secret.is_in(&HeaderMap::from_iter([(header::AUTHORIZATION, value.parse().unwrap())]));
        assert!(is_in("Bearer 0123456789abcdef"));
        assert!(is_in("bearer 0123456789abcdef"));
        assert!(!is_in("Bearer 0123456789abcde"));
        assert!(!is_in("Bearer 0123456789abcdef0"));
        assert!(!is_in("Basic 0123456789abcdef"));
        assert!(!is_in("0123456789abcdef"));
        assert!(!secret.is_in(&HeaderMap::new()));
    }
}
