//! The checkpoints that a node offers, one copy of each in memory for all its devices.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, bail, ensure};
use farm_core::model::weights::checkpoint::Checkpoint;
use farm_core::wire::to_scheduler::ModelInfo;

pub struct ModelShelf {
    models: BTreeMap<String, Shelved>,
}

struct Shelved {
    checkpoint: Checkpoint,
    info: ModelInfo,
}

impl ModelShelf {
    /// Opens and hashes every checkpoint (name and folder), which reads all its bytes. Nothing is loaded yet.
    pub fn open(models: impl IntoIterator<Item = (String, PathBuf)>) -> anyhow::Result<Self> {
        let mut shelf = BTreeMap::new();
        for (name, dir) in models {
            let shelved = shelve(&name, &dir).with_context(|| format!("cannot offer model {name}"))?;
            ensure!(shelf.insert(name.clone(), shelved).is_none(), "--model names {name} twice");
        }
        Ok(Self { models: shelf })
    }

    /// What the scheduler is told, by name.
    pub fn infos(&self) -> Vec<ModelInfo> {
        self.models.values().map(|shelved| shelved.info.clone()).collect()
    }
}

fn shelve(name: &str, dir: &std::path::Path) -> anyhow::Result<Shelved> {
    let checkpoint = Checkpoint::open(dir)?;
    for note in checkpoint.notes() {
        tracing::info!(model = name, "{note}");
    }
    let parts = [
        ("a transformer", checkpoint.dit().is_some()),
        ("a video decoder", checkpoint.vae().is_some()),
        ("a text encoder", checkpoint.t5().is_some()),
        ("a tokenizer", checkpoint.tokenizer_dir().is_some()),
    ];
    let missing: Vec<&str> = parts.iter().filter(|(_, there)| !there).map(|(part, _)| *part).collect();
    if !missing.is_empty() {
        bail!("{} lacks {}", dir.display(), missing.join(" and "));
    }
    let hash = checkpoint.content_hash()?.to_owned();
    let defaults_json = serde_json::to_string(checkpoint.generation_defaults())?;
    tracing::info!(model = name, %hash, dir = %dir.display(), "model opened");
    Ok(Shelved { info: ModelInfo { name: name.to_owned(), hash, defaults_json }, checkpoint })
}
