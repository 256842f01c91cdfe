//! `felid bench generate`. Generation.

use super::{Output, heading};
use crate::cli::print;
use clap::Args;
use felid::Result;
use felid::bench::{GenerateBench, bench_generate};
use felid::generate::{CacheFormat, Decoding};
use felid::model::ModelConfig;

#[derive(Args)]
pub struct Generate {
    /// nano, cpu-small, paper-31m, paper-92m, paper-1b or paper-dense
    #[arg(long, default_value = "cpu-small")]
    preset: String,
    /// Texts at once
    #[arg(long, default_value_t = 8)]
    batch_size: usize,
    /// Tokens of each prompt [default: one chunk]
    #[arg(long)]
    prompt_len: Option<usize>,
    /// Tokens of each text at the end [default: the model's block size]
    #[arg(long)]
    seq_len: Option<usize>,
    /// [default: those that the model trains with, from the largest]
    #[arg(long, value_delimiter = ',')]
    chunk_sizes: Option<Vec<usize>>,
    /// Measured runs a chunk size
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// How tokens follow one another on a CUDA device: graphs, runs or single
    #[arg(long, default_value = "graphs", value_name = "HOW")]
    decoding: Decoding,
    /// How keys and values are kept: plain, in --dtype, or int8, in half of 16 bits
    #[arg(long, default_value = "plain", value_name = "FORMAT")]
    cache: CacheFormat,
    #[command(flatten)]
    output: Output,
}

impl Generate {
    pub fn run(self) -> Result<()> {
        let device = self.output.compute.set()?;
        let config = ModelConfig::preset(&self.preset)?;
        let chunk_sizes = self.chunk_sizes.unwrap_or_else(|| config.training_chunk_sizes().into_iter().rev().collect());
        let prompt = self.prompt_len.unwrap_or(chunk_sizes.first().copied().unwrap_or(1).max(1));
        let settings = GenerateBench {
            preset: self.preset,
            batch: self.batch_size,
            prompt,
            tokens: self.seq_len.unwrap_or(config.block_size),
            chunk_sizes,
            runs: self.runs,
            dtype: self.output.dtype,
            decoding: self.decoding,
            cache: self.cache,
        };
        let peer = self.output.peer()?;
        self.output.show(&bench_generate(settings, device, peer)?, |report| {
            let s = &report.settings;
            heading(&s.preset, &report.machine)?;
            print::line(&format!("{} texts from {} to {} tokens", s.batch, s.prompt, s.tokens))?;
            print::line("   C   seconds (p10..p90)      first ms   tokens/s  of floor      cache      peak")?;
            for r in &report.rows {
                print::line(&format!(
                    "{:>4}  {:>8.3} ({:.3}..{:.3})  {:>8.1}  {:>9.0}  {:>7.0}%  {:>9}  {:>8}",
                    r.chunk_size,
                    r.whole.median_ms / 1e3,
                    r.whole.p10_ms / 1e3,
                    r.whole.p90_ms / 1e3,
                    r.first_token_ms,
                    r.tokens_per_s,
                    100.0 * r.share_of_floor,
                    print::bytes(r.memory.cache_bytes),
                    print::bytes(r.peak_bytes)
                ))?;
            }
            report.peer.iter().try_for_each(|(_, text)| print::line(text.trim_end()))
        })
    }
}
