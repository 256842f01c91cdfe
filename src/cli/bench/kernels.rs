//! `felid bench kernels`. Each op.

use super::{Output, heading};
use crate::cli::print;
use clap::Args;
use felid::Result;
use felid::bench::{KernelsBench, bench_kernels};

#[derive(Args)]
pub struct Kernels {
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

impl Kernels {
    pub fn run(self) -> Result<()> {
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
