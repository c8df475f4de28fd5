//! A decode by devices of this process, without a farm.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::Context;
use farm_core::engine::Engine;
use farm_core::model::latent::DitLatent;
use farm_core::model::vae::VaeDecoder;
use farm_core::tiles::shape::Shape;
use tokio::sync::mpsc;

use super::hand;
use super::stitcher::{Arrival, OpenSink, StitchError, Stitched, Surroundings, stitch};
use crate::link;

/// Messages that wait for a hand, or from it.
pub const DEPTH: usize = 16;

/// A latent `[C, T, h, w]` and what decodes it.
pub struct LocalDecode<'a, E: Engine> {
    /// The devices, and for each the decoder in its memory. More of them than tiles have nothing to do.
    pub hands: Vec<(E, Arc<VaeDecoder<E>>)>,
    pub latent: &'a [f32],
    pub size: [usize; 4],
    pub shape: Arc<Shape>,
    /// Called by the thread of each device before it begins.
    pub settle: &'a (dyn Fn(usize) -> anyhow::Result<()> + Sync),
    pub stop: Arc<AtomicBool>,
}

/// Decodes into a file. `progress` is told how many frames are encoded.
pub fn decode<E: Engine>(
    work: LocalDecode<'_, E>,
    sink: OpenSink,
    progress: Box<dyn FnMut(u32) + Send + '_>,
) -> anyhow::Result<Result<Stitched, StitchError>> {
    let LocalDecode { hands, latent, size, shape, settle, stop } = work;
    let stop = &stop;
    let devices = hands.len().min(shape.plan.tiles.len());
    let (expect, expected) = mpsc::channel(1);
    let (arrive, arrivals) = mpsc::channel(devices.max(1));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::scope(|scope| {
        for (device, (engine, decoder)) in hands.into_iter().take(devices).enumerate() {
            let (crew, link) = link::pair(DEPTH);
            let latent = DitLatent(engine.upload(latent, &size)?);
            let name = format!("device {device}");
            std::thread::Builder::new().name(name.clone()).spawn_scoped(scope, move || {
                if let Err(error) = settle(device) {
                    tracing::warn!("device {device} computes on any core: {error:#}");
                }
                // The crew is told what goes wrong.
                let _ = hand::work(&engine, &decoder, &latent, link, stop);
            })?;
            arrive.try_send(Arrival { name, link: crew }).ok().context("a hand has no place")?;
        }
        let around = Surroundings {
            // If they are lost there are no others.
            want_hands: Box::new(|round| {
                // There is room: one question is open at a time.
                let _ = expect.try_send(if round == 1 { devices } else { 0 });
            }),
            expected,
            arrivals,
            progress,
            stop: stop.clone(),
            log: Box::new(|line| eprintln!("{line}")),
        };
        Ok(runtime.block_on(stitch(shape, sink, around)))
    })
}
