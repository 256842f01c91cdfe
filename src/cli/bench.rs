//! `felid bench`.

use super::{Compute, print};
use clap::{Args, Subcommand};
use felid::bench::{TrainBench, bench_train, run_peer};
use felid::model::{ModelConfig, write_json};
use felid::{Error, Result};
use std::path::PathBuf;

/// Measure speed.
#[derive(Args)]
pub struct Bench {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// A training step: forward, backward, clip and AdamW
    Train(Train),
}

#[derive(Args)]
struct Train {
    /// nano, cpu-small, paper-1b or paper-dense
    #[arg(long, default_value = "cpu-small")]
    preset: String,
    /// Rows of a batch
    #[arg(long, default_value_t = 8)]
    batch_size: usize,
    /// Tokens of a row [default: the model's block size]
    #[arg(long)]
    seq_len: Option<usize>,
    /// Chunk sizes to measure [default: the model's round, largest first]
    #[arg(long, value_delimiter = ',')]
    chunk_sizes: Option<Vec<usize>>,
    /// Measured steps a chunk size
    #[arg(long, default_value_t = 20)]
    steps: usize,
    /// Steps before those
    #[arg(long, default_value_t = 3)]
    warmup: usize,
    /// Shell command of a peer to run first; it prints lines like 'C=16 304.0 ms/step'
    #[arg(long)]
    peer: Option<String>,
    /// JSON file to write, such as docs/results/train-cpu.json
    #[arg(long)]
    out: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    compute: Compute,
}

impl Bench {
    pub fn run(self) -> Result<()> {
        match self.what {
            What::Train(t) => t.run(),
        }
    }
}

impl Train {
    fn run(self) -> Result<()> {
        self.compute.set()?;
        let config = ModelConfig::preset(&self.preset)?;
        let chunk_sizes = self.chunk_sizes.unwrap_or_else(|| config.training_chunk_sizes().into_iter().rev().collect());
        if config.chunk_size.is_some() {
            chunk_sizes.iter().try_for_each(|&c| config.resolve_chunk_size(Some(c)).map(drop))?;
        }
        let tokens = self.seq_len.unwrap_or(config.block_size);
        if tokens > config.block_size {
            return Err(Error::Length { len: tokens, block_size: config.block_size });
        }
        let peer = self.peer.map(|c| Ok::<_, Error>((c.clone(), run_peer(&c)?))).transpose()?;
        let settings = TrainBench {
            preset: self.preset,
            batch: self.batch_size,
            tokens,
            chunk_sizes,
            steps: self.steps,
            warmup: self.warmup,
        };
        let report = bench_train(settings, peer)?;
        if let Some(path) = &self.out {
            write_json(path, &report)?;
        }
        if self.json {
            return print::json(&report);
        }
        print::line(&format!(
            "{} on {}, {} threads; matrix products reach {:.0} GFLOP/s",
            report.settings.preset,
            report.cpu,
            report.threads,
            report.ceiling_flops_per_s / 1e9
        ))?;
        print::line("   C  median ms (p10..p90)    Ktok/s  of ceiling  x peer      peak")?;
        for r in &report.rows {
            let ratio = r.speedup_over_peer.map_or("-".into(), |x| format!("{x:.2}"));
            print::line(&format!(
                "{:>4}  {:>8.1} ({:.0}..{:.0})  {:>10.2}  {:>9.0}%  {ratio:>6}  {:>8}",
                r.chunk_size,
                r.step.median_ms,
                r.step.p10_ms,
                r.step.p90_ms,
                r.ktokens_per_s,
                100.0 * r.share_of_ceiling,
                print::bytes(r.peak_bytes)
            ))?;
        }
        Ok(())
    }
}
