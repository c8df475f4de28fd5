use std::path::Path;

use clap::Parser;
use farm_core::engine::cuda::plan::Stage;

use super::report::StageFigures;
use super::*;

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    args: Args,
}

fn args(line: &str) -> Args {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/mochi-tiny");
    let line =
        format!("gpu --devices emulated:1 --width 16 --height 16 --num-frames 7 --steps 1 --precision fp32 {line}");
    let words = line.split_whitespace().map(str::to_owned);
    Line::try_parse_from(words.chain(["--model".into(), model.to_str().unwrap().into()])).unwrap().args
}

fn figures(line: &str) -> Figures {
    let args = args(line);
    let model = Model::stored(Checkpoint::open(args.model.as_deref().unwrap()).unwrap()).unwrap();
    let limit = args.memory.map_or(usize::MAX, |bytes| bytes as usize);
    let rates = Rates::embedded().unwrap().device("cpu").unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    measure(Emulation::with_memory(limit), |_| Ok(f64::MAX), rates, &model, &args, &stop).unwrap()
}

fn calls(stage: &StageFigures, kernel: &str) -> u64 {
    stage.rows.iter().filter(|row| row.kernel == kernel).map(|row| row.calls).sum()
}

#[test]
fn a_table_has_every_kernel_with_its_work_and_shares_that_sum_to_one() {
    let figures = figures("");
    let [text, step, decode] = &figures.stages;
    // 3 blocks: attention of both branches, the text's own queries but in the last, in the branch that has text.
    assert_eq!(calls(step, "attention_f32"), 3 + 3 + 2);
    assert_eq!(calls(step, "euler_step"), 1);
    // 5 ResBlocks of two convolutions, for each of two latent frames.
    assert_eq!(calls(decode, "convolution_f32") + calls(decode, "convolution_scalar_f32"), 2 * 2 * 5);
    assert_eq!(calls(text, "attention_f32"), 2);
    let attention: u64 = step.rows.iter().filter(|row| row.kernel == "attention_f32").map(|row| row.flops).sum();
    assert_eq!(attention as f64, attention_flops(&figures));
    for (stage, planned) in figures.stages.iter().zip(&figures.plan.stages) {
        let sum: f64 = stage.rows.iter().filter_map(|row| row.share).sum();
        assert!((sum - 1.0).abs() < 1e-9, "{}: {sum}", stage.stage);
        assert!(stage.rows.iter().all(|row| row.bytes > 0 && row.of_ceiling > 0.0 && row.calls > 0));
        assert!(stage.busy_seconds <= stage.seconds && stage.seconds > 0.0);
        assert!(stage.rows.is_sorted_by(|a, b| a.seconds >= b.seconds));
        // In a small network what is beside the tensors that a plan counts is much, but for its 64 MB for libraries.
        assert!(stage.peak > 0 && (stage.peak as u64) < planned.bytes(), "{}", stage.stage);
    }
    let predicted = &figures.predicted;
    assert!(predicted.clip > f64::from(predicted.steps) * predicted.step && figures.step_seconds.len() == 1);
    let json: serde_json::Value = serde_json::from_str(&serde_json::to_string(&figures).unwrap()).unwrap();
    assert_eq!(json["stages"][1]["rows"].as_array().unwrap().len(), step.rows.len());
    let shown = figures.to_string();
    assert!(shown.contains("attention_f32") && shown.contains("bench gpu: a clip of 24 steps"), "{shown}");
}

/// Of a step, both branches, by the cost model.
fn attention_flops(figures: &Figures) -> f64 {
    let model = Model::stored(Checkpoint::open(args("").model.as_deref().unwrap()).unwrap()).unwrap().dit.shape();
    let (tokens, text) = (2, figures.clip.text[0]);
    let layer = |layer: usize| {
        let queries = if layer + 1 == model.layers { tokens } else { tokens + text };
        model.attention_flops(queries, tokens + text, model.heads) + model.attention_flops(tokens, tokens, model.heads)
    };
    (0..model.layers).map(layer).sum()
}

#[test]
fn with_little_memory_blocks_are_fetched_and_the_fetches_are_timed_apart() {
    let figures = figures("--memory 82000000");
    assert!(figures.plan.streaming.resident < 3, "{:?}", figures.plan);
    let [_, step, decode] = &figures.stages;
    let fetches: Vec<_> = step.rows.iter().filter(|row| row.share.is_none()).collect();
    let streamed = 3 - figures.plan.streaming.resident as u64;
    assert!(fetches.len() == 1 && fetches[0].calls == streamed, "a block is fetched once for both branches");
    assert!(decode.rows.iter().all(|row| row.share.is_some()));
    assert!(figures.to_string().contains("of 3 blocks stay on the device: streaming"));
    assert_eq!(figures.plan.stages[1].stage, Stage::Denoise);
}

#[test]
fn what_cannot_be_measured_says_why_and_a_stop_is_no_error() {
    let refused = |devices: &str| {
        let mut args = args("");
        args.devices = devices.parse().unwrap();
        format!("{:#}", run(args).unwrap_err())
    };
    assert!(refused("cpu:1").contains("bench kernels and bench forward"));
    assert!(refused("emulated:2").contains("one GPU is measured at a time"));
    let args = args("");
    let model = Model::published();
    let rates = Rates::embedded().unwrap().device("cpu").unwrap();
    let stop = Arc::new(AtomicBool::new(true));
    let stopped = measure(Emulation::default(), |_| Ok(f64::MAX), rates, &model, &args, &stop).map(drop).unwrap_err();
    assert!(matches!(stopped.downcast_ref(), Some(ModelError::Stopped)), "{stopped:#}");
}
