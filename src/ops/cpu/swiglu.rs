//! SwiGLU's gate on the CPU: one pass each way.

use super::elementwise::{for_rows, sigmoid};
use super::{rows_per_task, simd};
use crate::tensor::{Float, Real, Tensor};
use crate::{Result, with_float};
use rayon::prelude::*;

pub(crate) fn forward(gate: Tensor, up: &Tensor) -> Result<Tensor> {
    with_float!(gate.dtype(), "swiglu", T => {
        let (gate, up) = (gate.dense_rows()?, up.dense_rows()?);
        let d = gate.last_dim();
        let (gs, us) = (gate.storage_slice::<T>()?, up.storage_slice::<T>()?);
        let mut y = Tensor::unspecified(gate.shape(), gate.dtype());
        for_rows(y.as_mut_slice::<T>()?, d, |r, y| {
            let g = &gs[gate.layout().row_offset(r)..][..d];
            let u = &us[up.layout().row_offset(r)..][..d];
            simd(#[inline(always)] || {
                for ((y, g), u) in y.iter_mut().zip(g).zip(u) {
                    let g = g.to_acc();
                    *y = T::from_acc(g * sigmoid(g) * u.to_acc());
                }
            });
        });
        Ok(y)
    })
}

/// `(dgate, dup)`, and if asked for, y again.
pub(crate) fn backward(gate: Tensor, up: Tensor, dy: Tensor, again: bool) -> Result<(Tensor, Tensor, Option<Tensor>)> {
    with_float!(gate.dtype(), "swiglu", T => {
        let (gate, up, dy) = (gate.dense_rows()?, up.dense_rows()?, dy.dense_rows()?);
        let d = gate.last_dim().max(1);
        let n = rows_per_task(d);
        let (gs, us, dys) = (gate.storage_slice::<T>()?, up.storage_slice::<T>()?, dy.storage_slice::<T>()?);
        let mut dgate = Tensor::unspecified(gate.shape(), gate.dtype());
        let mut dup = Tensor::unspecified(gate.shape(), gate.dtype());
        let mut y = if again { Some(Tensor::unspecified(gate.shape(), gate.dtype())) } else { None };
        let ys = match &mut y {
            Some(y) => y.as_mut_slice::<T>()?.par_chunks_mut(n * d).map(Some).collect(),
            None => (0..dgate.numel().div_ceil(n * d)).map(|_| None).collect::<Vec<_>>(),
        };
        let chunks = dgate.as_mut_slice::<T>()?.par_chunks_mut(n * d).zip(dup.as_mut_slice::<T>()?.par_chunks_mut(n * d));
        chunks.zip(ys).enumerate().for_each(|(task, ((dgate, dup), mut y))| {
            for (r, (dgate, dup)) in dgate.chunks_exact_mut(d).zip(dup.chunks_exact_mut(d)).enumerate() {
                let row = task * n + r;
                let mut none = [];
                let y = y.as_deref_mut().map_or(&mut none[..], |y| &mut y[r * d..][..d]);
                let g = &gs[gate.layout().row_offset(row)..][..d];
                let u = &us[up.layout().row_offset(row)..][..d];
                let dy = &dys[dy.layout().row_offset(row)..][..d];
                simd(#[inline(always)] || match y.is_empty() {
                    true => backward_row::<T, false>(g, u, dy, dgate, dup, y),
                    false => backward_row::<T, true>(g, u, dy, dgate, dup, y),
                });
            }
        });
        Ok((dgate, dup, y))
    })
}

/// One row; y is written if `AGAIN`.
#[inline(always)]
fn backward_row<T: Float, const AGAIN: bool>(g: &[T], u: &[T], dy: &[T], dgate: &mut [T], dup: &mut [T], y: &mut [T]) {
    for i in 0..g.len() {
        let (g, u, dy) = (g[i].to_acc(), u[i].to_acc(), dy[i].to_acc());
        let s = sigmoid(g);
        if AGAIN {
            y[i] = T::from_acc(g * s * u);
        }
        dup[i] = T::from_acc(dy * g * s);
        dgate[i] = T::from_acc(dy * u * s * (T::Acc::ONE + g * (T::Acc::ONE - s)));
    }
}
