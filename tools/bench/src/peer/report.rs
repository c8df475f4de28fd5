//! What the rounds come to: medians, ratios, the goals.

use serde::Serialize;
use serde_json::Value;

use super::{Peak, Printed};
use crate::machine::Setting;
use crate::process::Finished;
use crate::ratio::{median, ratio, table};

/// Others' use of the machine, in cores, from which a line says so.
const NOISE: f64 = 0.1;

/// One process of one side.
#[derive(Serialize)]
pub struct Round {
    /// Of a forward, the median of its runs; of a clip, from the start of the process to its end.
    seconds: f64,
    /// Without `cuda_mib`.
    peak_mib: f64,
    /// What CUDA's libraries take of their process, which a build for the processor alone would not have.
    cuda_mib: f64,
    relative_l2: Option<f64>,
    /// Of a forward, where they are counted.
    flops: Option<f64>,
    /// Cores that other processes used meanwhile.
    others: f64,
}

impl Round {
    pub fn forward(printed: &Printed, others: f64) -> Self {
        let Printed { median, peak_mib, relative_l2, cuda_mib, flops, .. } = *printed;
        Self { seconds: median, peak_mib: peak_mib - cuda_mib, cuda_mib, relative_l2: Some(relative_l2), flops, others }
    }

    pub fn clip(finished: &Finished, peak_mib: f64, cuda_mib: f64) -> Self {
        let Finished { seconds, others, .. } = *finished;
        Self { seconds, peak_mib: peak_mib - cuda_mib, cuda_mib, relative_l2: None, flops: None, others }
    }
}

/// All rounds of one side.
#[derive(Serialize)]
pub struct Side {
    /// Medians over the rounds.
    seconds: f64,
    peak_mib: f64,
    /// The worst.
    relative_l2: Option<f64>,
    rounds: Vec<Round>,
}

impl Side {
    /// None of no rounds.
    pub fn of(rounds: Vec<Round>) -> Option<Self> {
        let all = |of: fn(&Round) -> f64| rounds.iter().map(of).collect::<Vec<_>>();
        let (seconds, peak_mib) = (median(&all(|round| round.seconds)), median(&all(|round| round.peak_mib)));
        let relative_l2 = rounds.iter().filter_map(|round| round.relative_l2).max_by(f64::total_cmp);
        (!rounds.is_empty()).then_some(Self { seconds, peak_mib, relative_l2, rounds })
    }
}

#[derive(Serialize)]
pub struct Report {
    pub setting: Setting,
    /// Of the peer.
    pub versions: Value,
    peak: Peak,
    rounds: usize,
    lines: Vec<Line>,
}

/// A case on a number of threads.
#[derive(Serialize)]
struct Line {
    case: &'static str,
    threads: usize,
    ours: Option<Side>,
    theirs: Side,
    time: Goal,
    memory: Goal,
    /// What both sides do of what the cores can at most.
    limit: Option<Limit>,
    /// Of the relative difference of either side from the expected output.
    tolerance: Option<f64>,
    /// None if there is nothing on our side.
    pass: Option<bool>,
}

/// Of a forward whose FLOPs are counted. A product of f32 may be made of several products of tiles, so neither share says
/// alone how much is left to gain.
#[derive(Serialize)]
struct Limit {
    flops: f64,
    /// FLOP/s of either side.
    ours: f64,
    theirs: f64,
}

/// Ours over theirs.
#[derive(Serialize)]
struct Goal {
    ratio: Option<f64>,
    at_most: f64,
}

impl Goal {
    fn met(&self) -> Option<bool> {
        Some(self.ratio? <= self.at_most)
    }

    fn as_text(&self) -> String {
        let ratio = self.ratio.map_or("–".into(), |ratio| format!("{ratio:.2}"));
        format!("{ratio} ≤ {}", self.at_most)
    }
}

impl Report {
    pub fn new(setting: Setting, peak: Peak, rounds: usize) -> Self {
        Self { setting, versions: Value::Null, peak, rounds, lines: Vec::new() }
    }

    pub fn add(
        &mut self,
        case: &'static str,
        threads: usize,
        [time_goal, memory_goal]: [f64; 2],
        tolerance: Option<f64>,
        ours: Option<Side>,
        theirs: Side,
    ) {
        let of = |value: fn(&Side) -> f64| ratio(value(ours.as_ref()?), value(&theirs));
        let time = Goal { ratio: of(|side| side.seconds), at_most: time_goal };
        let memory = Goal { ratio: of(|side| side.peak_mib), at_most: memory_goal };
        let near = [ours.as_ref(), Some(&theirs)].into_iter().flatten().filter_map(|side| side.relative_l2);
        let same = tolerance.is_none_or(|tolerance| near.into_iter().all(|difference| difference <= tolerance));
        let pass = time.met().zip(memory.met()).map(|(time, memory)| time && memory && same);
        let limit = ours.as_ref().and_then(|ours| {
            let flops = ours.rounds.first()?.flops?;
            Some(Limit { flops, ours: flops / ours.seconds, theirs: flops / theirs.seconds })
        });
        self.lines.push(Line { case, threads, ours, theirs, time, memory, limit, tolerance, pass });
    }

    /// Whether no line that was measured misses a goal.
    pub fn passed(&self) -> bool {
        self.lines.iter().all(|line| line.pass != Some(false))
    }

    /// The peer's versions.
    pub fn versions_line(&self) -> String {
        let versions = self.versions.as_object().into_iter().flatten();
        let words = versions.map(|(name, version)| format!("{name} {}", version.as_str().unwrap_or("?")));
        format!("against {}; medians of {} rounds", words.collect::<Vec<_>>().join(", "), self.rounds)
    }

    pub fn as_text(&self) -> String {
        let header =
            ["case", "threads", "ours s", "theirs s", "ratio", "ours MiB", "theirs MiB", "ratio", "difference", ""];
        let rows = self.lines.iter().map(|line| {
            let number = |side: Option<&Side>, of: fn(&Side) -> String| side.map_or("–".into(), of);
            let seconds = |side| number(side, |side| format!("{:.3}", side.seconds));
            let memory = |side| number(side, |side| format!("{:.0}", side.peak_mib));
            let difference = line.ours.as_ref().and_then(|ours| ours.relative_l2);
            vec![
                line.case.to_owned(),
                line.threads.to_string(),
                seconds(line.ours.as_ref()),
                seconds(Some(&line.theirs)),
                line.time.as_text(),
                memory(line.ours.as_ref()),
                memory(Some(&line.theirs)),
                line.memory.as_text(),
                difference.map_or("–".into(), |difference| format!("{difference:.1e}")),
                line.verdict(),
            ]
        });
        let mut table = table(&header, 1, rows);
        if let Some(column) = table.column_mut(header.len() - 1) {
            column.set_cell_alignment(comfy_table::CellAlignment::Left);
        }
        table.to_string()
    }
}

impl Report {
    /// What one core can do at most, and what part of it either side gets out of its threads.
    pub fn limits_as_text(&self) -> String {
        let Peak { vectors, f32_flops, tile_flops, copy_bytes } = &self.peak;
        let tiles = tile_flops.map_or("none".into(), |flops| format!("{:.0} GFLOP/s", flops / 1e9));
        let core = format!(
            "one core at most: f32 with {vectors} {:.0} GFLOP/s, bf16 with AMX {tiles}, copy {:.0} GB/s",
            f32_flops / 1e9,
            copy_bytes / 1e9
        );
        let header =
            ["case", "threads", "GFLOP", "ours GFLOP/s", "of f32", "of AMX", "theirs GFLOP/s", "of f32", "of AMX"];
        let rows = self.lines.iter().filter_map(|line| {
            let limit = line.limit.as_ref()?;
            let giga = |flops: f64| format!("{:.0}", flops / 1e9);
            let share = |flops: f64, of: Option<f64>| {
                let of = of.and_then(|of| ratio(flops, of * line.threads as f64));
                of.map_or("–".into(), |share| format!("{:.0} %", 100.0 * share))
            };
            let mut row = vec![line.case.to_owned(), line.threads.to_string(), giga(limit.flops)];
            for side in [limit.ours, limit.theirs] {
                row.extend([giga(side), share(side, Some(*f32_flops)), share(side, *tile_flops)]);
            }
            Some(row)
        });
        format!("{core}\n{}", table(&header, 1, rows))
    }
}

impl Line {
    fn verdict(&self) -> String {
        let verdict = match self.pass {
            Some(true) => "PASS",
            Some(false) => "FAIL",
            None => "skipped: not here yet",
        };
        let rounds = self.ours.iter().chain([&self.theirs]).flat_map(|side| &side.rounds);
        let others = rounds.map(|round| round.others).fold(0.0, f64::max);
        if others < NOISE { verdict.into() } else { format!("{verdict} (others used {others:.1} cores)") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn setting() -> Setting {
        let (date, revision) = (jiff::Timestamp::UNIX_EPOCH, "abc".to_owned());
        Setting { date, revision, cpu: "a processor".into(), cores: 2, memory_mib: 1 }
    }

    fn side(seconds: [f64; 3], peak_mib: f64, relative_l2: f64) -> Option<Side> {
        let round = |seconds| Round {
            seconds,
            peak_mib,
            cuda_mib: 0.0,
            relative_l2: Some(relative_l2),
            flops: Some(8e9),
            others: 0.0,
        };
        Side::of(seconds.map(round).into())
    }

    fn report(ours: Option<Side>, theirs: Option<Side>) -> Report {
        let peak = Peak { vectors: "AVX2".into(), f32_flops: 10e9, tile_flops: None, copy_bytes: 5e9 };
        let mut report = Report::new(setting(), peak, 3);
        report.add("dit", 2, [0.6, 0.5], Some(1e-4), ours, theirs.unwrap());
        report
    }

    #[test]
    fn ratios_are_of_medians_and_held_against_both_goals() {
        let theirs = || side([10.0, 11.0, 30.0], 100.0, 1e-6);
        let pass = report(side([1.0, 5.5, 90.0], 50.0, 1e-6), theirs());
        assert!(pass.passed() && pass.as_text().contains("0.50 ≤ 0.6"), "{}", pass.as_text());
        assert!(pass.as_text().contains("PASS"));
        for missed in [side([7.0; 3], 50.0, 1e-6), side([1.0; 3], 51.0, 1e-6)] {
            assert!(!report(missed, theirs()).passed());
        }
    }

    #[test]
    fn another_output_is_never_a_pass() {
        let far = report(side([1.0; 3], 1.0, 2e-4), side([10.0; 3], 100.0, 1e-6));
        assert!(!far.passed() && far.as_text().contains("FAIL"));
        let lost = report(side([1.0; 3], 1.0, f64::NAN), side([10.0; 3], 100.0, 1e-6));
        assert!(!lost.passed());
    }

    #[test]
    fn what_there_is_not_here_is_said_and_neither_passes_nor_fails() {
        let report = report(None, side([10.0; 3], 100.0, 1e-3));
        assert!(report.passed() && report.as_text().contains("skipped"), "{}", report.as_text());
        assert_eq!(serde_json::to_value(&report).unwrap()["lines"][0]["pass"], Value::Null);
    }

    #[test]
    fn the_part_of_the_limit_is_of_all_threads() {
        let report = report(side([1.0; 3], 1.0, 1e-6), side([2.0; 3], 100.0, 1e-6));
        // 8 GFLOP in 1 and in 2 s, of 10 GFLOP/s on each of two cores.
        let text = report.limits_as_text();
        assert!(text.contains("40 %") && text.contains("20 %") && text.contains("AMX none"), "{text}");
    }

    #[test]
    fn a_busy_machine_is_noted() {
        let mut ours = side([1.0; 3], 1.0, 1e-6).unwrap();
        ours.rounds[1].others = 0.7;
        let report = report(Some(ours), side([10.0; 3], 100.0, 1e-6));
        assert!(report.as_text().contains("others used 0.7 cores"));
    }
}
