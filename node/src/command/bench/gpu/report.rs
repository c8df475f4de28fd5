//! The figures of `bench gpu`, as JSON and for people.

use std::fmt;

use comfy_table::{CellAlignment, Table, presets};
use farm_core::engine::cuda::ceiling::Ceiling;
use farm_core::engine::cuda::device::Device;
use farm_core::engine::cuda::plan::{Clip, Plan};
use farm_core::engine::cuda::profile::{Action, Profile, Record};
use farm_core::parallel::cost::devices::Devices as Rates;
use serde::Serialize;

use super::stages::Measured;
use crate::command::bench::median;
use crate::devices::known_gpu;

#[derive(Serialize)]
pub struct Figures {
    pub device: String,
    pub clip: Clip,
    pub ceiling: CeilingFigures,
    /// How the clip was predicted to fit, and how long a step would take.
    pub plan: Plan,
    pub stages: [StageFigures; 3],
    /// Of each step whose kernels were not timed.
    pub step_seconds: Vec<f64>,
    pub predicted: Predicted,
}

#[derive(Serialize)]
pub struct CeilingFigures {
    pub products: Vec<ProductFigures>,
    /// Bytes/s, read and written.
    pub copy: f64,
    pub data_sheet: Option<DataSheet>,
}

#[derive(Serialize)]
pub struct ProductFigures {
    pub dtype: String,
    /// `cublasLt`, or `own` for the program's own kernel.
    pub by: &'static str,
    /// Rows, columns and depth.
    pub size: usize,
    /// FLOP/s
    pub flops: f64,
}

/// What is promised.
#[derive(Serialize)]
pub struct DataSheet {
    /// FLOP/s of products in bf16.
    pub flops: Option<f64>,
    /// Bytes/s
    pub copy: f64,
    pub source: String,
}

#[derive(Serialize)]
pub struct StageFigures {
    pub stage: &'static str,
    /// By the clock.
    pub seconds: f64,
    /// Of it, what launches and copies took; fetches, which are beside them, are not counted.
    pub busy_seconds: f64,
    /// Bytes of tensors at the peak, and what was planned, libraries included.
    pub peak: usize,
    pub planned: u64,
    pub rows: Vec<Row>,
}

#[derive(Serialize)]
pub struct Row {
    pub kernel: String,
    /// Rows, columns, and products that are summed for each value.
    pub sizes: Option<[usize; 3]>,
    pub calls: u64,
    pub seconds: f64,
    /// Part of `busy_seconds`; none of a fetch.
    pub share: Option<f64>,
    /// Stated by the operations, of all calls.
    pub flops: u64,
    pub bytes: u64,
    /// The part that is reached of the nearer of both limits.
    pub of_ceiling: f64,
    /// Which: the type that is multiplied in, or `copy`.
    pub limit: String,
}

/// Seconds of a whole clip.
#[derive(Serialize)]
pub struct Predicted {
    pub steps: u32,
    pub text: f64,
    /// The median.
    pub step: f64,
    pub decode: f64,
    pub clip: f64,
}

impl Figures {
    pub fn new<D: Device>(
        device: &D,
        clip: &Clip,
        steps: u32,
        plan: Plan,
        ceiling: &Ceiling,
        measured: Measured,
    ) -> anyhow::Result<Self> {
        let Measured { text, steps: each, step, decode } = measured;
        let step_seconds: Vec<f64> = each.iter().map(|time| time.as_secs_f64()).collect();
        let [text, one, decode] = [("text", text), ("step", step), ("decode", decode)]
            .map(|(stage, profile)| StageFigures::new(stage, &profile, ceiling));
        let median = median(&step_seconds);
        let predicted = Predicted {
            steps,
            text: text.seconds,
            step: median,
            decode: decode.seconds,
            clip: text.seconds + f64::from(steps) * median + decode.seconds,
        };
        let mut stages = [text, one, decode];
        for (stage, planned) in stages.iter_mut().zip(&plan.stages) {
            stage.planned = planned.bytes();
        }
        let products = ceiling.products.iter().map(|rate| ProductFigures {
            dtype: rate.dtype.to_string(),
            by: if rate.vendor { "cublasLt" } else { "own" },
            size: rate.size,
            flops: rate.flops,
        });
        let name = device.name();
        let ceiling =
            CeilingFigures { products: products.collect(), copy: ceiling.copy, data_sheet: data_sheet(&name)? };
        Ok(Self { device: name, clip: *clip, ceiling, plan, stages, step_seconds, predicted })
    }
}

/// None for a device that the program does not know.
fn data_sheet(name: &str) -> anyhow::Result<Option<DataSheet>> {
    let rates = Rates::embedded()?;
    let entry = known_gpu(name).and_then(|known| rates.device.get(known));
    Ok(entry.map(|entry| DataSheet { flops: entry.peak, copy: entry.bandwidth, source: entry.source.clone() }))
}

impl StageFigures {
    fn new(stage: &'static str, profile: &Profile, ceiling: &Ceiling) -> Self {
        let busy_seconds = profile.busy().as_secs_f64();
        let mut records = profile.records.clone();
        records.sort_by_key(|record| std::cmp::Reverse(record.time));
        let rows = records.iter().map(|record| Row::new(record, busy_seconds, ceiling)).collect();
        Self { stage, seconds: profile.wall.as_secs_f64(), busy_seconds, peak: profile.peak, planned: 0, rows }
    }

    /// Seconds in which nothing that is done in order was under way.
    fn idle(&self) -> f64 {
        (self.seconds - self.busy_seconds).max(0.0)
    }
}

impl Row {
    fn new(record: &Record, busy: f64, ceiling: &Ceiling) -> Self {
        let Record { action, calls, time, flops, bytes } = *record;
        let seconds = time.as_secs_f64();
        let rate = |work: u64| if seconds > 0.0 { work as f64 / seconds } else { 0.0 };
        let arithmetic = action.arithmetic();
        let computed = arithmetic.and_then(|dtype| Some((rate(flops) / ceiling.flops(dtype)?, dtype.to_string())));
        let moved = (rate(bytes) / ceiling.copy, "copy".to_owned());
        let (of_ceiling, limit) = match computed {
            Some(computed) if computed.0 >= moved.0 => computed,
            _ => moved,
        };
        let share = (action != Action::Fetch && busy > 0.0).then(|| seconds / busy);
        Self {
            kernel: action.to_string(),
            sizes: action.sizes(),
            calls,
            seconds,
            share,
            flops,
            bytes,
            of_ceiling,
            limit,
        }
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { device, clip, ceiling, plan, stages, step_seconds, predicted } = self;
        let Clip { width, height, frames, text } = clip;
        writeln!(f, "{device}: {width}x{height}, {frames} frames, {} text tokens, {}", text[0], plan.precision)?;
        writeln!(f, "{ceiling}")?;
        for stage in stages {
            writeln!(f, "{stage}")?;
        }
        let resident = plan.streaming.resident.min(plan.blocks);
        write!(f, "{resident} of {} blocks stay on the device", plan.blocks)?;
        if resident < plan.blocks {
            let measured = 100.0 * stages[1].idle() / stages[1].busy_seconds;
            let planned = 100.0 * (plan.speed.step / plan.speed.resident_step - 1.0).max(0.0);
            write!(f, ": streaming and gaps between kernels add {measured:.1} % to a step, {planned:.1} % planned")?;
        }
        writeln!(f)?;
        let Predicted { steps, text, step, decode, clip } = predicted;
        writeln!(
            f,
            "a step: {} (median of {}; planned {})",
            seconds(*step),
            step_seconds.len(),
            seconds(plan.speed.step)
        )?;
        let denoise = seconds(f64::from(*steps) * step);
        let [text, decode, clip] = [*text, *decode, *clip].map(seconds);
        write!(f, "bench gpu: a clip of {steps} steps {clip}: text {text}, denoise {denoise}, decode {decode}")
    }
}

impl fmt::Display for CeilingFigures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sheet = self.data_sheet.as_ref();
        let mut table = new_table(["at most", "by", "size", "measured", "data sheet", "of it"]);
        let promised = |table: &mut Table, what: [String; 3], measured: f64, unit: &str, promised: Option<f64>| {
            let sheet = promised.map(|rate| format!("{}{unit}", si(rate))).unwrap_or_default();
            let part = promised.map(|rate| percent(measured / rate)).unwrap_or_default();
            let [name, by, size] = what;
            table.add_row([name, by, size, format!("{}{unit}", si(measured)), sheet, part]);
        };
        for ProductFigures { dtype, by, size, flops } in &self.products {
            // Data sheets have f32 without tensor cores elsewhere, and this is not it.
            let sheet = sheet.and_then(|sheet| sheet.flops).filter(|_| dtype == "bf16");
            promised(&mut table, [format!("product {dtype}"), (*by).into(), size.to_string()], *flops, "FLOP/s", sheet);
        }
        let sheet_copy = sheet.map(|sheet| sheet.copy);
        promised(&mut table, ["copy".into(), String::new(), String::new()], self.copy, "B/s", sheet_copy);
        align(&mut table, 2);
        write_table(f, &table)?;
        match sheet {
            Some(DataSheet { source, .. }) => writeln!(f, "{source}"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for StageFigures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [peak, planned] = [self.peak as f64, self.planned as f64].map(|bytes| bytes / 1e9);
        writeln!(
            f,
            "{}: {}, {} of it in kernels and copies, {} between them; tensors {peak:.2} GB at the peak, {planned:.2} GB planned",
            self.stage,
            seconds(self.seconds),
            seconds(self.busy_seconds),
            percent(if self.seconds > 0.0 { self.idle() / self.seconds } else { 0.0 }),
        )?;
        let mut table = new_table(["kernel", "sizes", "calls", "ms", "share", "FLOP/s", "B/s", "of the", "limit"]);
        for row in &self.rows {
            let per_second =
                |work: u64| if work > 0 && row.seconds > 0.0 { si(work as f64 / row.seconds) } else { String::new() };
            table.add_row([
                row.kernel.clone(),
                row.sizes.map(|[rows, columns, inner]| format!("{rows}x{columns}x{inner}")).unwrap_or_default(),
                row.calls.to_string(),
                format!("{:.2}", 1e3 * row.seconds),
                row.share.map(percent).unwrap_or_default(),
                per_second(row.flops),
                per_second(row.bytes),
                percent(row.of_ceiling),
                row.limit.clone(),
            ]);
        }
        align(&mut table, 1);
        write_table(f, &table)
    }
}

fn new_table<const N: usize>(header: [&str; N]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header);
    table
}

/// Numbers to the right, from a column on.
fn align(table: &mut Table, first: usize) {
    for column in table.column_iter_mut().skip(first) {
        column.set_cell_alignment(CellAlignment::Right);
    }
}

fn write_table(f: &mut fmt::Formatter<'_>, table: &Table) -> fmt::Result {
    for line in table.lines() {
        writeln!(f, "{}", line.trim_end())?;
    }
    Ok(())
}

fn percent(part: f64) -> String {
    format!("{:.1} %", 100.0 * part)
}

fn seconds(time: f64) -> String {
    if time < 1.0 { format!("{:.1} ms", 1e3 * time) } else { format!("{time:.2} s") }
}

/// Three digits with a unit's prefix.
fn si(value: f64) -> String {
    let (value, prefix) = match value {
        v if v < 1e3 => (v, ""),
        v if v < 1e6 => (v / 1e3, "k"),
        v if v < 1e9 => (v / 1e6, "M"),
        v if v < 1e12 => (v / 1e9, "G"),
        v => (v / 1e12, "T"),
    };
    let digits = if value < 10.0 {
        2
    } else if value < 100.0 {
        1
    } else {
        0
    };
    format!("{value:.digits$} {prefix}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_have_three_digits() {
        assert_eq!([si(689e12), si(2.998e12), si(45.26e9), si(7.0)], ["689 T", "3.00 T", "45.3 G", "7.00 "]);
    }
}
