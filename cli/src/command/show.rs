//! `farmctl show`

use farm_core::api::JobDetail;
use farm_core::job::spec::GuidanceScale;

use crate::args::OneJob;
use crate::client::Client;
use crate::error::{Error, Status};
use crate::output::{self, clean};

pub async fn run(client: &Client, args: OneJob) -> Result<Status, Error> {
    let detail = client.job(&args.id).await?;
    if args.output.json {
        output::json(&detail)?;
        return Ok(Status::Ok);
    }
    for (key, value) in facts(&detail) {
        output::line(&format!("{key:<16}{}", clean(&value)))?;
    }
    if !detail.attempts.is_empty() {
        let rows = detail.attempts.iter().map(|attempt| {
            [
                attempt.attempt.to_string(),
                attempt.node.to_string(),
                attempt.devices.iter().map(ToString::to_string).collect::<Vec<_>>().join("+"),
                format!("{:.0}", attempt.started),
                attempt.ended.map(|at| format!("{at:.0}")).unwrap_or_default(),
                attempt.outcome.clone(),
                attempt.message.clone().unwrap_or_default(),
            ]
        });
        output::line("")?;
        output::line(&output::table(["attempt", "node", "devices", "started", "ended", "outcome", "message"], rows))?;
    }
    Ok(Status::Ok)
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
    add("priority", Some(view.priority.to_string()));
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
