//! Speed, measured as `docs/performance.md` says: medians with their spread, the work counted, the machine's own
//! ceiling and peers measured in the same call.

mod attention;
mod cost;
mod flops;
mod generate;
mod kernels;
mod ladder;
mod machine;
mod plot;
mod profile;
mod train;

pub use attention::{AttentionBench, AttentionReport, AttentionRow, bench_attention};
pub use cost::{CostBench, CostReport, CostRow, bench_cost};
pub use flops::{Flops, training_flops};
pub use generate::{GenerateBench, GenerateBenchReport, GenerateRow, bench_generate};
pub use kernels::{KernelRow, KernelsBench, KernelsReport, bench_kernels};
pub use ladder::{LadderReport, RungRow, bench_ladder};
pub use machine::{Machine, matmul_ceiling, peer_output, time};
pub use profile::{Profile, ProfiledKernel, ProfiledOp, profile};
pub use train::{PeerRow, TrainBench, TrainBenchReport, TrainRow, bench_train, run_peer};

use serde::Serialize;

/// Times of one thing measured several times, in milliseconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Spread {
    /// The shortest run.
    pub best_ms: f64,
    /// Half of the runs took at most this long.
    pub median_ms: f64,
    /// A tenth of the runs took at most this long.
    pub p10_ms: f64,
    /// Nine tenths of the runs took at most this long.
    pub p90_ms: f64,
    /// How often it was measured.
    pub runs: usize,
}

impl Spread {
    /// The spread of some times in seconds; zeros if there are none.
    pub fn of(seconds: &[f64]) -> Self {
        let mut ms: Vec<f64> = seconds.iter().map(|s| s * 1e3).collect();
        ms.sort_by(f64::total_cmp);
        let at = |q: f64| ms.get(((ms.len().max(1) - 1) as f64 * q).round() as usize).copied().unwrap_or(0.0);
        Self { best_ms: at(0.0), median_ms: at(0.5), p10_ms: at(0.1), p90_ms: at(0.9), runs: ms.len() }
    }
}
