//! `felid bench train`: the whole training step (forward, backward, clip, AdamW), and a peer's beside it.

use super::machine::held_at_peak;
use super::{Flops, Machine, Profile, Spread, peer_output, profile, training_flops};
use crate::autograd::{Gradients, Tape};
use crate::data::Batch;
use crate::model::{Cat, ForwardOptions, ModelConfig};
use crate::ops::{self, AdamWSettings};
use crate::random;
use crate::tensor::{DType, Device, Tensor};
use crate::train::{MAX_BATCH, Optimizer, micro_step, prepare, training_tape};
use crate::{Error, Result};
use serde::Serialize;
use std::time::Instant;

/// What to measure.
#[derive(Clone, Debug, Serialize)]
pub struct TrainBench {
    /// Model preset.
    pub preset: String,
    /// Rows of a batch.
    pub batch: usize,
    /// Tokens of a row.
    pub tokens: usize,
    /// Chunk sizes, measured one after the other.
    pub chunk_sizes: Vec<usize>,
    /// Measured steps a chunk size, after `warmup` others.
    pub steps: usize,
    /// Steps that are not counted.
    pub warmup: usize,
    /// Of weights and activations; 16-bit weights get f32 masters.
    pub dtype: DType,
    /// Compute whole blocks again in backward.
    pub recompute: bool,
    /// Save what backward would compute again because it is cheap.
    pub save_all: bool,
    /// Profile one more step at each chunk size.
    pub profile: bool,
}

/// One chunk size.
#[derive(Clone, Debug, Serialize)]
pub struct TrainRow {
    /// C; 0 for a dense model.
    pub chunk_size: usize,
    /// Time of a step.
    pub step: Spread,
    /// Thousand tokens a second, at the median.
    pub ktokens_per_s: f64,
    /// Matrix products of a step.
    pub flops: Flops,
    /// Needed operations over the median time, as a share of the measured ceiling.
    pub share_of_ceiling: f64,
    /// Most bytes that tensors held at once.
    pub peak_bytes: usize,
    /// What these were for, where the device counts that.
    pub held_at_peak: Vec<(&'static str, usize)>,
    /// Bytes that forward leaves for backward: activations, and gradients that it has computed already.
    pub saved_bytes: usize,
    /// The peer's time over ours: above 1 is faster than the peer.
    pub speedup_over_peer: Option<f64>,
    /// Where the time of a step goes.
    pub profile: Option<Profile>,
}

/// What a peer printed.
#[derive(Clone, Debug, Serialize)]
pub struct PeerRow {
    /// C.
    pub chunk_size: usize,
    /// Time of a step, as the peer reports it.
    pub ms: f64,
}

/// All of it, as it goes to `docs/results/`.
#[derive(Clone, Debug, Serialize)]
pub struct TrainBenchReport {
    /// Where it ran, and what that machine reaches.
    pub machine: Machine,
    /// What was measured.
    pub settings: TrainBench,
    /// The results.
    pub rows: Vec<TrainRow>,
    /// The peer's command, and what it printed.
    pub peer: Option<(String, Vec<PeerRow>)>,
}

/// Measure training steps on random ids. With a peer's rows, also the ratios.
pub fn bench_train(settings: TrainBench, device: Device, peer: Option<(String, Vec<PeerRow>)>) -> Result<TrainBenchReport> {
    let config = ModelConfig::preset(&settings.preset)?;
    if settings.batch == 0 || settings.steps == 0 {
        return Err(Error::Usage("batch and steps must be at least 1".into()));
    }
    if settings.batch.checked_mul(settings.tokens).is_none_or(|n| n > MAX_BATCH) {
        let (b, n) = (settings.batch, settings.tokens);
        return Err(Error::Usage(format!("batches of {b} x {n} tokens are too large: choose smaller ones")));
    }
    let machine = Machine::measure(device, settings.dtype)?;
    let mut bench = Steps::new(config, device, &settings)?;
    let mut rows = Vec::new();
    for &chunk in &settings.chunk_sizes {
        let mut row = bench.row(&settings, &machine, chunk)?;
        let of_peer = |(_, rows): &(String, Vec<PeerRow>)| rows.iter().find(|r| r.chunk_size == chunk).map(|r| r.ms);
        row.speedup_over_peer = peer.as_ref().and_then(of_peer).map(|ms| ms / row.step.median_ms);
        rows.push(row);
    }
    Ok(TrainBenchReport { machine, settings, rows, peer })
}

/// A model that takes steps.
pub(super) struct Steps {
    config: ModelConfig,
    model: Cat,
    optimizer: Optimizer,
    grads: Gradients,
    step: u64,
}

impl Steps {
    pub fn new(config: ModelConfig, device: Device, s: &TrainBench) -> Result<Self> {
        let mut model = Cat::new(config.clone(), 0)?;
        prepare(&mut model, s.dtype)?;
        let model = model.to_device(device)?;
        let optimizer = Optimizer::new(&model)?;
        Ok(Self { config, model, optimizer, grads: Gradients::default(), step: 0 })
    }
    /// After an error: no gradients.
    pub fn clear(&mut self) {
        self.grads = Gradients::default();
    }
    pub fn parameters(&self) -> usize {
        self.model.params().iter().map(|p| p.value().numel()).sum()
    }

    fn batch(&self, s: &TrainBench) -> Result<Batch> {
        random_batch(s, self.config.vocab_size, self.step)
    }

    /// One step as training does it: all submitted before the loss and the norm are read.
    fn one(&mut self, s: &TrainBench, batch: &Batch, options: ForwardOptions) -> Result<()> {
        let h = AdamWSettings { lr: 1e-3, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };
        self.step += 1;
        let loss = micro_step(tape(s, self.model.device()), &self.model, batch, options, 1.0, &mut self.grads)?;
        let norm = self.optimizer.submit(&mut self.model, &mut self.grads, self.step, &h, 1.0)?;
        loss.item()?;
        norm.item()?;
        Ok(())
    }

    /// Steps at chunk size `chunk`, on batches of the settings' size.
    pub fn row(&mut self, s: &TrainBench, machine: &Machine, chunk: usize) -> Result<TrainRow> {
        let device = self.model.device();
        device.forget_peak();
        let chunk_size = self.config.chunk_size.map(|_| chunk);
        let options = ForwardOptions { chunk_size, recompute: s.recompute };
        let saved_bytes = saved_bytes(tape(s, device), &self.model, &self.batch(s)?, options)?;
        let mut seconds = Vec::with_capacity(s.steps);
        for i in 0..s.warmup + s.steps {
            let batch = self.batch(s)?;
            let start = Instant::now();
            self.one(s, &batch, options)?;
            if i >= s.warmup {
                seconds.push(start.elapsed().as_secs_f64());
            }
        }
        let spread = Spread::of(&seconds);
        let profile = match s.profile {
            false => None,
            true => {
                let batch = self.batch(s)?;
                Some(profile(device, || self.one(s, &batch, options))?)
            }
        };
        let flops = training_flops(&self.config, s.batch, s.tokens, chunk);
        Ok(TrainRow {
            chunk_size: chunk,
            step: spread,
            ktokens_per_s: (s.batch * s.tokens) as f64 / spread.median_ms,
            flops,
            share_of_ceiling: flops.needed / (spread.median_ms / 1e3) / machine.matmul_flops_per_s,
            peak_bytes: device.memory_stats().peak,
            held_at_peak: held_at_peak(device),
            saved_bytes,
            speedup_over_peer: None,
            profile,
        })
    }
}

fn tape(s: &TrainBench, device: Device) -> Tape {
    if s.save_all { ops::tape().saving_all() } else { training_tape(device) }
}

/// What a forward pass leaves behind, the loss itself included.
fn saved_bytes(tape: Tape, model: &Cat, batch: &Batch, options: ForwardOptions) -> Result<usize> {
    let held = || model.device().memory_stats().current;
    let before = held();
    let _loss = tape.record(|| model.loss(&batch.input_ids, &batch.labels, options))?;
    Ok(held().saturating_sub(before))
}

fn random_batch(s: &TrainBench, vocab: usize, step: u64) -> Result<Batch> {
    let shape = [s.batch, s.tokens];
    let draw = |key: u64| {
        let first = step * (s.batch * s.tokens) as u64;
        let ids: Vec<i64> =
            (0..(s.batch * s.tokens) as u64).map(|i| random::below_at(key, first + i, vocab as u64) as i64).collect();
        Tensor::ids(&ids, &shape)
    };
    Ok(Batch { input_ids: draw(1)?, labels: draw(2)? })
}

/// Run a peer's command in a shell and read the lines it prints of the form `C=16  304.0 ms/step` or `CAT-16 ..`.
pub fn run_peer(command: &str) -> Result<Vec<PeerRow>> {
    let rows: Vec<PeerRow> = peer_output(command)?.lines().filter_map(peer_row).collect();
    if rows.is_empty() {
        return Err(Error::Usage(format!("peer '{command}': printed no line with 'C=.. .. ms/step'")));
    }
    Ok(rows)
}

fn peer_row(line: &str) -> Option<PeerRow> {
    let (_, line) = line.split_once("C=").or_else(|| line.split_once("CAT-"))?;
    let (chunk, rest) = line.trim_start().split_once(char::is_whitespace)?;
    let ms = rest.split_once("ms/step")?.0.trim();
    Some(PeerRow { chunk_size: chunk.parse().ok()?, ms: ms.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_peers_print() {
        let r = peer_row("C= 8     343.0 ms/step     5.97 Ktok/s").unwrap();
        assert_eq!((r.chunk_size, r.ms), (8, 343.0));
        let r = peer_row("compiled CAT-16             550.1 ms/step     59.6 Ktok/s  peak   51.6 GiB").unwrap();
        assert_eq!((r.chunk_size, r.ms), (16, 550.1));
        assert!(peer_row("parameters 4396416 torch 2.11").is_none());
    }
}
