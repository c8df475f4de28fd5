//! `farmctl tenants` and `farmctl quota`

use farm_core::api::{TenantSpec, TenantView};

use crate::args::{Limit, Output, Quota};
use crate::client::Client;
use crate::error::{Error, Status};
use crate::output;

pub async fn list(client: &Client, args: Output) -> Result<Status, Error> {
    let list = client.tenants().await?;
    if args.json {
        output::json(&list)?;
    } else {
        output::line(&table(&list.tenants))?;
    }
    Ok(Status::Ok)
}

/// Shows a tenant; with options, changes it first. What no option names stays as it is.
pub async fn quota(client: &Client, args: Quota) -> Result<Status, Error> {
    if let Some(limit) = args.clear.iter().find(|limit| sets(&args, **limit)) {
        let name = format!("{limit:?}").to_lowercase();
        return Err(Error::usage(format!("the limit {name} is set and cleared at once")));
    }
    let known = client.tenants().await?.tenants.into_iter().find(|view| view.tenant == args.tenant);
    let before = known.as_ref().map(|view| view.spec.clone()).unwrap_or_default();
    let after = merged(before, &args);
    let asked = args.share.is_some() || !args.clear.is_empty() || LIMITS.iter().any(|limit| sets(&args, *limit));
    let view = match known {
        _ if asked => client.set_tenant(&args.tenant, &after).await?,
        Some(view) => view,
        None => {
            return Err(Error::with_help(
                format!("there is no tenant {}", args.tenant),
                "`farmctl tenants` names them; --share or a limit makes one",
            ));
        }
    };
    if args.output.json {
        output::json(&view)?;
    } else {
        output::line(&table(&[view]))?;
    }
    Ok(Status::Ok)
}

const LIMITS: [Limit; 3] = [Limit::Devices, Limit::Queued, Limit::DeviceSeconds];

fn sets(args: &Quota, limit: Limit) -> bool {
    match limit {
        Limit::Devices => args.devices.is_some(),
        Limit::Queued => args.queued.is_some(),
        Limit::DeviceSeconds => args.device_seconds.is_some(),
    }
}

fn merged(mut spec: TenantSpec, args: &Quota) -> TenantSpec {
    spec.share = args.share.unwrap_or(spec.share);
    let quota = &mut spec.quota;
    for limit in &args.clear {
        match limit {
            Limit::Devices => quota.devices = None,
            Limit::Queued => quota.queued = None,
            Limit::DeviceSeconds => quota.device_seconds = None,
        }
    }
    quota.devices = args.devices.or(quota.devices);
    quota.queued = args.queued.or(quota.queued);
    quota.device_seconds = args.device_seconds.or(quota.device_seconds);
    spec
}

fn table(tenants: &[TenantView]) -> String {
    let header = ["tenant", "share", "usage", "devices", "jobs", "running", "device-seconds in 24 h", ""];
    output::table(header, tenants.iter().map(row))
}

/// `4 of 8` where there is a limit.
fn of(now: impl ToString, limit: Option<impl ToString>) -> String {
    match limit {
        Some(limit) => format!("{} of {}", now.to_string(), limit.to_string()),
        None => now.to_string(),
    }
}

fn row(view: &TenantView) -> [String; 8] {
    let quota = &view.spec.quota;
    [
        view.tenant.to_string(),
        view.spec.share.to_string(),
        format!("{:.0}", view.usage),
        of(view.devices, quota.devices),
        of(view.queued + view.running, quota.queued),
        view.running.to_string(),
        of(format!("{:.0}", view.day), quota.device_seconds),
        if view.paused { "paused".to_owned() } else { String::new() },
    ]
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use farm_core::api::Quota as Limits;

    use super::*;
    use crate::args::{Args, Command};

    fn parse(line: &str) -> Quota {
        match Args::try_parse_from(["farmctl", "quota"].into_iter().chain(line.split(' '))).unwrap().command {
            Command::Quota(quota) => quota,
            command => panic!("{command:?}"),
        }
    }

    #[test]
    fn what_is_not_named_stays() {
        let before = TenantSpec {
            share: 2.0,
            quota: Limits { devices: Some(4), queued: Some(100), device_seconds: Some(3600) },
        };
        let after = merged(before.clone(), &parse("films --devices 8 --clear queued,device-seconds"));
        let quota = Limits { devices: Some(8), queued: None, device_seconds: None };
        assert_eq!(after, TenantSpec { share: 2.0, quota });
        assert_eq!(merged(before.clone(), &parse("films")), before);
        assert_eq!(merged(before.clone(), &parse("films --share 0.5")).quota, before.quota);
    }

    #[test]
    fn a_tenant_is_read_back_as_it_was_written() {
        let view = TenantView {
            tenant: "films".parse().unwrap(),
            spec: TenantSpec { share: 2.0, quota: Limits { devices: Some(4), ..Limits::default() } },
            paused: true,
            queued: 3,
            running: 2,
            devices: 4,
            usage: 1234.5,
            day: 100.0,
        };
        let json = serde_json::to_string(&view).unwrap();
        assert_eq!(serde_json::from_str::<TenantView>(&json).unwrap(), view);
        assert_eq!(row(&view), ["films", "2", "1234", "4 of 4", "5", "2", "100", "paused"]);
    }
}
