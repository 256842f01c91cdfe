//! `felid generate`.

use super::{Compute, parse_dtype, print};
use clap::Args;
use felid::data::Tokenizer;
use felid::generate::{GenerateOptions, Generator};
use felid::model::load;
use felid::ops::Sampling;
use felid::tensor::{DType, Tensor};
use felid::{Error, Result};
use std::path::PathBuf;
use std::time::Instant;

/// Continue a prompt. Text goes to stdout as it comes, statistics to stderr.
#[derive(Args)]
pub struct Generate {
    /// Model folder (native or Hugging Face)
    #[arg(long)]
    model: PathBuf,
    /// Text to continue
    #[arg(long, conflicts_with = "prompt_file", required_unless_present = "prompt_file")]
    prompt: Option<String>,
    /// File with the text to continue; - for standard input
    #[arg(long)]
    prompt_file: Option<PathBuf>,
    /// Tokens to add [default: 256, or as many as fit]
    #[arg(long)]
    max_new_tokens: Option<usize>,
    /// Chunk size: larger is faster and smaller, smaller is better [default: the model's largest]
    #[arg(long)]
    chunk_size: Option<usize>,
    /// 0 is greedy
    #[arg(long, default_value_t = 0.8)]
    temperature: f64,
    /// Choose among the k most likely tokens; 0 for all
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Choose among the fewest most likely tokens of this probability together
    #[arg(long, default_value_t = 1.0)]
    top_p: f64,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Print the prompt before its continuation
    #[arg(long)]
    echo: bool,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
    /// Weights' dtype [default: as stored]
    #[arg(long, value_parser = parse_dtype)]
    dtype: Option<DType>,
    #[command(flatten)]
    compute: Compute,
}

/// What `--json` prints.
#[derive(serde::Serialize)]
struct Report {
    text: String,
    tokens: Vec<i64>,
    prompt_tokens: usize,
    chunk_size: usize,
    seed: u64,
    first_token_s: f64,
    tokens_per_s: f64,
    cache_bytes: usize,
}

impl Generate {
    pub fn run(self) -> Result<()> {
        let device = self.compute.set()?;
        let sampling = Sampling { temperature: self.temperature, top_k: self.top_k, top_p: self.top_p };
        sampling.check()?;
        let prompt = self.prompt_bytes()?;
        if prompt.is_empty() {
            let fix = "give --prompt some text: a model continues, it cannot begin from nothing";
            return Err(Error::Empty { what: "the prompt".into(), fix: fix.into() });
        }
        let model = load(&self.model, self.dtype)?.model.to_device(device)?;
        let tokenizer = Tokenizer::load(Some(&self.model))?;
        let vocab_size = model.config().vocab_size;
        if matches!(tokenizer, Tokenizer::Bytes) && vocab_size > tokenizer.vocab_size() {
            print::note(&format!(
                "felid: note: {} has no tokenizer.json: text is taken as bytes, though the model has {vocab_size} ids",
                self.model.display()
            ));
        }
        let ids = tokenizer.encode_bytes(&prompt)?;
        let block_size = model.config().block_size;
        let room = (block_size + 1).saturating_sub(ids.len());
        if room == 0 {
            return Err(Error::Length { len: ids.len(), block_size });
        }
        let options = GenerateOptions {
            max_new_tokens: self.max_new_tokens.unwrap_or(256.min(room)),
            chunk_size: self.chunk_size,
            sampling,
            seed: self.seed,
            vocab_limit: Some(tokenizer.vocab_size()),
        };
        let start = Instant::now();
        let chunk_size = model.config().resolve_chunk_size(self.chunk_size)?;
        let generator = Generator::new(&model, &Tensor::ids(&ids, &[1, ids.len()])?, options)?;
        let cache_bytes = generator.cache_bytes();
        let mut stream = tokenizer.decode_stream();
        let (mut text, mut tokens, mut first) = (String::new(), Vec::new(), None);
        if self.echo {
            text.push_str(&tokenizer.decode(&ids)?);
            self.show(&text)?;
        }
        for turn in generator {
            let id = turn?[0];
            first.get_or_insert_with(|| start.elapsed().as_secs_f64());
            if tokenizer.end_of_text() == Some(id) {
                break;
            }
            tokens.push(id);
            let piece = stream.push(id)?;
            self.show(&piece)?;
            text.push_str(&piece);
        }
        let rest = stream.finish()?;
        self.show(&rest)?;
        text.push_str(&rest);
        let (first_token_s, all) = (first.unwrap_or(0.0), start.elapsed().as_secs_f64());
        let tokens_per_s = tokens.len().saturating_sub(1) as f64 / (all - first_token_s).max(1e-9);
        if self.json {
            let (prompt_tokens, seed) = (ids.len(), self.seed);
            return print::json(&Report {
                text,
                tokens,
                prompt_tokens,
                chunk_size,
                seed,
                first_token_s,
                tokens_per_s,
                cache_bytes,
            });
        }
        self.show("\n")?;
        print::note(&format!(
            "{} prompt + {} new tokens, chunk size {chunk_size}; first token {:.1} ms, then {tokens_per_s:.0} tokens/s; cache {}",
            ids.len(),
            tokens.len(),
            first_token_s * 1e3,
            print::bytes(cache_bytes)
        ));
        Ok(())
    }

    fn show(&self, piece: &str) -> Result<()> {
        if self.json || piece.is_empty() { Ok(()) } else { print::text(piece) }
    }
    fn prompt_bytes(&self) -> Result<Vec<u8>> {
        use std::io::Read;
        let io = |source| Error::Io { action: "read", path: self.prompt_file.clone().unwrap_or_default(), source };
        match (&self.prompt, &self.prompt_file) {
            (Some(text), _) => Ok(text.clone().into_bytes()),
            (None, Some(path)) if path.as_os_str() == "-" => {
                let mut all = Vec::new();
                std::io::stdin().read_to_end(&mut all).map_err(io)?;
                Ok(all)
            }
            (None, Some(path)) => std::fs::read(path).map_err(io),
            (None, None) => Ok(vec![]),
        }
    }
}
