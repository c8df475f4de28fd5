//! Whether a clip has room on devices whose memory is limited: by prediction, before anything is computed.

use farm_core::job::spec::RenderSpec;
use farm_core::job::state::FailureKind;
use farm_core::model::config::VaeConfig;
use farm_core::model::vae::decode_bytes_per_pixel;
use farm_core::parallel::cost::{self, ClipShape, Overrides, Site};
use farm_core::parallel::topology::Topology;
use farm_core::tiles::plan::Mode;
use farm_core::tiles::shape::Shape;

use super::{Failure, Offered};

/// Denoising on a group of these devices, each of which has all weights.
pub(super) fn check_denoise(
    model: &Offered,
    spec: &RenderSpec,
    topology: Topology,
    site: &Site,
) -> Result<(), Failure> {
    // A token is a byte or more, and the end mark is one.
    let text = [&spec.prompt, &spec.negative_prompt].map(|text| if text.is_empty() { 0 } else { text.len() + 1 });
    let input = |error: &dyn std::fmt::Display| Failure::new(FailureKind::Input, error);
    let clip = ClipShape::new(spec.width, spec.height, spec.num_frames, spec.num_inference_steps, text);
    let clip = clip.map_err(|error| input(&error))?;
    let fixed = Overrides {
        cfg: Some(topology.cfg()),
        ring: Some(topology.ring()),
        ulysses: Some(topology.ulysses()),
        shard: Some(false),
    };
    let all = cost::candidates(&model.shape, &clip, site, topology.world(), fixed).map_err(|error| input(&error))?;
    match all.first() {
        Some(needs) if !needs.fits => Err(too_little("denoising it", needs.memory, topology.world(), site)),
        _ => Ok(()),
    }
}

/// Decoding the largest tile on one device.
pub(super) fn check_decode(shape: &Shape, vae: &VaeConfig, site: &Site) -> Result<(), Failure> {
    // Pixels around an exact tile come from its neighbours.
    let halo = if shape.plan.mode == Mode::Exact { 2 } else { 0 };
    let largest = shape.plan.tiles.iter().map(|&tile| {
        let [height, width] = match shape.plan.mode {
            Mode::Exact => [tile.rows.own().len(), tile.cols.own().len()],
            Mode::Whole | Mode::Shared | Mode::Independent => [tile.rows.len(), tile.cols.len()],
        };
        ((height + halo) * (width + halo)) as u64
    });
    let bytes = largest.max().unwrap_or(0).saturating_mul(decode_bytes_per_pixel(vae));
    if bytes as f64 <= cost::USABLE_MEMORY * site.device.memory {
        return Ok(());
    }
    let tiles = shape.plan.tiles.len();
    Err(too_little(&format!("decoding a tile of {tiles}"), bytes, 1, site))
}

fn too_little(what: &str, bytes: u64, devices: usize, site: &Site) -> Failure {
    let (memory, usable) = (site.device.memory, 100.0 * cost::USABLE_MEMORY);
    let message = format!(
        "{what} takes about {bytes} bytes on each of {devices} devices, and each may fill {usable:.0} % of the {memory:.0} \
         bytes that --memory gives it"
    );
    Failure::new(FailureKind::OutOfMemory, message)
}

#[cfg(test)]
mod tests {
    use farm_core::job::spec::GenerationDefaults;
    use farm_core::parallel::cost::ModelShape;
    use farm_core::parallel::cost::devices::Devices;
    use farm_core::tiles::plan::Tiling;

    use super::*;
    use crate::attempt::tests::vae;
    use crate::decode;

    fn site(memory: f64) -> Site {
        let known = Devices::embedded().unwrap();
        let mut device = known.device("cpu").unwrap();
        (device.memory, device.shared_weights) = (memory, false);
        Site::one_host(device, known.link("local").unwrap())
    }

    #[test]
    fn a_clip_that_has_no_room_fails_with_the_numbers_and_has_it_on_more_devices_or_in_smaller_tiles() {
        let model = Offered { hash: String::new(), shape: ModelShape::mochi1(), vae: vae() };
        let request = serde_json::from_str(r#"{"prompt":"a ball"}"#).unwrap();
        let spec = RenderSpec::resolve(&request, &GenerationDefaults::default(), 1).unwrap();
        let denoise = |memory, ulysses| {
            let topology = Topology::new(1, 1, ulysses).unwrap();
            check_denoise(&model, &spec, topology, &site(memory))
        };
        let needs = |failure: Failure| {
            assert_eq!(failure.kind, FailureKind::OutOfMemory);
            let number = |word: &str| word.parse::<f64>().ok().filter(|number| *number > 1e4);
            failure.message.split(' ').find_map(number).unwrap_or_else(|| panic!("{}", failure.message))
        };
        let alone = needs(denoise(1e9, 1).unwrap_err());
        assert!(needs(denoise(1e9, 8).unwrap_err()) < alone);
        assert!(denoise(alone * 1.1, 1).is_ok() && denoise(alone, 1).is_err() && denoise(alone, 8).is_ok());

        let shape = |tiling: Tiling| decode::shape(tiling, spec.latent_shape(), &vae()).unwrap();
        let tiling: Tiling = "whole".parse().unwrap();
        let whole = needs(check_decode(&shape(tiling), &vae(), &site(1e5)).unwrap_err());
        assert!(check_decode(&shape(tiling), &vae(), &site(whole * 1.1)).is_ok());
        assert!(check_decode(&shape(tiling), &vae(), &site(whole)).is_err());
        assert!(check_decode(&shape(tiling.smaller(1)), &vae(), &site(whole)).is_ok());
    }
}
