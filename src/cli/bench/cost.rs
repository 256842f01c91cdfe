//! `felid bench cost`. Cost against size.

use super::{Output, heading};
use crate::cli::print;
use clap::Args;
use felid::Result;
use felid::bench::{CostBench, bench_cost};
use std::path::PathBuf;

#[derive(Args)]
pub struct Cost {
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

impl Cost {
    pub fn run(self) -> Result<()> {
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
