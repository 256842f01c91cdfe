//! Windows of tokens as batches: drawn at random for training, fixed for validation.
//!
//! A window is N + 1 tokens: its first N are inputs, its last N the labels, already the next tokens (spec section 1).

use super::{Tokens, purpose};
use crate::random::{below_at, subkey};
use crate::tensor::Tensor;
use crate::{Error, Result};

/// What a training or validation step takes.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Token ids, int64 [B, N].
    pub input_ids: Tensor,
    /// The token after each, int64 [B, N]; -100 where there is nothing to predict.
    pub labels: Tensor,
}

impl Batch {
    /// The windows of N + 1 tokens at `starts`.
    fn at(tokens: &Tokens, starts: &[usize], len: usize) -> Result<Self> {
        let shape = [starts.len(), len];
        let n = crate::tensor::checked_numel("Batch::at", &shape)?;
        let (mut inputs, mut labels) = (Vec::with_capacity(n), Vec::with_capacity(n));
        let mut window = Vec::new();
        for &start in starts {
            window.clear();
            tokens.read(start, len + 1, &mut window)?;
            inputs.extend_from_slice(&window[..len]);
            labels.extend_from_slice(&window[1..]);
        }
        Ok(Self { input_ids: Tensor::ids(&inputs, &shape)?, labels: Tensor::ids(&labels, &shape)? })
    }
}

/// Draws training batches: windows at uniformly random starts.
///
/// Its whole state is one counter, the number of batches drawn. Row b of batch s is draw number s * B + b of the seed, so
/// a sampler of the same seed, B, N and tokens put to a saved step with [`BatchSampler::seek`] goes on identically.
#[derive(Clone, Debug)]
pub struct BatchSampler {
    key: u64,
    batch: usize,
    len: usize,
    step: u64,
}

impl BatchSampler {
    /// Batches of `batch` windows with `len` inputs each, from step 0.
    pub fn new(seed: u64, batch: usize, len: usize) -> Result<Self> {
        check_sizes(batch, len)?;
        Ok(Self { key: subkey(seed, purpose::BATCHES), batch, len, step: 0 })
    }
    /// How many batches were drawn: what a checkpoint stores.
    pub fn step(&self) -> u64 {
        self.step
    }
    /// Go on as if `step` batches had been drawn.
    pub fn seek(&mut self, step: u64) {
        self.step = step;
    }
    /// The next batch, [B, N]. Errors if `tokens` holds no window; the step is then not taken.
    pub fn next(&mut self, tokens: &Tokens) -> Result<Batch> {
        let batch = self.at(tokens, self.step)?;
        self.step += 1;
        Ok(batch)
    }
    /// Batch number `step`, whatever was drawn before.
    pub fn at(&self, tokens: &Tokens, step: u64) -> Result<Batch> {
        Batch::at(tokens, &self.starts(tokens, step)?, self.len)
    }
    /// Where in `tokens` the windows of batch `step` start.
    pub fn starts(&self, tokens: &Tokens, step: u64) -> Result<Vec<usize>> {
        if tokens.len() <= self.len {
            return Err(too_short("the training text", tokens.len(), self.len));
        }
        let starts = (tokens.len() - self.len) as u64;
        let first = step.wrapping_mul(self.batch as u64);
        Ok((0..self.batch as u64).map(|b| below_at(self.key, first.wrapping_add(b), starts) as usize).collect())
    }
}

/// Validation batches: fixed windows, evenly spaced over the held-out tokens.
///
/// No input is in two windows and no token is predicted twice (the last label of a window may be the first input of the
/// next). The last batch is smaller if B does not divide the number of windows.
#[derive(Clone, Debug)]
pub struct Windows<'a> {
    tokens: &'a Tokens,
    batch: usize,
    len: usize,
    count: usize,
    next: usize,
}

impl<'a> Windows<'a> {
    /// All windows of `len` inputs of `tokens`, or `at_most` of them, in batches of `batch`.
    pub fn new(tokens: &'a Tokens, batch: usize, len: usize, at_most: Option<usize>) -> Result<Self> {
        check_sizes(batch, len)?;
        if tokens.len() <= len {
            return Err(too_short("the held-out text", tokens.len(), len));
        }
        let count = (tokens.len() - 1) / len;
        match at_most {
            Some(0) => Err(Error::Usage("0 validation windows: choose at least 1".into())),
            _ => Ok(Self { tokens, batch, len, count: count.min(at_most.unwrap_or(count)), next: 0 }),
        }
    }
    /// How many windows there are in all batches together.
    pub fn total(&self) -> usize {
        self.count
    }
    /// Where window `i` starts: window number floor(i * all / count) of all that fit side by side.
    pub fn start(&self, i: usize) -> usize {
        let all = (self.tokens.len() - 1) / self.len;
        (i as u128 * all as u128 / self.count as u128) as usize * self.len
    }
}

impl Iterator for Windows<'_> {
    type Item = Result<Batch>;
    fn next(&mut self) -> Option<Result<Batch>> {
        let end = self.next.saturating_add(self.batch).min(self.count);
        let starts: Vec<usize> = (self.next..end).map(|i| self.start(i)).collect();
        self.next = end;
        (!starts.is_empty()).then(|| Batch::at(self.tokens, &starts, self.len))
    }
}

fn check_sizes(batch: usize, len: usize) -> Result<()> {
    match (batch, len) {
        (0, _) | (_, 0) => Err(Error::Usage(format!("batches of {batch} windows of {len} tokens: choose at least 1 and 1"))),
        _ => Ok(()),
    }
}
fn too_short(what: &str, has: usize, len: usize) -> Error {
    let need = len.saturating_add(1);
    let fix = "give more text, hold out another fraction or shorten the windows";
    Error::config(format!("{what} has {has} tokens, one window of {len} needs at least {need}: {fix}"))
}
