//! QK-norm and RoPE of a fused projection (spec section 1), in one pass over its query and key heads.
//!
//! Of a head x: `z = x * rstd * w`, `rstd = 1 / sqrt(mean(x^2) + eps)` (without norms `z = x`), and y is z turned by the
//! angles of its position, as in [`ops::rope`](crate::ops::rope). Arithmetic runs in f32 and rounds once: z is not rounded on
//! the way, as [`ops::rms_norm`](crate::ops::rms_norm) and then `rope` would.
//!
//! Backward, with dz the gradient dy turned back, `g = dz * w` and `m = mean(g * x) * rstd^2`: `dx = rstd * (g - x * m)`,
//! `dw = sum over rows and heads of dz * x * rstd`. The gradient of the whole projection is written in one pass.

use super::RopeTable;
use super::elementwise::same_dtype;
use crate::autograd::{Var, compute_again, record};
use crate::tensor::Tensor;
use crate::{Error, Result, profile};

/// The weights of QK-norm, `[d]` each.
#[derive(Clone, Copy, Debug)]
pub struct QkNorm<'a> {
    /// For query heads.
    pub q: &'a Var,
    /// For key heads.
    pub k: &'a Var,
    /// Added to the mean square.
    pub eps: f64,
}

/// What twins take of the norms.
#[derive(Clone, Debug)]
pub(crate) struct Weights {
    /// `[d]`, contiguous.
    pub q: Tensor,
    /// `[d]`, contiguous.
    pub k: Tensor,
    pub eps: f64,
}

/// What backward needs of a forward pass with norms.
#[derive(Clone, Debug)]
pub(crate) struct Raw {
    /// The projection, with dense rows.
    pub x: Tensor,
    /// `1/rms` of every row's query and key heads, `[B L, H + Hkv]`, in the accumulator type.
    pub rstd: Tensor,
    pub weights: Weights,
}

/// Numbers of heads.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Heads {
    /// H.
    pub q: usize,
    /// Hkv.
    pub kv: usize,
}

/// joint `[B, L, (H + 2 Hkv) d]`, a row holding query heads, key heads and value heads -> q `[B, H, L, d]`, k and v
/// `[B, Hkv, L, d]`: q and k normed, where norms are given, and turned by `table` (L positions, n <= d).
///
/// All three lie in memory as `[B, L, heads, d]`: q and k in one new buffer, v where it is, as a view of joint. Saves joint
/// (of which v's saver keeps all anyway) and, with norms, `1/rms`; q and k are computed again where backward needs them.
pub fn qk_norm_rope(
    joint: &Var,
    heads: usize,
    kv_heads: usize,
    norm: Option<QkNorm<'_>>,
    table: &RopeTable,
) -> Result<[Var; 3]> {
    const OP: &str = "qk_norm_rope";
    let heads = Heads { q: heads, kv: kv_heads };
    let d = head_dim(joint, heads, norm, table)?;
    let (x, turned) = (joint.value().dense_rows()?, heads.q + heads.kv);
    let (b, l) = (x.dim(0), x.dim(1));
    let weights = match norm {
        None => None,
        Some(n) => Some(Weights { q: n.q.value().contiguous()?, k: n.k.value().contiguous()?, eps: n.eps }),
    };
    let (y, rstd) = on_device!(x.device(), qk_norm_rope::forward(&x, heads, weights.as_ref(), table))?;
    let (bytes, all_bytes) = (y.numel() * y.dtype().size(), x.numel() * x.dtype().size());
    let (forward_bytes, backward_bytes) = (2 * bytes, 2 * all_bytes + if norm.is_some() { bytes } else { 0 });
    profile::moved(forward_bytes);
    // `n` heads of every row of t from element `from` on, [B, n, L, d]
    let view = move |t: &Tensor, from: usize, n: usize| {
        t.narrow(2, from * d, n * d)?.reshape(&[b, l, n, d])?.permute(&[0, 2, 1, 3])
    };
    let of_turned = move |y: &Tensor| Ok(vec![view(y, 0, heads.q)?, view(y, heads.q, heads.kv)?]);
    let mut outputs: Vec<Tensor> = of_turned(&y)?;
    outputs.push(view(&x, turned, heads.kv)?);
    let (x_again, weights_again, table_again) = (x.clone(), weights.clone(), table.clone());
    let shapes = [heads.q, heads.kv, heads.kv].map(|h| [b, h, l, d]);
    let (dtype, device, table) = (x.dtype(), x.device(), table.clone());
    let raw = weights.zip(rstd).map(|(weights, rstd)| Raw { x, rstd, weights });
    let inputs: Vec<&Var> = [joint].into_iter().chain(norm.into_iter().flat_map(|n| [n.q, n.k])).collect();
    let mut vars = record(OP, &inputs, outputs, move |flow| {
        let mut grads = Vec::with_capacity(3);
        for (i, shape) in shapes.iter().enumerate() {
            let dy = flow.output_at(i).map_or_else(|| Tensor::full(0.0, shape, dtype, device), Ok)?;
            grads.push(dy.permute(&[0, 2, 1, 3])?.dense_rows()?); // [B, L, heads, d]
        }
        let (dx, sums) =
            on_device!(device, qk_norm_rope::backward(raw.as_ref(), [&grads[0], &grads[1], &grads[2]], &table))?;
        profile::moved(backward_bytes);
        flow.give(0, dx)?;
        let Some((raw, [of_q, of_k])) = raw.zip(sums) else { return Ok(()) };
        for (i, partial, w) in [(1, of_q, raw.weights.q), (2, of_k, raw.weights.k)] {
            let dtype = flow.gradient_dtype(i).unwrap_or(dtype);
            let sum = flow.take_sum(i);
            let dw = on_device!(device, qk_norm_rope::weight_gradient(&partial, &w, sum, dtype))?;
            flow.put(i, dw);
        }
        Ok(())
    });
    compute_again(&mut vars[..2], move || {
        let (x, weights, table) = (&x_again, weights_again.as_ref(), &table_again);
        let y = on_device!(x.device(), qk_norm_rope::forward(x, heads, weights, table))?.0;
        profile::moved(forward_bytes);
        of_turned(&y)
    });
    <[Var; 3]>::try_from(vars).map_err(|v| Error::shape(OP, format!("{} outputs instead of 3", v.len())))
}

/// d, and that everything fits it.
fn head_dim(joint: &Var, heads: Heads, norm: Option<QkNorm<'_>>, table: &RopeTable) -> Result<usize> {
    let fail = |detail: String| Err(Error::shape("qk_norm_rope", detail));
    let (x, all) = (joint.value(), heads.q.saturating_add(heads.kv.saturating_mul(2)));
    if x.rank() != 3 || all == 0 || !x.last_dim().is_multiple_of(all) {
        let (q, kv) = (heads.q, heads.kv);
        return fail(format!("{:?} is not [B, L, (H + 2 Hkv) d] of {q} query and {kv} key heads", x.shape()));
    }
    let d = x.last_dim() / all;
    if x.dim(1) != table.len() || d < table.width() {
        let (len, n) = (table.len(), table.width());
        return fail(format!("{:?}, heads {d} wide, does not fit a table of {len} positions, {n} wide", x.shape()));
    }
    if !x.dtype().is_float() {
        return Err(Error::dtype("qk_norm_rope", format!("needs a float dtype, got {}", x.dtype())));
    }
    if let Some(n) = norm {
        same_dtype("qk_norm_rope", &[x, n.q.value(), n.k.value()])?;
        if [n.q.shape(), n.k.shape()].iter().any(|s| *s != [d]) {
            return fail(format!("weights {:?} and {:?} for heads {d} wide", n.q.shape(), n.k.shape()));
        }
    }
    Ok(d)
}
