//! QK-norm and RoPE of a fused projection on CUDA.

use super::packs::{in_packs, pack};
use super::rms_norm::sum_columns;
use crate::Result;
use crate::cuda::{Arg, Grid, kernels::qk_norm_rope as kernel};
use crate::ops::RopeTable;
use crate::ops::qk_norm_rope::{Heads, Raw, Weights};
use crate::tensor::{DType, Tensor, read_or_null};

const OP: &str = "qk_norm_rope";

/// True where heads of x's width can be taken by lanes of a warp, 16 bytes each: in the projection's rows or as they come.
fn packed(tensors: &[&Tensor], d: usize, table: &RopeTable) -> Result<bool> {
    let n = pack(tensors[0]);
    let mut packed = d.is_multiple_of(n) && (table.width() / 2).is_multiple_of(n) && d / n <= 32;
    for t in tensors {
        packed &= in_packs(OP, t)?;
    }
    Ok(packed)
}

/// The logarithm of the number of lanes that have a head of width d.
fn shift(d: usize, x: &Tensor) -> usize {
    d.div_ceil(pack(x)).next_power_of_two().trailing_zeros() as usize
}

/// The strides of the first `N` dimensions.
fn strides<const N: usize>(t: &Tensor) -> [Arg; N] {
    std::array::from_fn(|i| t.layout().strides()[i].into())
}

/// x `[B, L, (H + 2 Hkv) d]` -> its query and key heads normed and turned, `[B, L, (H + Hkv) d]`, and with norms their
/// `1/rms`.
pub(crate) fn forward(
    x: &Tensor,
    heads: Heads,
    weights: Option<&Weights>,
    table: &RopeTable,
) -> Result<(Tensor, Option<Tensor>)> {
    let (turned, d) = (heads.q + heads.kv, x.last_dim() / (heads.q + 2 * heads.kv));
    let rows = x.dim(0) * x.dim(1);
    let mut y = Tensor::empty(&[x.dim(0), x.dim(1), turned * d], x.dtype(), x.device())?;
    let mut rstd = weights.map(|_| Tensor::empty(&[rows, turned], DType::F32, x.device())).transpose()?;
    let [index, angles] = table.on(x.device())?;
    let beside: Vec<&Tensor> = [x].into_iter().chain(weights.into_iter().flat_map(|w| [&w.q, &w.k])).collect();
    let (symbol, grid) = match (packed(&beside, d, table)?, weights) {
        (true, Some(_)) => (kernel::qk_norm_rope, Grid::new(2 * rows.div_ceil(4), 128)),
        (true, None) => (kernel::qk_rope, Grid::new(2 * rows.div_ceil(4), 128)),
        (false, _) => (kernel::qk_norm_rope_single, Grid::new((rows * turned).div_ceil(8), 256)),
    };
    let (wq, wk) = (read_or_null(weights.map(|w| &w.q))?, read_or_null(weights.map(|w| &w.k))?);
    let to_rstd = rstd.as_mut().map_or(Ok(0u64.into()), Tensor::write)?;
    let mut args = vec![y.write()?, to_rstd, x.read()?, wq, wk];
    args.extend(strides::<2>(x));
    args.extend([angles.read()?, index.read()?, rows.into(), table.len().into(), heads.q.into(), heads.kv.into()]);
    let eps = weights.map_or(0.0, |w| w.eps as f32);
    args.extend::<[Arg; 4]>([d.into(), table.width().into(), eps.into(), shift(d, x).into()]);
    // SAFETY: the parameters are (y, rstd or null, x, weights of q and k or null, x's two strides, table, index, rows,
    // positions, H, Hkv, d, n, eps, logarithm of the lanes of a head); y and rstd are new and hold (H + Hkv) d elements and
    // H + Hkv numbers a row; x's rows hold (H + 2 Hkv) d, densely; weights hold d; index has an element for each position,
    // naming a row of the table, which is n <= d wide.
    unsafe { x.gpu()?.launch(symbol, x.variant()?, grid.early(true), &args)? };
    Ok((y, rstd))
}

/// From the gradients of q, k and v, `[B, L, heads, d]` each with dense heads, that of the projection, contiguous. With
/// norms also the gradients of both weights as sums of parts, `[parts, d]`, in f32.
pub(crate) fn backward(raw: Option<&Raw>, grads: [&Tensor; 3], table: &RopeTable) -> Result<(Tensor, Option<[Tensor; 2]>)> {
    let [dq, dk, dv] = grads;
    let (gpu, heads, d) = (dq.gpu()?, Heads { q: dq.dim(2), kv: dk.dim(2) }, dq.last_dim());
    let rows = dq.dim(0) * dq.dim(1);
    let mut dx = Tensor::empty(&[dq.dim(0), dq.dim(1), (heads.q + 2 * heads.kv) * d], dq.dtype(), dq.device())?;
    let mut beside = grads.to_vec();
    beside.extend(raw.into_iter().flat_map(|r| [&r.x, &r.weights.q, &r.weights.k]));
    let packed = packed(&beside, d, table)?;
    // the kernel, and the blocks that a multiprocessor has registers for
    let (symbol, resident) = match (packed, raw) {
        (true, Some(_)) => (kernel::qk_norm_rope_backward, 2),
        (true, None) => (kernel::qk_rope_backward, 3),
        (false, _) => (kernel::qk_norm_rope_backward_single, 2),
    };
    let blocks = (gpu.multiprocessors as usize * resident).min(rows.div_ceil(8)).max(1);
    // each block, or each of its warps, sums for both weights
    let parts = if packed { blocks } else { 8 * blocks };
    let mut partial = raw.map(|_| Tensor::empty(&[2 * parts, d], DType::F32, dq.device())).transpose()?;
    let [index, angles] = table.on(dq.device())?;
    let to_partial = partial.as_mut().map_or(Ok(0u64.into()), Tensor::write)?;
    let weights = raw.map(|r| &r.weights);
    let (wq, wk) = (read_or_null(weights.map(|w| &w.q))?, read_or_null(weights.map(|w| &w.k))?);
    let mut args = vec![dx.write()?, to_partial, read_or_null(raw.map(|r| &r.x))?, wq, wk];
    args.extend([read_or_null(raw.map(|r| &r.rstd))?, dq.read()?, dk.read()?, dv.read()?]);
    args.extend(raw.map_or([0usize.into(); 2], |r| strides::<2>(&r.x)));
    args.extend(grads.into_iter().flat_map(strides::<3>));
    args.extend([angles.read()?, index.read()?, rows.into(), table.len().into(), heads.q.into(), heads.kv.into()]);
    args.extend::<[Arg; 3]>([d.into(), table.width().into(), shift(d, dq).into()]);
    // SAFETY: the parameters are (dx, partial or null, x or null, weights of q and k or null, rstd or null, dq, dk, dv, x's
    // two strides, three of each gradient, table, index, rows, positions, H, Hkv, d, n, logarithm of the lanes of a head);
    // dx is new and holds (H + 2 Hkv) d elements a row, as x's rows do; heads of the gradients are dense; partial has two
    // rows of d for each block, or for each warp; index has an element for each position, naming a row of the table, which
    // is n <= d wide.
    unsafe { gpu.launch(symbol, dq.variant()?, Grid::new(blocks, 256), &args)? };
    let sums = match partial {
        None => None,
        Some(p) => Some([p.narrow(0, 0, parts)?, p.narrow(0, parts, parts)?]),
    };
    Ok((dx, sums))
}

/// `sum + the parts of the gradient of w`, kept in `dtype`: f32, or that of w.
pub(crate) fn weight_gradient(partial: &Tensor, w: &Tensor, sum: Option<Tensor>, dtype: DType) -> Result<Tensor> {
    let add = sum.is_some();
    let mut dw = match sum {
        Some(sum) => sum,
        None => Tensor::empty(&[partial.dim(1)], dtype, partial.device())?,
    };
    sum_columns(&mut dw, partial, w, add)?;
    Ok(dw)
}
