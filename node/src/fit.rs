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
    /// Bytes of memory to plan with if an allocation fails all the same.
    pub less: f64,
}

/// None where nothing limits it, so on a processor, which has the machine's memory. Errors with what would fit.
#[cfg(feature = "cuda")]
pub fn fit(
    compute: &Compute,
    checkpoint: &Checkpoint,
    spec: &RenderSpec,
    topology: Topology,
) -> anyhow::Result<Option<Fit>> {
    compute.gpu_memory()?.map(|memory| fit_into(memory, compute, checkpoint, spec, topology)).transpose()
}

/// For people: how a clip would fit whose allocation has failed, into `less` bytes of memory.
#[cfg(feature = "cuda")]
pub fn remedy(less: f64, compute: &Compute, checkpoint: &Checkpoint, spec: &RenderSpec, topology: Topology) -> String {
    // As it is typed.
    const MIB: f64 = (1 << 20) as f64;
    let less = (less / MIB).floor();
    match fit_into(less * MIB, compute, checkpoint, spec, topology) {
        Ok(fit) => format!("with --memory {less}MiB it is planned so:\n{}", fit.table),
        Err(error) => format!("with less memory it does not fit: {error:#}"),
    }
}

#[cfg(feature = "cuda")]
fn fit_into(
    memory: f64,
    compute: &Compute,
    checkpoint: &Checkpoint,
    spec: &RenderSpec,
    topology: Topology,
) -> anyhow::Result<Fit> {
    use anyhow::Context;
    use farm_core::engine::cuda::plan::{Clip, Networks, plan};

    use crate::devices::Placing;

    /// Tokens of a prompt, to plan with before it is read.
    const TYPICAL_TEXT: usize = 256;

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
    Ok(Fit { residency, tiling, table: plan.to_string(), less: plan.less() })
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

#[cfg(not(feature = "cuda"))]
pub fn remedy(_: f64, _: &Compute, _: &Checkpoint, _: &RenderSpec, _: Topology) -> String {
    "there is no plan without a GPU".into()
}

#[cfg(all(test, feature = "cuda"))]
mod tests {
    use farm_core::job::spec::RenderRequest;

    use super::*;
    use crate::devices::{Devices, ThreadArgs};

    #[test]
    fn what_has_failed_is_planned_again_with_less_until_it_does_not_fit() {
        let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../assets/mochi-tiny");
        let checkpoint = Checkpoint::open(std::path::Path::new(dir)).unwrap();
        let request: RenderRequest = serde_json::from_str(r#"{"prompt": "a clip"}"#).unwrap();
        let spec = RenderSpec::resolve(&request, checkpoint.generation_defaults(), 0).unwrap();
        let compute = |memory| {
            let devices: Devices = "emulated:1".parse().unwrap();
            ThreadArgs::default().compute_within(devices, Some(memory)).unwrap()
        };
        let plan = |memory| fit(&compute(memory), &checkpoint, &spec, Topology::SOLO).map(Option::unwrap);
        let first = plan(1e9).unwrap();
        let said = remedy(first.less, &compute(1e9), &checkpoint, &spec, Topology::SOLO);
        assert!(said.contains("MiB it is planned so:\nstage"), "{said}");
        let memory = said.strip_prefix("with --memory ").unwrap().split_once(' ').unwrap().0;
        let second = plan(crate::devices::parse_bytes(memory).unwrap()).unwrap();
        assert!(second.less < first.less && said.ends_with(&second.table), "{said}");
        let none = remedy(1e6, &compute(1e9), &checkpoint, &spec, Topology::SOLO);
        assert!(none.starts_with("with less memory it does not fit: the "), "{none}");
    }
}
