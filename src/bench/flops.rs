//! Counting the arithmetic of a training step, and measuring how fast this machine multiplies matrices.

use crate::Result;
use crate::autograd::Var;
use crate::model::{Cat, ModelConfig, ModelType, TransformerConfig};
use crate::ops;
use crate::tensor::{DType, Device, Tensor};
use serde::Serialize;
use std::time::Instant;

/// Floating-point operations (a multiply-add counts two) of one forward and backward pass.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Flops {
    /// What the model as published computes: every row of the padded layout of spec sections 2 and 3.
    pub reference: f64,
    /// What is needed without the rows that nobody reads (`model::ChunkPlan`).
    pub needed: f64,
}

/// Elements of the matrices of one block: each costs 6 operations a row (2 forward, 4 backward).
fn block_weights(t: &TransformerConfig) -> usize {
    let (d, h) = (t.dim, t.head_dim());
    d * (t.n_head + 2 * t.kv_heads()) * h + t.n_head * h * d + 3 * d * t.ffn_width()
}

/// Matrix products of a training step of `batch` rows of `tokens` at chunk size `chunk`, for dense, fixed and adaptive
/// models. Attention's own products (a few percent at these sizes) are left out, and so is everything memory-bound.
pub fn training_flops(c: &ModelConfig, batch: usize, tokens: usize, chunk: usize) -> Flops {
    let (d, v) = (&c.decoder, c.vocab_rows());
    let head = (batch * tokens * d.dim * v) as f64;
    let (Some(f), false) = (&c.compressor, c.model_type == ModelType::Transformer) else {
        let all = 6.0 * ((batch * tokens * d.n_layer * block_weights(d)) as f64 + head);
        return Flops { reference: all, needed: all };
    };
    let header = if c.model_type == ModelType::CatAdaptive { 2 } else { 1 };
    let of = |k: usize, rows: usize| {
        let compressor = k * (chunk + header) * f.n_layer * block_weights(f) + k * chunk * f.dim * d.dim;
        let decoder = rows * d.n_layer * block_weights(d);
        6.0 * ((batch * (compressor + decoder)) as f64 + head)
    };
    let padded = tokens.div_ceil(chunk);
    let plan = crate::model::ChunkPlan { chunk, header, tokens };
    Flops { reference: of(padded, padded * (chunk + header) + header), needed: of(plan.full_chunks(), plan.len()) }
}

/// Operations a second of a large f32 matrix product on this machine, the best of several.
pub fn matmul_ceiling() -> Result<f64> {
    let n = 1024;
    let fill = |i: usize| ((i * 2_654_435_761) % 1000) as f32 / 500.0 - 1.0;
    let make = || Tensor::from_vec((0..n * n).map(fill).collect(), &[n, n]).map(Var::constant);
    let (a, b) = (make()?, make()?);
    let mut best = f64::INFINITY;
    for _ in 0..12 {
        let start = Instant::now();
        ops::matmul(&a, &b)?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(2.0 * (n as f64).powi(3) / best)
}

/// A model of this config with f32 weights on the CPU.
pub(super) fn model(c: ModelConfig) -> Result<Cat> {
    let model = Cat::new(c, 0)?;
    debug_assert!(model.params().iter().all(|p| p.dtype() == DType::F32 && p.value().device() == Device::Cpu));
    Ok(model)
}
