//! Choosing next tokens from logits. Has no gradient.

use crate::tensor::Tensor;
use crate::{Error, Result};

/// How tokens are chosen. The default is greedy.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Logits are divided by this; 0 is greedy: the most likely token, the lowest id among equals.
    pub temperature: f64,
    /// Choose among the k most likely tokens; 0 for all.
    pub top_k: usize,
    /// Choose among the fewest most likely tokens whose probability is at least this together, after temperature and
    /// top-k; 1 for all.
    pub top_p: f64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0 }
    }
}

impl Sampling {
    /// Errors where a setting is out of range.
    pub fn check(&self) -> Result<()> {
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return Err(Error::Usage(format!("temperature {} must be 0 (greedy) or more", self.temperature)));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(Error::Usage(format!("top-p {} must be above 0 and at most 1", self.top_p)));
        }
        Ok(())
    }
}

/// One id a row of logits `[B, V]`, among ids below `limit`. `uniforms[b]` in [0, 1) decides row b, so equal numbers give
/// equal ids whatever else is in the batch. NaN counts as minus infinity.
pub fn sample(logits: &Tensor, limit: usize, sampling: &Sampling, uniforms: &[f64]) -> Result<Vec<i64>> {
    sampling.check()?;
    let &[b, v] = logits.shape() else {
        return Err(Error::shape("sample", format!("logits must be [batch, vocabulary], got {:?}", logits.shape())));
    };
    if uniforms.len() != b || limit == 0 || v == 0 {
        let n = uniforms.len();
        return Err(Error::shape("sample", format!("{n} random numbers and limit {limit} do not fit logits [{b}, {v}]")));
    }
    on_device!(logits.device(), sample::sample(logits, limit.min(v), sampling, uniforms))
}
