//! `farm-node model inspect`: what a checkpoint folder holds, from the file headers alone.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use farm_core::model::weights::checkpoint::Checkpoint;
use farm_core::model::weights::report::{Inspection, TensorStatus};
use serde::Serialize;

#[derive(clap::Args)]
pub struct Args {
    /// Checkpoint folder
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report<'a> {
    #[serde(flatten)]
    inspection: &'a Inspection,
    /// What keeps the folder from being run.
    findings: Vec<String>,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let inspection = Checkpoint::inspect(&args.dir)?;
    let findings = inspection.findings();
    let code = if findings.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    if args.json {
        let report = Report { inspection: &inspection, findings };
        writeln!(io::stdout(), "{}", serde_json::to_string_pretty(&report)?)?;
    } else {
        io::stdout().write_all(as_text(&inspection, &findings).as_bytes())?;
    }
    Ok(code)
}

fn as_text(inspection: &Inspection, findings: &[String]) -> String {
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = writeln!(out, "layout: {}", format!("{:?}", inspection.layout).to_lowercase());
    for note in &inspection.notes {
        let _ = writeln!(out, "note: {note}");
    }
    for part in &inspection.parts {
        let used = part.with_status(TensorStatus::Used).len();
        let bytes: Vec<String> =
            part.bytes_by_dtype.iter().map(|(dtype, bytes)| format!("{} bytes of {dtype}", grouped(*bytes))).collect();
        let _ = write!(out, "\n{}: {} parameters in {used} tensors", part.name, grouped(part.parameters));
        let _ = writeln!(out, "{}{}", if bytes.is_empty() { "" } else { ", " }, bytes.join(", "));
        if part.unused_parameters > 0 {
            let _ = writeln!(out, "  and {} parameters that are not needed", grouped(part.unused_parameters));
        }
        for file in &part.files {
            let _ = writeln!(out, "  file {file}");
        }
        for tensor in &part.tensors {
            let status = match tensor.status {
                TensorStatus::Used => "ok",
                TensorStatus::Unused => "not needed",
                TensorStatus::Missing => "missing",
                TensorStatus::Unexpected => "unexpected",
                TensorStatus::WrongShape => "wrong shape",
                TensorStatus::WrongDtype => "wrong dtype",
            };
            let dtype = tensor.dtype.as_deref().unwrap_or("-");
            let _ = write!(out, "  {status:<11} {dtype:<5} {:<22} {}", format!("{:?}", tensor.shape), tensor.name);
            let expected = tensor.expected_shape.as_ref().map(|shape| format!(", expected {shape:?}"));
            let _ = writeln!(out, "{}", expected.unwrap_or_default());
        }
    }
    let _ = writeln!(out);
    if findings.is_empty() {
        let _ = writeln!(out, "complete: every tensor is there, and no other");
    }
    for finding in findings {
        let _ = writeln!(out, "wrong: {finding}");
    }
    out
}

/// Digits in groups of three.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let head = digits.len() % 3;
    let mut out = digits[..head].to_string();
    for (index, digit) in digits[head..].chars().enumerate() {
        if index % 3 == 0 && !out.is_empty() {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_names_every_tensor_and_counts_in_groups() {
        let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../assets/mochi-tiny");
        let inspection = Checkpoint::inspect(dir.as_ref()).unwrap();
        let text = as_text(&inspection, &inspection.findings());
        assert!(text.contains("transformer: 2,201,808 parameters in"), "{text}");
        assert!(text.contains("layout: diffusers"));
        for tensor in inspection.parts.iter().flat_map(|part| &part.tensors) {
            assert!(text.contains(&format!(" {}\n", tensor.name)), "{}", tensor.name);
        }
        assert!(text.ends_with("complete: every tensor is there, and no other\n"));
        assert_eq!([0, 12, 999, 1000, 1_234_567].map(grouped), ["0", "12", "999", "1,000", "1,234,567"]);
    }
}
