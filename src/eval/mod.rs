//! How good a model is: loss and accuracy on held-out data, also as an 8-bit cache has it, and parity with golden files.

mod cached;
pub mod parity;

pub use cached::{CacheCost, cache_cost};

use crate::Result;
use crate::autograd::no_grad;
use crate::data::Batch;
use crate::model::{Cat, ForwardOptions, IGNORE_INDEX};
use crate::ops::{argmax, cross_entropy};

/// Quality over some batches.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Quality {
    /// Mean cross-entropy, nats a counted token (a byte, with the byte tokenizer).
    pub loss: f64,
    /// Share of counted tokens that were the most likely ones.
    pub accuracy: f64,
    /// Counted tokens.
    pub tokens: usize,
}

/// Loss and accuracy over batches, each counted token weighing the same.
pub fn quality(model: &Cat, batches: impl Iterator<Item = Result<Batch>>, chunk_size: Option<usize>) -> Result<Quality> {
    let (mut loss, mut right, mut tokens) = (0.0, 0usize, 0usize);
    for batch in batches {
        let batch = batch?;
        let options = ForwardOptions { chunk_size, ..Default::default() };
        let logits = no_grad(|| model.logits(&batch.input_ids, options))?;
        let labels = batch.labels.to_vec::<i64>()?;
        let best = argmax(logits.value())?.to_vec::<i64>()?;
        let counted = labels.iter().filter(|&&l| l != IGNORE_INDEX).count();
        right += labels.iter().zip(&best).filter(|(l, b)| l == b).count();
        loss += no_grad(|| cross_entropy(&logits, &batch.labels, IGNORE_INDEX))?.value().item()? * counted as f64;
        tokens += counted;
    }
    let n = tokens.max(1) as f64;
    Ok(Quality { loss: loss / n, accuracy: right as f64 / n, tokens })
}
