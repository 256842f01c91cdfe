//! SwiGLU's gate on the CPU: one pass each way.

use super::elementwise::{for_rows, sigmoid};
use super::{rows_per_task, simd};
use crate::tensor::{Float, Real, Tensor};
use crate::{Result, with_float};
use rayon::prelude::*;

pub(crate) fn forward(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
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

/// `(dgate, dup)`.
pub(crate) fn backward(gate: Tensor, up: Tensor, dy: &Tensor) -> Result<(Tensor, Tensor)> {
    with_float!(gate.dtype(), "swiglu", T => {
        type A = <T as Float>::Acc;
        let (gate, up, dy) = (gate.dense_rows()?, up.dense_rows()?, dy.dense_rows()?);
        let d = gate.last_dim().max(1);
        let n = rows_per_task(d);
        let (gs, us, dys) = (gate.storage_slice::<T>()?, up.storage_slice::<T>()?, dy.storage_slice::<T>()?);
        let mut dgate = Tensor::unspecified(gate.shape(), gate.dtype());
        let mut dup = Tensor::unspecified(gate.shape(), gate.dtype());
        let chunks = dgate.as_mut_slice::<T>()?.par_chunks_mut(n * d).zip(dup.as_mut_slice::<T>()?.par_chunks_mut(n * d));
        chunks.enumerate().for_each(|(task, (dgate, dup))| {
            for (r, (dgate, dup)) in dgate.chunks_exact_mut(d).zip(dup.chunks_exact_mut(d)).enumerate() {
                let row = task * n + r;
                let g = &gs[gate.layout().row_offset(row)..][..d];
                let u = &us[up.layout().row_offset(row)..][..d];
                let dy = &dys[dy.layout().row_offset(row)..][..d];
                simd(#[inline(always)] || {
                    for i in 0..d {
                        let (g, dy) = (g[i].to_acc(), dy[i].to_acc());
                        let s = sigmoid(g);
                        dup[i] = T::from_acc(dy * g * s);
                        dgate[i] = T::from_acc(dy * u[i].to_acc() * s * (A::ONE + g * (A::ONE - s)));
                    }
                });
            }
        });
        Ok((dgate, dup))
    })
}
