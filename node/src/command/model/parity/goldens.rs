//! Reference tensors: inputs of the stages and what the reference made of them.

use std::path::Path;

use anyhow::{Context, bail, ensure};
use farm_core::model::weights::file::TensorFile;
use serde::Deserialize;

/// An open file of reference tensors, and what is written about it beside it.
pub struct Goldens {
    file: TensorFile,
    pub about: About,
}

/// The part of `goldens.json` that matters. Without the file: the values of the specification's script.
#[derive(Deserialize)]
#[serde(default)]
pub struct About {
    pub guidance_scale: f64,
    /// Which row of the texts `sample.*` was made with.
    pub sampled_prompt: usize,
}

impl Default for About {
    fn default() -> Self {
        Self { guidance_scale: 4.5, sampled_prompt: 0 }
    }
}

/// A reference tensor, widened to f32.
pub struct Golden {
    pub values: Vec<f32>,
}

impl Golden {
    /// The values of sample `index` of a batch of `samples`.
    pub fn sample(&self, index: usize, samples: usize) -> &[f32] {
        let length = self.values.len() / samples.max(1);
        self.values.get(index * length..(index + 1) * length).unwrap_or_default()
    }
}

impl Goldens {
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let file = TensorFile::open(path)?;
        let beside = path.with_file_name("goldens.json");
        let about = if beside.is_file() {
            let text = std::fs::read(&beside).with_context(|| beside.display().to_string())?;
            serde_json::from_slice(&text).with_context(|| beside.display().to_string())?
        } else {
            About::default()
        };
        Ok(Self { file, about })
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &String> {
        self.file.tensors().keys()
    }

    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.file.tensors().get(name).map(|info| info.shape.as_slice())
    }

    /// Tensor `name`, widened.
    pub fn floats(&self, name: &str) -> anyhow::Result<Golden> {
        Ok(Golden { values: self.file.floats(name)? })
    }

    /// Tensor `name`, whole numbers from 0: ids or a mask.
    pub fn numbers(&self, name: &str) -> anyhow::Result<Vec<u32>> {
        Ok(self.file.numbers(name)?)
    }

    /// Valid tokens of each row of the mask `name` `[rows, L]`. Valid ones have to come first.
    pub fn valid_tokens(&self, name: &str) -> anyhow::Result<Vec<usize>> {
        let Some(&[_, length]) = self.shape(name) else { bail!("{name} in the goldens is not [rows, tokens]") };
        ensure!(length > 0, "{name} in the goldens has no tokens");
        let mask = self.numbers(name)?;
        let rows = mask.chunks(length).map(|row| {
            let valid = row.iter().take_while(|&&value| value == 1).count();
            ensure!(
                row[valid..].iter().all(|&value| value == 0),
                "{name} in the goldens is not ones followed by zeros"
            );
            Ok(valid)
        });
        rows.collect()
    }
}
