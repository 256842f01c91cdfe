//! What to generate, and what comes back.

use crate::model::{CacheSize, Cat};
use crate::ops::{LogProbs, Sampling};
use crate::{Error, Result};
use serde::Serialize;

/// A prompt to be continued. What comes of it depends on nothing else in its batch.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Request {
    /// Ids; at least one.
    pub prompt: Vec<i64>,
    /// Tokens to add at most. The last one need not be read, so prompt and new tokens may be block_size + 1 together.
    pub max_new_tokens: usize,
    /// C; the model's (largest) if not given.
    pub chunk_size: Option<usize>,
    /// Other chunk sizes later on: `(n, C)` goes over to C once n new tokens are there, n ascending. All chunks so far are
    /// compressed again.
    pub chunk_changes: Vec<(usize, usize)>,
    /// How tokens are chosen; greedy by default.
    pub sampling: Sampling,
    /// Of the random numbers that sampling draws.
    pub seed: u64,
    /// Tokens that end the text; the one that does is no part of it.
    pub stop_tokens: Vec<i64>,
    /// Texts that end the text, which is cut before them. Needs a generator with a tokenizer.
    pub stop_strings: Vec<String>,
    /// Ask for log-probabilities: of each token, and of this many likeliest ones.
    pub logprobs: Option<usize>,
}

/// Why a text ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// All tokens that were asked for are there.
    Length,
    /// By a stop token.
    StopToken,
    /// By a stop string.
    StopString,
}

/// A new token of one request.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// The request's number, in the order of asking.
    pub row: usize,
    /// The token.
    pub token: i64,
    /// Text that is complete now: whole characters, nothing that may become part of a stop string. Always empty without a
    /// tokenizer.
    pub text: String,
    /// If they were asked for.
    pub logprobs: Option<LogProbs>,
    /// Set with the last token.
    pub finish: Option<Finish>,
}

/// Everything that came of a request.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Output {
    /// New tokens, without a stop token.
    pub tokens: Vec<i64>,
    /// Their text, cut before a stop string; empty without a tokenizer.
    pub text: String,
    /// Of each token, if asked for.
    pub logprobs: Vec<LogProbs>,
    /// `None` if no token was asked for.
    pub finish: Option<Finish>,
}

impl Output {
    /// Take in one of its events.
    pub fn add(&mut self, event: Event) {
        self.text.push_str(&event.text);
        self.finish = event.finish;
        if event.finish != Some(Finish::StopToken) {
            self.tokens.push(event.token);
            self.logprobs.extend(event.logprobs);
        }
    }
}

impl Request {
    /// A request for `max_new_tokens` after a prompt, everything else at its default.
    pub fn new(prompt: Vec<i64>, max_new_tokens: usize) -> Self {
        Self { prompt, max_new_tokens, ..Self::default() }
    }
    /// Tokens that will be read at most.
    pub(super) fn longest(&self) -> usize {
        self.prompt.len().saturating_add(self.max_new_tokens.saturating_sub(1))
    }

    /// Everything that can be known to be wrong before any work, for choices among ids below `limit`.
    pub(super) fn check(&self, model: &Cat, limit: usize, has_text: bool) -> Result<()> {
        let c = model.config();
        self.sampling.check()?;
        self.sampling.check_together()?;
        if self.prompt.is_empty() {
            let fix = "give it at least one token: a model continues, it cannot begin from nothing";
            return Err(Error::empty("the prompt", fix));
        }
        if self.longest() > c.block_size {
            return Err(Error::Length { len: self.longest(), block_size: c.block_size });
        }
        c.resolve_chunk_size(self.chunk_size)?;
        for &(_, chunk) in &self.chunk_changes {
            c.resolve_chunk_size(Some(chunk))?;
        }
        let ascending = self.chunk_changes.windows(2).all(|w| w[0].0 < w[1].0);
        if !ascending || self.chunk_changes.iter().any(|c| c.0 == 0) {
            let detail =
                "changes of the chunk size come after 1 or more new tokens, one after the other: give them in order";
            return Err(Error::Usage(detail.into()));
        }
        let ids = |what: &str, ids: &[i64], below: usize| match ids
            .iter()
            .find(|id| !usize::try_from(**id).is_ok_and(|i| i < below))
        {
            Some(id) => Err(Error::index("generate", format!("{what} {id} is outside the vocabulary of {below}"))),
            None => Ok(()),
        };
        ids("the prompt's id", &self.prompt, c.vocab_rows())?;
        ids("stop token", &self.stop_tokens, limit.min(c.vocab_rows()))?;
        if limit == 0 {
            return Err(Error::Usage("a vocabulary limit of 0 leaves no token to choose".into()));
        }
        if self.stop_strings.iter().any(String::is_empty) {
            return Err(Error::Usage("a stop string is empty: it would stop before the first token".into()));
        }
        if !self.stop_strings.is_empty() && !has_text {
            return Err(Error::Usage("stop strings need text: give the generator a tokenizer".into()));
        }
        Ok(())
    }

    /// What it needs of a cache, changes of the chunk size included.
    pub(super) fn cache_size(&self, model: &Cat) -> Result<CacheSize> {
        if self.max_new_tokens == 0 {
            return Ok(CacheSize::default());
        }
        let (mut chunk, mut from, mut need) = (self.chunk_size, self.prompt.len(), CacheSize::default());
        for &(n, next) in self.chunk_changes.iter().filter(|c| c.0 < self.max_new_tokens) {
            need = need.max(model.cache_size(chunk, from, self.prompt.len() + n - 1)?);
            (chunk, from) = (Some(next), self.prompt.len() + n);
        }
        Ok(need.max(model.cache_size(chunk, from, self.longest())?))
    }
}
