//! What a cache's format costs in quality: the same text read token by token with each.

use super::Quality;
use crate::Result;
use crate::autograd::{Var, no_grad};
use crate::data::Batch;
use crate::model::{CacheFormat, CacheSize, Cat, IGNORE_INDEX, Prompt};
use crate::ops::{argmax, cross_entropy};
use crate::tensor::{DType, Tensor};

/// Quality with a plain cache and with one in 8 bits.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct CacheCost {
    /// With keys and values as they are computed.
    pub plain: Quality,
    /// With 8-bit ones.
    pub int8: Quality,
    /// Share of counted tokens at which the most likely token is the same with both.
    pub same_choice: f64,
    /// Bytes of the cache of one text as long as a row.
    pub plain_bytes: usize,
    /// The same in 8 bits.
    pub int8_bytes: usize,
}

/// Read batches as generation does, which predicts every token but the first from the cache: with each format, over the same
/// counted tokens.
pub fn cache_cost(
    model: &Cat,
    batches: impl Iterator<Item = Result<Batch>>,
    chunk_size: Option<usize>,
) -> Result<CacheCost> {
    let formats = [CacheFormat::Plain, CacheFormat::Int8];
    let (mut all, mut same, mut bytes) = ([Sums::default(); 2], 0, [0; 2]);
    for batch in batches {
        let batch = batch?;
        let mut best = [vec![], vec![]];
        for i in 0..2 {
            let size = model.cache_size(chunk_size, 1, batch.input_ids.shape()[1])?;
            bytes[i] = usize::try_from(model.cache_bytes(size, formats[i])).unwrap_or(usize::MAX);
            best[i] = no_grad(|| all[i].read(model, &batch, chunk_size, (size, formats[i])))?;
        }
        same += best[0].iter().zip(&best[1]).filter(|(a, b)| a == b).count();
    }
    let [plain, int8] = all.map(Sums::quality);
    let same_choice = same as f64 / plain.tokens.max(1) as f64;
    Ok(CacheCost { plain, int8, same_choice, plain_bytes: bytes[0], int8_bytes: bytes[1] })
}

#[derive(Clone, Copy, Default)]
struct Sums {
    loss: f64,
    right: usize,
    tokens: usize,
}

impl Sums {
    fn quality(self) -> Quality {
        let n = self.tokens.max(1) as f64;
        Quality { loss: self.loss / n, accuracy: self.right as f64 / n, tokens: self.tokens }
    }
    /// Add a batch, read token by token from the first on. The most likely token at each counted place.
    fn read(
        &mut self,
        model: &Cat,
        batch: &Batch,
        chunk_size: Option<usize>,
        (size, format): (CacheSize, CacheFormat),
    ) -> Result<Vec<i64>> {
        let (b, n) = (batch.input_ids.shape()[0], batch.input_ids.shape()[1]);
        let [ids, labels] = [batch.input_ids.to_vec::<i64>()?, batch.labels.to_vec::<i64>()?];
        let mut cache = model.cache(std::iter::repeat_n(size, b).sum(), format)?;
        let texts: Vec<_> = (0..b).filter_map(|_| cache.reserve(size)).collect();
        let mut all_best = Vec::with_capacity(labels.len());
        for t in 0..n {
            let logits = if t == 0 {
                let prompt = |(r, &text)| Prompt { text, ids: &ids[r * n..r * n + 1], chunk_size };
                model.prefill(&mut cache, &texts.iter().enumerate().map(prompt).collect::<Vec<_>>())?
            } else {
                let next: Vec<_> = texts.iter().enumerate().map(|(r, &text)| (text, ids[r * n + t])).collect();
                model.step(&mut cache, &next)?
            };
            let wanted: Vec<i64> = (0..b).map(|r| labels[r * n + t]).collect();
            let counted = wanted.iter().filter(|&&l| l != IGNORE_INDEX).count();
            if counted == 0 {
                continue;
            }
            let best = argmax(&logits)?.to_vec::<i64>()?;
            let best = best.into_iter().zip(&wanted).filter(|(_, l)| **l != IGNORE_INDEX);
            self.right += best.clone().filter(|(best, l)| best == *l).count();
            all_best.extend(best.map(|(best, _)| best));
            let wanted = Tensor::ids(&wanted, &[b])?;
            self.loss += loss(logits, &wanted)? * counted as f64;
            self.tokens += counted;
        }
        Ok(all_best)
    }
}

/// Mean cross-entropy, in f32 at least: what 8 bits cost is little, and a mean in 16 would not show it.
fn loss(logits: Tensor, labels: &Tensor) -> Result<f64> {
    let logits = if logits.dtype() == DType::F64 { logits } else { crate::ops::cast_tensor(&logits, DType::F32)? };
    cross_entropy(&Var::constant(logits), labels, IGNORE_INDEX)?.value().item()
}
