//! Attention of a step of decoding, from the fused projection on: QK-norm and RoPE, the new key and value into the cache, and
//! what each row sees of it. Has no gradient.

use super::{
    CacheRows, Int8Rows, QkNorm, RopeTable, cached_attention, cached_attention_int8, qk_norm_rope, write_int8_rows,
    write_row_pairs,
};
use crate::Result;
use crate::autograd::{Var, no_grad};
use crate::tensor::Tensor;

/// joint `[1, R, (H + 2 Hkv) d]`, rows as [`qk_norm_rope`] takes them, at the R positions of `table` -> `[1, R, H d]`: each row's
/// key and value are written into the caches k and v `[Hkv, T, d]` at the row's place, as [`write_row_pairs`] does, and then each
/// attends to what it sees, as in [`cached_attention`].
///
/// On CUDA one kernel does it where no row sees another's place, or none but that of its neighbour, as where a text's chunk fills:
/// rows then stand in groups of one or two, each of two neighbours from one start of which the second sees one place more.
/// Its results are, in every bit, those of the ops one by one.
pub fn cached_step(
    joint: &Tensor,
    heads: (usize, usize),
    norm: Option<QkNorm>,
    table: &RopeTable,
    caches: [&mut Tensor; 2],
    rows: &CacheRows,
    scale: f64,
) -> Result<Tensor> {
    step(joint, heads, norm, table, caches, rows, scale, false)
}

/// As [`cached_step`]; `settled` if the norms' weights are, as [`super::FusedLinear`] has it.
#[allow(clippy::too_many_arguments)]
pub(crate) fn step(
    joint: &Tensor,
    (heads, kv_heads): (usize, usize),
    norm: Option<QkNorm>,
    table: &RopeTable,
    [k, v]: [&mut Tensor; 2],
    rows: &CacheRows,
    scale: f64,
    settled: bool,
) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let crate::tensor::Device::Cuda(_) = joint.device()
        && rows.groups().is_some()
    {
        let (of, n) = (super::qk_norm_rope::Heads { q: heads, kv: kv_heads }, norm);
        let weights = n.map(|n| -> Result<_> {
            let [q, k] = [n.q.value().contiguous()?, n.k.value().contiguous()?];
            Ok(super::qk_norm_rope::Weights { q, k, eps: n.eps })
        });
        let weights = weights.transpose()?;
        let fused = {
            let _op = crate::profile::enter("cached_step :: forward");
            let caches = [&mut *k, &mut *v];
            super::cuda::cached_step::forward(
                joint,
                (of, weights.as_ref()),
                table,
                caches,
                rows,
                scale,
                settled && n.is_none_or(|n| n.q.value().is_contiguous() && n.k.value().is_contiguous()),
            )?
        };
        if let Some(y) = fused {
            return Ok(y);
        }
    }
    #[cfg(not(feature = "cuda"))]
    let _ = settled;
    no_grad(|| {
        let [q, new_k, new_v] = qk_norm_rope(&Var::constant(joint.clone()), heads, kv_heads, norm, table)?;
        write_row_pairs([&mut *k, &mut *v], [new_k.value(), new_v.value()], rows)?;
        joined(&cached_attention(q.value(), k, v, rows, scale)?)
    })
}

/// As [`cached_step`] with caches in 8 bits, by [`write_int8_rows`] and [`cached_attention_int8`]: a row sees itself as it is
/// kept.
pub fn cached_step_int8(
    joint: &Tensor,
    (heads, kv_heads): (usize, usize),
    norm: Option<QkNorm>,
    table: &RopeTable,
    [k, v]: [&mut Int8Rows; 2],
    rows: &CacheRows,
    scale: f64,
) -> Result<Tensor> {
    no_grad(|| {
        let [q, new_k, new_v] = qk_norm_rope(&Var::constant(joint.clone()), heads, kv_heads, norm, table)?;
        write_int8_rows([&mut *k, &mut *v], [new_k.value(), new_v.value()], rows)?;
        joined(&cached_attention_int8(q.value(), k, v, rows, scale)?)
    })
}

/// `[B, H, n, d]`, lying as `[B, n, H, d]` -> `[B, n, H d]`.
fn joined(y: &Tensor) -> Result<Tensor> {
    let y = y.permute(&[0, 2, 1, 3])?;
    y.reshape(&[y.dim(0), y.dim(1), y.dim(2) * y.dim(3)])
}
