//! TLS between ranks: each shows a certificate, and both have to be signed by the same authority.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio_rustls::rustls::crypto::aws_lc_rs;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::comm::CommError;

/// PEM files for connections that are encrypted and authenticated on both sides.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// This rank's certificate and those between it and the authority. It names the host as the list of peers does, and
    /// is good for servers and for clients.
    pub certificate: PathBuf,
    /// The key of the certificate.
    pub key: PathBuf,
    /// The authority whose certificates are ranks.
    pub ca: PathBuf,
}

impl TlsFiles {
    /// What a server and what a client need: each shows this certificate and asks for one of the authority's.
    pub fn load(&self) -> Result<(ServerConfig, ClientConfig), CommError> {
        let chain = certificates(&self.certificate)?;
        let key = PrivateKeyDer::from_pem_file(&self.key).map_err(|error| unreadable(&self.key, &error))?;
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&self.ca)? {
            roots.add(certificate).map_err(|error| unreadable(&self.ca, &error))?;
        }
        let roots = Arc::new(roots);
        let provider = Arc::new(aws_lc_rs::default_provider());
        let bad_pair = |error| {
            let (certificate, key) = (self.certificate.display(), self.key.display());
            CommError::Transport(format!("the certificate {certificate} cannot be used with the key {key}: {error}"))
        };
        let bad_tls = |error: &dyn std::fmt::Display| CommError::Transport(format!("tls: {error}"));

        let clients = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
            .build()
            .map_err(|error| bad_tls(&error))?;
        let server = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(|error| bad_tls(&error))?
            .with_client_cert_verifier(clients)
            .with_single_cert(chain.clone(), key.clone_key())
            .map_err(bad_pair)?;
        let client = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| bad_tls(&error))?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .map_err(bad_pair)?;
        Ok((server, client))
    }
}

pub(super) struct Tls {
    pub(super) acceptor: TlsAcceptor,
    pub(super) connector: TlsConnector,
}

impl Tls {
    pub(super) fn load(files: &TlsFiles) -> Result<Self, CommError> {
        let (server, client) = files.load()?;
        Ok(Self { acceptor: Arc::new(server).into(), connector: Arc::new(client).into() })
    }
}

/// The name that the certificate of the rank at `address` (`host:port`) has to bear.
pub(super) fn name(address: &str) -> Result<ServerName<'static>, String> {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host).trim_matches(['[', ']']);
    ServerName::try_from(host.to_owned()).map_err(|error| format!("{host:?} is no name of a host: {error}"))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, CommError> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let found = read.map_err(|error| unreadable(path, &error))?;
    if found.is_empty() {
        return Err(unreadable(path, &"there is no certificate in it"));
    }
    Ok(found)
}

fn unreadable(path: &Path, error: &dyn std::fmt::Display) -> CommError {
    CommError::Transport(format!("{} cannot be used for tls: {error}", path.display()))
}
