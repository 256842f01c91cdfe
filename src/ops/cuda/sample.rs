//! Sampling on CUDA: a block a row; the ids come back in one copy.

use super::rows::float_variant;
use crate::Result;
use crate::cuda::{Grid, kernels::sample as kernel};
use crate::ops::Sampling;
use crate::tensor::{DType, Tensor};

/// Threads of a block.
const THREADS: usize = 1024;

pub(crate) fn sample(logits: &Tensor, limit: usize, s: &Sampling, uniforms: &[f64]) -> Result<Vec<i64>> {
    let variant = float_variant("sample", logits)?;
    let logits = logits.dense_rows()?;
    let (b, device) = (logits.dim(0), logits.device());
    let mut ids = Tensor::empty(&[b], DType::I64, device)?;
    let greedy = s.temperature == 0.0 || s.top_k == 1;
    let mut weights = Tensor::empty(&[if greedy { 0 } else { b }, limit], DType::I64, device)?;
    // no tensor on a device holds f64: their bits travel as integers
    let uniforms = uniforms.iter().map(|u| u.to_bits() as i64).collect::<Vec<_>>();
    let uniforms = Tensor::from_vec(uniforms, &[b])?.to_device(device)?;
    // sums of `limit` weights up to this stay below 2^62
    let scale = (1u64 << (62 - limit.next_power_of_two().trailing_zeros())) as f64;
    let args = [
        ids.write()?,
        weights.write()?,
        logits.read()?,
        logits.layout().strides()[0].into(),
        limit.into(),
        s.temperature.to_bits().into(),
        s.top_k.into(),
        s.top_p.to_bits().into(),
        uniforms.read()?,
        scale.to_bits().into(),
    ];
    // SAFETY: the parameters are (ids, weights, logits, stride, limit, temperature, top_k, top_p, uniforms, scale), reals as
    // f64; rows of logits are dense and hold at least `limit` elements, ids, weights and uniforms are new and have a row
    // each (weights none where the kernel writes none).
    unsafe { logits.gpu()?.launch(kernel::sample, variant, Grid::new(b, THREADS), &args)? };
    ids.to_vec()
}
