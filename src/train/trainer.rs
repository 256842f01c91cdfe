//! One run: model, optimizer, data, and where it stands.

use super::config::{Task, TrainConfig};
use super::optimizer::{Optimizer, accepted};
use crate::autograd::{Gradients, Tape, Var, no_grad};
use crate::data::{Batch, BatchSampler, Dataset, Mqar, Tokenizer, Windows};
use crate::eval::{self, Quality};
use crate::model::{Cat, ForwardOptions};
use crate::ops::{self, AdamWSettings};
use crate::tensor::{DType, Device, Tensor};
use crate::{Error, Result};
use std::time::Instant;

/// Where batches come from.
#[derive(Debug)]
pub enum Source {
    /// Windows of a text.
    Text {
        /// Its tokens, in a training and a held-out part.
        data: Dataset,
        /// Which windows each batch takes.
        sampler: BatchSampler,
    },
    /// The recall task, generated as it is asked for.
    Mqar(Mqar),
}

impl Source {
    fn open(c: &TrainConfig, tokenizer: &Tokenizer) -> Result<Self> {
        match c.task {
            Task::Mqar => Ok(Self::Mqar(Mqar::new(c.mqar.vocab_size, c.mqar.pairs, c.seq_len, c.seed)?)),
            Task::Text => {
                let data = Dataset::open(&c.data, tokenizer, c.val_fraction)?;
                let sampler = BatchSampler::new(c.seed, c.batch_size, c.seq_len)?;
                // a text too short for a batch or a validation is known now, not after hours
                sampler.starts(&data.train, 0)?;
                Windows::new(&data.val, c.batch_size, c.seq_len, None)?;
                Ok(Self::Text { data, sampler })
            }
        }
    }
    /// Micro-batch number `i` of the run: a function of the seed and `i` alone, so `i` is all a checkpoint keeps.
    fn batch(&self, i: u64, rows: usize) -> Result<Batch> {
        match self {
            Self::Text { data, sampler } => sampler.at(&data.train, i),
            Self::Mqar(task) => task.batch(i, rows),
        }
    }
}

/// Weights of `dtype` with gradients in f32 (f64 for f64): 16 bits would lose what many rows and micro-batches add.
pub(crate) fn prepare(model: &mut Cat, dtype: DType) -> Result<()> {
    let wide = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
    for p in model.params_mut() {
        p.var = Var::parameter_with_gradient(ops::cast_tensor(p.value(), dtype)?, wide);
    }
    Ok(())
}

/// What one step did.
#[derive(Clone, Debug, serde::Serialize)]
pub struct StepReport {
    /// Its number, counted from 1.
    pub step: u64,
    /// Mean cross-entropy of the step's micro-batches, nats a token.
    pub loss: f64,
    /// C of each micro-batch; empty for a dense model.
    pub chunk_sizes: Vec<usize>,
    /// The rate it ran at.
    pub lr: f64,
    /// Global norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Input tokens of the step over its wall time.
    pub tokens_per_s: f64,
    /// Bytes that tensors held at most so far.
    pub memory: usize,
}

/// A training run that can be stepped, validated, saved and resumed.
pub struct Trainer {
    /// The settings.
    pub config: TrainConfig,
    /// The model as it stands.
    pub model: Cat,
    /// How its text becomes tokens.
    pub tokenizer: Tokenizer,
    pub(super) optimizer: Optimizer,
    source: Source,
    round: Vec<Option<usize>>,
    grads: Gradients,
    pub(super) step: u64,
}

impl Trainer {
    /// Start a run on the CPU: open the data, draw the weights.
    pub fn new(config: TrainConfig) -> Result<Self> {
        Self::on(config, Device::Cpu)
    }
    /// As [`Trainer::new`], on any device. Weights are drawn on the CPU, so they are the same everywhere.
    pub fn on(config: TrainConfig, device: Device) -> Result<Self> {
        device.check()?;
        // a folder of shards brings the tokenizer that made them
        let shards = Some(config.data.as_path()).filter(|d| config.task == Task::Text && d.is_dir());
        let tokenizer = Tokenizer::load(config.tokenizer.as_deref().or(shards))?;
        let vocab = match config.task {
            Task::Text => tokenizer.vocab_size(),
            Task::Mqar => config.mqar.vocab_size,
        };
        let model_config = config.model_config(vocab)?;
        config.check(&model_config)?;
        let source = Source::open(&config, &tokenizer)?;
        let mut model = Cat::new(model_config, config.seed)?;
        prepare(&mut model, config.dtype)?;
        let model = model.to_device(device)?;
        let optimizer = Optimizer::new(&model)?;
        let round = config.round(model.config());
        Ok(Self { config, model, tokenizer, optimizer, source, round, grads: Gradients::default(), step: 0 })
    }
    /// Steps done.
    pub fn steps_done(&self) -> u64 {
        self.step
    }
    /// Position in the round of chunk sizes: micro-batches done.
    pub fn micro_steps(&self) -> u64 {
        self.step * self.config.grad_accum as u64
    }

    /// One optimizer step. An error leaves weights, moments and step as they were.
    pub fn step(&mut self) -> Result<StepReport> {
        let start = Instant::now();
        let submitted = self.micro_batches().and_then(|(losses, chunk_sizes)| Ok((losses, chunk_sizes, self.update()?)));
        // whatever an error left behind must not count in the next step
        self.grads.clear();
        let (losses, chunk_sizes, (lr, norm)) = submitted?;
        // all of the step is under way: only now is it waited for
        let c = &self.config;
        let loss = losses.iter().map(|l| Ok(l.item()? / c.grad_accum as f64)).sum::<Result<f64>>()?;
        if !loss.is_finite() {
            let detail = format!("the loss of step {} is {loss}: lower the rate, or look at the data", self.step + 1);
            return Err(Error::gradient("train", detail));
        }
        let grad_norm = accepted(self.step + 1, norm.item()?)?;
        self.step += 1;
        let tokens = (c.batch_size * c.seq_len * c.grad_accum) as f64;
        Ok(StepReport {
            step: self.step,
            loss,
            chunk_sizes,
            lr,
            grad_norm,
            tokens_per_s: tokens / start.elapsed().as_secs_f64(),
            memory: self.model.device().memory_stats().peak,
        })
    }
    /// Gradients of the step's micro-batches, averaged; returns their losses, on the device, and their chunk sizes.
    fn micro_batches(&mut self) -> Result<(Vec<Tensor>, Vec<usize>)> {
        let c = &self.config;
        let (accum, first) = (c.grad_accum as u64, self.micro_steps());
        let (mut losses, mut chunk_sizes) = (Vec::new(), Vec::new());
        for i in first..first + accum {
            let chunk_size = self.round[(i % self.round.len() as u64) as usize];
            let batch = self.source.batch(i, c.batch_size)?;
            let options = ForwardOptions { chunk_size, recompute: c.recompute };
            losses.push(micro_step(
                training_tape(self.model.device()),
                &self.model,
                &batch,
                options,
                1.0 / accum as f64,
                &mut self.grads,
            )?);
            chunk_sizes.extend(chunk_size);
        }
        Ok((losses, chunk_sizes))
    }
    /// The optimizer's part of a step: its rate, and the norm of the gradient, on the device.
    fn update(&mut self) -> Result<(f64, Tensor)> {
        let c = &self.config;
        let lr = c.rate(self.step);
        let settings = AdamWSettings { lr, beta1: c.beta1, beta2: c.beta2, eps: c.eps, weight_decay: c.weight_decay };
        let norm = self.optimizer.submit(&mut self.model, &mut self.grads, self.step + 1, &settings, c.clip)?;
        Ok((lr, norm))
    }

    /// Ids that begin the held-out text, a quarter of a row, to continue in samples; `None` where there is no text.
    pub fn held_out_prompt(&self) -> Result<Option<Vec<i64>>> {
        let Source::Text { data, .. } = &self.source else { return Ok(None) };
        let mut ids = Vec::new();
        data.val.read(0, (self.config.seq_len / 4).clamp(1, data.val.len().max(1)), &mut ids)?;
        Ok(Some(ids))
    }

    /// Quality on held-out data at each chunk size of the round.
    pub fn evaluate(&self, windows: usize) -> Result<Vec<(Option<usize>, Quality)>> {
        let mut sizes = self.round.clone();
        sizes.sort_unstable();
        sizes.dedup();
        sizes.into_iter().map(|chunk| Ok((chunk, self.evaluate_at(chunk, windows)?))).collect()
    }
    fn evaluate_at(&self, chunk_size: Option<usize>, windows: usize) -> Result<Quality> {
        let rows = self.config.batch_size;
        match &self.source {
            Source::Text { data, .. } => {
                let batches = Windows::new(&data.val, rows, self.config.seq_len, Some(windows))?;
                eval::quality(&self.model, batches, chunk_size)
            }
            Source::Mqar(task) => {
                let task = task.validation();
                let batches = (0..windows.div_ceil(rows) as u64).map(|i| task.batch(i, rows));
                eval::quality(&self.model, batches, chunk_size)
            }
        }
    }
}

/// The tape of a training step. On a CPU, where memory is plentiful and computing again takes 4% of a step of `cpu-small`,
/// everything is saved.
pub(crate) fn training_tape(device: Device) -> Tape {
    match device {
        Device::Cpu => ops::tape().saving_all(),
        _ => ops::tape(),
    }
}

/// Forward and backward of one micro-batch: adds `weight` times the gradient to `grads`, returns the loss, a scalar on the
/// device. Nothing waits for the device. Where the loss is not finite, neither is the gradient, so the optimizer will refuse it.
pub(crate) fn micro_step(
    tape: Tape,
    model: &Cat,
    batch: &Batch,
    options: ForwardOptions,
    weight: f64,
    grads: &mut Gradients,
) -> Result<Tensor> {
    let (ids, labels): (&Tensor, &Tensor) = (&batch.input_ids, &batch.labels);
    let loss = tape.record(|| model.loss(ids, labels, options))?;
    // weight + 0 loss: the weight, in every bit, or not a number
    let weight = Tensor::full(weight, loss.shape(), loss.dtype(), loss.value().device())?;
    let seed = no_grad(|| ops::add(&ops::scale(&loss, 0.0)?, &weight.into()))?;
    tape.backward_from(&[(&loss, seed.into_value())], grads)?;
    Ok(loss.into_value())
}
