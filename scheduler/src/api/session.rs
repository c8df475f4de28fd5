//! Where nodes come in: an HTTP request that turns into their session.

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use farm_core::id::BootId;
use farm_core::wire::PROTOCOL;
use farm_core::wire::cluster::{BOOT_HEADER, PROTOCOL_HEADER, UPGRADE_PROTOCOL, VERSION_HEADER, check_protocol};

use super::{Api, Failure};

pub async fn join(State(api): State<Api>, request: Request) -> Result<Response, Failure> {
    let boot = check(request.headers())?;
    let upgrade = hyper::upgrade::on(request);
    // Ends with the connection at the latest: hyper drops the other half.
    tokio::spawn(async move {
        match upgrade.await {
            Ok(upgraded) => {
                if let Err(error) = api.link.accept(upgraded, boot) {
                    tracing::warn!(%boot, %error, "cannot take over a node's connection");
                }
            }
            Err(error) => tracing::warn!(%boot, %error, "a node's connection did not upgrade"),
        }
    });
    let headers = [
        (header::CONNECTION, HeaderValue::from_static("upgrade")),
        (header::UPGRADE, HeaderValue::from_static(UPGRADE_PROTOCOL)),
        (HeaderName::from_static(PROTOCOL_HEADER), HeaderValue::from(u16::from(PROTOCOL))),
        (HeaderName::from_static(VERSION_HEADER), HeaderValue::from_static(farm_core::VERSION)),
    ];
    Ok((StatusCode::SWITCHING_PROTOCOLS, headers).into_response())
}

fn check(headers: &HeaderMap) -> Result<BootId, Failure> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    if !text("upgrade").is_some_and(|protocol| protocol.eq_ignore_ascii_case(UPGRADE_PROTOCOL)) {
        return Err(Failure::new(
            StatusCode::UPGRADE_REQUIRED,
            format!("nodes join here, with `upgrade: {UPGRADE_PROTOCOL}`"),
        ));
    }
    check_protocol(headers).map_err(|reason| {
        tracing::warn!(%reason, "a node is refused");
        Failure::new(StatusCode::CONFLICT, reason)
    })?;
    let boot = text(BOOT_HEADER).and_then(|boot| boot.parse().ok());
    boot.map(BootId).ok_or_else(|| Failure::bad_request(format!("header {BOOT_HEADER} is not a boot id")))
}
