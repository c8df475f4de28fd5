//! `farmctl show`

use farm_core::api::{BatchView, JobDetail};
use farm_core::job::spec::GuidanceScale;
use farm_core::precision::Precision;

use crate::args::One;
use crate::client::{Client, Named};
use crate::error::{Error, Status};
use crate::output::{self, clean};

pub async fn run(client: &Client, args: One) -> Result<Status, Error> {
    let json = args.output.json;
    match client.find(&args.id).await? {
        Named::Job(detail) if json => output::json(&detail)?,
        Named::Job(detail) => show_job(&detail)?,
        Named::Batch(batch) if json => output::json(&batch)?,
        Named::Batch(batch) => lines(batch_facts(&batch))?,
    }
    Ok(Status::Ok)
}

fn lines(facts: Vec<(&'static str, String)>) -> Result<(), Error> {
    facts.iter().try_for_each(|(key, value)| output::line(&format!("{key:<16}{}", clean(value))))
}

fn show_job(detail: &JobDetail) -> Result<(), Error> {
    lines(facts(detail))?;
    if !detail.attempts.is_empty() {
        let rows = detail.attempts.iter().map(|attempt| {
            [
                attempt.attempt.to_string(),
                attempt.node.to_string(),
                attempt.devices.iter().map(ToString::to_string).collect::<Vec<_>>().join("+"),
                format!("{:.0}", attempt.started),
                attempt.ended.map(|at| format!("{at:.0}")).unwrap_or_default(),
                attempt.device_seconds.map(|seconds| format!("{seconds:.1}")).unwrap_or_default(),
                attempt.outcome.clone(),
                attempt.message.clone().unwrap_or_default(),
            ]
        });
        output::line("")?;
        let header = ["attempt", "node", "devices", "started", "ended", "device-seconds", "outcome", "message"];
        output::line(&output::table(header, rows))?;
    }
    Ok(())
}

fn batch_facts(batch: &BatchView) -> Vec<(&'static str, String)> {
    let mut facts = vec![
        ("batch", batch.submission.to_string()),
        ("tenant", batch.tenant.to_string()),
        ("submitted", format!("{:.0}", batch.submitted)),
        ("summary", batch.summary.clone()),
        ("jobs", output::counts(&batch.jobs)),
    ];
    if batch.paused {
        facts.push(("paused", "`farmctl resume` ends it".to_owned()));
    }
    if let Some(most) = batch.max_failures {
        facts.push(("failures", format!("cancelled when more than {most} have failed")));
    }
    if let Some(seconds) = batch.eta_seconds {
        facts.push(("ends", format!("in about {}", output::duration(seconds as f32))));
    }
    facts
}

/// What there is to say, in the order of interest. Values from the result stand for left-out ones once it is there.
fn facts(detail: &JobDetail) -> Vec<(&'static str, String)> {
    let JobDetail { view, request, result, .. } = detail;
    let spec = result.as_ref().map(|result| &result.spec);
    let number = |asked: Option<u32>, used: Option<u32>| match asked.or(used) {
        Some(number) => number.to_string(),
        None => "default".to_owned(),
    };
    let guidance = match request.guidance_scale.as_ref().or(spec.map(|spec| &spec.guidance_scale)) {
        Some(GuidanceScale::Constant(scale)) => scale.to_string(),
        Some(GuidanceScale::PerStep(scales)) => scales.iter().map(f64::to_string).collect::<Vec<_>>().join(", "),
        None => "default".to_owned(),
    };
    let size = format!(
        "{} × {}, {} frames",
        number(request.width, spec.map(|spec| spec.width)),
        number(request.height, spec.map(|spec| spec.height)),
        number(request.num_frames, spec.map(|spec| spec.num_frames)),
    );
    let mut facts = vec![("job", view.job.to_string())];
    let mut add = |key, value: Option<String>| facts.extend(value.map(|value| (key, value)));
    add("id", view.id.clone());
    add("state", Some(view.state.as_str().to_owned()));
    add("reason", view.reason.clone());
    add("progress", view.progress.as_ref().map(output::progress));
    add("node", view.node.as_ref().map(ToString::to_string));
    add("clip", view.clip.clone());
    for warning in &view.warnings {
        add("warning", Some(warning.clone()));
    }
    add("prompt", Some(view.prompt.clone()));
    add("negative prompt", request.negative_prompt.clone());
    add("model", view.model.clone());
    add("size", Some(size));
    add("steps", Some(number(request.num_inference_steps, spec.map(|spec| spec.num_inference_steps))));
    add("guidance", Some(guidance));
    add("seed", Some(detail.seed.to_string()));
    add("tenant", Some(view.tenant.to_string()));
    add("priority", Some(view.priority.to_string()));
    add("after", Some(request.after.join(" ")).filter(|after| !after.is_empty()));
    for (key, value) in &request.require {
        add("requires", Some(format!("{key} = {value}")));
    }
    for (key, value) in &request.labels {
        add("label", Some(format!("{key} = {value}")));
    }
    add("submitted", Some(format!("{:.0}", view.submitted)));
    add("finished", view.finished.map(|at| format!("{at:.0}")));
    if let Some(result) = result {
        let s = result.seconds;
        add(
            "spread",
            Some(format!("{} on {}", result.topology, output::plural(result.topology.world() as u64, "device"))),
        );
        // Worth a line only where it is not the usual one.
        add("precision", Some(result.precision.to_string()).filter(|_| result.precision != Precision::F32));
        add("sha-256", Some(result.clip_sha256.clone()));
        add("checkpoint", Some(result.model_hash.clone()));
        add(
            "seconds",
            Some(format!(
                "text {:.2}, denoise {:.2}, decode {:.2}, encode {:.2}, upload {:.2}, total {:.2}",
                s.text, s.denoise, s.decode, s.encode, s.upload, s.total
            )),
        );
    }
    facts
}
