//! RMSNorm on the CPU: a row a time, both directions side by side.

use super::{rows_per_task, simd, sum_over};
use crate::tensor::{DType, Device, Float, Real, Tensor};
use crate::{Result, with_float};
use rayon::prelude::*;

pub(crate) struct Normed {
    pub y: Tensor,
    /// `x + residual`, where a residual was given.
    pub h: Option<Tensor>,
    /// `1/rms`, one a row, in the accumulator type.
    pub rstd: Tensor,
}

/// The dtype that arithmetic on `d` accumulates in.
pub(crate) fn acc_dtype(d: DType) -> DType {
    if d == DType::F64 { DType::F64 } else { DType::F32 }
}

pub(crate) fn forward(x: &Tensor, residual: Option<&Tensor>, w: &Tensor, eps: f64) -> Result<Normed> {
    with_float!(x.dtype(), "rms_norm", T => {
        type A = <T as Float>::Acc;
        let x = x.dense_rows()?;
        let (d, rows) = (x.last_dim(), x.numel() / x.last_dim().max(1));
        let w = w.contiguous()?;
        let (xs, ws, eps) = (x.storage_slice::<T>()?, w.as_slice::<T>()?, A::of(eps));
        let mut rstd = Tensor::unspecified(&[rows], acc_dtype(x.dtype()));
        let h = match residual {
            None => None,
            Some(r) => {
                // the sum is rounded to the tensor's dtype before it is normed, as an add of its own would
                Some(super::elementwise::binary(crate::ops::elementwise::Binary::Add, &x, r)?)
            }
        };
        let (src, l) = match &h {
            Some(h) => (h.as_slice::<T>()?, h.layout()),
            None => (xs, x.layout()),
        };
        let mut y = Tensor::unspecified(x.shape(), x.dtype());
        let n = rows_per_task(d);
        y.as_mut_slice::<T>()?.par_chunks_mut((n * d).max(1)).zip(rstd.as_mut_slice::<A>()?.par_chunks_mut(n)).enumerate().for_each(
            |(task, (y, rstd))| {
                for (r, (y, rstd)) in y.chunks_exact_mut(d).zip(rstd).enumerate() {
                    let at = l.row_offset(task * n + r);
                    let x = &src[at..at + d];
                    simd(#[inline(always)] || {
                        let square = sum_over(d, #[inline(always)] |i| x[i].to_acc() * x[i].to_acc());
                        *rstd = A::ONE / (square / A::of(d as f64) + eps).sqrt();
                        for ((y, x), w) in y.iter_mut().zip(x).zip(ws) {
                            *y = T::from_acc(x.to_acc() * *rstd * w.to_acc());
                        }
                    });
                }
            },
        );
        Ok(Normed { y, h, rstd })
    })
}

/// `(dx + dh, dw + sum)`: the gradient of the normed rows, and of the weight, which is kept in `sum_dtype`.
#[allow(clippy::too_many_arguments)] // what backward needs is what forward had
pub(crate) fn backward(
    x: &Tensor,
    w: &Tensor,
    rstd: &Tensor,
    dy: &Tensor,
    dh: Option<Tensor>,
    sum: Option<Tensor>,
    sum_dtype: DType,
) -> Result<(Tensor, Tensor)> {
    with_float!(x.dtype(), "rms_norm", T => {
        type A = <T as Float>::Acc;
        let (x, dy, w) = (x.dense_rows()?, dy.dense_rows()?, w.contiguous()?);
        let d = x.last_dim();
        let n = rows_per_task(d);
        let dh = dh.map(|t| t.contiguous()).transpose()?;
        let mut dx = Tensor::unspecified(x.shape(), x.dtype());
        let (xs, dys, ws, rs) = (x.storage_slice::<T>()?, dy.storage_slice::<T>()?, w.as_slice::<T>()?, rstd.as_slice::<A>()?);
        let dhs = dh.as_ref().map(|t| t.as_slice::<T>()).transpose()?;
        // dw is summed per task and then over tasks in order: the same sum for any number of threads
        let partial: Vec<Vec<A>> = dx
            .as_mut_slice::<T>()?
            .par_chunks_mut((n * d).max(1))
            .enumerate()
            .map(|(task, dx)| {
                let mut dw = vec![A::ZERO; d];
                for (r, dx) in dx.chunks_exact_mut(d).enumerate() {
                    let row = task * n + r;
                    let (ax, ay) = (x.layout().row_offset(row), dy.layout().row_offset(row));
                    let (x, dy, rstd) = (&xs[ax..ax + d], &dys[ay..ay + d], rs[row]);
                    simd(#[inline(always)] || {
                        let gx = sum_over(d, #[inline(always)] |i| dy[i].to_acc() * ws[i].to_acc() * x[i].to_acc());
                        let m = gx / A::of(d as f64) * rstd * rstd;
                        let dh = dhs.map(|dhs| &dhs[row * d..][..d]);
                        for i in 0..d {
                            let (g, x) = (dy[i].to_acc(), x[i].to_acc());
                            dw[i] += g * x * rstd;
                            let through_h = dh.map_or(A::ZERO, |dh| dh[i].to_acc());
                            dx[i] = T::from_acc(rstd * (g * ws[i].to_acc() - x * m) + through_h);
                        }
                    });
                }
                dw
            })
            .collect();
        Ok((dx, total(&partial.concat(), d, sum, sum_dtype)?))
    })
}

/// `sum + the rows of partial [parts, d]`, row after row, kept in `dtype`: the gradient of a weight.
pub(super) fn total<A: Real>(partial: &[A], d: usize, sum: Option<Tensor>, dtype: DType) -> Result<Tensor> {
    let mut dw = match sum {
        Some(sum) => sum,
        None => Tensor::zeros(&[d], dtype, Device::Cpu)?,
    };
    with_float!(dw.dtype(), "rms_norm", G => {
        for (i, dw) in dw.as_mut_slice::<G>()?.iter_mut().enumerate() {
            let total = A::of(dw.to_acc().f64()) + partial.iter().skip(i).step_by(d).copied().sum::<A>();
            *dw = G::from_acc(<G as Float>::Acc::of(total.f64()));
        }
        Ok(dw)
    })
}
