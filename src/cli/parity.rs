//! `felid parity`.

use super::{Compute, parse_dtype, print};
use clap::Args;
use felid::eval::parity::parity;
use felid::tensor::DType;
use felid::{Error, Result};
use std::path::PathBuf;

/// Run golden files and print the relative L2 error of logits, loss and gradients, and whether greedy tokens agree.
/// Exits with 1 if anything is out of bounds.
#[derive(Args)]
pub struct Parity {
    /// Golden files, or model folders with expect.safetensors
    #[arg(required = true)]
    paths: Vec<PathBuf>,
    #[arg(long, value_parser = parse_dtype, default_value = "f32")]
    dtype: DType,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    compute: Compute,
}

impl Parity {
    pub fn run(self) -> Result<()> {
        let device = self.compute.set()?;
        let mut failed = 0;
        let mut reports = Vec::new();
        for path in &self.paths {
            let cases = parity(path, self.dtype, device)?;
            failed += cases.iter().filter(|c| !c.pass).count();
            if !self.json {
                let first = cases.first();
                print::line(&format!(
                    "{}  ({} on {device}, bounds {:.1e} logits and loss, {:.1e} gradients{})",
                    path.display(),
                    self.dtype,
                    first.map_or(0.0, |c| c.logits_bound),
                    first.map_or(0.0, |c| c.gradients_bound),
                    if self.dtype == DType::F32 { "" } else { ": of the first case, by the error of rounded weights" },
                ))?;
                print::line("case  batch x length  chunk    logits      loss  gradients  generated")?;
                for c in &cases {
                    let or_dash = |x: Option<String>| x.unwrap_or_else(|| "-".into());
                    print::line(&format!(
                        "{:>4}  {:>5} x {:<6}  {:>5}  {:>8.2e}  {:>8}  {:>9}  {:>9}  {}",
                        c.case,
                        c.batch,
                        c.length,
                        or_dash(c.chunk_size.map(|n| n.to_string())),
                        c.logits,
                        or_dash(c.loss.map(|e| format!("{e:.2e}"))),
                        or_dash(c.gradients.as_ref().map(|g| format!("{:.2e}", g.0))),
                        or_dash(c.generated_agree.map(|ok| if ok { "agree" } else { "DIFFER" }.into())),
                        if c.pass { "ok" } else { "OUT OF BOUNDS" }
                    ))?;
                }
            }
            reports.push(
                serde_json::json!({ "path": path, "dtype": self.dtype, "device": device.to_string(), "cases": cases }),
            );
        }
        if self.json {
            print::json(&reports)?;
        }
        if failed > 0 {
            return Err(Error::Config(format!("{failed} golden cases are out of bounds")));
        }
        Ok(())
    }
}
