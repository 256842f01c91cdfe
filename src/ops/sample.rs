//! Choosing next tokens from logits, and how likely they were. Has no gradient.

use crate::tensor::Tensor;
use crate::{Error, Result};

/// How tokens are chosen. The default is greedy.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Logits are divided by this; 0 is greedy: the most likely token, the lowest id among equals.
    pub temperature: f64,
    /// Choose among the k most likely tokens; 0 for all.
    pub top_k: usize,
    /// Choose among the fewest most likely tokens whose probability is at least this together, after temperature, top-k
    /// and min-p; 1 for all.
    pub top_p: f64,
    /// Choose among the tokens that are at least this likely relative to the most likely one, after temperature; 0 for all.
    pub min_p: f64,
    /// Before all else, logits of tokens that occurred already are divided by this where positive, multiplied where
    /// negative, and rounded to their dtype; 1 for no penalty.
    pub repetition_penalty: f64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0 }
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
        if !(0.0..=1.0).contains(&self.min_p) {
            return Err(Error::Usage(format!("min-p {} must be 0 to 1", self.min_p)));
        }
        if !(self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite()) {
            return Err(Error::Usage(format!("repetition penalty {} must be above 0", self.repetition_penalty)));
        }
        Ok(())
    }
    /// Errors where settings contradict one another: a greedy choice leaves nothing to cut.
    pub fn check_together(&self) -> Result<()> {
        let cuts = [(self.top_k > 1, "top-k"), (self.top_p < 1.0, "top-p"), (self.min_p > 0.0, "min-p")];
        match cuts.into_iter().find(|(given, _)| *given) {
            Some((_, name)) if self.temperature == 0.0 => Err(Error::Usage(format!(
                "temperature 0 always takes the most likely token, so {name} contradicts it: leave one of them out"
            ))),
            _ => Ok(()),
        }
    }
}

/// How the token of one row is drawn.
#[derive(Clone, Copy, Debug)]
pub struct Draw<'a> {
    /// The settings.
    pub how: Sampling,
    /// In [0, 1): decides among the candidates.
    pub uniform: f64,
    /// Ids that the repetition penalty is for, a bit each: id i is bit `i % 64` of word `i / 64`. Empty for none.
    pub seen: &'a [u64],
}

/// One id a row of logits `[B, V]`, among ids below `limit`. Row b depends on its own logits and `rows[b]` only, whatever
/// else is in the batch. NaN counts as minus infinity.
pub fn sample(logits: &Tensor, limit: usize, rows: &[Draw]) -> Result<Vec<i64>> {
    rows.iter().try_for_each(|r| r.how.check())?;
    let (b, v) = sizes("sample", logits)?;
    if rows.len() != b || limit == 0 || v == 0 {
        let n = rows.len();
        return Err(Error::shape("sample", format!("{n} draws and limit {limit} do not fit logits [{b}, {v}]")));
    }
    on_device!(logits.device(), sample::sample(logits, limit.min(v), rows))
}

/// How likely a token was, and which were likeliest: natural logarithms of the softmax of a row of logits.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct LogProbs {
    /// Of the token that was asked for.
    pub logprob: f64,
    /// The likeliest tokens, the likeliest first, of equals the lowest id.
    pub top: Vec<(i64, f64)>,
}

/// Log-probabilities of `ids[b]`, and the `top` likeliest ids, among ids below `limit`, in each row of logits `[B, V]`: the
/// model's own, before any setting of [`Sampling`]. NaN logits count as minus infinity; where no logit is finite, nothing
/// is normalised and the result is NaN.
pub fn log_probs(logits: &Tensor, limit: usize, ids: &[i64], top: usize) -> Result<Vec<LogProbs>> {
    let (b, v) = sizes("log_probs", logits)?;
    let limit = limit.min(v);
    if ids.len() != b || limit == 0 {
        let n = ids.len();
        return Err(Error::shape("log_probs", format!("{n} ids and limit {limit} do not fit logits [{b}, {v}]")));
    }
    if let Some(id) = ids.iter().find(|id| !usize::try_from(**id).is_ok_and(|i| i < limit)) {
        return Err(Error::index("log_probs", format!("id {id} is not below {limit}")));
    }
    on_device!(logits.device(), sample::log_probs(logits, limit, ids, top.min(limit)))
}

fn sizes(op: &'static str, logits: &Tensor) -> Result<(usize, usize)> {
    match logits.shape() {
        &[b, v] => Ok((b, v)),
        other => Err(Error::shape(op, format!("logits must be [batch, vocabulary], got {other:?}"))),
    }
}
