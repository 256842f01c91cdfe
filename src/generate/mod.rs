//! Decoding: a [`Generator`] reads prompts and yields tokens, one a row at each turn, from a cached model.

use crate::model::{Cache, Cat};
use crate::ops::{Sampling, sample};
use crate::random;
use crate::tensor::Tensor;
use crate::{Error, Result};

/// What to generate.
#[derive(Clone, Debug, Default)]
pub struct GenerateOptions {
    /// Tokens to add to each row.
    pub max_new_tokens: usize,
    /// C; the model's (largest) if not given.
    pub chunk_size: Option<usize>,
    /// How tokens are chosen; greedy by default.
    pub sampling: Sampling,
    /// Of the random numbers that sampling draws; a row draws the same whatever else is in the batch.
    pub seed: u64,
    /// Only ids below this are chosen: a vocabulary is padded, a tokenizer may know fewer ids than the model. All of
    /// the model's if not given.
    pub vocab_limit: Option<usize>,
}

/// Generates a batch of rows of one prompt length; an iterator over turns, each one new token a row.
///
/// ```
/// use felid::{generate::{GenerateOptions, Generator}, model::{Cat, ModelConfig}, tensor::Tensor};
/// let model = Cat::new(ModelConfig::preset("nano")?, 0)?;
/// let prompt = Tensor::ids(&[72, 101, 108, 108, 111], &[1, 5])?;
/// let options = GenerateOptions { max_new_tokens: 4, chunk_size: Some(8), ..Default::default() };
/// let tokens: Vec<i64> = Generator::new(&model, &prompt, options)?.map(|t| t.map(|t| t[0])).collect::<Result<_, _>>()?;
/// assert_eq!(tokens.len(), 4);
/// # Ok::<(), felid::Error>(())
/// ```
pub struct Generator<'m> {
    model: &'m Cat,
    options: GenerateOptions,
    cache: Cache,
    logits: Tensor,
    produced: usize,
}

impl<'m> Generator<'m> {
    /// Read the prompt, ids `[B, P]` int64. Errors when prompt and new tokens together do not fit block_size (the last
    /// token need not be read, so P + max_new_tokens - 1 must).
    pub fn new(model: &'m Cat, prompt: &Tensor, options: GenerateOptions) -> Result<Self> {
        options.sampling.check()?;
        let more = options.max_new_tokens.saturating_sub(1);
        let (len, block_size) = (prompt.shape().last().copied().unwrap_or(0), model.config().block_size);
        let all = len.saturating_add(more);
        if all > block_size {
            return Err(Error::Length { len: all, block_size });
        }
        let (logits, cache) = model.prefill(prompt, options.chunk_size, more)?;
        Ok(Self { model, options, cache, logits, produced: 0 })
    }
    /// Bytes that the cache holds.
    pub fn cache_bytes(&self) -> usize {
        self.cache.bytes()
    }
    /// Logits of the token to be chosen next, `[B, V]`.
    pub fn logits(&self) -> &Tensor {
        &self.logits
    }

    fn turn(&mut self) -> Result<Vec<i64>> {
        let rows = self.logits.shape()[0] as u64;
        // a stream of its own for each row, addressed by the number of the token: the same whatever the batch
        let uniforms: Vec<f64> =
            (0..rows).map(|r| random::uniform_at(random::subkey(self.options.seed, r), self.produced as u64)).collect();
        let limit = self.options.vocab_limit.unwrap_or(usize::MAX);
        let next = sample(&self.logits, limit, &self.options.sampling, &uniforms)?;
        self.produced += 1;
        if self.produced < self.options.max_new_tokens {
            self.logits = self.model.step(&Tensor::ids(&next, &[next.len()])?, &mut self.cache)?;
        }
        Ok(next)
    }
}

impl Iterator for Generator<'_> {
    type Item = Result<Vec<i64>>;
    fn next(&mut self) -> Option<Self::Item> {
        if self.produced >= self.options.max_new_tokens {
            return None;
        }
        let turn = self.turn();
        if turn.is_err() {
            self.produced = self.options.max_new_tokens;
        }
        Some(turn)
    }
}

/// All tokens at once: prompt `[B, P]` -> `[B, max_new_tokens]`.
pub fn generate(model: &Cat, prompt: &Tensor, options: GenerateOptions) -> Result<Tensor> {
    let (b, n) = (prompt.shape().first().copied().unwrap_or(0), options.max_new_tokens);
    let generator = Generator::new(model, prompt, options)?;
    let mut ids = vec![0i64; b * n];
    for (t, turn) in generator.enumerate() {
        for (r, id) in turn?.into_iter().enumerate() {
            ids[r * n + t] = id;
        }
    }
    Tensor::from_vec(ids, &[b, n])
}
