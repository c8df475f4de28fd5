//! `farm-node model parity`: the stages of a checkpoint against reference tensors.
//!
//! Tensors are named as in the specification's script. A stage runs if the checkpoint has its weights and the file its
//! inputs; whatever the file holds besides is listed as skipped.

mod goldens;
mod report;

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, bail, ensure};
use farm_core::engine::{Engine, EngineError};
use farm_core::job::spec::{GenerationDefaults, GuidanceScale};
use farm_core::model::config::{DitConfig, T5Config, VaeConfig};
use farm_core::model::dit::Dit;
use farm_core::model::latent::VaeLatent;
use farm_core::model::sampler::Sampler;
use farm_core::model::schedule::SigmaSchedule;
use farm_core::model::t5::T5Encoder;
use farm_core::model::vae::VaeDecoder;
use farm_core::model::weights::checkpoint::{Checkpoint, Part};
use farm_core::model::weights::{Loader, Tensors};
use farm_core::parallel::group::RankGroup;
use farm_core::precision::Precision;
use goldens::Goldens;
use report::{Measure, Report};

use crate::command::layout::{channels_first, channels_last};
use crate::devices::{Devices, ThreadArgs};

// Of max|a − b| / max(1, max|b|): about five times what independent f32 implementations differ by.
const T5_TOLERANCE: f64 = 3e-5;
const DIT_TOLERANCE: f64 = 1e-4;
const SAMPLER_TOLERANCE: f64 = 1e-4;
const VAE_TOLERANCE: f64 = 5e-5;
// Of ‖a − b‖ / ‖b‖, where numbers are rounded to bf16: single values say nothing then.
const BF16_TOLERANCE: f64 = 2e-2;

#[derive(clap::Args)]
pub struct Args {
    /// Checkpoint folder; parts may be missing
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// Reference tensors
    #[arg(value_name = "GOLDENS.safetensors")]
    goldens: PathBuf,
    /// The device to compare: cpu:1, cuda:1, or emulated:1, the kernels of a GPU on the processor
    #[arg(long, value_name = "cpu:1", default_value = "cpu:1")]
    devices: Devices,
    #[command(flatten)]
    threads: ThreadArgs,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let checkpoint = Checkpoint::open(&args.dir)?;
    for note in checkpoint.notes() {
        eprintln!("note: {note}");
    }
    ensure!(args.devices.count == 1, "--devices {}: parity is of one device", args.devices);
    let engine = args.threads.compute(args.devices)?.engine(0)?;
    let report = compare(&engine, &checkpoint, &Goldens::open(&args.goldens)?)?;
    if args.json {
        #[derive(serde::Serialize)]
        struct Output<'a> {
            passed: bool,
            #[serde(flatten)]
            report: &'a Report,
        }
        let output = Output { passed: report.passed(), report: &report };
        writeln!(io::stdout(), "{}", serde_json::to_string_pretty(&output)?)?;
    } else {
        write!(io::stdout(), "{}", report.as_text())?;
    }
    Ok(if report.passed() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn compare<E: Engine>(engine: &E, checkpoint: &Checkpoint, goldens: &Goldens) -> anyhow::Result<Report> {
    let report = Report::new(match engine.precision() {
        Precision::F32 => Measure::Largest,
        Precision::Bf16 => Measure::Relative(BF16_TOLERANCE),
    });
    let mut stages = Stages { engine, goldens, report, inputs: BTreeSet::new() };
    if let Some(part) = checkpoint.t5() {
        stages.text_encoder(part).context("text encoder")?;
    }
    if let Some(part) = checkpoint.dit() {
        stages.transformer(part).context("transformer")?;
    }
    if let Some(part) = checkpoint.vae() {
        stages.decoder(part).context("decoder")?;
    }
    Ok(stages.finish(checkpoint))
}

struct Stages<'a, E> {
    engine: &'a E,
    goldens: &'a Goldens,
    report: Report,
    /// Reference tensors that a stage took as inputs.
    inputs: BTreeSet<&'static str>,
}

impl<E: Engine> Stages<'_, E> {
    /// Whether the file has all of `names`, which then count as inputs.
    fn takes(&mut self, names: &[&'static str]) -> bool {
        let all = names.iter().all(|name| self.goldens.shape(name).is_some());
        if all {
            self.inputs.extend(names);
        }
        all
    }

    fn text_encoder(&mut self, part: &Arc<Part<T5Config>>) -> anyhow::Result<()> {
        if !self.takes(&["t5.ids", "t5.mask"]) {
            return Ok(());
        }
        let Some(&[samples, length]) = self.goldens.shape("t5.ids") else { bail!("t5.ids is not [rows, tokens]") };
        ensure!(self.goldens.shape("t5.mask") == Some(&[samples, length]), "t5.mask has another shape than t5.ids");
        let (ids, valid) = (self.goldens.numbers("t5.ids")?, self.goldens.valid_tokens("t5.mask")?);
        let encoder = T5Encoder::load(self.engine, part.clone(), part.config())?;
        for (sample, &tokens) in valid.iter().enumerate().filter(|(_, tokens)| **tokens > 0) {
            let mut taps = Taps::new("t5.", |_| true);
            let ids = &ids[sample * length..][..tokens];
            encoder.encode_observed(self.engine, ids, &mut |name, x| taps.take(self.engine, name, x))?;
            self.record(taps, sample, samples, T5_TOLERANCE)?;
        }
        self.skip_padding(&valid, length, "t5.");
        Ok(())
    }

    fn transformer(&mut self, part: &Part<DitConfig>) -> anyhow::Result<()> {
        let dit = Dit::load(&Loader { engine: self.engine, source: part }, part.config())?;
        self.rope(part)?;
        self.velocity(&dit)?;
        self.sampler(&dit)
    }

    fn rope(&mut self, part: &Part<DitConfig>) -> anyhow::Result<()> {
        if self.goldens.shape("rope.cos").or(self.goldens.shape("rope.sin")).is_none() {
            return Ok(());
        }
        let latent = ["dit.in", "sample.noise"].into_iter().find_map(|name| self.goldens.shape(name));
        let Some(&[_, _, t, h, w]) = latent else { return Ok(()) };
        let loader = Loader { engine: self.engine, source: part };
        let config = part.config();
        let frequencies = loader.tensor("pos_frequencies", &[3, config.num_heads, config.head_dim / 2])?;
        let table = self.engine.rope_table(&frequencies, [t, h / 2, w / 2], 0..t * h * w / 4)?;
        let mut taps = Taps::new("rope.", |_| false);
        taps.take(self.engine, "cos", &table.cos);
        taps.take(self.engine, "sin", &table.sin);
        self.record(taps, 0, 1, DIT_TOLERANCE)
    }

    /// One forward pass for every sample, each with its valid text rows alone.
    fn velocity(&mut self, dit: &Dit<E>) -> anyhow::Result<()> {
        if !self.takes(&["dit.in", "dit.t", "dit.text", "dit.mask"]) {
            return Ok(());
        }
        let Some(&[samples, c, t, h, w]) = self.goldens.shape("dit.in") else {
            bail!("dit.in is not [samples, channels, t, h, w]")
        };
        let latents = self.goldens.floats("dit.in")?;
        let timesteps = self.goldens.floats("dit.t")?.values;
        let valid = self.goldens.valid_tokens("dit.mask")?;
        ensure!(
            timesteps.len() == samples && valid.len() == samples,
            "dit.in has {samples} samples, dit.t {} and dit.mask {}",
            timesteps.len(),
            valid.len()
        );
        let solo = RankGroup::solo()?;
        let geometry = dit.geometry(self.engine, &solo, [c, t, h, w])?;
        for sample in 0..samples {
            let text = self.text("dit.text", sample, valid[sample])?;
            let branch = dit.text_conditioning(self.engine, &solo, text.as_ref())?;
            let latent = self.engine.upload(latents.sample(sample, samples), &[c, t, h, w])?;
            let mut taps = Taps::new("dit.", |name| name.ends_with(".y"));
            let observe = &mut |name: &str, x: &E::Tensor| taps.take(self.engine, name, x);
            let out = dit.velocity_observed(self.engine, &geometry, &latent, timesteps[sample], &branch, observe)?;
            taps.take(self.engine, "out", &out);
            self.record(taps, sample, samples, DIT_TOLERANCE)?;
        }
        let length = self.goldens.shape("dit.mask").map_or(0, |shape| shape[1]);
        self.skip_padding(&valid, length, "dit.");
        Ok(())
    }

    /// Row `row` of the features `name` `[rows, L, width]`, its first `tokens` tokens. None without tokens.
    fn text(&self, name: &str, row: usize, tokens: usize) -> anyhow::Result<Option<E::Tensor>> {
        let Some(&[rows, length, width]) = self.goldens.shape(name) else {
            bail!("{name} is not [rows, tokens, width]")
        };
        ensure!(row < rows && tokens <= length, "{name} has no {tokens} tokens in row {row}");
        if tokens == 0 {
            return Ok(None);
        }
        let features = self.goldens.floats(name)?;
        Ok(Some(self.engine.upload(&features.sample(row, rows)[..tokens * width], &[tokens, width])?))
    }

    /// The schedule, and the guided loop from `sample.noise` with the text of one row against no text at all.
    fn sampler(&mut self, dit: &Dit<E>) -> anyhow::Result<()> {
        let length = |name: &str| self.goldens.shape(name).and_then(|shape| shape.first().copied());
        let steps = length("sched.sigmas").map(|values| values.saturating_sub(1)).or(length("sched.timesteps"));
        let steps = steps.unwrap_or_else(|| self.goldens.names().filter(|name| name.starts_with("sample.z")).count());
        if steps == 0 {
            return Ok(());
        }
        let schedule = SigmaSchedule::linear_quadratic(steps, GenerationDefaults::default().threshold_noise, None)?;
        // The reference counts from noise to data.
        let progress: Vec<f32> = schedule.sigmas().iter().map(|sigma| (1.0 - sigma) as f32).collect();
        let timesteps: Vec<f32> = (0..steps).map(|step| schedule.timestep(step)).collect();
        let mut taps = Taps::new("sched.", |_| false);
        taps.values.push(("sched.sigmas".into(), vec![steps + 1], progress));
        taps.values.push(("sched.timesteps".into(), vec![steps], timesteps));
        self.record(taps, 0, 1, SAMPLER_TOLERANCE)?;

        let text = if self.takes(&["sample.noise", "dit.text", "dit.mask"]) {
            ["dit.text", "dit.mask"]
        } else if self.takes(&["sample.noise", "t5.out", "t5.mask"]) {
            ["t5.out", "t5.mask"]
        } else {
            return Ok(());
        };
        let Some(&[1, c, t, h, w]) = self.goldens.shape("sample.noise") else {
            bail!("sample.noise is not [1, channels, t, h, w]")
        };
        let row = self.goldens.about.sampled_prompt;
        let valid = self.goldens.valid_tokens(text[1])?;
        let tokens = *valid.get(row).with_context(|| format!("{} has no row {row}", text[1]))?;
        let text = self.text(text[0], row, tokens)?;
        let noise = self.engine.upload(&self.goldens.floats("sample.noise")?.values, &[c, t, h, w])?;
        let solo = RankGroup::solo()?;
        let sampler = Sampler {
            dit,
            geometry: &dit.geometry(self.engine, &solo, [c, t, h, w])?,
            cond: &dit.text_conditioning(self.engine, &solo, text.as_ref())?,
            uncond: &dit.text_conditioning(self.engine, &solo, None)?,
            schedule: &schedule,
            guidance: &GuidanceScale::Constant(self.goldens.about.guidance_scale),
            group: &solo,
        };
        let mut taps = Taps::new("sample.", |_| false);
        sampler.run(self.engine, &noise, 0, &mut |done, _, z| {
            // Called before the first step, too.
            if let Some(step) = done.checked_sub(1) {
                taps.take(self.engine, &format!("z{step}"), z);
            }
            ControlFlow::Continue(())
        })?;
        self.record(taps, 0, 1, SAMPLER_TOLERANCE)
    }

    fn decoder(&mut self, part: &Part<VaeConfig>) -> anyhow::Result<()> {
        if !self.takes(&["vae.in"]) {
            return Ok(());
        }
        let Some(&[samples, c, t, h, w]) = self.goldens.shape("vae.in") else {
            bail!("vae.in is not [samples, channels, t, h, w]")
        };
        ensure!(
            c == part.config().latent_channels,
            "vae.in has {c} channels, the checkpoint has {}",
            part.config().latent_channels
        );
        let latents = self.goldens.floats("vae.in")?;
        let decoder = VaeDecoder::load(&Loader { engine: self.engine, source: part }, part.config())?;
        for sample in 0..samples {
            let volume = channels_last(latents.sample(sample, samples), c);
            let latent = VaeLatent(self.engine.upload(&volume, &[t, h, w, c])?);
            let mut taps = Taps::new("", |_| false);
            let observe = &mut |name: &str, x: &E::Tensor| taps.take(self.engine, name, x);
            let frames = decoder.stream().push(self.engine, &latent, observe)?;
            taps.take(self.engine, "vae.out_genmo", &frames);
            for (_, shape, values) in &mut taps.values {
                // [T, H, W, C] → [C, T, H, W]
                if let Some(channels) = shape.pop() {
                    *values = channels_first(values, channels);
                    shape.insert(0, channels);
                }
            }
            self.record(taps, sample, samples, VAE_TOLERANCE)?;
        }
        Ok(())
    }

    /// Compares what a stage showed with sample `sample` of the references of the same names.
    fn record(&mut self, taps: Taps, sample: usize, samples: usize, tolerance: f64) -> anyhow::Result<()> {
        if let Some(error) = taps.error {
            return Err(error.into());
        }
        for (name, shape, got) in taps.values {
            let Some(golden_shape) = self.goldens.shape(&name) else { continue };
            let golden = self.goldens.floats(&name)?;
            let mut reference = golden.sample(sample, samples);
            if (taps.rows_only)(&name) && golden_shape.last() == shape.last() && got.len() <= reference.len() {
                // Valid text rows; the rest of the reference is padding.
                reference = &reference[..got.len()];
            }
            self.report.compare(&name, &got, reference, tolerance);
        }
        Ok(())
    }

    /// Lists the rows of compared text tensors that are past the valid ones.
    fn skip_padding(&mut self, valid: &[usize], length: usize, prefix: &str) {
        let (all, valid) = (valid.len() * length, valid.iter().sum::<usize>());
        let compared: Vec<String> = self.report.compared.iter().map(|comparison| comparison.tensor.clone()).collect();
        let text = |name: &&String| name.starts_with(prefix) && (prefix == "t5." || name.ends_with(".y"));
        for name in compared.iter().filter(text).filter(|_| all > valid) {
            self.report.skip(name, format!("{} of {all} rows, which are padding", all - valid));
        }
    }

    /// Lists what was not compared, with the reason.
    fn finish(mut self, checkpoint: &Checkpoint) -> Report {
        let compared: BTreeSet<String> = self.report.compared.iter().map(|c| c.tensor.clone()).collect();
        for name in self.goldens.names() {
            if compared.contains(name) || self.inputs.contains(name.as_str()) {
                continue;
            }
            let part = match name.split('.').next() {
                Some("t5") => Some((checkpoint.t5().is_some(), "text encoder", "t5.ids, t5.mask")),
                Some("dit") => Some((checkpoint.dit().is_some(), "transformer", "dit.in, dit.t, dit.text, dit.mask")),
                Some("rope") => Some((checkpoint.dit().is_some(), "transformer", "dit.in or sample.noise")),
                Some("sched" | "sample") => {
                    Some((checkpoint.dit().is_some(), "transformer", "sample.noise with dit.text and dit.mask"))
                }
                Some("vae") => Some((checkpoint.vae().is_some(), "decoder", "vae.in")),
                _ => None,
            };
            let reason = match part {
                _ if name.starts_with("enc.") => "there is no encoder here".into(),
                _ if name.contains("_diffusers") => "the reference decode is another one (vae.out_genmo)".into(),
                Some((false, part, _)) => format!("the checkpoint has no {part}"),
                Some((true, _, inputs)) => {
                    format!("not a value of this checkpoint, or its inputs ({inputs}) are missing")
                }
                None => "not understood".into(),
            };
            self.report.skip(name, reason);
        }
        self.report
    }
}

/// Values that a stage showed.
struct Taps {
    prefix: &'static str,
    /// Which ones have only the valid text rows.
    rows_only: fn(&str) -> bool,
    /// Name, shape, values.
    values: Vec<(String, Vec<usize>, Vec<f32>)>,
    error: Option<EngineError>,
}

impl Taps {
    fn new(prefix: &'static str, rows_only: fn(&str) -> bool) -> Self {
        Self { prefix, rows_only, values: Vec::new(), error: None }
    }

    fn take<E: Engine>(&mut self, engine: &E, name: &str, x: &E::Tensor) {
        match engine.download(x) {
            Ok(values) => self.values.push((format!("{}{name}", self.prefix), engine.shape(x), values)),
            // An observer cannot fail; Stages::record does.
            Err(error) => self.error = Some(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use farm_core::engine::cpu::CpuEngine;
    #[cfg(feature = "cuda")]
    use farm_core::engine::cuda::{CudaEngine, emulation::Emulation};

    use super::*;

    fn repository() -> PathBuf {
        PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
    }

    fn parity(checkpoint: &str, goldens: &str) -> Report {
        let checkpoint = Checkpoint::open(&repository().join(checkpoint)).unwrap();
        let goldens = Goldens::open(&repository().join("tests/goldens").join(goldens)).unwrap();
        compare(&CpuEngine::new(2).unwrap(), &checkpoint, &goldens).unwrap()
    }

    fn reason<'a>(report: &'a Report, tensor: &str) -> &'a str {
        report.skipped.iter().find(|skipped| skipped.tensor == tensor).map_or("", |skipped| &skipped.reason)
    }

    #[test]
    fn every_committed_reference_is_met() {
        let all = ["t5.out", "rope.sin", "dit.out", "sched.sigmas", "sample.z5", "vae.out_genmo"];
        for (checkpoint, goldens, stages) in [
            ("tests/goldens/small", "small", &all[..]),
            ("tests/goldens/small/original", "small", &all[1..]),
            ("tests/goldens/small-bf16", "small-bf16", &all[1..5]),
            ("assets/mochi-tiny", "mochi-tiny", &all),
        ] {
            let report = parity(checkpoint, &format!("{goldens}/goldens.safetensors"));
            assert!(report.passed(), "{checkpoint}\n{}", report.as_text());
            for tensor in stages {
                let compared = report.compared.iter().any(|comparison| comparison.tensor == *tensor);
                assert!(compared, "{checkpoint}: no {tensor}\n{}", report.as_text());
            }
        }
    }

    /// The whole CUDA engine, kernels and all, without a GPU.
    #[cfg(feature = "cuda")]
    #[test]
    fn the_kernels_of_gpus_meet_the_references_in_both_precisions() {
        let checkpoint = Checkpoint::open(&repository().join("tests/goldens/small")).unwrap();
        let goldens = Goldens::open(&repository().join("tests/goldens/small/goldens.safetensors")).unwrap();
        for precision in [Precision::F32, Precision::Bf16] {
            let engine = CudaEngine::new(Arc::<Emulation>::default(), precision);
            let report = compare(&engine, &checkpoint, &goldens).unwrap();
            assert!(report.passed() && report.compared.len() == 27, "{precision}\n{}", report.as_text());
        }
    }

    #[test]
    fn what_is_not_compared_is_listed_with_the_reason() {
        let report = parity("tests/goldens/small/original", "small/goldens.safetensors");
        assert_eq!(reason(&report, "t5.out"), "the checkpoint has no text encoder");
        assert!(reason(&report, "dit.block0.y").contains("padding"), "{}", report.as_text());
        let report = parity("assets/mochi-tiny", "mochi-tiny/goldens.safetensors");
        assert!(reason(&report, "vae.out_diffusers").contains("another one"));
    }

    #[test]
    fn values_of_another_checkpoint_do_not_pass() {
        // The same sizes, other values.
        let checkpoint = Checkpoint::open(&repository().join("tests/goldens/small-bf16")).unwrap();
        let goldens = Goldens::open(&repository().join("tests/goldens/small/goldens.safetensors")).unwrap();
        let report = compare(&CpuEngine::new(1).unwrap(), &checkpoint, &goldens).unwrap();
        assert!(report.ran() && !report.passed(), "{}", report.as_text());
    }
}
