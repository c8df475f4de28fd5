//! Nodes that know each other by certificates.

use std::path::Path;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tempfile::TempDir;

use super::*;

/// PEM files of a node at 127.0.0.1, signed by an authority that is made for it.
struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    fn files(&self, dir: &Path, name: &str) -> TlsFiles {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        let write = |kind: &str, text: String| {
            let path = dir.join(format!("{name}-{kind}.pem"));
            std::fs::write(&path, text).unwrap();
            path
        };
        TlsFiles {
            certificate: write("cert", certificate.pem()),
            key: write("key", key.serialize_pem()),
            ca: write("ca", self.0.pem()),
        }
    }
}

async fn start(tls: Option<TlsFiles>) -> DataPlane {
    let listen = "127.0.0.1:0".parse().unwrap();
    DataPlane::start(Options { listen, host: None, tls, patience: patience() }).await.unwrap()
}

#[tokio::test]
async fn nodes_of_one_authority_talk_and_others_do_not() {
    let dir = TempDir::new().unwrap();
    let (farm, strangers) = (Authority::new(), Authority::new());
    let serving = start(Some(farm.files(dir.path(), "serving"))).await;
    let joining = start(Some(farm.files(dir.path(), "joining"))).await;
    let stranger = start(Some(strangers.files(dir.path(), "stranger"))).await;
    // Believes the farm, and is not of it.
    let posing = TlsFiles { ca: farm.files(dir.path(), "farm").ca, ..strangers.files(dir.path(), "posing") };
    let posing = start(Some(posing)).await;
    let open = start(None).await;

    let mut decode = serving.open(Bytes::from_static(b"latent"), MAX, 4);
    assert!(decode.url.starts_with("https://127.0.0.1:"));
    let mut hand = soon(joining.join(&decode.url, &decode.token, "a hand", 100, MAX)).await.unwrap();
    assert_eq!(hand.latent.unwrap(), &b"latent"[..]);
    let Joined { link: crew, .. } = soon(decode.joined.recv()).await.unwrap();
    crew.to.send(closed(1, 50_000)).await.unwrap();
    assert_eq!(soon(hand.link.from.recv()).await, Some(closed(1, 50_000)));

    for other in [&stranger, &posing] {
        let refused = soon(other.join(&decode.url, &decode.token, "a hand", 100, MAX)).await.err();
        assert!(matches!(refused, Some(JoinError::Unreachable { .. })), "{refused:?}");
    }
    let refused = soon(open.join(&decode.url, &decode.token, "a hand", 100, MAX)).await.err();
    assert!(matches!(refused, Some(JoinError::Url { .. })), "{refused:?}");
    let plain = decode.url.replace("https", "http");
    assert!(matches!(
        soon(joining.join(&plain, &decode.token, "a hand", 100, MAX)).await.err(),
        Some(JoinError::Url { .. })
    ));
    let refused = soon(open.join(&plain, &decode.token, "a hand", 100, MAX)).await.err();
    assert!(matches!(refused, Some(JoinError::Unreachable { .. })), "{refused:?}");
}

#[tokio::test]
async fn files_that_do_not_do_are_named() {
    let dir = TempDir::new().unwrap();
    let mut files = Authority::new().files(dir.path(), "node");
    files.key = dir.path().join("nothing.pem");
    let listen = "127.0.0.1:0".parse().unwrap();
    let options = Options { listen, host: None, tls: Some(files), patience: patience() };
    let error = DataPlane::start(options).await.err().unwrap();
    assert!(error.to_string().contains("nothing.pem"), "{error:#}");
}
