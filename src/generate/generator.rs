//! What generates: a model, perhaps with a tokenizer, and how much it may do at once.

use super::generation::Generation;
use super::lookahead::Decoding;
use super::request::{Output, Request};
use crate::data::Tokenizer;
use crate::model::{CacheFormat, CacheSize, Cat};
use crate::{Error, Result};
use serde::Serialize;

/// How much a [`Generator`] may do at once.
#[derive(Clone, Debug, Default)]
pub struct GeneratorOptions {
    /// Texts that are continued at once; all if not given. Others wait for one to end.
    pub max_batch: Option<usize>,
    /// Bytes that the cache may take; what the device has free if not given.
    pub cache_bytes: Option<usize>,
    /// Only ids below this are chosen: a vocabulary is padded, a tokenizer may know fewer ids than the model. Those of the
    /// tokenizer if there is one, else all of the model's.
    pub vocab_limit: Option<usize>,
    /// How tokens follow one another on a CUDA device.
    pub decoding: Decoding,
    /// How keys and values are kept.
    pub cache: CacheFormat,
}

/// Continues prompts. Cloning is cheap, and one generator may serve several threads: each [`Generation`] has a cache of its
/// own and shares nothing but the weights.
///
/// ```
/// use felid::{generate::{Generator, Request}, model::{Cat, ModelConfig}};
/// let model = Cat::new(ModelConfig::preset("nano")?, 0)?;
/// let generator = Generator::new(&model);
/// let short = Request { chunk_size: Some(8), ..Request::new(vec![72, 101, 108, 108, 111], 4) };
/// let long = Request { chunk_size: Some(16), ..Request::new((0..40).collect(), 9) };
/// for event in generator.start(vec![short.clone(), long])? {
///     let event = event?;
///     println!("request {}: token {}", event.row, event.token);
/// }
/// let outputs = generator.run(vec![short])?;
/// assert_eq!(outputs[0].tokens.len(), 4);
/// # Ok::<(), felid::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Generator {
    pub(super) model: Cat,
    pub(super) tokenizer: Option<Tokenizer>,
    pub(super) options: GeneratorOptions,
}

/// What a generation will hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryPlan {
    /// Texts that are continued at once.
    pub batch: usize,
    /// Bytes of the cache, taken once at the start.
    pub cache_bytes: usize,
    /// Bytes of the weights, which are there already.
    pub weight_bytes: usize,
}

impl Generator {
    /// Over a model, whose weights it shares; choosing among all of its ids.
    pub fn new(model: &Cat) -> Self {
        Self { model: model.clone(), tokenizer: None, options: GeneratorOptions::default() }
    }
    /// With text beside the tokens, and stop strings.
    pub fn with_tokenizer(self, tokenizer: Tokenizer) -> Self {
        Self { tokenizer: Some(tokenizer), ..self }
    }
    /// With limits.
    pub fn with_options(self, options: GeneratorOptions) -> Self {
        Self { options, ..self }
    }
    /// The model.
    pub fn model(&self) -> &Cat {
        &self.model
    }

    /// Ids below this may be chosen.
    pub(super) fn limit(&self) -> usize {
        let known = self.tokenizer.as_ref().map_or(usize::MAX, Tokenizer::vocab_size);
        self.options.vocab_limit.unwrap_or(known).min(self.model.config().vocab_rows())
    }
    /// Errors on what is wrong with requests, the first of them named where there are several.
    pub fn check(&self, requests: &[Request]) -> Result<()> {
        let check = |r: &Request| r.check(&self.model, self.limit(), self.tokenizer.is_some());
        for (row, request) in requests.iter().enumerate() {
            check(request).map_err(|source| match requests.len() {
                1 => source,
                _ => Error::Request { row, source: Box::new(source) },
            })?;
        }
        Ok(())
    }

    /// What serving these requests will hold, and that it can be held; errors say which rows would fit. Takes nothing.
    pub fn plan(&self, requests: &[Request]) -> Result<MemoryPlan> {
        Ok(self.sized(requests)?.1)
    }

    /// The cache that serves these requests.
    pub(super) fn sized(&self, requests: &[Request]) -> Result<(CacheSize, MemoryPlan)> {
        if self.options.max_batch == Some(0) {
            return Err(Error::Usage("a batch of 0 texts does nothing: use 1 or more".into()));
        }
        self.check(requests)?;
        let needs: Vec<CacheSize> = requests.iter().map(|r| r.cache_size(&self.model)).collect::<Result<_>>()?;
        let batch = self.options.max_batch.unwrap_or(usize::MAX).min(needs.len());
        let size = largest(&needs, batch);
        let bytes = self.cache_bytes(size);
        let room = self.options.cache_bytes.or_else(|| self.model.device().free_memory());
        if let Some(room) = room
            && bytes > room as u128
        {
            return Err(self.too_large(&needs, batch, room));
        }
        let weights = self.model.params().iter().map(|p| p.value().numel() * p.value().dtype().size()).sum();
        let cache_bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        Ok((size, MemoryPlan { batch, cache_bytes, weight_bytes: weights }))
    }

    pub(super) fn cache_bytes(&self, size: CacheSize) -> u128 {
        self.model.cache_bytes(size, self.options.cache)
    }
    /// The error for a batch that does not fit: which rows do.
    fn too_large(&self, needs: &[CacheSize], batch: usize, room: usize) -> Error {
        let bytes = |size: CacheSize| self.cache_bytes(size);
        let all = bytes(largest(needs, batch));
        if let Some(row) = needs.iter().position(|n| bytes(*n) > room as u128) {
            let need = bytes(needs[row]);
            return Error::Usage(format!(
                "request {row} alone needs a cache of {need} bytes, there is room for {room}: shorten it, or take larger chunks"
            ));
        }
        let at_once = (1..=batch).take_while(|n| bytes(largest(needs, *n)) <= room as u128).count();
        let mut held = CacheSize::default();
        let first = needs.iter().take_while(|n| {
            held = held + **n;
            bytes(held) <= room as u128
        });
        Error::Usage(format!(
            "{batch} texts at once need a cache of {all} bytes, there is room for {room}: requests 0 to {} fit together, any \
             {at_once} of all do (max_batch)",
            first.count().saturating_sub(1)
        ))
    }

    /// Begin to serve requests: takes the cache, and yields tokens as they are chosen. Errors before any work.
    pub fn start(&self, requests: Vec<Request>) -> Result<Generation> {
        Generation::new(self, requests)
    }
    /// Serve requests to their ends.
    pub fn run(&self, requests: Vec<Request>) -> Result<Vec<Output>> {
        let mut outputs = vec![Output::default(); requests.len()];
        for event in self.start(requests)? {
            let event = event?;
            let row = event.row;
            outputs[row].add(event);
        }
        Ok(outputs)
    }
}

/// Room for any `n` of these needs.
fn largest(needs: &[CacheSize], n: usize) -> CacheSize {
    let sum = |of: fn(&CacheSize) -> usize| {
        let mut all: Vec<usize> = needs.iter().map(of).collect();
        all.sort_unstable_by(|a, b| b.cmp(a));
        all.into_iter().take(n).fold(0usize, usize::saturating_add)
    };
    CacheSize { rows: sum(|s| s.rows), layer_rows: sum(|s| s.layer_rows), open_rows: sum(|s| s.open_rows) }
}
