//! `felid bench train`. A training step.

use super::{Output, heading};
use crate::cli::print;
use clap::Args;
use felid::bench::{Profile, TrainBench, bench_train, run_peer};
use felid::model::ModelConfig;
use felid::{Error, Result};

#[derive(Args)]
pub struct Train {
    /// nano, cpu-small, paper-31m, paper-92m, paper-1b or paper-dense
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
    /// Compute whole blocks again in backward
    #[arg(long)]
    recompute: bool,
    /// Save what backward would compute again because it is cheap; on the CPU that is always so
    #[arg(long)]
    save_all: bool,
    /// Then profile one more step: time by op and, on CUDA, by kernel
    #[arg(long)]
    profile: bool,
    #[command(flatten)]
    output: Output,
}

impl Train {
    pub fn run(self) -> Result<()> {
        let device = self.output.compute.set()?;
        let config = ModelConfig::preset(&self.preset)?;
        let chunk_sizes = self.chunk_sizes.unwrap_or_else(|| config.training_chunk_sizes().into_iter().rev().collect());
        if config.chunk_size.is_some() {
            chunk_sizes.iter().try_for_each(|&c| config.resolve_chunk_size(Some(c)).map(drop))?;
        }
        let tokens = self.seq_len.unwrap_or(config.block_size);
        if tokens > config.block_size {
            return Err(Error::Length { len: tokens, block_size: config.block_size });
        }
        let peer = self.output.peer.as_ref().map(|c| Ok::<_, Error>((c.clone(), run_peer(c)?))).transpose()?;
        let settings = TrainBench {
            preset: self.preset,
            batch: self.batch_size,
            tokens,
            chunk_sizes,
            steps: self.steps,
            warmup: self.warmup,
            dtype: self.output.dtype,
            recompute: self.recompute,
            save_all: self.save_all,
            profile: self.profile,
        };
        self.output.show(&bench_train(settings, device, peer)?, |report| {
            heading(&report.settings.preset, &report.machine)?;
            print::line("   C  median ms (p10..p90)    Ktok/s  of ceiling  x peer      peak     saved  at the peak")?;
            for r in &report.rows {
                let held: Vec<_> = r.held_at_peak.iter().map(|(name, n)| format!("{name} {}", print::bytes(*n))).collect();
                let ratio = r.speedup_over_peer.map_or("-".into(), |x| format!("{x:.2}"));
                print::line(&format!(
                    "{:>4}  {:>8.1} ({:.0}..{:.0})  {:>10.2}  {:>9.0}%  {ratio:>6}  {:>8}  {:>8}  {}",
                    r.chunk_size,
                    r.step.median_ms,
                    r.step.p10_ms,
                    r.step.p90_ms,
                    r.ktokens_per_s,
                    100.0 * r.share_of_ceiling,
                    print::bytes(r.peak_bytes),
                    print::bytes(r.saved_bytes),
                    if held.is_empty() { "-".into() } else { held.join(", ") }
                ))?;
            }
            report.rows.iter().try_for_each(|r| r.profile.iter().try_for_each(|p| show_profile(r.chunk_size, p)))
        })
    }
}

/// Ops by their time, with the kernels of each that take a thousandth of the step.
fn show_profile(chunk_size: usize, p: &Profile) -> Result<()> {
    print::line(&format!(
        "\none step at C {chunk_size}: {:.2} ms, of which {:.2} ms in {} pieces of work and {:.2} ms between them",
        p.total_ms,
        p.busy_ms,
        p.launches,
        p.total_ms - p.busy_ms
    ))?;
    print::line(&format!(
        "{:<60}  {:>5}  {:>9}  {:>6}  {:>7}  {:>7}",
        "op, kernels", "count", "ms", "share", "GB/s", "TFLOP/s"
    ))?;
    let line = |name: &str, count: usize, ms: f64, bytes: f64, flops: f64| {
        let rate = |n: f64, unit: f64, digits: usize| match n {
            0.0 => "-".into(),
            n => format!("{:.digits$}", n / unit / (ms / 1e3)),
        };
        let (share, bytes, flops) = (100.0 * ms / p.busy_ms, rate(bytes, 1e9, 0), rate(flops, 1e12, 2));
        print::line(&format!("{name:<60}  {count:>5}  {ms:>9.3}  {share:>5.1}%  {bytes:>7}  {flops:>7}"))
    };
    for op in &p.ops {
        line(&op.op, op.calls, op.ms, op.bytes, op.flops)?;
        for k in op.kernels.iter().filter(|k| k.ms > p.busy_ms / 1e3) {
            line(&format!("  {}", k.kernel), k.count, k.ms, k.bytes, k.flops)?;
        }
    }
    let gaps: Vec<_> = p.gaps.iter().map(|(ms, kernel)| format!("{ms:.3} ms before {kernel}")).collect();
    if gaps.is_empty() { Ok(()) } else { print::line(&format!("longest gaps: {}", gaps.join("; "))) }
}
