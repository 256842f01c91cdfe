//! `felid bench attention`. Attention, and the ladder of its kernels.

use super::{Output, heading};
use crate::cli::print;
use clap::Args;
use felid::Result;
use felid::bench::{AttentionBench, bench_attention, bench_ladder};

#[derive(Args)]
pub struct Attention {
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

impl Attention {
    pub fn run(self) -> Result<()> {
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
