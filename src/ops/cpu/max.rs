//! Maxima of rows on the CPU.

use super::elementwise::for_rows;
use super::rows_per_task;
use crate::tensor::{DType, Float, Real, Tensor};
use crate::{Result, with_float};
use rayon::prelude::*;

/// `(largest element, its index)` of each row of x `[rows, n]`, n > 0; int64 indices.
pub(crate) fn forward(op: &'static str, x: &Tensor) -> Result<(Tensor, Tensor)> {
    with_float!(x.dtype(), op, T => {
        let x = x.dense_rows()?;
        let (rows, n) = (x.dim(0), x.dim(1));
        let src = x.storage_slice::<T>()?;
        let row = |r: usize| &src[x.layout().row_offset(r)..][..n];
        let mut at = Tensor::unspecified(&[rows], DType::I64);
        let task = rows_per_task(n);
        at.as_mut_slice::<i64>()?.par_chunks_mut(task).enumerate().for_each(|(t, at)| {
            for (r, at) in at.iter_mut().enumerate() {
                *at = largest(row(t * task + r)) as i64;
            }
        });
        let mut y = Tensor::unspecified(&[rows], x.dtype());
        for ((r, y), &at) in y.as_mut_slice::<T>()?.iter_mut().enumerate().zip(at.as_slice::<i64>()?) {
            *y = row(r)[at as usize];
        }
        Ok((y, at))
    })
}

/// The lowest index of the largest element; of the first NaN, if there is one.
fn largest<T: Float>(row: &[T]) -> usize {
    let mut best = 0;
    for (i, x) in row.iter().enumerate().skip(1) {
        let (x, b) = (x.to_acc(), row[best].to_acc());
        if x > b || (x.f64().is_nan() && !b.f64().is_nan()) {
            best = i;
        }
    }
    best
}

/// `dx[r, at[r]] = dy[r]`, 0 elsewhere, `[rows, n]`.
pub(crate) fn backward(dy: &Tensor, at: &Tensor, n: usize) -> Result<Tensor> {
    with_float!(dy.dtype(), "max", T => {
        let dy = dy.contiguous()?;
        let (dys, at) = (dy.as_slice::<T>()?, at.as_slice::<i64>()?);
        let mut dx = Tensor::zeros(&[at.len(), n], dy.dtype(), dy.device())?;
        for_rows(dx.as_mut_slice::<T>()?, n, |r, dx| dx[at[r] as usize] = dys[r]);
        Ok(dx)
    })
}
