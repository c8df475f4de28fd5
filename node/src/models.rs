//! The checkpoints that a node offers, one copy of each in every memory that its devices have.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use farm_core::job::spec::{RenderRequest, RenderSpec};
use farm_core::model::config::VaeConfig;
use farm_core::model::pipeline::{Pipeline, Residency};
use farm_core::model::weights::checkpoint::Checkpoint;
use farm_core::parallel::cost::ModelShape;
use farm_core::parallel::topology::Topology;
use farm_core::wire::to_scheduler::ModelInfo;

use crate::attempt::Offered;
use crate::devices::Compute;
use crate::engine::DeviceEngine;
use crate::fit::{fit, remedy};

pub struct ModelShelf {
    models: BTreeMap<String, Shelved>,
}

/// A checkpoint, with a copy of its networks in every memory that its devices have.
pub struct Copies(Vec<Pipeline<DeviceEngine>>);

impl Copies {
    /// `residency` holds in each memory.
    pub fn open(compute: &Compute, checkpoint: Checkpoint, residency: Residency) -> anyhow::Result<Self> {
        let dir = checkpoint.dir().to_owned();
        let mut copies = vec![Pipeline::open(&compute.engine(0)?, checkpoint, residency)?];
        for memory in 1..compute.memories() {
            copies.push(Pipeline::open(&compute.engine(memory)?, Checkpoint::open(&dir)?, residency)?);
        }
        Ok(Self(copies))
    }

    /// That in the memory of device `device`.
    pub fn of(&self, compute: &Compute, device: usize) -> &Pipeline<DeviceEngine> {
        &self.0[compute.memory_of(device)]
    }

    /// That of the first device.
    pub fn first(&self) -> &Pipeline<DeviceEngine> {
        &self.0[0]
    }
}

struct Shelved {
    copies: Copies,
    /// Bytes of memory to plan with if an allocation fails; none if there is no plan.
    less: Option<f64>,
    info: ModelInfo,
    shape: ModelShape,
    vae: VaeConfig,
}

impl ModelShelf {
    /// Opens, hashes and loads every checkpoint (name and folder), which reads all its bytes.
    pub fn open(models: impl IntoIterator<Item = (String, PathBuf)>, compute: &Compute) -> anyhow::Result<Self> {
        let mut shelf = BTreeMap::new();
        for (name, dir) in models {
            ensure!(!shelf.contains_key(&name), "--model names {name} twice");
            let shelved = shelve(compute, &name, &dir).with_context(|| format!("cannot offer model {name}"))?;
            shelf.insert(name, shelved);
        }
        Ok(Self { models: shelf })
    }

    /// What the scheduler is told, by name.
    pub fn infos(&self) -> Vec<ModelInfo> {
        self.models.values().map(|shelved| shelved.info.clone()).collect()
    }

    /// What attempts have to know of each model before they use it.
    pub fn offered(&self) -> HashMap<String, Offered> {
        let offered = |shelved: &Shelved| Offered {
            hash: shelved.info.hash.clone(),
            shape: shelved.shape,
            vae: shelved.vae.clone(),
        };
        self.models.iter().map(|(name, shelved)| (name.clone(), offered(shelved))).collect()
    }

    /// How a clip would fit for which there was no memory; none if there was no plan either.
    pub fn remedy(&self, name: &str, compute: &Compute, spec: &RenderSpec, topology: Topology) -> Option<String> {
        let shelved = self.models.get(name)?;
        Some(remedy(shelved.less?, compute, shelved.copies.first().checkpoint(), spec, topology))
    }

    /// For device `device` of `compute`, with which this was opened.
    pub fn pipeline(&self, name: &str, compute: &Compute, device: usize) -> Option<&Pipeline<DeviceEngine>> {
        Some(self.models.get(name)?.copies.of(compute, device))
    }
}

fn shelve(compute: &Compute, name: &str, dir: &Path) -> anyhow::Result<Shelved> {
    let checkpoint = Checkpoint::open(dir)?;
    for note in checkpoint.notes() {
        tracing::info!(model = name, "{note}");
    }
    let hash = checkpoint.content_hash()?.to_owned();
    let defaults_json = serde_json::to_string(checkpoint.generation_defaults())?;
    let shape = checkpoint.dit().map(|dit| dit.config().shape()).context("it has no transformer")?;
    let shape_json = serde_json::to_string(&shape)?;
    // For a clip of its own sizes; larger ones say that they do not fit.
    let usual: RenderRequest = serde_json::from_str(r#"{"prompt": "a clip"}"#)?;
    let usual = RenderSpec::resolve(&usual, checkpoint.generation_defaults(), 0)?;
    let fit = fit(compute, &checkpoint, &usual, Topology::SOLO)?;
    let (residency, less) = fit.map_or((Residency::Kept, None), |fit| {
        tracing::info!(model = name, "\n{}", fit.table);
        (fit.residency, Some(fit.less))
    });
    let vae = checkpoint.vae().context("it has no vae decoder")?.config().clone();
    let copies = Copies::open(compute, checkpoint, residency)?;
    tracing::info!(model = name, %hash, dir = %dir.display(), "model loaded");
    Ok(Shelved { info: ModelInfo { name: name.to_owned(), hash, defaults_json, shape_json }, copies, less, shape, vae })
}
