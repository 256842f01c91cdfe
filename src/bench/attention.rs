//! `felid bench attention`: the CAT mask at several chunk sizes beside dense causal attention.

use super::machine::{random_tensor, time};
use super::{Machine, Spread};
use crate::autograd::{Gradients, Var, no_grad};
use crate::model::ChunkPlan;
use crate::ops::{self, Mask};
use crate::tensor::{DType, Device, Tensor};
use crate::{Error, Result};
use serde::Serialize;

/// Elements of q at most: several times what devices hold.
const LARGEST: usize = 1 << 40;

/// What to measure.
#[derive(Clone, Debug, Serialize)]
pub struct AttentionBench {
    /// B.
    pub batch: usize,
    /// H, query heads.
    pub heads: usize,
    /// Hkv, key heads.
    pub kv_heads: usize,
    /// d, width of a head.
    pub head_dim: usize,
    /// N tokens of a row.
    pub tokens: usize,
    /// C, one case each.
    pub chunk_sizes: Vec<usize>,
    /// Rows before a block's tokens: 2 in the adaptive model, 1 in the fixed one.
    pub header: usize,
    /// Element type.
    pub dtype: DType,
    /// Measured runs, after some that are not.
    pub runs: usize,
}

/// One mask.
#[derive(Clone, Debug, Serialize)]
pub struct AttentionRow {
    /// `cat` with its chunk size, `causal`, or the compressor's `bidirectional` blocks.
    pub mask: String,
    /// C; 0 for dense attention.
    pub chunk_size: usize,
    /// Sequences: B, or the number of the compressor's blocks.
    pub sequences: usize,
    /// Rows of each.
    pub length: usize,
    /// Time of a forward pass.
    pub forward: Spread,
    /// Time of a forward and a backward pass.
    pub forward_backward: Spread,
    /// Operations forward: 4 d for each allowed pair.
    pub flops_forward: f64,
    /// Operations of both: 14 d for each allowed pair.
    pub flops_both: f64,
    /// Bytes that must move forward: q, k, v, o once, and one f32 a row.
    pub bytes_forward: f64,
    /// Of both: forward, then q, k, v, o, do read, dq, dk, dv written.
    pub bytes_both: f64,
    /// The larger of flops and bytes over the machine's ceilings, ms: forward, both.
    pub floor_ms: [f64; 2],
}

/// All of it.
#[derive(Clone, Debug, Serialize)]
pub struct AttentionReport {
    /// Where.
    pub machine: Machine,
    /// What.
    pub settings: AttentionBench,
    /// The results.
    pub rows: Vec<AttentionRow>,
    /// A peer's command, and what it printed in the same call.
    pub peer: Option<(String, String)>,
}

/// Measure attention on random q, k and v, views of one fused projection.
pub fn bench_attention(s: AttentionBench, device: Device, peer: Option<(String, String)>) -> Result<AttentionReport> {
    if s.runs == 0 || [s.batch, s.heads, s.kv_heads, s.head_dim, s.tokens].contains(&0) {
        return Err(Error::Usage("sizes and runs must be at least 1".into()));
    }
    let sizes = [s.batch, s.tokens, s.heads.max(s.kv_heads), s.head_dim];
    if sizes.iter().try_fold(1usize, |n, &size| n.checked_mul(size)).is_none_or(|n| n > LARGEST) {
        return Err(Error::Usage(format!(
            "{sizes:?} (batch, tokens, heads, their width) is too large: choose smaller sizes"
        )));
    }
    if s.chunk_sizes.contains(&0) {
        return Err(Error::Usage("chunk sizes must be at least 1".into()));
    }
    let machine = Machine::measure(device, s.dtype)?;
    let mut rows = Vec::new();
    for &c in &s.chunk_sizes {
        let plan = ChunkPlan { chunk: c, header: s.header, tokens: s.tokens };
        rows.push(case(&s, &machine, device, "cat", c, (s.batch, plan.len()), plan.mask())?);
        let compressor = (s.batch * plan.full_chunks(), c + s.header);
        if compressor.0 > 0 {
            rows.push(case(&s, &machine, device, "bidirectional", c, compressor, Mask::Bidirectional)?);
        }
    }
    rows.push(case(&s, &machine, device, "causal", 0, (s.batch, s.tokens), Mask::Causal)?);
    Ok(AttentionReport { machine, settings: s, rows, peer })
}

fn case(
    s: &AttentionBench,
    machine: &Machine,
    device: Device,
    name: &str,
    chunk_size: usize,
    (batch, length): (usize, usize),
    mask: Mask,
) -> Result<AttentionRow> {
    let (h, kv, d) = (s.heads, s.kv_heads, s.head_dim);
    let size = s.dtype.size();
    let q_bytes = (batch * length * h * d * size) as f64;
    let kv_bytes = (batch * length * kv * d * size) as f64;
    // inputs in turn, more than a cache holds
    let sets = ((256usize << 20) / ((q_bytes + 2.0 * kv_bytes) as usize).max(1) + 1).clamp(2, 8);
    let inputs = (0..sets as u64)
        .map(|i| {
            let joint = random_tensor(&[batch, length, (h + 2 * kv) * d], s.dtype, device, 10 + i)?;
            let part = |at: usize, heads: usize| -> Result<Var> {
                let t = joint.narrow(2, at * d, heads * d)?.reshape(&[batch, length, heads, d])?.transpose(1, 2)?;
                Ok(Var::parameter(t))
            };
            let dy = random_tensor(&[batch, length, h, d], s.dtype, device, 100 + i)?.transpose(1, 2)?;
            Ok(([part(0, h)?, part(h, kv)?, part(h + kv, kv)?], dy))
        })
        .collect::<Result<Vec<([Var; 3], Tensor)>>>()?;
    let scale = 1.0 / (d as f64).sqrt();
    let forward = no_grad(|| {
        time(device, 3, s.runs, |i| {
            let ([q, k, v], _) = &inputs[i % sets];
            ops::attention(q, k, v, mask, scale).map(drop)
        })
    })?;
    let forward_backward = time(device, 3, s.runs, |i| {
        let ([q, k, v], dy) = &inputs[i % sets];
        let (tape, mut grads) = (ops::tape(), Gradients::default());
        let y = tape.record(|| ops::attention(q, k, v, mask, scale))?;
        tape.backward_from(&[(&y, dy.clone())], &mut grads)
    })?;
    let work = Work::of(s, (batch, length), mask);
    Ok(AttentionRow {
        mask: name.into(),
        chunk_size,
        sequences: batch,
        length,
        forward,
        forward_backward,
        flops_forward: work.flops[0],
        flops_both: work.flops[1],
        bytes_forward: work.bytes[0],
        bytes_both: work.bytes[1],
        floor_ms: work.floors(machine),
    })
}

/// What cannot be avoided, forward and in both directions: operations, and bytes that must move.
struct Work {
    flops: [f64; 2],
    bytes: [f64; 2],
}

impl Work {
    fn of(s: &AttentionBench, (batch, length): (usize, usize), mask: Mask) -> Self {
        let row = (batch * length * s.head_dim * s.dtype.size()) as f64;
        let (q, kv) = (row * s.heads as f64, row * s.kv_heads as f64);
        let stats = (batch * length * s.heads * 4) as f64;
        let pairs = (batch * s.heads) as f64 * mask.pairs(length, length) as f64;
        let forward = 2.0 * q + 2.0 * kv + stats;
        let d = s.head_dim as f64;
        Self { flops: [4.0 * d * pairs, 14.0 * d * pairs], bytes: [forward, forward + 4.0 * q + 4.0 * kv + stats] }
    }
    fn floors(&self, machine: &Machine) -> [f64; 2] {
        let floor = |i: usize| (self.flops[i] / machine.matmul_flops_per_s).max(self.bytes[i] / machine.copy_bytes_per_s);
        [1e3 * floor(0), 1e3 * floor(1)]
    }
}

/// The least time, ms, forward and both, that the machine's ceilings leave.
#[cfg(feature = "cuda")]
pub(super) fn floors(s: &AttentionBench, machine: &Machine, sizes: (usize, usize), mask: Mask) -> [f64; 2] {
    Work::of(s, sizes, mask).floors(machine)
}
