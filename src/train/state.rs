//! Saving and resuming. `training_state.safetensors` alone holds all that a resumed run needs (weights, moments, step,
//! configuration) and appears whole or not at all, so weights and moments can never be of different steps. Beside it
//! the folder holds the same weights as a model that other commands load.
//!
//! Batches, chunk sizes and rates are functions of the seed and the step, so the step is the position in the data and
//! the state of the random numbers as well.

use super::config::MAX_MICRO_STEPS;
use super::{Optimizer, TrainConfig, Trainer};
use crate::data::Tokenizer;
use crate::data::tokenizer::TOKENIZER_FILE;
use crate::memory::{Category, counted_as};
use crate::model::formats::{read_safetensors, write_atomically, write_safetensors};
use crate::model::{FolderFormat, save};
use crate::tensor::{Device, Tensor};
use crate::{Error, Result};
use std::collections::BTreeMap;
use std::path::Path;

const STATE: &str = "training_state.safetensors";
const CONFIG: &str = "train.toml";

/// A saved tensor on the run's device, counted as what it is.
fn moved(kind: &str, t: &Tensor, device: Device) -> Result<Tensor> {
    let category = if kind == "param" { Category::Weights } else { Category::Optimizer };
    counted_as(category, || t.to_device(device))
}

/// Remove a file that may be absent.
fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", path)(e)),
        _ => Ok(()),
    }
}

impl Trainer {
    /// Write the state, the model, the tokenizer and the resolved configuration into `config.out`.
    pub fn save(&self) -> Result<()> {
        let dir = &self.config.out;
        std::fs::create_dir_all(dir).map_err(Error::io("create folder", dir))?;
        let toml = self.config.to_toml()?;
        let params = self.model.params();
        let mut tensors: Vec<(String, &Tensor)> = Vec::new();
        for (i, p) in params.iter().enumerate() {
            tensors.push((format!("param.{}", p.name), p.value()));
            tensors.push((format!("m.{}", p.name), &self.optimizer.m[i]));
            tensors.push((format!("v.{}", p.name), &self.optimizer.v[i]));
            tensors.extend(self.optimizer.master.get(i).map(|t| (format!("master.{}", p.name), t)));
        }
        let borrowed: Vec<(&str, &Tensor)> = tensors.iter().map(|(n, t)| (n.as_str(), *t)).collect();
        let metadata = BTreeMap::from([("step".to_string(), self.step.to_string()), ("config".to_string(), toml.clone())]);
        write_safetensors(&dir.join(STATE), &borrowed, &metadata)?;
        save(dir, &self.model, FolderFormat::Native, None)?;
        self.tokenizer.save(dir)?;
        if matches!(self.tokenizer, Tokenizer::Bytes) {
            // an earlier run's would be taken for this one's
            remove(&dir.join(TOKENIZER_FILE))?;
        }
        self.save_config(&toml)
    }
    fn save_config(&self, toml: &str) -> Result<()> {
        let path = self.config.out.join(CONFIG);
        write_atomically(&path, |w| w.write_all(toml.as_bytes()).map_err(Error::io("write", &path)))
    }

    /// Go on from the state in `dir`, on the CPU. The configuration is the saved one; `adjust` may change it (more steps,
    /// another folder), and what it changes must leave the weights' shapes as they are.
    pub fn resume(dir: &Path, adjust: impl FnOnce(TrainConfig) -> Result<TrainConfig>) -> Result<Self> {
        Self::resume_on(dir, Device::Cpu, adjust)
    }
    /// As [`Trainer::resume`], on any device, whichever the state was saved from.
    pub fn resume_on(dir: &Path, device: Device, adjust: impl FnOnce(TrainConfig) -> Result<TrainConfig>) -> Result<Self> {
        let path = dir.join(STATE);
        let mut file = read_safetensors(&path)?;
        let text = |key: &str| {
            file.metadata.get(key).cloned().ok_or_else(|| Error::format(&path, format!("not a training state: no '{key}'")))
        };
        let step: u64 = text("step")?.parse().map_err(|_| Error::format(&path, "its step is not a number"))?;
        let saved = TrainConfig::from_table(TrainConfig::parse_table(&text("config")?, &path)?, &path, "nano")?;
        let config = adjust(saved)?;
        if step.checked_mul(config.grad_accum as u64).is_none_or(|n| n > MAX_MICRO_STEPS) {
            return Err(Error::format(&path, format!("its step {step} is no step that a run can be at")));
        }
        let mut trainer = Self::on(config, device)?;
        let mut problems = Vec::new();
        let mut take = |kind: &str, name: &str, into: &mut Tensor| match file.tensors.remove(&format!("{kind}.{name}")) {
            Some(t) if t.shape() == into.shape() && t.dtype() == into.dtype() => match moved(kind, &t, into.device()) {
                Ok(t) => *into = t,
                Err(e) => problems.push(format!("{kind}.{name}: {e}")),
            },
            Some(t) => problems.push(format!(
                "{kind}.{name} is {} {:?}, not {} {:?}",
                t.dtype(),
                t.shape(),
                into.dtype(),
                into.shape()
            )),
            None => problems.push(format!("{kind}.{name} is missing")),
        };
        let Optimizer { m, v, master } = &mut trainer.optimizer;
        for (i, p) in trainer.model.params_mut().into_iter().enumerate() {
            take("m", &p.name, &mut m[i]);
            take("v", &p.name, &mut v[i]);
            if let Some(master) = master.get_mut(i) {
                take("master", &p.name, master);
            }
            let name = p.name.clone();
            take("param", &name, p.value_mut());
        }
        if !problems.is_empty() {
            return Err(Error::weights(&path, problems.join("; ")));
        }
        trainer.step = step;
        Ok(trainer)
    }
}
