//! QK-norm and RoPE of a fused projection on the CPU: a row a time, both directions side by side.

use super::rms_norm::{acc_dtype, total};
use super::rope::turn;
use super::{rows_per_task, simd, sum_over};
use crate::ops::RopeTable;
use crate::ops::qk_norm_rope::{Heads, Raw, Weights};
use crate::tensor::{DType, Float, Real, Tensor};
use crate::{Result, with_float};
use rayon::prelude::*;

/// x `[B, L, (H + 2 Hkv) d]` -> its query and key heads normed and turned, `[B, L, (H + Hkv) d]`, and with norms their
/// `1/rms`.
pub(crate) fn forward(
    x: &Tensor,
    heads: Heads,
    weights: Option<&Weights>,
    table: &RopeTable,
) -> Result<(Tensor, Option<Tensor>)> {
    with_float!(x.dtype(), "qk_norm_rope", T => {
        type A = <T as Float>::Acc;
        let (h, d) = (heads.q + heads.kv, x.last_dim() / (heads.q + 2 * heads.kv));
        let mut y = Tensor::unspecified(&[x.dim(0), x.dim(1), h * d], x.dtype());
        let mut rstd = Tensor::unspecified(&[x.dim(0) * x.dim(1), h], acc_dtype(x.dtype()));
        let norm = match weights {
            None => None,
            Some(w) => Some((w.q.as_slice::<T>()?, w.k.as_slice::<T>()?, A::of(w.eps))),
        };
        let (xs, l, angles) = (x.storage_slice::<T>()?, x.layout(), Angles::<A>::new(table, x.dtype())?);
        let n = rows_per_task(h * d);
        let ys = y.as_mut_slice::<T>()?.par_chunks_mut((n * h * d).max(1));
        ys.zip(rstd.as_mut_slice::<A>()?.par_chunks_mut(n * h)).enumerate().for_each(|(task, (y, rstd))| {
            let mut z = vec![A::ZERO; d];
            for (r, (y, rstd)) in y.chunks_exact_mut(h * d).zip(rstd.chunks_exact_mut(h)).enumerate() {
                let row = task * n + r;
                let (x, angles) = (&xs[l.row_offset(row)..][..h * d], angles.at(row));
                simd(#[inline(always)] || {
                    let parts = x.chunks_exact(d).zip(y.chunks_exact_mut(d)).zip(rstd);
                    for (head, ((x, y), rstd)) in parts.enumerate() {
                        let Some((wq, wk, eps)) = norm else {
                            turn(x, angles, false, y);
                            continue;
                        };
                        let w = if head < heads.q { wq } else { wk };
                        let square = sum_over(d, #[inline(always)] |i| x[i].to_acc() * x[i].to_acc());
                        *rstd = A::ONE / (square / A::of(d as f64) + eps).sqrt();
                        for ((z, x), w) in z.iter_mut().zip(x).zip(w) {
                            *z = x.to_acc() * *rstd * w.to_acc();
                        }
                        turn(&z, angles, false, y);
                    }
                });
            }
        });
        Ok((y, norm.map(|_| rstd)))
    })
}

/// The rows of a table, in the type of arithmetic.
struct Angles<'a, A> {
    rows: &'a [usize],
    width: usize,
    table: &'a [A],
}

impl<'a, A: Real> Angles<'a, A> {
    fn new(table: &'a RopeTable, dtype: DType) -> Result<Self> {
        Ok(Self { rows: table.rows(), width: table.width(), table: table.table(dtype).as_slice::<A>()? })
    }
    /// Of row `b L + l`.
    fn at(&self, row: usize) -> &'a [A] {
        &self.table[self.rows[row % self.rows.len()] * self.width..][..self.width]
    }
}

/// From the gradients of q, k and v, `[B, L, heads, d]` each with dense heads, that of the projection, contiguous. With
/// norms also the gradients of both weights as sums of parts, `[parts, d]`, in the accumulator type.
pub(crate) fn backward(raw: Option<&Raw>, grads: [&Tensor; 3], table: &RopeTable) -> Result<(Tensor, Option<[Tensor; 2]>)> {
    let [dq, dk, dv] = grads;
    with_float!(dq.dtype(), "qk_norm_rope", T => {
        type A = <T as Float>::Acc;
        let (heads, d) = (Heads { q: dq.dim(2), kv: dk.dim(2) }, dq.last_dim());
        let (turned, width) = (heads.q + heads.kv, (heads.q + 2 * heads.kv) * d);
        let mut dx = Tensor::unspecified(&[dq.dim(0), dq.dim(1), width], dq.dtype());
        let sources = [dq.storage_slice::<T>()?, dk.storage_slice::<T>()?, dv.storage_slice::<T>()?];
        let norm = match raw {
            None => None,
            Some(raw) => {
                let weights = [raw.weights.q.as_slice::<T>()?, raw.weights.k.as_slice::<T>()?];
                Some((raw.x.storage_slice::<T>()?, raw.x.layout(), raw.rstd.as_slice::<A>()?, weights))
            }
        };
        let angles = Angles::<A>::new(table, dq.dtype())?;
        let n = rows_per_task(width);
        // dw is summed per task, and later over tasks in order: the same sum for any number of threads
        let partial: Vec<[Vec<A>; 2]> = dx
            .as_mut_slice::<T>()?
            .par_chunks_mut((n * width).max(1))
            .enumerate()
            .map(|(task, dx)| {
                let (mut dw, mut dz) = ([vec![A::ZERO; d], vec![A::ZERO; d]], vec![A::ZERO; d]);
                for (r, dx) in dx.chunks_exact_mut(width).enumerate() {
                    let row = task * n + r;
                    let starts = grads.map(|g| g.layout().row_offset(row * g.dim(2)));
                    let angles = angles.at(row);
                    simd(#[inline(always)] || {
                        for (head, dx) in dx.chunks_exact_mut(d).enumerate() {
                            let (kind, h) = match head {
                                i if i < heads.q => (0, i),
                                i if i < turned => (1, i - heads.q),
                                i => (2, i - turned),
                            };
                            let dy = &sources[kind][starts[kind] + h * grads[kind].layout().strides()[2]..][..d];
                            if kind == 2 {
                                dx.copy_from_slice(dy);
                                continue;
                            }
                            let Some((xs, l, rstd, weights)) = norm else {
                                turn(dy, angles, true, dx);
                                continue;
                            };
                            turn(dy, angles, true, &mut dz);
                            let x = &xs[l.row_offset(row) + head * d..][..d];
                            let (w, rstd, dw) = (weights[kind], rstd[row * turned + head], &mut dw[kind]);
                            let gx = sum_over(d, #[inline(always)] |i| dz[i] * w[i].to_acc() * x[i].to_acc());
                            let m = gx / A::of(d as f64) * rstd * rstd;
                            for i in 0..d {
                                let x = x[i].to_acc();
                                dw[i] += dz[i] * x * rstd;
                                dx[i] = T::from_acc(rstd * (dz[i] * w[i].to_acc() - x * m));
                            }
                        }
                    });
                }
                dw
            })
            .collect();
        let sums = |kind: usize| {
            let parts: Vec<A> = partial.iter().flat_map(|p| p[kind].iter().copied()).collect();
            Tensor::from_vec(parts, &[partial.len(), d])
        };
        Ok((dx, raw.map(|_| Ok::<_, crate::Error>([sums(0)?, sums(1)?])).transpose()?))
    })
}

/// `sum + the parts of the gradient of w`, kept in `dtype`.
pub(crate) fn weight_gradient(partial: &Tensor, w: &Tensor, sum: Option<Tensor>, dtype: DType) -> Result<Tensor> {
    with_float!(w.dtype(), "qk_norm_rope", T => total(partial.as_slice::<<T as Float>::Acc>()?, partial.dim(1), sum, dtype))
}
