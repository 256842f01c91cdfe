//! `felid generate`.

use super::{Compute, parse_dtype, print};
use clap::{ArgGroup, Args};
use felid::data::Tokenizer;
use felid::generate::{CacheFormat, Decoding, Finish, Generation, Generator, GeneratorOptions, MemoryPlan, Output, Request};
use felid::model::{ModelConfig, load};
use felid::ops::{LogProbs, Sampling};
use felid::tensor::{DType, Device};
use felid::{Error, Result};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Continue a prompt, or many. Text goes to stdout as it comes, statistics to stderr.
#[derive(Args)]
#[command(group(ArgGroup::new("what").required(true).args(["prompt", "prompt_file", "prompts"])))]
pub struct Generate {
    /// Model folder (native or Hugging Face)
    #[arg(long)]
    model: PathBuf,
    /// Text to continue
    #[arg(long)]
    prompt: Option<String>,
    /// File with the text to continue; - for standard input
    #[arg(long)]
    prompt_file: Option<PathBuf>,
    /// File of prompts to continue together, one JSON object a line: "prompt", and any of max_new_tokens, chunk_size,
    /// temperature, top_k, top_p, min_p, repetition_penalty, seed, stop, stop_token, logprobs where it differs from the
    /// flags. Prints one JSON object a line as each is done
    #[arg(long, value_name = "FILE.jsonl", conflicts_with = "echo")]
    prompts: Option<PathBuf>,
    /// Prompts that are continued at once [default: all that --prompts gives]
    #[arg(long)]
    max_batch: Option<usize>,
    /// How tokens follow one another on a CUDA device: graphs, runs or single (for comparisons; the tokens are the same)
    #[arg(long, default_value = "graphs", value_name = "HOW")]
    decoding: Decoding,
    /// How keys and values are kept: plain, in the weights' dtype, or int8, in about half of 16 bits and a little less exact
    /// (`felid bench cache` measures how much)
    #[arg(long, default_value = "plain", value_name = "FORMAT")]
    cache: CacheFormat,
    #[command(flatten)]
    settings: Settings,
    /// Print the prompt before its continuation
    #[arg(long)]
    echo: bool,
    /// Print one JSON object instead of text; with --prompts, statistics as one on stderr
    #[arg(long)]
    json: bool,
    /// Print the memory that this would take, and stop
    #[arg(long)]
    dry_run: bool,
    /// Weights' dtype [default: as stored]
    #[arg(long, value_parser = parse_dtype)]
    dtype: Option<DType>,
    #[command(flatten)]
    compute: Compute,
}

/// What flags say of all prompts, and a line of --prompts of one.
#[derive(Args, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Settings {
    #[arg(skip)]
    prompt: String,
    /// Tokens to add [default: 256, or as many as fit]
    #[arg(long)]
    max_new_tokens: Option<usize>,
    /// Chunk size: larger is faster and smaller, smaller is better; 16,4@100 goes over to 4 after 100 new tokens [default:
    /// the model's largest]
    #[arg(long, value_parser = chunk_sizes)]
    #[serde(deserialize_with = "chunk_sizes_of_json")]
    chunk_size: Option<ChunkSizes>,
    /// 0 is greedy [default: 0.8]
    #[arg(long)]
    temperature: Option<f64>,
    /// Choose among the k most likely tokens; 0 for all [default: 0]
    #[arg(long)]
    top_k: Option<usize>,
    /// Choose among the fewest most likely tokens of this probability together [default: 1]
    #[arg(long)]
    top_p: Option<f64>,
    /// Choose among tokens at least this likely relative to the most likely one [default: 0]
    #[arg(long)]
    min_p: Option<f64>,
    /// Make tokens that occurred less likely: divide their positive logits by this [default: 1]
    #[arg(long)]
    repetition_penalty: Option<f64>,
    /// Of the random numbers [default: 0]
    #[arg(long)]
    seed: Option<u64>,
    /// End before this text; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// End at this token: its id, or its text in the tokenizer; may be given several times, <|endoftext|> always counts
    #[arg(long, value_name = "TOKEN")]
    stop_token: Vec<StopToken>,
    /// Report log-probabilities: of each token, and of this many likeliest
    #[arg(long, value_name = "N")]
    logprobs: Option<usize>,
}

/// The first chunk size, and the changes: after how many new tokens, to what.
#[derive(Clone, Debug, Default)]
struct ChunkSizes {
    first: Option<usize>,
    changes: Vec<(usize, usize)>,
}

fn chunk_sizes(s: &str) -> std::result::Result<ChunkSizes, String> {
    let usage = || format!("'{s}': use a chunk size, or like 16,4@100 others after so many new tokens");
    let mut sizes = ChunkSizes::default();
    for (i, part) in s.split(',').enumerate() {
        match part.split_once('@') {
            None if i == 0 => sizes.first = Some(part.trim().parse().map_err(|_| usage())?),
            Some((c, n)) if i > 0 => {
                let number = |x: &str| x.trim().parse::<usize>().map_err(|_| usage());
                sizes.changes.push((number(n)?, number(c)?));
            }
            _ => return Err(usage()),
        }
    }
    Ok(sizes)
}

fn chunk_sizes_of_json<'de, D: serde::Deserializer<'de>>(d: D) -> std::result::Result<Option<ChunkSizes>, D::Error> {
    use serde::de::Error;
    match Option::<serde_json::Value>::deserialize(d)? {
        None => Ok(None),
        Some(value) => {
            let text = value.as_str().map_or_else(|| value.to_string(), str::to_string);
            chunk_sizes(&text).map(Some).map_err(D::Error::custom)
        }
    }
}

/// A token by its text in the tokenizer or, where that has none such, by its id; in JSON a number is an id.
#[derive(Clone, Deserialize)]
#[serde(untagged, expecting = "a stop token is an id, or a token of the tokenizer")]
enum StopToken {
    Id(i64),
    Text(String),
}

impl From<String> for StopToken {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl Settings {
    /// This prompt's settings where it has them, else those of the flags.
    fn over(self, flags: &Self) -> Self {
        fn list<T: Clone>(mine: Vec<T>, theirs: &[T]) -> Vec<T> {
            if mine.is_empty() { theirs.to_vec() } else { mine }
        }
        Self {
            prompt: self.prompt,
            max_new_tokens: self.max_new_tokens.or(flags.max_new_tokens),
            chunk_size: self.chunk_size.or_else(|| flags.chunk_size.clone()),
            temperature: self.temperature.or(flags.temperature),
            top_k: self.top_k.or(flags.top_k),
            top_p: self.top_p.or(flags.top_p),
            min_p: self.min_p.or(flags.min_p),
            repetition_penalty: self.repetition_penalty.or(flags.repetition_penalty),
            seed: self.seed.or(flags.seed),
            stop: list(self.stop, &flags.stop),
            stop_token: list(self.stop_token, &flags.stop_token),
            logprobs: self.logprobs.or(flags.logprobs),
        }
    }
    fn sampling(&self) -> Sampling {
        Sampling {
            temperature: self.temperature.unwrap_or(0.8),
            top_k: self.top_k.unwrap_or(0),
            top_p: self.top_p.unwrap_or(1.0),
            min_p: self.min_p.unwrap_or(0.0),
            repetition_penalty: self.repetition_penalty.unwrap_or(1.0),
        }
    }
    fn request(&self, prompt: Vec<i64>, tokenizer: &Tokenizer, c: &ModelConfig) -> Result<Request> {
        let room = (c.block_size + 1).saturating_sub(prompt.len());
        if room == 0 {
            return Err(Error::Length { len: prompt.len(), block_size: c.block_size });
        }
        let stop = |t: &StopToken| {
            let t = match t {
                StopToken::Id(id) => return Ok(*id),
                StopToken::Text(t) => t,
            };
            let id = tokenizer.token_id(t).or_else(|| t.parse().ok());
            id.ok_or_else(|| Error::Usage(format!("unknown stop token '{t}': give an id, or a token of the tokenizer")))
        };
        let mut stop_tokens = self.stop_token.iter().map(stop).collect::<Result<Vec<_>>>()?;
        let limit = c.vocab_rows().min(tokenizer.vocab_size());
        stop_tokens.extend(tokenizer.end_of_text().filter(|id| *id < limit as i64));
        let chunks = self.chunk_size.clone().unwrap_or_default();
        Ok(Request {
            prompt,
            max_new_tokens: self.max_new_tokens.unwrap_or(256.min(room)),
            chunk_size: chunks.first,
            chunk_changes: chunks.changes,
            sampling: self.sampling(),
            seed: self.seed.unwrap_or(0),
            stop_tokens,
            stop_strings: self.stop.clone(),
            logprobs: self.logprobs,
        })
    }
}

/// What `--json` prints, and with --prompts a line of each.
#[derive(Serialize)]
struct Report<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    row: Option<usize>,
    text: &'a str,
    tokens: &'a [i64],
    finish: Option<Finish>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    logprobs: &'a [LogProbs],
    prompt_tokens: usize,
    chunk_size: usize,
    seed: u64,
    #[serde(flatten)]
    statistics: Option<Statistics>,
}

#[derive(Serialize)]
struct Statistics {
    first_token_s: f64,
    tokens_per_s: f64,
    cache_bytes: usize,
    weight_bytes: usize,
    peak_bytes: usize,
}

impl Statistics {
    fn of(generation: &Generation, device: Device) -> Self {
        let (stats, memory) = (generation.stats(), generation.memory());
        Self {
            first_token_s: stats.first_token.unwrap_or_default().as_secs_f64(),
            tokens_per_s: stats.tokens_per_second(),
            cache_bytes: memory.cache_bytes,
            weight_bytes: memory.weight_bytes,
            peak_bytes: device.memory_stats().peak,
        }
    }
}

impl Generate {
    pub fn run(self) -> Result<()> {
        let device = self.compute.set()?;
        // what can be refused before the model is there
        self.settings.sampling().check()?;
        self.settings.sampling().check_together()?;
        let asked = self.asked()?;
        let model = load(&self.model, self.dtype)?.model.to_device(device)?;
        let (tokenizer, c) = (Tokenizer::load(Some(&self.model))?, model.config().clone());
        if matches!(tokenizer, Tokenizer::Bytes) && c.vocab_size > tokenizer.vocab_size() {
            print::note(&format!(
                "felid: note: {} has no tokenizer.json: text is taken as bytes, though the model has {} ids",
                self.model.display(),
                c.vocab_size
            ));
        }
        let mut requests = Vec::with_capacity(asked.len());
        for (row, (prompt, settings)) in asked.into_iter().enumerate() {
            let request = tokenizer.encode_bytes(&prompt).and_then(|ids| settings.request(ids, &tokenizer, &c));
            requests.push(match (request, &self.prompts) {
                (Err(source), Some(_)) => return Err(Error::Request { row, source: Box::new(source) }),
                (request, _) => request?,
            });
        }
        let (max_batch, decoding, cache) = (self.max_batch, self.decoding, self.cache);
        let options = GeneratorOptions { max_batch, decoding, cache, ..Default::default() };
        let generator = Generator::new(&model).with_tokenizer(tokenizer.clone()).with_options(options);
        if self.dry_run {
            return self.show_plan(generator.plan(&requests)?);
        }
        let mut outputs = vec![Output::default(); requests.len()];
        let report = |row: usize, output: &Output, statistics: Option<Statistics>| {
            let r: &Request = &requests[row];
            let chunk_size = c.resolve_chunk_size(r.chunk_size)?;
            let row = self.prompts.as_ref().map(|_| row);
            let Output { text, tokens, logprobs, finish } = output;
            let (prompt_tokens, seed) = (r.prompt.len(), r.seed);
            let report =
                Report { row, text, tokens, finish: *finish, logprobs, prompt_tokens, chunk_size, seed, statistics };
            if row.is_some() { print::json_line(&report) } else { print::json(&report) }
        };
        let mut generation = generator.start(requests.clone())?;
        if self.echo {
            let text = tokenizer.decode(&requests[0].prompt)?;
            self.show(&text)?;
            outputs[0].text = text;
        }
        // of those that ask for no token no event comes
        for row in (0..requests.len()).filter(|&r| self.prompts.is_some() && requests[r].max_new_tokens == 0) {
            report(row, &outputs[row], None)?;
        }
        for event in generation.by_ref() {
            let event = event?;
            let (row, done) = (event.row, event.finish.is_some());
            if self.prompts.is_none() {
                self.show(&event.text)?;
            }
            outputs[row].add(event);
            if done && self.prompts.is_some() {
                report(row, &outputs[row], None)?;
            }
        }
        let statistics = Statistics::of(&generation, device);
        if self.json && self.prompts.is_none() {
            return report(0, &outputs[0], Some(statistics));
        }
        if self.prompts.is_none() {
            self.show("\n")?;
        }
        if self.json {
            print::note(&serde_json::to_string(&statistics).unwrap_or_default());
            return Ok(());
        }
        let new: usize = outputs.iter().map(|o| o.tokens.len()).sum();
        let prompt: usize = requests.iter().map(|r| r.prompt.len()).sum();
        let of = match requests[..] {
            [ref one] => format!("chunk size {}", c.resolve_chunk_size(one.chunk_size)?),
            _ => format!("{} prompts, {} at once", requests.len(), generation.memory().batch),
        };
        print::note(&format!(
            "{prompt} prompt + {new} new tokens, {of}; first token {:.1} ms, then {:.0} tokens/s; cache {}, weights {}, peak {}",
            statistics.first_token_s * 1e3,
            statistics.tokens_per_s,
            print::bytes(statistics.cache_bytes),
            print::bytes(statistics.weight_bytes),
            print::bytes(statistics.peak_bytes),
        ));
        Ok(())
    }

    fn show_plan(&self, plan: MemoryPlan) -> Result<()> {
        if self.json {
            return print::json(&plan);
        }
        print::line(&format!(
            "{} at once: cache {} bytes ({}), weights {} bytes ({})",
            plan.batch,
            plan.cache_bytes,
            print::bytes(plan.cache_bytes),
            plan.weight_bytes,
            print::bytes(plan.weight_bytes)
        ))
    }
    fn show(&self, piece: &str) -> Result<()> {
        if self.json || piece.is_empty() { Ok(()) } else { print::text(piece) }
    }

    /// Prompts and their settings.
    fn asked(&self) -> Result<Vec<(Vec<u8>, Settings)>> {
        let flags = &self.settings;
        let Some(path) = &self.prompts else {
            let prompt = self.prompt_bytes()?;
            if prompt.is_empty() {
                let fix = "give --prompt some text: a model continues, it cannot begin from nothing";
                return Err(Error::Empty { what: "the prompt".into(), fix: fix.into() });
            }
            return Ok(vec![(prompt, flags.clone())]);
        };
        let text = String::from_utf8(read(path)?).map_err(|e| {
            let whole = &e.as_bytes()[..e.utf8_error().valid_up_to()];
            bad_line(path, 1 + whole.iter().filter(|b| **b == b'\n').count(), &e.utf8_error())
        })?;
        let lines = text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty());
        let prompts: Vec<(Vec<u8>, Settings)> = lines
            .map(|(i, line)| {
                let own: Settings = serde_json::from_str(line).map_err(|e| bad_line(path, i + 1, &e))?;
                let settings = own.over(flags);
                Ok((settings.prompt.clone().into_bytes(), settings))
            })
            .collect::<Result<_>>()?;
        match prompts.is_empty() {
            true => Err(Error::Empty { what: path.display().to_string(), fix: "give it a prompt a line".into() }),
            false => Ok(prompts),
        }
    }
    fn prompt_bytes(&self) -> Result<Vec<u8>> {
        match (&self.prompt, &self.prompt_file) {
            (Some(text), _) => Ok(text.clone().into_bytes()),
            (None, Some(path)) => read(path),
            (None, None) => Ok(vec![]),
        }
    }
}

/// A file, or standard input for `-`.
fn read(path: &Path) -> Result<Vec<u8>> {
    use std::io::Read;
    let io = |source| Error::Io { action: "read", path: path.into(), source };
    if path.as_os_str() == "-" {
        let mut all = Vec::new();
        std::io::stdin().read_to_end(&mut all).map_err(io)?;
        return Ok(all);
    }
    std::fs::read(path).map_err(io)
}

fn bad_line(path: &Path, line: usize, e: &dyn std::fmt::Display) -> Error {
    let detail = format!("line {line} is no JSON object with a \"prompt\" and known settings: {e}");
    Error::Format { path: path.into(), detail }
}
