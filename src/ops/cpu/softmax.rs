//! Softmax on the CPU, and the log-sum-exp that it shares with cross-entropy.

use super::elementwise::for_rows;
use super::rms_norm::acc_dtype;
use super::{LANES, rows_per_task, simd, sum_over};
use crate::tensor::{Float, Real, Tensor};
use crate::{Result, with_float};
use rayon::prelude::*;

/// `ln sum e^x`, shifted by the maximum so that nothing overflows.
#[inline(always)]
pub(crate) fn log_sum_exp<T: Float>(row: &[T]) -> T::Acc {
    let mut lanes = [T::Acc::NEG_INFINITY; LANES];
    for run in row.chunks(LANES) {
        for (m, x) in lanes.iter_mut().zip(run) {
            *m = m.maximum(x.to_acc());
        }
    }
    let max = lanes.into_iter().fold(T::Acc::NEG_INFINITY, Real::maximum);
    let sum = sum_over(
        row.len(),
        #[inline(always)]
        |i| (row[i].to_acc() - max).exp(),
    );
    max + sum.ln()
}

/// The log-sum-exp of every row of x (dense rows), `[rows]` in the accumulator type.
pub(crate) fn row_lse(op: &'static str, x: &Tensor) -> Result<Tensor> {
    with_float!(x.dtype(), op, T => {
        let w = x.last_dim();
        let mut lse = Tensor::unspecified(&[x.numel() / w.max(1)], acc_dtype(x.dtype()));
        let (src, n) = (x.storage_slice::<T>()?, rows_per_task(w));
        lse.as_mut_slice::<<T as Float>::Acc>()?.par_chunks_mut(n).enumerate().for_each(|(task, lse)| {
            for (r, lse) in lse.iter_mut().enumerate() {
                let row = &src[x.layout().row_offset(task * n + r)..][..w];
                *lse = simd(#[inline(always)] || log_sum_exp(row));
            }
        });
        Ok(lse)
    })
}

/// `(y, log-sum-exp of every row)`.
pub(crate) fn forward(op: &'static str, x: &Tensor, log: bool) -> Result<(Tensor, Tensor)> {
    with_float!(x.dtype(), op, T => {
        let x = x.dense_rows()?;
        let w = x.last_dim();
        let lse = row_lse(op, &x)?;
        let (src, ls) = (x.storage_slice::<T>()?, lse.as_slice::<<T as Float>::Acc>()?);
        let mut y = Tensor::unspecified(x.shape(), x.dtype());
        for_rows(y.as_mut_slice::<T>()?, w, |r, y| {
            let (x, l) = (&src[x.layout().row_offset(r)..][..w], ls[r]);
            simd(#[inline(always)] || {
                for (y, x) in y.iter_mut().zip(x) {
                    let shifted = x.to_acc() - l;
                    *y = T::from_acc(if log { shifted } else { shifted.exp() });
                }
            });
        });
        Ok((y, lse))
    })
}

pub(crate) fn backward(op: &'static str, x: &Tensor, lse: &Tensor, dy: &Tensor, log: bool) -> Result<Tensor> {
    with_float!(x.dtype(), op, T => {
        let (x, dy) = (x.dense_rows()?, dy.dense_rows()?);
        let w = x.last_dim();
        let (xs, dys, ls) = (x.storage_slice::<T>()?, dy.storage_slice::<T>()?, lse.as_slice::<<T as Float>::Acc>()?);
        let mut dx = Tensor::unspecified(x.shape(), x.dtype());
        for_rows(dx.as_mut_slice::<T>()?, w, |r, dx| {
            let (x, l) = (&xs[x.layout().row_offset(r)..][..w], ls[r]);
            let dy = &dys[dy.layout().row_offset(r)..][..w];
            simd(#[inline(always)] || {
                if log {
                    let sum = sum_over(w, #[inline(always)] |i| dy[i].to_acc());
                    for i in 0..w {
                        dx[i] = T::from_acc(dy[i].to_acc() - (x[i].to_acc() - l).exp() * sum);
                    }
                } else {
                    let sum = sum_over(w, #[inline(always)] |i| dy[i].to_acc() * (x[i].to_acc() - l).exp());
                    for i in 0..w {
                        dx[i] = T::from_acc((x[i].to_acc() - l).exp() * (dy[i].to_acc() - sum));
                    }
                }
            });
        });
        Ok(dx)
    })
}
