//! `felid bench cost`: what a training step takes as sequences grow and as models grow, in a table and a plot.

use super::Machine;
use super::plot::{Curve, Plot};
use super::train::{Steps, TrainBench, TrainRow};
use crate::model::ModelConfig;
use crate::tensor::{DType, Device};
use crate::{Error, Result};
use serde::Serialize;
use std::path::Path;

/// What to measure.
#[derive(Clone, Debug, Serialize)]
pub struct CostBench {
    /// Model presets, each at all lengths.
    pub presets: Vec<String>,
    /// N, tokens of a row; the model's positions are made as many as the longest needs.
    pub lengths: Vec<usize>,
    /// C; a dense preset is measured once.
    pub chunk_sizes: Vec<usize>,
    /// Tokens of a batch: its rows are as many as fill it.
    pub tokens: usize,
    /// Measured steps a case, after two others.
    pub steps: usize,
    /// Of weights and activations.
    pub dtype: DType,
}

/// One case.
#[derive(Clone, Debug, Serialize)]
pub struct CostRow {
    /// The model.
    pub preset: String,
    /// Its parameters.
    pub parameters: usize,
    /// N.
    pub length: usize,
    /// B.
    pub batch: usize,
    /// Time and memory of a step; `chunk_size` is 0 for a dense model.
    pub cost: TrainRow,
}

/// All of it.
#[derive(Clone, Debug, Serialize)]
pub struct CostReport {
    /// Where.
    pub machine: Machine,
    /// What.
    pub settings: CostBench,
    /// The results.
    pub rows: Vec<CostRow>,
}

/// Training steps of each model at each length and chunk size. A case that does not fit is left out, with a word in the log.
pub fn bench_cost(s: CostBench, device: Device) -> Result<CostReport> {
    let Some(&longest) = s.lengths.iter().max() else {
        return Err(Error::Usage("give at least one length".into()));
    };
    if s.steps == 0 || s.lengths.contains(&0) || longest > s.tokens {
        return Err(Error::Usage(format!("steps and lengths must be at least 1, lengths at most the {} tokens", s.tokens)));
    }
    // what the last case would be refused for, the first is
    for preset in &s.presets {
        ModelConfig::preset(preset)?.check_chunk_sizes(&s.chunk_sizes)?;
    }
    let machine = Machine::measure(device, s.dtype)?;
    let mut rows = Vec::new();
    for preset in &s.presets {
        let config = ModelConfig::preset(preset)?;
        let config = ModelConfig { block_size: config.block_size.max(longest), ..config };
        let dense = config.chunk_size.is_none();
        let case = |length: usize, chunk_sizes: Vec<usize>| TrainBench {
            preset: preset.clone(),
            batch: s.tokens / length,
            tokens: length,
            chunk_sizes,
            steps: s.steps,
            warmup: 2,
            dtype: s.dtype,
            recompute: false,
            save_all: false,
            profile: false,
        };
        let mut steps = Steps::new(config, device, &case(longest, vec![]))?;
        let parameters = steps.parameters();
        for &length in &s.lengths {
            for &chunk in if dense { &[0][..] } else { &s.chunk_sizes } {
                let settings = case(length, vec![chunk]);
                let cost = match steps.row(&settings, &machine, chunk) {
                    Err(e @ Error::OutOfMemory { .. }) => {
                        tracing::warn!("{preset} at N {length}, C {chunk}: {e}");
                        steps.clear();
                        continue;
                    }
                    cost => cost?,
                };
                rows.push(CostRow { preset: preset.clone(), parameters, length, batch: settings.batch, cost });
            }
        }
    }
    Ok(CostReport { machine, settings: s, rows })
}

impl CostReport {
    /// Write [`CostReport::plot`] to a file.
    pub fn write_plot(&self, path: &Path) -> Result<()> {
        std::fs::write(path, self.plot()).map_err(Error::io("write", path))
    }
    /// Two plots as SVG, one above the other: milliseconds and GiB of a step over N, a curve for each model and chunk size.
    pub fn plot(&self) -> String {
        let curves = |y: fn(&TrainRow) -> f64| -> Vec<Curve> {
            let mut curves: Vec<Curve> = Vec::new();
            for r in &self.rows {
                let name = match r.cost.chunk_size {
                    0 => r.preset.clone(),
                    c => format!("{} C {c}", r.preset),
                };
                let point = (r.length as f64, y(&r.cost));
                match curves.iter_mut().find(|c| c.name == name) {
                    Some(c) => c.points.push(point),
                    None => curves.push(Curve { name, points: vec![point] }),
                }
            }
            curves
        };
        let tokens = self.settings.tokens;
        Plot::stack(&[
            Plot { title: format!("a training step of {tokens} tokens, ms"), x: "N", curves: curves(|r| r.step.median_ms) },
            Plot {
                title: "its peak memory, GiB".into(),
                x: "N",
                curves: curves(|r| r.peak_bytes as f64 / (1u64 << 30) as f64),
            },
        ])
    }
}
