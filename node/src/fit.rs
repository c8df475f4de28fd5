//! How a clip fits into a GPU's memory, decided before anything is loaded.

#[cfg(feature = "cuda")]
use farm_core::engine::cuda::plan::Target;
use farm_core::job::spec::RenderSpec;
use farm_core::model::pipeline::Residency;
use farm_core::model::weights::checkpoint::Checkpoint;
#[cfg(feature = "cuda")]
use farm_core::parallel::cost::{DeviceRates, devices::Devices as Rates};
use farm_core::parallel::topology::Topology;
use farm_core::tiles::plan::Tiling;

use crate::devices::Compute;

/// A way in which it fits.
pub struct Fit {
    pub residency: Residency,
    /// None for the whole frame.
    pub tiling: Option<Tiling>,
    /// For people: what each stage takes, and what stays.
    pub table: String,
}

/// None where nothing limits it, so on a processor, which has the machine's memory. Errors with what would fit.
#[cfg(feature = "cuda")]
pub fn fit(
    compute: &Compute,
    checkpoint: &Checkpoint,
    spec: &RenderSpec,
    topology: Topology,
) -> anyhow::Result<Option<Fit>> {
    use anyhow::Context;
    use farm_core::engine::cuda::plan::{Clip, Networks, plan};

    use crate::devices::Placing;

    /// Tokens of a prompt, to plan with before it is read.
    const TYPICAL_TEXT: usize = 256;

    let Some(memory) = compute.gpu_memory()? else { return Ok(None) };
    let networks = Networks {
        dit: checkpoint.dit().context("the checkpoint has no transformer")?.config().shape(),
        t5: checkpoint.t5().context("the checkpoint has no text encoder")?.config(),
        vae: checkpoint.vae().context("the checkpoint has no vae decoder")?.config(),
    };
    let text = [&spec.prompt, &spec.negative_prompt].map(|text| if text.is_empty() { 0 } else { TYPICAL_TEXT });
    let clip = Clip { width: spec.width, height: spec.height, frames: spec.num_frames, text };
    let mut device = compute.site(1, Placing::Threads, None)?.device;
    device.memory = memory;
    let plan = plan(&networks, &clip, compute.precision(), topology, &target(device)?)?;
    let residency = if plan.kept { Residency::Kept } else { Residency::Streamed(plan.streaming) };
    let tiling = (plan.tiling != Tiling::WHOLE).then_some(plan.tiling);
    Ok(Some(Fit { residency, tiling, table: plan.to_string() }))
}

/// A GPU of this machine to plan for. How it is connected the driver does not say; PCI Express 4 is what most have.
#[cfg(feature = "cuda")]
pub fn target(device: DeviceRates) -> anyhow::Result<Target> {
    Ok(Target { device, host_link: Rates::embedded()?.link("pcie4")? })
}

#[cfg(not(feature = "cuda"))]
pub fn fit(_: &Compute, _: &Checkpoint, _: &RenderSpec, _: Topology) -> anyhow::Result<Option<Fit>> {
    Ok(None)
}
