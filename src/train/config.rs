//! The settings of a training run: defaults, presets, TOML, and the checks between them.

use crate::model::{ModelConfig, ModelType, TransformerConfig};
use crate::tensor::DType;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// What is learned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Task {
    /// The next token of a text.
    #[default]
    Text,
    /// Multi-query associative recall (spec section 7).
    Mqar,
}

/// Sizes of the recall task.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MqarConfig {
    /// Ids: keys are drawn from one half, values from the other.
    pub vocab_size: usize,
    /// Key-value pairs in a sequence; a sequence has at least four tokens for each.
    pub pairs: usize,
}

/// Everything that a run depends on. A TOML file has these fields, all optional: what is left out comes from the preset.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// The preset that fields left out come from, the model included.
    pub preset: String,
    /// What is learned.
    pub task: Task,
    /// A text file, a `.bin` shard, or a folder of shards.
    pub data: PathBuf,
    /// `tokenizer.json` or a folder with one; bytes if not given.
    pub tokenizer: Option<PathBuf>,
    /// Folder of the model, its training state and its log.
    pub out: PathBuf,
    /// Part of the text held out, at its end.
    pub val_fraction: f64,
    /// Rows of a micro-batch.
    pub batch_size: usize,
    /// Tokens of a row.
    pub seq_len: usize,
    /// Micro-batches whose gradients are averaged in one step.
    pub grad_accum: usize,
    /// Optimizer steps.
    pub steps: u64,
    /// Peak rate, reached after `warmup` steps; then a cosine down to `min_lr` at the last step.
    pub lr: f64,
    /// The rate at the last step.
    pub min_lr: f64,
    /// Steps over which the rate rises, linearly from lr / warmup.
    pub warmup: u64,
    /// AdamW's b1.
    pub beta1: f64,
    /// AdamW's b2.
    pub beta2: f64,
    /// AdamW's eps.
    pub eps: f64,
    /// Applied to matrices, not to norm weights and biases.
    pub weight_decay: f64,
    /// Largest global norm of the gradient; 0 for no clipping.
    pub clip: f64,
    /// Chunk sizes taken in turn, one a micro-batch; the model's own round if empty.
    pub chunk_sizes: Vec<usize>,
    /// Steps between validations; 0 for only one, at the end.
    pub eval_every: u64,
    /// Windows (or recall sequences) of a validation during the run, and of the last one.
    pub eval_windows: usize,
    /// The same of the validation after the last step.
    pub final_eval_windows: usize,
    /// Steps between checkpoints; 0 for only one, at the end.
    pub save_every: u64,
    /// Of weights, batches and samples.
    pub seed: u64,
    /// Compute activations again in backward instead of keeping them.
    pub recompute: bool,
    /// Of weights and activations; 16-bit weights get f32 masters.
    pub dtype: DType,
    /// Sizes of the recall task, where that is the task.
    pub mqar: MqarConfig,
    /// Instead of the preset's model.
    pub model: Option<ModelConfig>,
}

impl TrainConfig {
    /// The settings that go with a model preset.
    pub fn preset(name: &str) -> Result<Self> {
        let model = ModelConfig::preset(name)?;
        let base = Self {
            preset: name.into(),
            task: Task::Text,
            data: "data/shakespeare.txt".into(),
            tokenizer: None,
            out: format!("runs/{name}").into(),
            val_fraction: 0.05,
            batch_size: 16,
            seq_len: model.block_size,
            grad_accum: 1,
            steps: 1400,
            lr: 4e-3,
            min_lr: 2e-4,
            warmup: 80,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
            clip: 1.0,
            chunk_sizes: vec![],
            eval_every: 350,
            eval_windows: 64,
            final_eval_windows: 256,
            save_every: 350,
            seed: 0,
            recompute: false,
            dtype: DType::F32,
            mqar: MqarConfig { vocab_size: 8192, pairs: 8 },
            model: None,
        };
        Ok(match name {
            "nano" => base,
            "cpu-small" => Self { batch_size: 8, steps: 5000, lr: 1e-3, min_lr: 1e-4, warmup: 200, ..base },
            // spec section 7: 0.5M tokens a step, 15B tokens in all
            _ => Self {
                batch_size: 8,
                grad_accum: 16,
                steps: 28_600,
                lr: 8e-4,
                min_lr: 8e-5,
                warmup: 2000,
                save_every: 1000,
                ..base
            },
        })
    }

    /// Parse a TOML table; errors name `path`.
    pub fn parse_table(text: &str, path: &Path) -> Result<toml::Table> {
        text.parse().map_err(|e: toml::de::Error| bad_toml(path, &e))
    }
    /// The preset that `given` names (or `default`), with every field of `given` put over it.
    pub fn from_table(given: toml::Table, path: &Path, default: &str) -> Result<Self> {
        let preset = given.get("preset").and_then(toml::Value::as_str).unwrap_or(default).to_string();
        Self::preset(&preset)?.with(given, path)
    }
    /// This configuration with every field of `given` put over it, tables key by key. Unknown fields are errors; `path`
    /// is what they name as the source.
    ///
    /// A `model` table with a `model_type` is a whole model; one without changes fields of the model there is.
    pub fn with(&self, given: toml::Table, path: &Path) -> Result<Self> {
        let mut base = self.clone();
        if let Some(model) = given.get("model").and_then(toml::Value::as_table) {
            if model.contains_key("model_type") {
                base.model = None;
            } else if base.model.is_none() {
                let preset = given.get("preset").and_then(toml::Value::as_str).unwrap_or(&self.preset);
                base.model = Some(ModelConfig::preset(preset)?);
            }
        }
        let mut merged = toml::Table::try_from(&base).map_err(|e| bad_toml(path, &e))?;
        put_over(&mut merged, given);
        merged.try_into().map_err(|e| bad_toml(path, &e))
    }
    /// All fields as TOML; [`TrainConfig::from_table`] reads it back.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string_pretty(self).map_err(|e| Error::config(e.to_string()))
    }

    /// The model of this run, for a tokenizer of `vocab_size` ids.
    pub fn model_config(&self, vocab_size: usize) -> Result<ModelConfig> {
        let mut m = match &self.model {
            Some(m) => m.clone(),
            None => {
                let mut m = ModelConfig::preset(&self.preset)?;
                m.block_size = m.block_size.max(self.seq_len);
                m.vocab_size = vocab_size;
                m
            }
        };
        if m.vocab_size < vocab_size {
            let have = m.vocab_size;
            let what = if self.task == Task::Mqar { "the recall task (mqar.vocab_size)" } else { "the tokenizer" };
            return Err(Error::config(format!(
                "{what} has {vocab_size} ids, model.vocab_size is only {have}: make it as large"
            )));
        }
        m.padded_vocab_size = Some(m.vocab_rows());
        fill_width(&mut m.decoder);
        m.compressor.as_mut().map(fill_width);
        m.check()?;
        Ok(m)
    }

    /// Everything that must hold between the fields.
    pub fn check(&self, model: &ModelConfig) -> Result<()> {
        let fail = |why: String| Err(Error::config(why));
        if self.batch_size == 0 || self.seq_len == 0 || self.grad_accum == 0 || self.steps == 0 {
            return fail("batch_size, seq_len, grad_accum and steps must be at least 1".into());
        }
        let batch = self.batch_size.checked_mul(self.seq_len).filter(|&n| n <= MAX_BATCH);
        if batch.is_none() || self.steps.checked_mul(self.grad_accum as u64).is_none_or(|n| n > MAX_MICRO_STEPS) {
            let (b, n, a, s) = (self.batch_size, self.seq_len, self.grad_accum, self.steps);
            return fail(format!(
                "batch_size {b} x seq_len {n} or grad_accum {a} x steps {s} is too large: choose smaller ones"
            ));
        }
        if self.eval_windows == 0 || self.final_eval_windows == 0 {
            return fail("eval_windows and final_eval_windows must be at least 1".into());
        }
        if self.seq_len > model.block_size {
            return Err(Error::Length { len: self.seq_len, block_size: model.block_size });
        }
        let rates = [self.lr, self.min_lr, self.eps, self.weight_decay, self.clip];
        if rates.iter().any(|r| !(r.is_finite() && *r >= 0.0)) {
            return fail(format!("lr, min_lr, eps, weight_decay, clip = {rates:?} must be 0 or more"));
        }
        if ![self.beta1, self.beta2].iter().all(|b| (0.0..1.0).contains(b)) {
            return fail(format!("beta1 {} and beta2 {} must be in 0..1", self.beta1, self.beta2));
        }
        if !self.dtype.is_float() {
            return fail(format!("dtype {} cannot be trained: use f32", self.dtype));
        }
        for &c in &self.chunk_sizes {
            model.resolve_chunk_size(Some(c))?;
        }
        Ok(())
    }

    /// The chunk sizes that micro-batches take in turn; `None` for a dense model.
    pub fn round(&self, model: &ModelConfig) -> Vec<Option<usize>> {
        match (model.model_type, self.chunk_sizes.is_empty()) {
            (ModelType::Transformer, _) => vec![None],
            (_, true) => model.training_chunk_sizes().into_iter().map(Some).collect(),
            (_, false) => self.chunk_sizes.iter().copied().map(Some).collect(),
        }
    }

    /// The rate of step `step`, counted from 0.
    pub fn rate(&self, step: u64) -> f64 {
        if step < self.warmup {
            return self.lr * (step + 1) as f64 / self.warmup as f64;
        }
        let span = self.steps.saturating_sub(self.warmup).max(1) as f64;
        let progress = ((step - self.warmup) as f64 / span).min(1.0);
        self.min_lr + 0.5 * (self.lr - self.min_lr) * (1.0 + (std::f64::consts::PI * progress).cos())
    }
}

/// Tokens of a micro-batch, and micro-batches of a run: beyond these, numbers are mistakes.
pub(crate) const MAX_BATCH: usize = 1 << 28;
pub(super) const MAX_MICRO_STEPS: u64 = 1 << 53;

fn bad_toml(path: &Path, e: &dyn std::fmt::Display) -> Error {
    let text = e.to_string();
    Error::format(path, text.lines().map(str::trim).filter(|l| !l.is_empty()).collect::<Vec<_>>().join(" "))
}

fn put_over(old: &mut toml::Table, new: toml::Table) {
    for (key, value) in new {
        match (old.get_mut(&key), value) {
            (Some(toml::Value::Table(old)), toml::Value::Table(new)) => put_over(old, new),
            (_, value) => drop(old.insert(key, value)),
        }
    }
}

/// Saved configs name the width instead of leaving it to be computed.
fn fill_width(t: &mut TransformerConfig) {
    t.intermediate_size = Some(t.ffn_width());
    t.n_local_heads = Some(t.kv_heads());
}
