//! `felid bench`.

use super::{Compute, parse_dtype, print};
use clap::{Args, Subcommand};
use felid::bench::{
    AttentionBench, CostBench, GenerateBench, KernelsBench, Machine, Profile, TrainBench, bench_attention, bench_cost,
    bench_generate, bench_kernels, bench_ladder, bench_train, peer_output, run_peer,
};
use felid::generate::Decoding;
use felid::model::{ModelConfig, write_json};
use felid::tensor::DType;
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
    /// Greedy generation with the cache
    Generate(Generate),
    /// Attention under the CAT mask at several chunk sizes, in the compressor, and dense causal
    Attention(Attention),
    /// A training step as sequences and models grow, in a table and a plot
    Cost(Cost),
    /// Each op at the sizes of a training step, against the bytes or operations that it cannot avoid
    Kernels(Kernels),
}

/// Where results go, and what runs beside.
#[derive(Args)]
struct Output {
    /// Shell command of a peer to run first, in the same call
    #[arg(long)]
    peer: Option<String>,
    /// JSON file to write, such as docs/results/train-cpu.json
    #[arg(long)]
    out: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[arg(long, value_parser = parse_dtype, default_value = "f32")]
    dtype: DType,
    #[command(flatten)]
    compute: Compute,
}

impl Output {
    fn peer(&self) -> Result<Option<(String, String)>> {
        self.peer.as_ref().map(|c| Ok((c.clone(), peer_output(c)?))).transpose()
    }
    /// Write and print a report: as JSON, or by `table`.
    fn show<R: serde::Serialize>(&self, report: &R, table: impl FnOnce(&R) -> Result<()>) -> Result<()> {
        if let Some(path) = &self.out {
            write_json(path, report)?;
        }
        if self.json { print::json(report) } else { table(report) }
    }
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
    /// Compute whole blocks again in backward
    #[arg(long)]
    recompute: bool,
    /// Save what backward would compute again because it is cheap
    #[arg(long)]
    save_all: bool,
    /// Then profile one more step: time by op and, on CUDA, by kernel
    #[arg(long)]
    profile: bool,
    #[command(flatten)]
    output: Output,
}

#[derive(Args)]
struct Attention {
    #[arg(long, default_value_t = 4)]
    batch_size: usize,
    #[arg(long, default_value_t = 32)]
    heads: usize,
    /// Key heads [default: as many as query heads]
    #[arg(long)]
    kv_heads: Option<usize>,
    #[arg(long, default_value_t = 64)]
    head_dim: usize,
    /// Tokens of a row
    #[arg(long, default_value_t = 4096)]
    seq_len: usize,
    /// [default: 4,8,16,32]
    #[arg(long, value_delimiter = ',')]
    chunk_sizes: Option<Vec<usize>>,
    /// Measured runs a case
    #[arg(long, default_value_t = 50)]
    runs: usize,
    /// Only the forward kernels of kernels/lab/attention, from the definition to what ships, at C 16 or the first of
    /// --chunk-sizes
    #[arg(long)]
    ladder: bool,
    #[command(flatten)]
    output: Output,
}

#[derive(Args)]
struct Cost {
    /// Models
    #[arg(long, value_delimiter = ',', default_value = "paper-31m,paper-92m,paper-1b,paper-dense")]
    presets: Vec<String>,
    /// Tokens of a row, one case each
    #[arg(long, value_delimiter = ',', default_value = "1024,2048,4096,8192,16384")]
    seq_len: Vec<usize>,
    #[arg(long, value_delimiter = ',', default_value = "4,16")]
    chunk_sizes: Vec<usize>,
    /// Tokens of a batch
    #[arg(long, default_value_t = 32_768)]
    tokens: usize,
    /// Measured steps a case
    #[arg(long, default_value_t = 5)]
    steps: usize,
    /// SVG file to draw into
    #[arg(long)]
    plot: Option<PathBuf>,
    #[command(flatten)]
    output: Output,
}

#[derive(Args)]
struct Kernels {
    /// Rows
    #[arg(long, default_value_t = 36_880)]
    rows: usize,
    /// Width of the residual stream
    #[arg(long, default_value_t = 2048)]
    dim: usize,
    /// Width of SwiGLU
    #[arg(long, default_value_t = 5632)]
    ffn: usize,
    #[arg(long, default_value_t = 50_432)]
    vocab: usize,
    #[arg(long, default_value_t = 64)]
    head_dim: usize,
    /// Parameters of the AdamW row
    #[arg(long, default_value_t = 123_000_000)]
    params: usize,
    /// Only ops whose names contain this
    #[arg(long)]
    only: Option<String>,
    /// Measured runs an op
    #[arg(long, default_value_t = 30)]
    runs: usize,
    #[command(flatten)]
    output: Output,
}

#[derive(Args)]
struct Generate {
    /// nano, cpu-small, paper-1b or paper-dense
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
    #[command(flatten)]
    output: Output,
}

impl Bench {
    pub fn run(self) -> Result<()> {
        match self.what {
            What::Train(t) => t.run(),
            What::Generate(g) => g.run(),
            What::Attention(a) => a.run(),
            What::Cost(c) => c.run(),
            What::Kernels(k) => k.run(),
        }
    }
}

fn heading(what: &str, m: &Machine) -> Result<()> {
    print::line(&format!(
        "{what} on {} ({}), {} threads; copies reach {:.0} GB/s, matrix products in {} {:.2} TFLOP/s",
        m.name(),
        m.device,
        m.threads,
        m.copy_bytes_per_s / 1e9,
        m.matmul_dtype,
        m.matmul_flops_per_s / 1e12
    ))
}

impl Train {
    fn run(self) -> Result<()> {
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

impl Generate {
    fn run(self) -> Result<()> {
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

impl Attention {
    fn run(self) -> Result<()> {
        let device = self.output.compute.set()?;
        let peer = self.output.peer()?;
        let settings = AttentionBench {
            batch: self.batch_size,
            heads: self.heads,
            kv_heads: self.kv_heads.unwrap_or(self.heads),
            head_dim: self.head_dim,
            tokens: self.seq_len,
            chunk_sizes: self.chunk_sizes.unwrap_or(if self.ladder { vec![16] } else { vec![4, 8, 16, 32] }),
            header: 2,
            dtype: self.output.dtype,
            runs: self.runs,
        };
        if self.ladder {
            return self.output.show(&bench_ladder(settings, device)?, |report| {
                heading("the ladder of attention", &report.machine)?;
                print::line("rung                              forward ms     gain  of floor     error")?;
                for r in &report.rows {
                    print::line(&format!(
                        "{}  {:<28}  {:>12.3}  {:>6.2}x  {:>7.0}%  {:>8.1e}",
                        r.rung,
                        r.adds,
                        r.forward.median_ms,
                        r.gain,
                        100.0 * r.share_of_floor,
                        r.error
                    ))?;
                }
                Ok(())
            });
        }
        self.output.show(&bench_attention(settings, device, peer)?, |report| {
            heading("attention", &report.machine)?;
            print::line("mask             C  sequences x length  forward ms   of floor  forward+backward ms   of floor")?;
            for r in &report.rows {
                let (f, b) = (r.forward.median_ms, r.forward_backward.median_ms);
                print::line(&format!(
                    "{:<13} {:>4}  {:>9} x {:<6}  {f:>10.3}  {:>8.0}%  {b:>19.3}  {:>8.0}%",
                    r.mask,
                    r.chunk_size,
                    r.sequences,
                    r.length,
                    100.0 * r.floor_ms[0] / f,
                    100.0 * r.floor_ms[1] / b
                ))?;
            }
            report.peer.iter().try_for_each(|(_, text)| print::line(text.trim_end()))
        })
    }
}

impl Cost {
    fn run(self) -> Result<()> {
        let device = self.output.compute.set()?;
        let settings = CostBench {
            presets: self.presets,
            lengths: self.seq_len,
            chunk_sizes: self.chunk_sizes,
            tokens: self.tokens,
            steps: self.steps,
            dtype: self.output.dtype,
        };
        let report = bench_cost(settings, device)?;
        if let Some(path) = &self.plot {
            report.write_plot(path)?;
        }
        self.output.show(&report, |report| {
            heading("a training step", &report.machine)?;
            print::line("model         parameters    C      N   batch  median ms    Ktok/s  of ceiling      peak")?;
            for r in &report.rows {
                print::line(&format!(
                    "{:<12}  {:>8.0} M  {:>3}  {:>5}  {:>6}  {:>9.1}  {:>8.2}  {:>9.0}%  {:>8}",
                    r.preset,
                    r.parameters as f64 / 1e6,
                    r.cost.chunk_size,
                    r.length,
                    r.batch,
                    r.cost.step.median_ms,
                    r.cost.ktokens_per_s,
                    100.0 * r.cost.share_of_ceiling,
                    print::bytes(r.cost.peak_bytes)
                ))?;
            }
            Ok(())
        })
    }
}

impl Kernels {
    fn run(self) -> Result<()> {
        let device = self.output.compute.set()?;
        let peer = self.output.peer()?;
        let settings = KernelsBench {
            rows: self.rows,
            dim: self.dim,
            ffn: self.ffn,
            vocab: self.vocab,
            head_dim: self.head_dim,
            params: self.params,
            dtype: self.output.dtype,
            runs: self.runs,
            only: self.only,
        };
        self.output.show(&bench_kernels(settings, device, peer)?, |report| {
            heading("kernels", &report.machine)?;
            print::line(
                "op                                              forward ms  of ceiling  forward+backward ms  of ceiling",
            )?;
            for r in &report.rows {
                let (both, share) = match &r.forward_backward {
                    Some(b) => (format!("{:.3}", b.median_ms), format!("{:.0}%", 100.0 * r.share_of_ceiling[1])),
                    None => ("-".into(), "-".into()),
                };
                print::line(&format!(
                    "{:<46}  {:>10.3}  {:>9.0}%  {both:>19}  {share:>10}",
                    r.op,
                    r.forward.median_ms,
                    100.0 * r.share_of_ceiling[0],
                ))?;
            }
            report.peer.iter().try_for_each(|(_, text)| print::line(text.trim_end()))
        })
    }
}
