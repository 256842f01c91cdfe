//! sample on CUDA.
#![allow(unused_variables, clippy::too_many_arguments)]

use crate::Result;
use crate::ops::sample::Sampling;
use crate::tensor::Tensor;

pub(crate) fn sample(logits: &Tensor, limit: usize, s: &Sampling, uniforms: &[f64]) -> Result<Vec<i64>> {
    Err(super::missing("sample"))
}
