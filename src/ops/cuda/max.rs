//! Maxima of rows on CUDA.

use super::rows::{Teams, float_variant};
use crate::Result;
use crate::cuda::{Grid, kernels::max as kernel};
use crate::tensor::{DType, Tensor};

/// `(largest element, its index)` of each row of x `[rows, n]`, n > 0; int64 indices.
pub(crate) fn forward(op: &'static str, x: &Tensor) -> Result<(Tensor, Tensor)> {
    let variant = float_variant(op, x)?;
    let x = x.dense_rows()?;
    let (rows, n) = (x.dim(0), x.dim(1));
    let mut y = Tensor::empty(&[rows], x.dtype(), x.device())?;
    let mut at = Tensor::empty(&[rows], DType::I64, x.device())?;
    let teams = Teams::new(rows, n);
    let sizes = [x.rows(op)?.into(), rows.into(), n.into(), teams.lanes.into()];
    let args = [&[y.write()?, at.write()?, x.read()?][..], &sizes].concat();
    // SAFETY: the parameters are (y, at, x, rows' view, rows, n, lanes); rows of x are dense, n > 0, y and at are new and
    // hold an element a row.
    unsafe { x.gpu()?.launch(kernel::max_forward, variant, teams.grid, &args)? };
    Ok((y, at))
}

/// `dx[r, at[r]] = dy[r]`, 0 elsewhere, `[rows, n]`.
pub(crate) fn backward(dy: &Tensor, at: &Tensor, n: usize) -> Result<Tensor> {
    let variant = float_variant("max", dy)?;
    let (dy, at, rows) = (dy.contiguous()?, at.contiguous()?, at.numel());
    let mut dx = Tensor::zeros(&[rows, n], dy.dtype(), dy.device())?;
    let args = [dx.write()?, dy.read()?, at.read()?, rows.into(), n.into()];
    // SAFETY: the parameters are (dx, dy, at, rows, n); dy and at hold an element a row, at's below n as forward found
    // them, and dx is new.
    unsafe { dy.gpu()?.launch(kernel::max_backward, variant, Grid::for_each(rows, 256), &args)? };
    Ok(dx)
}
