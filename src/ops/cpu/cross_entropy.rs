//! Cross-entropy on the CPU.

use super::elementwise::for_rows;
use super::simd;
use super::softmax::{log_sum_exp, row_lse};
use crate::ops::cross_entropy::Counted;
use crate::tensor::{DType, Float, Real, Tensor};
use crate::{Result, with_float};
use rayon::prelude::*;

/// A loss in the accumulator type of `dtype`.
pub(crate) fn scalar(loss: f64, dtype: DType) -> Tensor {
    if dtype == DType::F64 { Tensor::scalar(loss) } else { Tensor::scalar(f32::of(loss)) }
}

/// `(mean of the counted rows' losses, log-sum-exp of every row)`.
pub(crate) fn forward(logits: &Tensor, counted: &Counted) -> Result<(Tensor, Tensor)> {
    with_float!(logits.dtype(), "cross_entropy", T => {
        let z = logits.dense_rows()?;
        let lse = row_lse("cross_entropy", &z)?;
        let (src, ls) = (z.storage_slice::<T>()?, lse.as_slice::<<T as Float>::Acc>()?);
        let loss = |(&r, &label): (&usize, &usize)| {
            ls[r].f64() - src[z.layout().row_offset(r) + label].to_acc().f64()
        };
        let sum: f64 = counted.rows.iter().zip(&counted.labels).map(loss).sum();
        Ok((scalar(sum / counted.len() as f64, logits.dtype()), lse))
    })
}

/// `(softmax - onehot) * dloss / count` in counted rows, 0 in others.
pub(crate) fn backward(logits: &Tensor, lse: &Tensor, counted: &Counted, dloss: &Tensor) -> Result<Tensor> {
    let scale = dloss.item()? / counted.len() as f64;
    with_float!(logits.dtype(), "cross_entropy", T => {
        type A = <T as Float>::Acc;
        let z = logits.dense_rows()?;
        let w = z.last_dim();
        let mut label_of = vec![None; lse.numel()];
        for (&r, &label) in counted.rows.iter().zip(&counted.labels) {
            label_of[r] = Some(label);
        }
        let (src, ls) = (z.storage_slice::<T>()?, lse.as_slice::<A>()?);
        let mut dz = Tensor::unspecified(z.shape(), z.dtype());
        for_rows(dz.as_mut_slice::<T>()?, w, |r, dz| match label_of[r] {
            None => dz.fill(T::from_acc(A::ZERO)),
            Some(label) => {
                let z = &src[z.layout().row_offset(r)..][..w];
                let (l, c) = (ls[r], A::of(scale));
                simd(#[inline(always)] || {
                    for (d, z) in dz.iter_mut().zip(z) {
                        *d = T::from_acc((z.to_acc() - l).exp() * c);
                    }
                });
                dz[label] = T::from_acc(((z[label].to_acc() - l).exp() - A::ONE) * c);
            }
        });
        Ok(dz)
    })
}

/// The sum of the rows' losses; with a scale, the logits `[rows, V]` become `(softmax - onehot) * scale`.
pub(crate) fn in_place(logits: &mut Tensor, labels: &[usize], scale: Option<f64>) -> Result<f64> {
    with_float!(logits.dtype(), "cross_entropy", T => {
        type A = <T as Float>::Acc;
        let w = logits.last_dim().max(1);
        let rows = logits.as_mut_slice::<T>()?.par_chunks_exact_mut(w).zip(labels);
        let losses: Vec<f64> = rows
            .map(|(z, &label)| {
                let l = simd(#[inline(always)] || log_sum_exp(z));
                let loss = l.f64() - z[label].to_acc().f64();
                if let Some(scale) = scale {
                    let c = A::of(scale);
                    simd(#[inline(always)] || {
                        for z in z.iter_mut() {
                            *z = T::from_acc((z.to_acc() - l).exp() * c);
                        }
                    });
                    z[label] = T::from_acc(z[label].to_acc() - c);
                }
                loss
            })
            .collect();
        Ok(losses.into_iter().sum())
    })
}
