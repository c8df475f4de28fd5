//! Replays of a trace under the farm's rules, and first come, first served.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::time::Duration;

use anyhow::ensure;
use farm_core::parallel::cost::{ClipShape, ModelShape};

use super::super::report::{mean, quantile, sorted};
use super::super::world::{Item, Kind, NEVER, Rules, World, model, registration, request};
use super::Row;
use crate::core::events::{Measured, Saved};

const DEVICE: &str = "slot";
/// Images are latent frames of a clip of this many pixels a side.
const SIDE: u32 = 512;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// First come, first served.
    Fifo,
    /// The farm, with a prediction for each request that is its true run time.
    Oracle,
    /// The farm, which knows of a request its model, steps and images, and learns from what has ended.
    Own,
}

impl Policy {
    pub const ALL: [Self; 3] = [Self::Fifo, Self::Oracle, Self::Own];

    pub fn name(self) -> &'static str {
        match self {
            Self::Fifo => "first come",
            Self::Oracle => "oracle",
            Self::Own => "own prediction",
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub struct Setting {
    pub nodes: usize,
    pub devices: usize,
    pub load: f64,
    pub switch: Duration,
    pub tick: Duration,
}

#[derive(Clone, Debug)]
pub struct Outcome {
    pub policy: Policy,
    /// Waits, and means of tenants' waits, sorted.
    pub waits: Vec<f64>,
    pub tenants: Vec<f64>,
    pub mean: f64,
    pub p95: f64,
    pub p99: f64,
    pub longest: f64,
    pub tenant_mean: f64,
    pub tenant_p95: f64,
    /// Work over what the slots could do until the last request has ended.
    pub used: f64,
    /// Part of the starts that had to load another model.
    pub switches: f64,
    pub preemptions: u64,
}

/// Seconds from arrival to start of each request, the end of the last, and the part of starts on another model.
struct Played {
    waits: Vec<f64>,
    end: f64,
    switches: f64,
    preemptions: u64,
}

pub fn replay(policy: Policy, rows: &[Row], setting: &Setting) -> anyhow::Result<Outcome> {
    let slots = setting.nodes * setting.devices;
    let work: f64 = rows.iter().map(|row| row.seconds).sum();
    let span = rows.last().map_or(0.0, |row| row.at);
    ensure!(work > 0.0 && span > 0.0 && slots > 0 && setting.load > 0.0, "there is nothing to replay");
    let compress = span / (work / (slots as f64 * setting.load));
    let arrivals: Vec<f64> = rows.iter().map(|row| row.at / compress).collect();
    let Played { waits, end, switches, preemptions } = match policy {
        Policy::Fifo => first_come(rows, &arrivals, setting),
        Policy::Oracle | Policy::Own => farm(policy, rows, &arrivals, setting)?,
    };
    let mut by_tenant: HashMap<u32, (f64, f64)> = HashMap::new();
    for (row, wait) in rows.iter().zip(&waits) {
        let (sum, count) = by_tenant.entry(row.tenant).or_default();
        (*sum, *count) = (*sum + wait, *count + 1.0);
    }
    let tenants = sorted(by_tenant.into_values().map(|(sum, count)| sum / count));
    let waits = sorted(waits);
    Ok(Outcome {
        policy,
        mean: mean(&waits),
        p95: quantile(&waits, 0.95),
        p99: quantile(&waits, 0.99),
        longest: quantile(&waits, 1.0),
        tenant_mean: mean(&tenants),
        tenant_p95: quantile(&tenants, 0.95),
        used: work / (slots as f64 * end),
        switches,
        preemptions,
        waits,
        tenants,
    })
}

/// Whoever comes first gets the slot that is free first.
fn first_come(rows: &[Row], arrivals: &[f64], setting: &Setting) -> Played {
    // Times as integers have an order.
    let micros = |seconds: f64| (seconds * 1e6) as u64;
    let mut slots: BinaryHeap<Reverse<(u64, usize)>> =
        (0..setting.nodes * setting.devices).map(|i| Reverse((0, i))).collect();
    let mut warm = HashMap::new();
    let (mut waits, mut end, mut switches) = (Vec::new(), 0.0f64, 0u64);
    for (row, arrival) in rows.iter().zip(arrivals) {
        let Some(Reverse((free, slot))) = slots.pop() else { break };
        let start = arrival.max(free as f64 / 1e6);
        let before = warm.insert(slot, row.model);
        switches += u64::from(before.is_some_and(|model| model != row.model));
        let load = if before == Some(row.model) { 0.0 } else { setting.switch.as_secs_f64() };
        let ends = start + load + row.seconds;
        slots.push(Reverse((micros(ends), slot)));
        end = end.max(ends);
        waits.push(start - arrival);
    }
    Played { waits, end, switches: switches as f64 / rows.len() as f64, preemptions: 0 }
}

fn farm(policy: Policy, rows: &[Row], arrivals: &[f64], setting: &Setting) -> anyhow::Result<Played> {
    let names = rows.iter().map(|row| row.model).max().unwrap_or(0) + 1;
    let name = |model: u32| format!("model-{model}");
    // With the oracle a step of one image is a second: measured, and so remembered from before.
    let second = ClipShape::new(SIDE, SIDE, 1, 1, [0, 0])?;
    let measured = (0..names).map(|model| Measured {
        model: name(model),
        device: DEVICE.to_owned(),
        base: 1e-6 * second.tokens as f64,
        seconds: 1.0,
    });
    let measured = if policy == Policy::Oracle { measured.collect() } else { Vec::new() };
    let rules = Rules { tick: setting.tick, load: setting.switch, ..Rules::default() };
    let tenants = rows.iter().map(|row| row.tenant).max().unwrap_or(0) as usize + 1;
    let mut world = World::new(rules, tenants, Saved { measured, ..Saved::default() });
    let shape = shape(setting.switch);
    let models: Vec<_> = (0..names).map(|i| model(&name(i), &shape)).collect();
    for _ in 0..setting.nodes {
        world.join(registration(setting.devices, DEVICE, None, &models));
    }
    let mut kinds = HashMap::new();
    let mut rows_left = rows.iter().zip(arrivals).peekable();
    while world.ended < rows.len() {
        while let Some((row, arrival)) = rows_left.next_if(|(_, at)| **at <= world.now.0.as_secs_f64()) {
            let asked = asked(policy, row);
            let kind = *kinds
                .entry((row.model, asked.num_frames, asked.num_inference_steps, asked.prompt.len()))
                .or_insert_with(|| world.kind(Kind::new(asked, Some(name(row.model)))));
            let first = world.submit([Item::new(kind, row.tenant, Duration::from_secs_f64(row.seconds))]);
            world.items[first].submitted_ms = (arrival * 1e3) as u32;
        }
        world.run_tick();
        ensure!(world.now.0 < Duration::from_secs(10_000_000), "requests have not ended");
    }
    let waits = world.items.iter().map(|item| f64::from(item.started_ms.saturating_sub(item.submitted_ms)) / 1e3);
    let end = world.items.iter().map(|item| item.ended_ms).filter(|at| *at != NEVER).max().unwrap_or(0);
    Ok(Played {
        waits: waits.collect(),
        end: f64::from(end) / 1e3,
        switches: world.switches as f64 / world.starts.max(1) as f64,
        preemptions: world.preemptions,
    })
}

/// The request as the farm gets it.
fn asked(policy: Policy, row: &Row) -> farm_core::job::spec::RenderRequest {
    let mut request = request("");
    (request.width, request.height) = (Some(SIDE), Some(SIDE));
    match policy {
        Policy::Fifo | Policy::Oracle => {
            request.num_frames = Some(1);
            request.num_inference_steps = Some((row.seconds.round() as u32).clamp(1, 1000));
        }
        Policy::Own => {
            request.prompt = "a".repeat(row.text[0].min(4096) as usize);
            // Images are latent frames.
            request.num_frames = Some(6 * (row.images.max(1) - 1) + 1);
            request.num_inference_steps = Some(row.steps);
        }
    }
    request
}

/// A model that takes about so long to load, by the core's own estimate.
fn shape(load: Duration) -> ModelShape {
    let least = ModelShape {
        layers: 1,
        heads: 1,
        head_dim: 1,
        hidden_x: 1,
        hidden_y: 1,
        ffn_x: 1,
        ffn_y: 1,
        text_dim: 1,
        time_dim: 1,
        channels: 1,
    };
    let block = ModelShape::mochi1();
    // Four bytes a parameter, a gigabyte a second.
    let layers = (load.as_secs_f64() * 1e9 / 4.0 / block.block_parameters(0) as f64).round() as usize;
    if layers == 0 { least } else { ModelShape { layers, ..block } }
}
