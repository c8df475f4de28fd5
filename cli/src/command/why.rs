//! `farmctl why`

use farm_core::api::WhyView;

use crate::args::OneJob;
use crate::client::Client;
use crate::error::{Error, Status};
use crate::output::{self, clean};

pub async fn run(client: &Client, args: OneJob) -> Result<Status, Error> {
    let job = client.job(&args.id).await?.view.job;
    let why = client.why(job).await?;
    if args.output.json {
        output::json(&why)?;
        return Ok(Status::Ok);
    }
    for (key, value) in facts(&why) {
        output::line(&format!("{key:<10}{}", clean(&value)))?;
    }
    Ok(Status::Ok)
}

fn facts(why: &WhyView) -> Vec<(&'static str, String)> {
    let mut facts = vec![("job", why.job.to_string()), ("state", why.state.as_str().to_owned())];
    facts.push(("why", why.reason.clone()));
    let mut add = |key, value: Option<String>| facts.extend(value.map(|value| (key, value)));
    add("change", why.change.clone());
    let soon = |seconds: f64| format!("in about {}", output::duration(seconds as f32));
    add("starts", why.starts_in_seconds.map(soon));
    add("ends", why.eta_seconds.map(soon));
    if !why.state.is_terminal() && why.eta_seconds.is_none() {
        add("ends", Some("not predicted".to_owned()));
    }
    facts
}

#[cfg(test)]
mod tests {
    use farm_core::api::WaitCode;
    use farm_core::id::JobId;
    use farm_core::job::state::JobState;

    use super::*;

    #[test]
    fn a_waiting_job_says_why_what_helps_and_when() {
        let mut why = WhyView {
            job: JobId(uuid::Uuid::nil()),
            state: JobState::Queued,
            code: Some(WaitCode::QuotaDevices),
            reason: "tenant films has its 4 devices".into(),
            change: Some("a clip of the tenant ends".into()),
            starts_in_seconds: Some(30.0),
            eta_seconds: Some(600.0),
        };
        let shown: Vec<_> = facts(&why).into_iter().skip(2).map(|(key, value)| format!("{key}: {value}")).collect();
        assert_eq!(
            shown,
            [
                "why: tenant films has its 4 devices",
                "change: a clip of the tenant ends",
                "starts: in about 30 s",
                "ends: in about 10 min"
            ]
        );
        (why.starts_in_seconds, why.eta_seconds) = (None, None);
        assert_eq!(facts(&why).pop().unwrap(), ("ends", "not predicted".into()));
        why.state = JobState::Done;
        assert_eq!(facts(&why).pop().unwrap().0, "change");
    }
}
