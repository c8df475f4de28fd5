//! What the cost model says about a clip on the devices of a node, remembered: it is asked about the same clip again
//! and again.

use std::collections::VecDeque;

use farm_core::job::spec::RenderSpec;
use farm_core::parallel::cost::{ClipShape, ModelShape, Site, predict};
use farm_core::parallel::topology::{MAX_RANKS, Topology};

/// Kinds of clips on kinds of nodes that are remembered.
const MAX_ENTRIES: usize = 64;
/// Bytes of a prompt for each of its tokens, about.
const BYTES_PER_TOKEN: usize = 4;

/// The clip on 1, 2, … devices of a node; `None` where it cannot be rendered.
#[derive(Clone, Debug, Default)]
pub(super) struct Sizes {
    pub seconds: Vec<Option<f64>>,
    topologies: Vec<Option<Topology>>,
}

impl Sizes {
    /// How to spread the clip over `devices`, at least 1. If nothing is predicted for that many, one device does it all.
    pub fn topology(&self, devices: usize) -> Topology {
        self.topologies.get(devices - 1).copied().flatten().unwrap_or(Topology::SOLO)
    }
}

#[derive(Debug, Default)]
pub(super) struct Forecasts(VecDeque<Entry>);

#[derive(Debug)]
struct Entry {
    site: Site,
    model: ModelShape,
    clip: ClipShape,
    sizes: Sizes,
}

impl Forecasts {
    /// The clip on 1 to `devices` devices, as far as groups go.
    pub fn sizes(&mut self, site: &Site, model: &ModelShape, clip: ClipShape, devices: usize) -> Sizes {
        let count = devices.min(MAX_RANKS);
        let known = self.0.iter().position(|e| e.clip == clip && e.model == *model && e.site == *site);
        let mut entry = match known.and_then(|i| self.0.remove(i)) {
            Some(entry) => entry,
            None => Entry { site: *site, model: *model, clip, sizes: Sizes::default() },
        };
        for devices in entry.sizes.seconds.len() + 1..=count {
            let best = predict(model, &clip, site, devices);
            entry.sizes.seconds.push(best.as_ref().map(|best| best.seconds));
            entry.sizes.topologies.push(best.map(|best| best.topology));
        }
        let Sizes { mut seconds, mut topologies } = entry.sizes.clone();
        seconds.truncate(count);
        topologies.truncate(count);
        // The latest used is the last to go.
        self.0.push_back(entry);
        if self.0.len() > MAX_ENTRIES {
            self.0.pop_front();
        }
        Sizes { seconds, topologies }
    }
}

/// The clip as the cost model sees it. A prompt's tokens are estimated by its length: the scheduler has no tokenizer,
/// and they are few beside those of the picture.
pub(super) fn clip_shape(spec: &RenderSpec) -> Option<ClipShape> {
    let tokens = |text: &str| if text.is_empty() { 0 } else { text.len() / BYTES_PER_TOKEN + 1 };
    let text = [tokens(&spec.prompt), tokens(&spec.negative_prompt)];
    ClipShape::new(spec.width, spec.height, spec.num_frames, spec.num_inference_steps, text).ok()
}

#[cfg(test)]
mod tests {
    use super::super::fixture::site;
    use super::*;

    fn clip(steps: u32) -> ClipShape {
        ClipShape::new(848, 480, 163, steps, [10, 0]).unwrap()
    }

    #[test]
    fn each_number_of_devices_has_its_time_and_its_topology() {
        let (site, mut forecasts) = (serde_json::from_str(&site(1e12)).unwrap(), Forecasts::default());
        let sizes = forecasts.sizes(&site, &ModelShape::mochi1(), clip(64), 3);
        for devices in 1..=3 {
            let best = predict(&ModelShape::mochi1(), &clip(64), &site, devices).unwrap();
            assert_eq!((sizes.seconds[devices - 1], sizes.topology(devices)), (Some(best.seconds), best.topology));
        }
        assert_eq!(sizes.seconds.len(), 3);
        // Asked again for more, and for less.
        assert_eq!(forecasts.sizes(&site, &ModelShape::mochi1(), clip(64), 5).seconds[..3], sizes.seconds);
        assert_eq!(forecasts.sizes(&site, &ModelShape::mochi1(), clip(64), 2).seconds, sizes.seconds[..2]);
        assert_eq!(forecasts.0.len(), 1);
    }

    #[test]
    fn only_so_many_kinds_of_clips_are_remembered() {
        let (site, mut forecasts) = (serde_json::from_str(&site(1e12)).unwrap(), Forecasts::default());
        for steps in 1..=2 * MAX_ENTRIES as u32 {
            forecasts.sizes(&site, &ModelShape::mochi1(), clip(1), 1);
            forecasts.sizes(&site, &ModelShape::mochi1(), clip(steps), 1);
        }
        assert_eq!(forecasts.0.len(), MAX_ENTRIES);
        assert!(forecasts.0.iter().any(|entry| entry.clip == clip(1)), "what is used stays");
    }

    #[test]
    fn a_group_has_at_most_so_many_ranks() {
        let (site, mut forecasts) = (serde_json::from_str(&site(1e12)).unwrap(), Forecasts::default());
        assert_eq!(forecasts.sizes(&site, &ModelShape::mochi1(), clip(1), 256).seconds.len(), MAX_RANKS);
    }

    #[test]
    fn an_absent_negative_prompt_has_no_tokens() {
        let request = serde_json::from_str(r#"{"prompt":"a red ball moving left"}"#).unwrap();
        let spec = RenderSpec::resolve(&request, &Default::default(), 1).unwrap();
        assert_eq!(clip_shape(&spec).unwrap().text, [6, 0]);
    }
}
