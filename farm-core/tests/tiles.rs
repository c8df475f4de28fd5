//! A decode in tiles against the decode of the whole frame, on one engine.
#![cfg(feature = "model")]

use std::io;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use farm_core::engine::cpu::CpuEngine;
use farm_core::engine::{Engine, SequenceOps};
use farm_core::job::spec::{RenderRequest, RenderSpec};
use farm_core::job::state::Progress;
use farm_core::model::ModelError;
use farm_core::model::config::VaeConfig;
use farm_core::model::latent::VaeLatent;
use farm_core::model::noise::normals;
use farm_core::model::pipeline::{Pipeline, RenderObserver, Residency, Start};
use farm_core::model::vae::{Advance, NORM_GROUPS, TileStream, VaeDecoder, random};
use farm_core::model::weights::Loader;
use farm_core::model::weights::checkpoint::Checkpoint;
use farm_core::parallel::group::RankGroup;
use farm_core::tiles::local::{Lockstep, Whole, decode, plan_of};
use farm_core::tiles::message::{Edges, Frame};
use farm_core::tiles::plan::{Mode, Span, Tile, TilePlan};
use farm_core::tiles::statistics::{Sums, Totals, merge};

type Tensor = <CpuEngine as SequenceOps>::Tensor;
type Decoder = Arc<VaeDecoder<CpuEngine>>;

fn engine() -> CpuEngine {
    CpuEngine::new(2).unwrap()
}

/// One block a stage, and the expansions of the published decoder.
fn small_config() -> VaeConfig {
    VaeConfig { channels: vec![32; 4], layers: vec![1; 5], ..random::published_layers() }
}

fn small(engine: &CpuEngine) -> Decoder {
    Arc::new(random::decoder(engine, &small_config(), 3).unwrap())
}

fn latent(engine: &CpuEngine, [frames, height, width]: [usize; 3]) -> VaeLatent<Tensor> {
    let shape = [frames, height, width, 12];
    VaeLatent(engine.upload(&normals(5, 0..shape.iter().product::<usize>() as u64), &shape).unwrap())
}

fn plan(engine: &CpuEngine, latent: &VaeLatent<Tensor>, text: &str) -> TilePlan {
    plan_of(engine, latent, text.parse().unwrap()).unwrap()
}

fn sums_merged(sums: &[Sums]) -> Result<Totals, String> {
    merge(sums)
}

/// All of it at once, the way that every other decoder test knows.
fn whole(engine: &CpuEngine, decoder: &Decoder, latent: &VaeLatent<Tensor>) -> Vec<f32> {
    engine.download(&decoder.stream().push(engine, latent, &mut |_, _| ()).unwrap()).unwrap()
}

fn worst(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn every_mode_gives_all_frames_of_clips_of_any_length() {
    let engine = engine();
    let decoder = small(&engine);
    for (latent_frames, frames) in [(1, 1), (2, 7), (4, 19), (5, 25), (15, 85), (28, 163)] {
        let latent = latent(&engine, [latent_frames, 3, 4]);
        let expected = whole(&engine, &decoder, &latent);
        assert_eq!(expected.len(), frames * 24 * 32 * 3);
        for text in ["whole", "shared:2x3+1", "independent:3x2+1", "exact:2x2"] {
            let got = decode(&engine, &decoder, &latent, &plan(&engine, &latent, text), &mut sums_merged).unwrap();
            assert_eq!(got.len(), expected.len(), "{frames} frames, {text}");
            match text {
                // Chunks of one latent frame, against all at once.
                "whole" => assert!(got == expected, "{frames} frames"),
                "exact:2x2" => assert!(worst(&got, &expected) < 1e-4, "{frames}: {}", worst(&got, &expected)),
                _ => assert!(got.iter().all(|x| x.is_finite())),
            }
        }
    }
}

#[test]
fn a_single_tile_that_shows_its_statistics_has_the_bits_of_the_whole_decode() {
    let engine = engine();
    let decoder = small(&engine);
    let latent = latent(&engine, [3, 5, 6]);
    let measured = Whole::decode(&engine, &decoder, &latent).unwrap();
    assert!(measured.frames == whole(&engine, &decoder, &latent));
    assert_eq!(measured.totals.len(), 3 * decoder.norms() as usize);
}

#[test]
fn exact_tiles_equal_the_whole_decode_wherever_they_are_cut() {
    let engine = engine();
    let decoder = small(&engine);
    let latent = latent(&engine, [3, 7, 6]);
    let expected = whole(&engine, &decoder, &latent);
    // Tiles of one pixel, of uneven sizes, in one row, in one column.
    for (text, grid) in [("exact:2x2", [4, 3]), ("exact:3x4", [3, 2]), ("exact:7x2", [1, 3]), ("exact:4x6", [2, 1])] {
        let plan = plan(&engine, &latent, text);
        assert_eq!(plan.grid, grid);
        let got = decode(&engine, &decoder, &latent, &plan, &mut sums_merged).unwrap();
        assert!(worst(&got, &expected) < 1e-4, "{text}: {}", worst(&got, &expected));
    }
    // The same tiles without their neighbours' pixels are far from it.
    let mut plan = plan(&engine, &latent, "exact:3x4");
    plan.mode = Mode::Shared;
    let got = decode(&engine, &decoder, &latent, &plan, &mut sums_merged).unwrap();
    assert!(worst(&got, &expected) > 0.1);
}

#[test]
fn exact_tiles_equal_the_whole_decode_through_all_layers_of_the_published_decoder() {
    let engine = engine();
    let decoder = Arc::new(random::decoder(&engine, &random::published_layers(), 1).unwrap());
    assert_eq!(decoder.norms(), 38);
    let latent = latent(&engine, [2, 5, 5]);
    let got = decode(&engine, &decoder, &latent, &plan(&engine, &latent, "exact:3x3"), &mut sums_merged).unwrap();
    let expected = whole(&engine, &decoder, &latent);
    assert!(worst(&got, &expected) < 1e-4, "{}", worst(&got, &expected));
}

#[test]
fn tiles_have_the_same_bits_for_any_number_of_threads() {
    let decoder = small(&engine());
    let mut all = [1, 2, 3].map(|threads| {
        let engine = CpuEngine::new(threads).unwrap();
        let latent = latent(&engine, [2, 5, 7]);
        ["shared:4x4+2", "exact:3x3"]
            .map(|text| decode(&engine, &decoder, &latent, &plan(&engine, &latent, text), &mut sums_merged).unwrap())
    });
    let one = std::mem::take(&mut all[0]);
    assert!(all[1..].iter().all(|more| *more == one));
}

/// Replacements and hedges depend on it.
#[test]
fn a_tile_that_starts_again_with_the_totals_of_a_log_has_the_bits_of_the_first() {
    let engine = engine();
    let decoder = small(&engine);
    let latent = latent(&engine, [3, 6, 6]);
    let plan = plan(&engine, &latent, "shared:4x4+2");
    let chunk = |t| VaeLatent(engine.narrow(&latent.0, 0, t, 1).unwrap());
    let (mut tiles, mut log, mut first) = (Lockstep::new(&decoder, &plan).unwrap(), Vec::new(), Vec::new());
    for t in 0..3 {
        let frames = tiles.chunk(&engine, &chunk(t), &mut |sums| {
            log.push(merge(sums)?);
            Ok(log[log.len() - 1].clone())
        });
        first.extend(engine.download(&frames.unwrap()[3]).unwrap());
    }

    let frame = Frame { mode: plan.mode, latent: plan.latent, grid: plan.grid };
    let mut alone = TileStream::new(decoder, 3, plan.tiles[3], frame).unwrap();
    let (mut log, mut second) = (log.iter(), Vec::new());
    for t in 0..3 {
        let mut step = alone.begin(&engine, &chunk(t)).unwrap();
        let frames = loop {
            match step {
                Advance::Norm { .. } => step = alone.advance(&engine, log.next().unwrap(), &[]).unwrap(),
                Advance::Frames(frames) => break frames,
            }
        };
        second.extend(engine.download(&frames).unwrap());
    }
    assert!(first == second && log.next().is_none());
}

#[test]
fn what_cannot_be_a_tile_of_the_frame_is_refused() {
    let decoder = small(&engine());
    fn span(start: usize, end: usize) -> Span {
        Span { start, end, own_start: start, own_end: end }
    }
    let tile = Tile { rows: span(0, 4), cols: span(3, 6) };
    let frame = Frame { mode: Mode::Exact, latent: [4, 6], grid: [1, 2] };
    assert!(TileStream::new(decoder.clone(), 1, tile, frame).is_ok());
    type Change = fn(&mut Tile, &mut Frame, &mut u32);
    let with = |change: Change| {
        let (mut tile, mut frame, mut number) = (tile, frame, 1);
        change(&mut tile, &mut frame, &mut number);
        TileStream::new(decoder.clone(), number, tile, frame).err().map(|error| error.to_string())
    };
    let changes: [Change; 10] = [
        |_, _, number| *number = 0,
        |_, _, number| *number = 2,
        |_, frame, _| frame.grid = [0, 0],
        |_, frame, _| frame.grid = [1, 3],
        |_, frame, _| frame.grid = [2, 2],
        |_, frame, _| frame.latent = [4, 7],
        |_, frame, _| frame.mode = Mode::Whole,
        |tile, _, _| tile.cols = span(6, 6),
        |tile, _, _| tile.rows = Span { start: 4, end: 0, own_start: 0, own_end: 4 },
        |tile, _, _| tile.cols.start = 2,
    ];
    for (index, change) in changes.iter().enumerate() {
        let error = with(*change).unwrap_or_else(|| panic!("change {index} is accepted"));
        assert!(error.contains("cannot be tile"), "{error}");
    }
}

#[test]
fn what_others_say_is_checked_and_named() {
    let engine = engine();
    let decoder = small(&engine);
    let latent = latent(&engine, [2, 4, 6]);
    let chunk = |t| VaeLatent(engine.narrow(&latent.0, 0, t, 1).unwrap());
    let plan = plan(&engine, &latent, "exact:2x3");
    let frame = Frame { mode: plan.mode, latent: plan.latent, grid: plan.grid };
    let good = Totals(vec![[0.0, 1.0]; NORM_GROUPS]);
    // The edges of a neighbour of tile 0 in the first norm: 2x3 pixels of 32 channels.
    let edges = Edges { top: vec![0.0; 96], bottom: vec![0.0; 96], left: vec![0.0; 64], right: vec![0.0; 64] };
    let all = |edges: Edges| [1, 2, 3].map(|number| (number, Arc::new(edges.clone())));
    let refusal = |totals: &Totals, edges: &[(u32, Arc<Edges>)]| -> Option<String> {
        let mut tile = TileStream::new(decoder.clone(), 0, plan.tiles[0], frame).unwrap();
        assert!(tile.advance(&engine, totals, edges).is_err(), "nothing has begun");
        let step = tile.begin(&engine, &chunk(0)).unwrap();
        assert!(matches!(step, Advance::Norm { sums: Sums { count: 6, .. }, edges: Some(_) }));
        assert!(tile.begin(&engine, &chunk(1)).err().unwrap().to_string().contains("waits at norm 0 of chunk 0"));
        let error = tile.advance(&engine, totals, edges).err()?.to_string();
        assert!(error.starts_with("tile 0, chunk 0, norm 0: "), "{error}");
        Some(error)
    };
    assert_eq!(refusal(&good, &all(edges.clone())), None);

    for (totals, reason) in [
        (vec![[0.0, 1.0]; NORM_GROUPS - 1], "31 totals, 32 are needed"),
        (Vec::new(), "0 totals"),
        ([vec![[0.0, 1.0]; 31], vec![[f32::NAN, 1.0]]].concat(), "group 31 has mean NaN"),
        ([vec![[0.0, -1.0]], vec![[0.0, 1.0]; 31]].concat(), "variance -1"),
        ([vec![[0.0, f32::INFINITY]], vec![[0.0, 1.0]; 31]].concat(), "variance inf"),
    ] {
        let error = refusal(&Totals(totals), &all(edges.clone())).unwrap();
        assert!(error.contains(reason), "{error}");
    }
    let nan = Edges { top: vec![f32::NAN; 96], ..edges.clone() };
    let short = Edges { left: vec![0.0; 63], ..edges.clone() };
    let ragged = Edges { top: vec![0.0; 97], ..edges.clone() };
    let no_corner = [(1, Arc::new(edges.clone())), (2, Arc::new(edges.clone()))];
    let bad_corner = |top| [no_corner.to_vec(), vec![(3, Arc::new(Edges { top, ..edges.clone() }))]].concat();
    for (edges, reason) in [
        (Vec::new(), "no edges of tile 2"),
        (no_corner.to_vec(), "no edges of tile 3"),
        (all(nan).to_vec(), "the top edge of tile 2 holds NaN"),
        (all(short).to_vec(), "the left edge of tile 1 has 63 values, not 1x2x32"),
        (all(ragged).to_vec(), "the top edge of tile 2 has 97 values, not 1x3x32"),
        (bad_corner(Vec::new()), "the top edge of tile 3 has 0 values"),
        (bad_corner(vec![0.0; 40]), "the top edge of tile 3 has 40 values"),
    ] {
        let error = refusal(&good, &edges).unwrap();
        assert!(error.contains(reason), "{error}");
    }

    let mut tile = TileStream::new(decoder.clone(), 0, plan.tiles[0], frame).unwrap();
    for shape in [[1, 4, 7, 12], [1, 5, 6, 12], [1, 4, 6, 11], [0, 4, 6, 12]] {
        let wrong = VaeLatent(engine.upload(&vec![0.0; shape.iter().product()], &shape).unwrap());
        let error = tile.begin(&engine, &wrong).err().unwrap().to_string();
        assert!(error.contains("[T, 4, 6, 12]") && error.contains(&format!("{shape:?}")), "{error}");
    }
}

struct Quiet;

impl RenderObserver for Quiet {
    fn progress(&mut self, _: Progress) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }

    fn warning(&mut self, _: &str) {}

    fn frames(&mut self, _: &[u8], _: usize) -> io::Result<()> {
        Ok(())
    }
}

/// A clip that the bundled checkpoint has made: with noise for a latent, figures are others.
fn rendered(engine: &CpuEngine, width: u32, height: u32) -> Result<(Decoder, VaeLatent<Tensor>), ModelError> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/mochi-tiny");
    let pipeline = Pipeline::open(engine, Checkpoint::open(&dir).unwrap(), Residency::Kept)?;
    let request: RenderRequest = serde_json::from_value(serde_json::json!({
        "prompt": "a red ball moving left on a black background", "seed": 1,
        "width": width, "height": height, "num_frames": 25,
    }))
    .unwrap();
    let spec = RenderSpec::resolve(&request, pipeline.defaults(), 1).unwrap();
    let latent = pipeline.denoise(engine, &RankGroup::solo()?, &spec, &Start::Seed, &mut Quiet)?.latent;
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let part = checkpoint.vae().unwrap();
    let decoder = Arc::new(VaeDecoder::load(&Loader { engine, source: part }, part.config())?);
    let latent = decoder.denormalize(engine, &latent)?;
    Ok((decoder, latent))
}

#[test]
fn shared_statistics_keep_tiles_close_to_the_whole_frame() {
    let engine = engine();
    let (decoder, latent) = rendered(&engine, 192, 128).unwrap();
    let whole = Whole::decode(&engine, &decoder, &latent).unwrap();
    let measure = |text: &str| {
        let plan = plan(&engine, &latent, text);
        assert!(plan.tiles.len() > 1);
        let measured = whole.measure(&engine, &decoder, &latent, &plan).unwrap();
        println!("{text}: {:?}, with the whole frame's own statistics {:?}", measured.quality, measured.oracle);
        measured
    };
    for (text, goal) in [("shared:8x8+2", 54.0), ("shared:12x12+4", 63.0)] {
        let measured = measure(text);
        assert!(measured.quality.psnr >= goal, "{text}: {:.1} dB, goal {goal}", measured.quality.psnr);
        // Live sums are worth as much as the statistics of the whole frame.
        assert!(measured.oracle.unwrap().psnr - measured.quality.psnr < 0.5, "{text}");
    }
    assert!(measure("independent:12x12+4").quality.psnr < 40.0, "so there is something to share");
    assert!(measure("exact:8x8").quality.worst <= 1e-4);
}
