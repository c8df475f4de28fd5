//! Who jobs are charged to, and what each may have.

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, State};
use farm_core::api::{SHARES, TenantList, TenantSpec, TenantView};
use farm_core::id::TenantId;

use super::{Api, By, Failure, body};
use crate::core::events::{Scope, Wish};

pub async fn list(State(api): State<Api>) -> Result<Json<TenantList>, Failure> {
    let tenants = api.scheduler()?.ask(|farm| farm.tenants()).await?;
    Ok(Json(TenantList { tenants }))
}

pub async fn set(
    State(api): State<Api>,
    Path(tenant): Path<String>,
    by: By,
    body: Body,
) -> Result<Json<TenantView>, Failure> {
    let tenant = parse(&tenant)?;
    let spec: TenantSpec = body::read_json(body).await?;
    let (least, most) = SHARES;
    if !(least..=most).contains(&spec.share) {
        return Err(Failure::refused(format!("share {} is not in {least}..={most}", spec.share)));
    }
    api.wish(Wish::SetTenant(tenant.clone(), spec), by).await?;
    view(&api, tenant).await
}

pub async fn pause(State(api): State<Api>, Path(tenant): Path<String>, by: By) -> Result<Json<TenantView>, Failure> {
    let tenant = known(&api, &tenant).await?;
    api.wish(Wish::Pause(Scope::Tenant(tenant.clone())), by).await?;
    view(&api, tenant).await
}

pub async fn resume(State(api): State<Api>, Path(tenant): Path<String>, by: By) -> Result<Json<TenantView>, Failure> {
    let tenant = known(&api, &tenant).await?;
    api.wish(Wish::Resume(Scope::Tenant(tenant.clone())), by).await?;
    view(&api, tenant).await
}

fn parse(text: &str) -> Result<TenantId, Failure> {
    text.parse().map_err(Failure::bad_request)
}

async fn known(api: &Api, text: &str) -> Result<TenantId, Failure> {
    let tenant = parse(text)?;
    _ = view(api, tenant.clone()).await?;
    Ok(tenant)
}

async fn view(api: &Api, tenant: TenantId) -> Result<Json<TenantView>, Failure> {
    let name = tenant.clone();
    let view = api.scheduler()?.ask(move |farm| farm.tenant_view(&tenant)).await?;
    view.map(Json).ok_or_else(|| unknown(&name))
}

pub fn unknown(tenant: &TenantId) -> Failure {
    Failure::not_found(format!(
        "there is no tenant {tenant}; an operator makes one with `farmctl quota {tenant} --share 1`"
    ))
}
