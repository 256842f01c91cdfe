//! `felid bench attention --ladder`: the forward kernels of `kernels/lab/attention`, from the definition to what ships.

use super::attention::AttentionBench;
use super::{Machine, Spread};
use crate::tensor::Device;
use crate::{Error, Result};
use serde::Serialize;

/// One kernel of the ladder.
#[derive(Clone, Debug, Serialize)]
pub struct RungRow {
    /// From 1.
    pub rung: usize,
    /// What it adds.
    pub adds: String,
    /// Time of a forward pass.
    pub forward: Spread,
    /// How much faster than the rung before.
    pub gain: f64,
    /// Relative error (L2) against the CPU in f64, on a small case.
    pub error: f64,
    /// The floor's share of the time: bytes or operations over the machine's ceilings.
    pub share_of_floor: f64,
}

/// All rungs that the device has.
#[derive(Clone, Debug, Serialize)]
pub struct LadderReport {
    /// Where.
    pub machine: Machine,
    /// What: the first of its chunk sizes.
    pub settings: AttentionBench,
    /// The rungs.
    pub rows: Vec<RungRow>,
}

/// Check each rung against the CPU on a small case, then time it on q, k and v of the settings' size (bf16, heads of 64).
#[cfg_attr(not(feature = "cuda"), allow(unused_variables))] // what only CUDA reads
pub fn bench_ladder(settings: AttentionBench, device: Device) -> Result<LadderReport> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => on_cuda::measure(settings, device),
        _ => Err(Error::Usage("the ladder is one of CUDA kernels: give --device cuda --dtype bf16".into())),
    }
}

#[cfg(feature = "cuda")]
mod on_cuda {
    use super::*;
    use crate::bench::attention::floors;
    use crate::bench::machine::{random_tensor, time};
    use crate::model::ChunkPlan;
    use crate::ops::cuda::attention_ladder::{rung, rungs};
    use crate::ops::{self, Mask};
    use crate::tensor::{DType, Tensor};

    /// Twice what rounding the result, and the probabilities before it, to bf16 errs: 2^-9 each, in the root mean square and
    /// nearly.
    const LARGEST_ERROR: f64 = 2.0 * std::f64::consts::SQRT_2 / 512.0;

    /// Heads out of a fused projection `[B, L, 3 H 64]`, as models give them.
    fn inputs(batch: usize, heads: usize, length: usize, device: Device, seed: u64) -> Result<[Tensor; 3]> {
        let joint = random_tensor(&[batch, length, 3 * heads * 64], DType::BF16, device, seed)?;
        let part =
            |n: usize| joint.narrow(2, n * heads * 64, heads * 64)?.reshape(&[batch, length, heads, 64])?.transpose(1, 2);
        Ok([part(0)?, part(1)?, part(2)?])
    }

    pub fn measure(s: AttentionBench, device: Device) -> Result<LadderReport> {
        let Some(&chunk) = s.chunk_sizes.first().filter(|c| **c > 0) else {
            return Err(Error::Usage("the ladder needs a chunk size of 1 or more".into()));
        };
        if s.runs == 0 || s.dtype != DType::BF16 || s.head_dim != 64 || s.kv_heads != s.heads {
            return Err(Error::Usage(
                "the ladder's kernels are for --dtype bf16, heads of 64, each with its own keys".into(),
            ));
        }
        let machine = Machine::measure(device, s.dtype)?;
        let scale = 1.0 / 8.0;
        let plan = |tokens: usize| ChunkPlan { chunk, header: s.header, tokens };
        let (small, full) = (plan(333), plan(s.tokens));
        let Mask::Cat { stride } = full.mask() else {
            return Err(Error::Usage(format!("chunks of {chunk} in {} tokens leave no CAT mask", s.tokens)));
        };
        let [q, k, v] = inputs(1, 3, small.len(), device, 1)?;
        let there = [&q, &k, &v].map(|t| Ok(ops::cast_tensor(&t.to_device(Device::Cpu)?, DType::F64)?.into()));
        let [a, b, c] = there;
        let truth = ops::attention(&a?, &b?, &c?, small.mask(), scale)?.into_value().to_f64_vec()?;
        let norm = truth.iter().map(|x| x * x).sum::<f64>().sqrt();

        // inputs in turn, more than a cache holds
        let sets = (0..3).map(|i| inputs(s.batch, s.heads, full.len(), device, 10 + i)).collect::<Result<Vec<_>>>()?;
        let [floor, _] = floors(&s, &machine, (s.batch, full.len()), full.mask());
        let mut rows: Vec<RungRow> = Vec::new();
        for (n, adds) in rungs().enumerate() {
            let Some(y) = rung(n, &q, &k, &v, stride, scale)? else { continue };
            let apart = y.to_f64_vec()?.iter().zip(&truth).map(|(x, t)| (x - t).powi(2)).sum::<f64>().sqrt();
            if apart.is_nan() || apart > LARGEST_ERROR * norm {
                let detail = format!("{adds}: errs by {:.1e} of the result, more than {LARGEST_ERROR:.1e}", apart / norm);
                return Err(Error::Kernel { kernel: format!("rung {} of the ladder", n + 1), detail });
            }
            // the first rungs take as long as hundreds of the last
            let runs = if n < 3 { s.runs.min(5) } else { s.runs };
            let forward = time(device, 1, runs, |i| {
                let [q, k, v] = &sets[i % sets.len()];
                rung(n, q, k, v, stride, scale).map(drop)
            })?;
            let gain = rows.last().map_or(1.0, |r| r.forward.median_ms / forward.median_ms);
            let share_of_floor = floor / forward.median_ms;
            rows.push(RungRow { rung: n + 1, adds: adds.into(), forward, gain, error: apart / norm, share_of_floor });
        }
        Ok(LadderReport { machine, settings: s, rows })
    }
}
