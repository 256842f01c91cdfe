//! Sums over any dimensions on the CPU, in a fixed order.

use super::simd;
use crate::tensor::{Float, Real, Tensor};
use crate::{Result, with_float};
use rayon::prelude::*;

/// Sum over `dims` (kept as size 1), accumulated in the accumulator type.
///
/// The view is permuted to `[kept, reduced]`. Where the last dimension is kept, columns are added row by row in vectors;
/// else each output sums its own run. The order follows from the shape alone: views sum like their copies, bit for bit.
pub(crate) fn sum(x: &Tensor, dims: &[usize]) -> Result<Tensor> {
    let keep: Vec<usize> = (0..x.rank()).filter(|d| !dims.contains(d)).collect();
    let reduce: Vec<usize> = (0..x.rank()).filter(|d| dims.contains(d)).collect();
    let out_shape: Vec<usize> = (0..x.rank()).map(|d| if dims.contains(&d) { 1 } else { x.dim(d) }).collect();
    let n: usize = reduce.iter().map(|&d| x.dim(d)).product();
    let m: usize = keep.iter().map(|&d| x.dim(d)).product();
    with_float!(x.dtype(), "sum", T => {
        type A = <T as Float>::Acc;
        let mut y = Tensor::zeros(&out_shape, x.dtype(), x.device())?;
        if n == 0 || m == 0 {
            return Ok(y);
        }
        if keep.last().is_some_and(|&d| d + 1 == x.rank()) && x.last_dim() > 1 {
            let (x, w) = (x.dense_rows()?, x.last_dim());
            let order: Vec<usize> = [&keep[..keep.len() - 1], &reduce, &keep[keep.len() - 1..]].concat();
            let v = x.permute(&order)?;
            let src = v.storage_slice::<T>()?;
            // rows are cut in runs of fixed length whose sums are added in order
            const RUN: usize = 256;
            for (block, out) in y.as_mut_slice::<T>()?.chunks_exact_mut(w).enumerate() {
                let partial: Vec<Vec<A>> = (0..n.div_ceil(RUN))
                    .into_par_iter()
                    .map(|run| {
                        let mut acc = vec![A::ZERO; w];
                        for r in run * RUN..n.min((run + 1) * RUN) {
                            let row = &src[v.layout().row_offset(block * n + r)..][..w];
                            simd(#[inline(always)] || {
                                for (a, x) in acc.iter_mut().zip(row) {
                                    *a += x.to_acc();
                                }
                            });
                        }
                        acc
                    })
                    .collect();
                for (i, out) in out.iter_mut().enumerate() {
                    *out = T::from_acc(partial.iter().map(|p| p[i]).sum());
                }
            }
        } else {
            let order: Vec<usize> = keep.iter().chain(&reduce).copied().collect();
            let v = x.permute(&order)?.contiguous()?;
            let src = v.as_slice::<T>()?;
            const RUN: usize = 16_384;
            if m == 1 {
                let partial: Vec<A> = src.par_chunks(RUN).map(row_sum).collect();
                y.as_mut_slice::<T>()?[0] = T::from_acc(partial.into_iter().sum());
            } else {
                y.as_mut_slice::<T>()?.par_iter_mut().zip(src.par_chunks_exact(n)).for_each(|(y, row)| {
                    *y = T::from_acc(row.chunks(RUN).map(row_sum).sum());
                });
            }
        }
        Ok(y)
    })
}

fn row_sum<T: Float>(row: &[T]) -> T::Acc {
    simd(
        #[inline(always)]
        || {
            super::sum_over(
                row.len(),
                #[inline(always)]
                |i| row[i].to_acc(),
            )
        },
    )
}
