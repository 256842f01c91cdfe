//! Gathering slices along a dimension and scattering their gradients back, on the CPU.

use super::elementwise::for_rows;
use super::simd;
use crate::tensor::{DType, Float, Real, Tensor};
use crate::{Result, with_element, with_float};

/// x with dense rows, and a dimension of one behind `dim` if that is the last: so that slices always end in a row.
fn sliced(x: &Tensor, dim: usize) -> Result<Tensor> {
    if dim + 1 < x.rank() {
        return x.dense_rows();
    }
    x.reshape(&[x.shape(), &[1]].concat())
}

/// `y[o, j, ..] = x[o, index[j], ..]`, o over the dimensions before `dim`.
pub(crate) fn gather(x: &Tensor, dim: usize, index: &[usize]) -> Result<Tensor> {
    let mut shape = x.shape().to_vec();
    shape[dim] = index.len();
    let (n, m) = (x.dim(dim), index.len());
    let x = sliced(x, dim)?;
    let w = x.last_dim();
    let rows: usize = x.shape()[dim + 1..x.rank() - 1].iter().product();
    with_element!(x.dtype(), "index_select", T => {
        let mut y = Tensor::unspecified(&shape, x.dtype());
        let (src, l) = (x.storage_slice::<T>()?, x.layout());
        for_rows(y.as_mut_slice::<T>()?, rows * w, |slice, y| {
            let (o, j) = (slice / m, slice % m);
            for (r, y) in y.chunks_exact_mut(w).enumerate() {
                let at = l.row_offset((o * n + index[j]) * rows + r);
                y.copy_from_slice(&src[at..at + w]);
            }
        });
        Ok(y)
    })
}

/// `sum[o, i, ..] += sum of dy[o, j, ..] over j with index[j] = i`, j ascending; `shape` is that of `sum`, `dtype` its dtype.
///
/// Each slice of the sum has one owner, whatever the threads, and positions are grouped by index beforehand.
pub(crate) fn scatter_add(
    dy: &Tensor,
    dim: usize,
    index: &[usize],
    shape: &[usize],
    sum: Option<Tensor>,
    dtype: DType,
) -> Result<Tensor> {
    const TILE: usize = 256;
    let (n, m) = (shape[dim], index.len());
    let (starts, order) = group(index, n);
    let dy = sliced(dy, dim)?;
    let w = dy.last_dim();
    let rows: usize = dy.shape()[dim + 1..dy.rank() - 1].iter().product();
    let mut dx = match sum {
        Some(sum) => sum,
        None => Tensor::zeros(shape, dtype, dy.device())?,
    };
    with_float!(dy.dtype(), "index_select", T => with_float!(dtype, "index_select", D => {
        type A = <T as Float>::Acc;
        let (src, l) = (dy.storage_slice::<T>()?, dy.layout());
        for_rows(dx.as_mut_slice::<D>()?, rows * w, |slice, dx| {
            let (o, i) = (slice / n, slice % n);
            let from = &order[starts[i]..starts[i + 1]];
            if from.is_empty() {
                return;
            }
            for (r, dx) in dx.chunks_exact_mut(w).enumerate() {
                for (t, dx) in dx.chunks_mut(TILE).enumerate() {
                    let mut acc = [A::ZERO; TILE];
                    simd(#[inline(always)] || {
                        for &j in from {
                            let at = l.row_offset((o * m + j) * rows + r) + t * TILE;
                            for (a, g) in acc.iter_mut().zip(&src[at..at + dx.len()]) {
                                *a += g.to_acc();
                            }
                        }
                        for (dx, a) in dx.iter_mut().zip(acc) {
                            *dx = D::from_acc(dx.to_acc() + <D as Float>::Acc::of(a.f64()));
                        }
                    });
                }
            }
        });
        Ok(dx)
    }))
}

/// Positions grouped by index (a counting sort): those of index i are `order[starts[i]..starts[i + 1]]`, ascending.
pub(crate) fn group(index: &[usize], n: usize) -> (Vec<usize>, Vec<usize>) {
    let mut starts = vec![0; n + 1];
    for &i in index {
        starts[i + 1] += 1;
    }
    for i in 0..n {
        starts[i + 1] += starts[i];
    }
    let mut next = starts.clone();
    let mut order = vec![0; index.len()];
    for (j, &i) in index.iter().enumerate() {
        order[next[i]] = j;
        next[i] += 1;
    }
    (starts, order)
}
