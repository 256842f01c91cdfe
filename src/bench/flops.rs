//! Counting the arithmetic of a training step.

use crate::model::{ModelConfig, ModelType, TransformerConfig};
use serde::Serialize;

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
