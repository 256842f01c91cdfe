//! A sparse matrix applied along a dimension, on the CPU.

use super::elementwise::for_rows;
use super::simd;
use crate::ops::interpolate::SparseRows;
use crate::tensor::{Float, Real, Tensor};
use crate::{Result, with_float};

/// `y[o, j, ..] = sum of weight * x[o, column, ..]` over the entries of row j, o over the dimensions before `dim`.
pub(crate) fn apply(x: &Tensor, dim: usize, matrix: &SparseRows) -> Result<Tensor> {
    const TILE: usize = 256;
    with_float!(x.dtype(), "interpolate", T => {
        type A = <T as Float>::Acc;
        let (n, m) = (x.dim(dim), matrix.len());
        let mut shape = x.shape().to_vec();
        shape[dim] = m;
        let x = x.dense_rows()?;
        let (src, l, w) = (x.storage_slice::<T>()?, x.layout(), x.last_dim());
        let weights: Vec<A> = matrix.weights.iter().map(|&c| A::of(c)).collect();
        let entries = |j: usize| {
            let run = matrix.starts[j]..matrix.starts[j + 1];
            matrix.columns[run.clone()].iter().zip(&weights[run])
        };
        let mut y = Tensor::unspecified(&shape, x.dtype());
        if dim + 1 == x.rank() {
            for_rows(y.as_mut_slice::<T>()?, m, |r, y| {
                let x = &src[l.row_offset(r)..][..n];
                for (j, y) in y.iter_mut().enumerate() {
                    let mut sum = A::ZERO;
                    for (&i, &c) in entries(j) {
                        sum += c * x[i].to_acc();
                    }
                    *y = T::from_acc(sum);
                }
            });
            return Ok(y);
        }
        let rows: usize = shape[dim + 1..shape.len() - 1].iter().product();
        for_rows(y.as_mut_slice::<T>()?, rows * w, |slice, y| {
            let (o, j) = (slice / m, slice % m);
            for (r, y) in y.chunks_exact_mut(w).enumerate() {
                for (t, y) in y.chunks_mut(TILE).enumerate() {
                    let mut acc = [A::ZERO; TILE];
                    simd(#[inline(always)] || {
                        for (&i, &c) in entries(j) {
                            let at = l.row_offset((o * n + i) * rows + r) + t * TILE;
                            for (a, x) in acc.iter_mut().zip(&src[at..at + y.len()]) {
                                *a += c * x.to_acc();
                            }
                        }
                        for (y, a) in y.iter_mut().zip(acc) {
                            *y = T::from_acc(a);
                        }
                    });
                }
            }
        });
        Ok(y)
    })
}
