//! `felid bench`.

mod attention;
mod cache;
mod cost;
mod generate;
mod kernels;
mod train;

use super::{Compute, parse_dtype, print};
use attention::Attention;
use cache::Cache;
use clap::{Args, Subcommand};
use cost::Cost;
use felid::Result;
use felid::bench::{Machine, peer_output};
use felid::model::write_json;
use felid::tensor::DType;
use generate::Generate;
use kernels::Kernels;
use std::path::PathBuf;
use train::Train;

/// Measure speed, and what a smaller cache costs.
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
    /// A cache in 8 bits against a plain one: held-out loss and bytes
    Cache(Cache),
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

impl Bench {
    pub fn run(self) -> Result<()> {
        match self.what {
            What::Train(t) => t.run(),
            What::Generate(g) => g.run(),
            What::Cache(c) => c.run(),
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
