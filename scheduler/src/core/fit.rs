//! Which kinds of nodes can take which kinds of jobs, on how many devices, and how long it would take.

use std::collections::HashMap;
use std::sync::Arc;

use farm_core::job::spec::GenerationDefaults;
use farm_core::parallel::cost::{Candidate, ClipShape, ModelShape, Site, predict};
use farm_core::parallel::topology::{MAX_RANKS, Topology};

use super::class::{Class, ClassIx};
use super::events::Ask;
use super::rates::Rates;
use super::stock::{GroupIx, Spec, Stock};

/// Kinds of clips on kinds of nodes that predictions are remembered of; beyond that all are forgotten and made again.
const MAX_PREDICTIONS: usize = 1 << 16;
/// Where nothing is known of the devices, a step of a token is expected to take this long, until it is measured.
const TOKEN_STEP: f64 = 1e-6;
/// Bytes of weights that are loaded in a second, about: what a device that has not just run the model needs first.
const LOAD_RATE: f64 = 1e9;

/// The clip on 1, 2, … devices of a node, by the devices' rates alone; `None` where it cannot be rendered.
#[derive(Clone, Debug, Default)]
pub struct Sizes {
    pub base: Vec<Option<f64>>,
    topologies: Vec<Option<Topology>>,
    /// The devices' rates are known.
    pub rated: bool,
}

impl Sizes {
    fn new(spec: &Spec, shape: &ModelShape, defaults: &GenerationDefaults, ask: Ask) -> Self {
        let Some(clip) = clip_shape(ask, defaults) else {
            return Self { base: vec![None], topologies: vec![Some(Topology::SOLO)], rated: false };
        };
        let sizes = || 1..=spec.devices.min(MAX_RANKS);
        let any = |devices| {
            let legal = Topology::of_world(devices, shape.heads, clip.tokens);
            legal.into_iter().min_by_key(|topology| (topology.ring(), std::cmp::Reverse(topology.cfg())))
        };
        let Some(site) = &spec.site else {
            let work = TOKEN_STEP * (clip.tokens * clip.steps) as f64;
            // Nothing says how much faster several are, so a clip that needs several is expected to take as long as on one,
            // until it is measured.
            return Self {
                base: vec![Some(work); sizes().count()],
                topologies: sizes().map(any).collect(),
                rated: false,
            };
        };
        let best: Vec<_> = sizes().map(|devices| predict(shape, &clip, site, devices)).collect();
        let topology = |(i, best): (usize, &Option<Candidate>)| best.map(|best| best.topology).or_else(|| any(i + 1));
        Self {
            base: best.iter().map(|best| best.map(|best| best.seconds)).collect(),
            topologies: best.iter().enumerate().map(topology).collect(),
            rated: true,
        }
    }

    /// How to spread the clip over `devices`, at least 1: the best way or, if nothing is predicted, any; `None` if there is
    /// none.
    pub fn topology(&self, devices: usize) -> Option<Topology> {
        self.topologies.get(devices - 1).copied().flatten()
    }

    /// It can be rendered there, on some number of devices.
    pub fn is_possible(&self) -> bool {
        !self.rated || self.base.iter().any(Option::is_some)
    }
}

/// The clip as the cost model sees it.
pub fn clip_shape(ask: Ask, defaults: &GenerationDefaults) -> Option<ClipShape> {
    ClipShape::new(
        ask.width.unwrap_or(defaults.width),
        ask.height.unwrap_or(defaults.height),
        ask.num_frames.unwrap_or(defaults.num_frames),
        ask.num_inference_steps.unwrap_or(defaults.num_inference_steps),
        ask.text.map(|tokens| tokens as usize),
    )
    .ok()
}

/// A kind of job on a kind of node.
#[derive(Clone, Debug)]
pub struct Choice {
    pub group: GroupIx,
    pub sizes: Arc<Sizes>,
    /// Predicted seconds on 1, 2, … devices, with what was measured taken into account. Empty: nothing is predicted.
    pub seconds: Vec<Option<f64>>,
    /// Seconds on top where the model is not loaded.
    pub load: f64,
}

impl Choice {
    pub fn seconds_on(&self, devices: usize) -> Option<f64> {
        self.seconds.get(devices - 1).copied().flatten().filter(|seconds| seconds.is_finite() && *seconds > 0.0)
    }
}

/// Where a kind of job can run. No choice at all: nowhere.
#[derive(Clone, Debug, Default)]
pub struct Fit {
    pub model: Option<Arc<str>>,
    pub choices: Vec<Choice>,
    /// Predicted device-seconds where it takes the fewest; 0 if nothing is predicted.
    pub work: f64,
}

struct Known {
    version: u64,
    only_model: Option<Arc<str>>,
    sizes: Vec<(GroupIx, Arc<Sizes>, f64)>,
}

/// What was found out about classes, as long as the nodes are of the same kinds.
#[derive(Default)]
pub struct Fits {
    of_class: HashMap<ClassIx, Known>,
    predictions: HashMap<(Ask, u64), Arc<Sizes>>,
}

impl Fits {
    pub fn forget(&mut self, class: ClassIx) {
        self.of_class.remove(&class);
    }

    /// `only_model` is the model of jobs that name none.
    pub fn fit(
        &mut self,
        ix: ClassIx,
        class: &Class,
        only_model: Option<&Arc<str>>,
        stock: &Stock,
        rates: &Rates,
    ) -> Fit {
        let Some(model) = class.model.as_ref().or(only_model) else { return Fit::default() };
        let known = self.of_class.get(&ix);
        if known.is_none_or(|known| known.version != stock.version() || known.only_model.as_ref() != only_model) {
            let known = self.find(class.ask, model, stock);
            self.of_class.insert(ix, Known { version: stock.version(), only_model: only_model.cloned(), sizes: known });
        }
        chosen(class, model, &self.of_class[&ix].sizes, stock, rates)
    }

    /// As [`Self::fit`], of a class that is not remembered.
    pub fn fit_anew(&mut self, class: &Class, only_model: Option<&Arc<str>>, stock: &Stock, rates: &Rates) -> Fit {
        let Some(model) = class.model.as_ref().or(only_model) else { return Fit::default() };
        chosen(class, model, &self.find(class.ask, model, stock), stock, rates)
    }

    fn find(&mut self, ask: Ask, model: &Arc<str>, stock: &Stock) -> Vec<(GroupIx, Arc<Sizes>, f64)> {
        let mut found = Vec::new();
        for (ix, group) in stock.groups() {
            let spec = &group.spec;
            let Some(registered) = spec.models.get(model).filter(|_| spec.roles.denoise) else { continue };
            let key = (ask, prediction_key(spec, registered.hash.as_str()));
            let sizes = match self.predictions.get(&key) {
                Some(sizes) => sizes.clone(),
                None => {
                    let sizes = Arc::new(Sizes::new(spec, &registered.shape, &registered.defaults, ask));
                    if self.predictions.len() >= MAX_PREDICTIONS {
                        self.predictions.clear();
                    }
                    self.predictions.insert(key, sizes.clone());
                    sizes
                }
            };
            if sizes.is_possible() {
                found.push((ix, sizes, load_seconds(&registered.shape, spec.site.as_ref())));
            }
        }
        found
    }
}

/// The groups with what is predicted there, and the least work of all.
fn chosen(class: &Class, model: &Arc<str>, known: &[(GroupIx, Arc<Sizes>, f64)], stock: &Stock, rates: &Rates) -> Fit {
    let choice = |(group, sizes, load): &(GroupIx, Arc<Sizes>, f64)| {
        let factor = rates.factor(model, &stock.group(*group).spec.device, class.ask);
        let factor = if sizes.rated { Some(factor.unwrap_or(1.0)) } else { factor };
        let seconds = factor.map(|factor| sizes.base.iter().map(|base| Some((*base)? * factor)).collect());
        Choice { group: *group, sizes: sizes.clone(), seconds: seconds.unwrap_or_default(), load: *load }
    };
    let choices: Vec<Choice> = known.iter().map(choice).collect();
    let work = |choice: &Choice| {
        (1..=choice.seconds.len()).filter_map(|k| Some(k as f64 * choice.seconds_on(k)?)).reduce(f64::min)
    };
    let work = choices.iter().filter_map(work).reduce(f64::min).unwrap_or(0.0);
    Fit { model: Some(model.clone()), choices, work }
}

/// Equal for nodes of which the same is predicted.
fn prediction_key(spec: &Spec, model_hash: &str) -> u64 {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    (spec.devices, model_hash, format!("{:?}", spec.site)).hash(&mut hasher);
    hasher.finish()
}

fn load_seconds(shape: &ModelShape, site: Option<&Site>) -> f64 {
    let value_bytes = site.map_or(4, |site| site.device.value_bytes);
    let blocks: u64 = (0..shape.layers).map(|layer| shape.block_parameters(layer)).sum();
    (blocks + shape.other_parameters()) as f64 * value_bytes as f64 / LOAD_RATE
}
