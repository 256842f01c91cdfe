//! Tokens: tokenizers, shards on disk, batches for training and validation, and the MQAR task.
//!
//! Letters: B batch, N tokens of a window.

pub mod batches;
pub mod bpe;
pub mod mqar;
pub mod shards;
mod stream;
pub mod tokenize;
pub mod tokenizer;

pub use batches::{Batch, BatchSampler, Windows};
pub use bpe::train_bpe;
pub use mqar::Mqar;
pub use shards::{ShardWriter, TokenShards};
pub use stream::DecodeStream;
pub use tokenize::{Progress, Summary, TokenizeOptions, tokenize_files};
pub use tokenizer::Tokenizer;

use crate::{Error, Result};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// The part of a text that is held out for validation unless asked otherwise.
pub const VAL_FRACTION: f64 = 0.05;

/// Where tokens come from.
#[derive(Debug)]
pub enum TokenSource {
    /// Tokens in memory, 4 bytes each.
    Memory(Vec<u32>),
    /// Shards on disk.
    Shards(TokenShards),
}

impl TokenSource {
    /// How many tokens there are.
    pub fn len(&self) -> usize {
        match self {
            Self::Memory(ids) => ids.len(),
            Self::Shards(shards) => shards.len(),
        }
    }
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Append tokens `start..start + n` to `out`.
    pub fn read(&self, start: usize, n: usize, out: &mut Vec<i64>) -> Result<()> {
        match self {
            Self::Memory(ids) => {
                check_range("TokenSource::read", start, n, ids.len())?;
                out.extend(ids[start..start + n].iter().map(|&id| i64::from(id)));
                Ok(())
            }
            Self::Shards(shards) => shards.read(start, n, out),
        }
    }
}

/// A run of tokens of a source: the training part or the held-out part.
#[derive(Clone, Debug)]
pub struct Tokens {
    source: Arc<TokenSource>,
    range: Range<usize>,
    vocab_size: usize,
}

impl Tokens {
    /// How many tokens there are.
    pub fn len(&self) -> usize {
        self.range.len()
    }
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }
    /// Where these tokens lie in their source.
    pub fn range(&self) -> Range<usize> {
        self.range.clone()
    }
    /// Append tokens `start..start + n` of this part to `out`. Errors on an id outside the vocabulary.
    pub fn read(&self, start: usize, n: usize, out: &mut Vec<i64>) -> Result<()> {
        check_range("Tokens::read", start, n, self.len())?;
        let before = out.len();
        self.source.read(self.range.start + start, n, out)?;
        match out[before..].iter().find(|&&id| id < 0 || id as usize >= self.vocab_size) {
            None => Ok(()),
            Some(id) => {
                let (size, fix) = (self.vocab_size, "tokenize with this model's tokenizer");
                Err(Error::index("Tokens::read", format!("id {id} is outside the vocabulary of {size}: {fix}")))
            }
        }
    }
}

/// Tokens to train on and tokens held out: the contiguous tail of a text, or shards of their own.
#[derive(Clone, Debug)]
pub struct Dataset {
    /// What is trained on.
    pub train: Tokens,
    /// What is held out; shares no token with `train`.
    pub val: Tokens,
}

impl Dataset {
    /// A text file, a `.bin` shard, or a folder of shards.
    ///
    /// A folder's `val` shards, if there are any, are what is held out; otherwise it is the last `val_fraction` of the
    /// tokens, as it is of a text, which `tokenizer` encodes in memory.
    pub fn open(path: &Path, tokenizer: &Tokenizer, val_fraction: f64) -> Result<Self> {
        let vocab_size = tokenizer.vocab_size();
        if path.is_dir() {
            let part = |shards: TokenShards| {
                let range = 0..shards.len();
                Tokens { source: Arc::new(TokenSource::Shards(shards)), range, vocab_size }
            };
            let (train, val) = (TokenShards::open_split(path, "train")?, TokenShards::open_split(path, "val")?);
            let all = match (train, val) {
                (Some(train), Some(val)) => return Ok(Self { train: part(train), val: part(val) }),
                (Some(train), None) => train,
                (None, _) => TokenShards::open(path)?,
            };
            return Self::split(TokenSource::Shards(all), vocab_size, val_fraction);
        }
        if path.extension().is_some_and(|e| e == "bin") {
            return Self::split(TokenSource::Shards(TokenShards::open(path)?), vocab_size, val_fraction);
        }
        let text = std::fs::read(path).map_err(Error::io("read", path))?;
        if text.is_empty() {
            return Err(Error::empty(path.display().to_string(), "give a file with text"));
        }
        let ids = match (tokenizer, std::str::from_utf8(&text)) {
            (Tokenizer::Json(_), Err(e)) => return Err(tokenizer::not_utf8(path, e.valid_up_to() as u64)),
            (Tokenizer::Json(_), Ok(text)) => tokenizer.encode(text)?,
            (Tokenizer::Bytes, _) => tokenizer.encode_bytes(&text)?,
        };
        Self::from_tokens(&ids, vocab_size, val_fraction)
    }
    /// Tokens in memory, the last `val_fraction` of them held out. Errors on an id outside the vocabulary.
    pub fn from_tokens(ids: &[i64], vocab_size: usize, val_fraction: f64) -> Result<Self> {
        let narrow = |&id: &i64| match u32::try_from(id) {
            Ok(small) if (small as usize) < vocab_size => Ok(small),
            _ => Err(Error::index("Dataset::from_tokens", format!("id {id} is outside the vocabulary of {vocab_size}"))),
        };
        let ids = ids.iter().map(narrow).collect::<Result<Vec<u32>>>()?;
        Self::split(TokenSource::Memory(ids), vocab_size, val_fraction)
    }
    /// Any source, the last `val_fraction` (at least 0, below 1) of its tokens held out.
    pub fn split(source: TokenSource, vocab_size: usize, val_fraction: f64) -> Result<Self> {
        let (n, source) = (source.len(), Arc::new(source));
        let at = n - held_out(n as u64, val_fraction)? as usize;
        let part = |range| Tokens { source: source.clone(), range, vocab_size };
        Ok(Self { train: part(0..at), val: part(at..n) })
    }
}

/// How much of `n` is held out: `n * fraction`, rounded down.
fn held_out(n: u64, fraction: f64) -> Result<u64> {
    if !(0.0..1.0).contains(&fraction) {
        return Err(Error::Usage(format!("a validation fraction of {fraction}: choose one from 0 to below 1")));
    }
    Ok((n as f64 * fraction) as u64)
}

/// `start..start + n` must lie within `len` tokens.
fn check_range(op: &'static str, start: usize, n: usize, len: usize) -> Result<()> {
    match start.checked_add(n) {
        Some(end) if end <= len => Ok(()),
        _ => Err(Error::index(op, format!("tokens {start}..{start}+{n} of {len}"))),
    }
}

/// What each room draws from a seed: the purpose of its [`crate::random::subkey`].
mod purpose {
    pub const BATCHES: u64 = 1;
    pub const MQAR: u64 = 2;
}
