//! `felid bench generate`: greedy generation with the cache, as a user gets it, and a peer's beside it.

use super::{Machine, Spread};
use crate::generate::{CacheFormat, Decoding, Generator, GeneratorOptions, MemoryPlan, Request};
use crate::model::{Cat, ModelConfig};
use crate::ops::cast_tensor;
use crate::random;
use crate::tensor::{DType, Device};
use crate::train::MAX_BATCH;
use crate::{Error, Result};
use serde::Serialize;
use std::time::Instant;

/// What to measure.
#[derive(Clone, Debug, Serialize)]
pub struct GenerateBench {
    /// Model preset.
    pub preset: String,
    /// Texts at once.
    pub batch: usize,
    /// Tokens of each prompt.
    pub prompt: usize,
    /// Tokens of each text at the end.
    pub tokens: usize,
    /// Chunk sizes, measured one after the other.
    pub chunk_sizes: Vec<usize>,
    /// Measured runs a chunk size, after one that is not counted.
    pub runs: usize,
    /// Of weights and cache.
    pub dtype: DType,
    /// How tokens follow one another on a CUDA device.
    pub decoding: Decoding,
    /// How keys and values are kept.
    pub cache: CacheFormat,
}

/// One chunk size.
#[derive(Clone, Debug, Serialize)]
pub struct GenerateRow {
    /// C; 0 for a dense model.
    pub chunk_size: usize,
    /// Time of the whole, prompts included.
    pub whole: Spread,
    /// Time to the first token, at the median.
    pub first_token_ms: f64,
    /// New tokens a second of all texts together, at the median of the whole.
    pub tokens_per_s: f64,
    /// What it cannot be faster than on this machine: each step reads what is valid of the cache once, and the weights
    /// once or multiplies by them, whichever takes longer.
    pub floor_ms: f64,
    /// The floor over the median.
    pub share_of_floor: f64,
    /// What it holds.
    pub memory: MemoryPlan,
    /// Most bytes that tensors held at once.
    pub peak_bytes: usize,
}

/// All of it, as it goes to `docs/results/`.
#[derive(Clone, Debug, Serialize)]
pub struct GenerateBenchReport {
    /// Where it ran, and what that machine reaches.
    pub machine: Machine,
    /// What was measured.
    pub settings: GenerateBench,
    /// The results.
    pub rows: Vec<GenerateRow>,
    /// The peer's command, and what it printed.
    pub peer: Option<(String, String)>,
}

/// Measure generation from random prompts by a random model.
pub fn bench_generate(
    settings: GenerateBench,
    device: Device,
    peer: Option<(String, String)>,
) -> Result<GenerateBenchReport> {
    let config = ModelConfig::preset(&settings.preset)?;
    if settings.runs == 0 || settings.batch == 0 || settings.prompt == 0 || settings.tokens <= settings.prompt {
        return Err(Error::Usage("runs, batch and prompt must be at least 1, and tokens more than the prompt".into()));
    }
    if settings.batch.checked_mul(settings.tokens).is_none_or(|n| n > MAX_BATCH) {
        let (b, n) = (settings.batch, settings.tokens);
        return Err(Error::Usage(format!("{b} texts of {n} tokens are too many: choose fewer")));
    }
    config.check_chunk_sizes(&settings.chunk_sizes)?;
    let machine = Machine::measure(device, settings.dtype)?;
    let mut model = Cat::new(config.clone(), 0)?;
    for p in model.params_mut() {
        *p.value_mut() = cast_tensor(p.value(), settings.dtype)?;
    }
    let model = model.to_device(device)?;
    let (decoding, cache) = (settings.decoding, settings.cache);
    let generator = Generator::new(&model).with_options(GeneratorOptions { decoding, cache, ..Default::default() });
    let mut rows = Vec::new();
    for &chunk in &settings.chunk_sizes {
        let request = |row: usize| Request {
            chunk_size: config.chunk_size.map(|_| chunk),
            ..Request::new(random_ids(&settings, config.vocab_size, row), settings.tokens - settings.prompt)
        };
        let requests: Vec<Request> = (0..settings.batch).map(request).collect();
        let memory = generator.plan(&requests)?;
        device.forget_peak();
        let (mut seconds, mut first) = (Vec::new(), Vec::new());
        for run in 0..=settings.runs {
            let begun = Instant::now();
            let mut generation = generator.start(requests.clone())?;
            generation.by_ref().try_for_each(|event| event.map(drop))?;
            device.synchronize()?;
            if run > 0 {
                seconds.push(begun.elapsed().as_secs_f64());
                first.push(generation.stats().first_token.unwrap_or_default().as_secs_f64());
            }
        }
        let (whole, floor_ms) = (Spread::of(&seconds), 1e3 * floor(&model, &settings, chunk, &machine)?);
        rows.push(GenerateRow {
            chunk_size: chunk,
            whole,
            first_token_ms: Spread::of(&first).median_ms,
            tokens_per_s: (settings.batch * (settings.tokens - settings.prompt)) as f64 / (whole.median_ms / 1e3),
            floor_ms,
            share_of_floor: floor_ms / whole.median_ms,
            memory,
            peak_bytes: device.memory_stats().peak,
        });
    }
    Ok(GenerateBenchReport { machine, settings, rows, peer })
}

fn random_ids(s: &GenerateBench, vocab: usize, row: usize) -> Vec<i64> {
    (0..s.prompt).map(|i| random::below_at(3, (row * s.prompt + i) as u64, vocab as u64) as i64).collect()
}

/// Seconds that the steps of one run take at least.
fn floor(model: &Cat, s: &GenerateBench, chunk: usize, machine: &Machine) -> Result<f64> {
    let adaptive = model.config().is_adaptive();
    let chunk_size = model.config().chunk_size.map(|_| chunk);
    // weights that every row of the decoder meets, and those that every token of a full chunk does
    let (mut decoder, mut output, mut compressor) = (0, 0, 0);
    for p in model.params() {
        match p.name.as_str() {
            n if n.starts_with("f.layers.") => compressor += p.value().numel(),
            n if n.starts_with("f.proj_fx.") => compressor += p.value().numel() / model.config().chunk_size.unwrap_or(1),
            n if n.starts_with("layers.") => decoder += p.value().numel(),
            n if n.starts_with("output.") => output += p.value().numel(),
            _ => {}
        }
    }
    let size = s.dtype.size() as f64;
    let mut seconds = 0.0;
    for n in s.prompt + 1..s.tokens {
        let cache = s.batch as f64 * model.cache_bytes(model.cache_size(chunk_size, n, n)?, s.cache) as f64;
        let filled = compressor > 0 && n % chunk == 0;
        // the adaptive model runs a row more for each chunk that is full
        let products =
            (decoder * if filled && adaptive { 2 } else { 1 } + output + if filled { compressor * chunk } else { 0 }) as f64;
        let weights = (decoder + output + if filled { compressor } else { 0 }) as f64 * size;
        let flops = 2.0 * products * s.batch as f64;
        seconds +=
            cache / machine.copy_bytes_per_s + (weights / machine.copy_bytes_per_s).max(flops / machine.matmul_flops_per_s);
    }
    Ok(seconds)
}
