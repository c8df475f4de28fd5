//! Reads the published file.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, ensure};
use jiff::civil::DateTime;
use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::Row;

/// What the sha-256 of the published file begins with.
const SHA256: &str = "263fb88f1095f62d";

pub fn is_known(sha256: &str) -> bool {
    sha256.starts_with(SHA256)
}

/// The columns that are used. Some requests leave out what has a default.
#[derive(Deserialize)]
struct Line {
    gmt_create: String,
    exec_time_seconds: Option<f64>,
    #[serde(rename = "groupId")]
    tenant: String,
    prompt_length: Option<f64>,
    negative_prompt_length: Option<f64>,
    num_images_per_prompt: Option<f64>,
    num_inference_steps: Option<f64>,
    checkpoint_model_version_id: String,
}

/// The requests, those that failed too, by time of arrival; and the file's sha-256.
pub fn read(path: &Path) -> anyhow::Result<(Vec<Row>, String)> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let sha256 = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    let rows = parse(&bytes).with_context(|| format!("{} is no such trace", path.display()))?;
    Ok((rows, sha256))
}

fn parse(bytes: &[u8]) -> anyhow::Result<Vec<Row>> {
    let (mut tenants, mut models) = (HashMap::new(), HashMap::new());
    let mut lines = Vec::new();
    for line in csv::Reader::from_reader(bytes).deserialize() {
        let line: Line = line?;
        let at: DateTime = line.gmt_create.parse().with_context(|| format!("time {:?}", line.gmt_create))?;
        lines.push((at, line));
    }
    lines.sort_by_key(|(at, _)| *at);
    let first = lines.first().context("it has no requests")?.0;
    let mut rows = Vec::with_capacity(lines.len());
    for (at, line) in lines {
        let number = |names: &mut HashMap<String, u32>, name| {
            let next = names.len() as u32;
            *names.entry(name).or_insert(next)
        };
        let seconds = line.exec_time_seconds.unwrap_or(0.0);
        ensure!((0.0..1e6).contains(&seconds), "a run time of {seconds} s");
        rows.push(Row {
            at: at.duration_since(first).as_secs_f64(),
            seconds,
            tenant: number(&mut tenants, line.tenant),
            model: number(&mut models, line.checkpoint_model_version_id),
            images: line.num_images_per_prompt.unwrap_or(1.0).clamp(1.0, 64.0) as u32,
            steps: line.num_inference_steps.unwrap_or(30.0).clamp(1.0, 1000.0) as u32,
            text: [line.prompt_length, line.negative_prompt_length].map(|length| length.unwrap_or(0.0) as u32),
        });
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_read_by_time_and_what_they_leave_out_is_the_default() {
        let file = b"gmt_create,predict_type,predict_status,exec_time_seconds,groupId,prompt_length,\
negative_prompt_length,num_images_per_prompt,num_inference_steps,checkpoint_model_version_id,num_lora
2024-11-15 18:16:14,TXT_2_IMG,SUCCEED,43.0,G1,93.0,,4.0,40.0,M1,0
2024-11-15 16:57:50,TXT_2_IMG,SUCCEED,32.0,G0,63.0,26.0,,,M0,0
";
        let rows = parse(file).unwrap();
        let first = Row { at: 0.0, seconds: 32.0, tenant: 0, model: 0, images: 1, steps: 30, text: [63, 26] };
        let second = Row { at: 4704.0, seconds: 43.0, tenant: 1, model: 1, images: 4, steps: 40, text: [93, 0] };
        assert_eq!(rows, [first, second]);
        assert!(parse(b"a,b\n1,2\n").is_err() && parse(b"").is_err());
    }
}
