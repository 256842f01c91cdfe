//! Softmax on CUDA.

use super::rows::{Teams, float_variant};
use crate::Result;
use crate::cuda::{Arg, kernels::softmax as kernel};
use crate::tensor::{DType, Tensor};

/// True where every row of x (dense rows) begins at a multiple of 16 bytes.
fn rows_aligned(op: &'static str, x: &Tensor) -> Result<bool> {
    let pack = 16 / x.dtype().size();
    Ok(x.pointer()?.is_multiple_of(16) && x.rows(op)?.dims().all(|(n, s)| n == 1 || s % pack == 0))
}

/// `(y, log-sum-exp of every row)`.
pub(crate) fn forward(op: &'static str, x: &Tensor, log: bool) -> Result<(Tensor, Tensor)> {
    let variant = float_variant(op, x)?;
    let x = x.dense_rows()?;
    let w = x.last_dim();
    let rows = x.numel() / w.max(1);
    let mut y = Tensor::empty(x.shape(), x.dtype(), x.device())?;
    let mut lse = Tensor::empty(&[rows], DType::F32, x.device())?;
    let teams = Teams::new(rows, w);
    let packed = [rows_aligned(op, &x)?, rows_aligned(op, &y)?].map(Arg::from);
    let sizes = [x.rows(op)?.into(), rows.into(), w.into(), teams.lanes.into(), packed[0], packed[1], log.into()];
    let args = [&[y.write()?, lse.write()?, x.read()?][..], &sizes].concat();
    // SAFETY: the parameters are (y, lse, x, rows' view, rows, w, lanes, packed, packed_out, log); rows of x are dense, y
    // and lse are new.
    unsafe { x.gpu()?.launch(kernel::softmax_forward, variant, teams.grid, &args)? };
    Ok((y, lse))
}

pub(crate) fn backward(op: &'static str, x: &Tensor, lse: &Tensor, dy: &Tensor, log: bool) -> Result<Tensor> {
    let variant = float_variant(op, x)?;
    let (x, lse, dy) = (x.dense_rows()?, lse.contiguous()?, dy.dense_rows()?);
    let w = x.last_dim();
    let rows = x.numel() / w.max(1);
    let mut dx = Tensor::empty(x.shape(), x.dtype(), x.device())?;
    let teams = Teams::new(rows, w);
    let packed = [rows_aligned(op, &x)?, rows_aligned(op, &dy)?, rows_aligned(op, &dx)?].map(Arg::from);
    let sizes = [x.rows(op)?.into(), dy.rows(op)?.into(), rows.into(), w.into(), teams.lanes.into()];
    let args = [&[dx.write()?, x.read()?, lse.read()?, dy.read()?][..], &sizes, &packed, &[log.into()]].concat();
    // SAFETY: the parameters are (dx, x, lse, dy, x's rows, dy's rows, rows, w, lanes, packed, packed_dy, packed_out, log);
    // rows of x and dy are dense and as many as lse has elements, dx is new.
    unsafe { x.gpu()?.launch(kernel::softmax_backward, variant, teams.grid, &args)? };
    Ok(dx)
}
