//! Rotary position embedding on the CPU, in the order in which x lies in memory.

use super::elementwise::for_rows;
use super::simd;
use crate::ops::rope::RopeTable;
use crate::tensor::{Float, Tensor};
use crate::{Result, with_float};

/// Turn x `[.., L, d]` by the table's angles, or back by them.
pub(crate) fn rotate(x: &Tensor, table: &RopeTable, back: bool) -> Result<Tensor> {
    with_float!(x.dtype(), "rope", T => {
        let x = x.dense_rows()?;
        let (rank, d) = (x.rank(), x.last_dim());
        let mut order: Vec<usize> = (0..rank - 1).collect();
        order.sort_by_key(|&i| std::cmp::Reverse(x.layout().strides()[i]));
        order.push(rank - 1);
        let mut inverse = vec![0; rank];
        for (i, &o) in order.iter().enumerate() {
            inverse[o] = i;
        }
        // rows lie in groups of one stride: `inner` heads of a position, or positions of a head
        let v = x.permute(&order)?;
        let (inner, stride) = (v.dim(rank - 2), v.layout().strides()[rank - 2]);
        let at = inverse[rank - 2];
        // consecutive groups that share a position, or 0 where the position changes inside a group
        let repeat: usize = if at == rank - 2 { 0 } else { v.shape()[at + 1..rank - 2].iter().product() };
        let (src, l) = (v.storage_slice::<T>()?, v.layout());
        let (rows, n) = (table.rows(), table.width());
        let angles = table.table(x.dtype()).as_slice::<<T as Float>::Acc>()?;
        let mut y = Tensor::unspecified(v.shape(), x.dtype());
        for_rows(y.as_mut_slice::<T>()?, inner * d, |g, y| {
            let from = l.row_offset(g * inner);
            simd(#[inline(always)] || {
                for (p, y) in y.chunks_exact_mut(d).enumerate() {
                    let position = g.checked_div(repeat).map_or(p, |i| i % rows.len());
                    let x = &src[from + p * stride..][..d];
                    turn(x, &angles[rows[position] * n..][..n], back, y);
                }
            });
        });
        y.permute(&inverse)
    })
}

/// One head, whose first elements turn by as many angles; from one type into another.
#[inline(always)]
pub(super) fn turn<S: Float<Acc = T::Acc>, T: Float>(x: &[S], angles: &[T::Acc], back: bool, y: &mut [T]) {
    let n = angles.len();
    let h = n / 2;
    let (cos, sin) = angles.split_at(h);
    let ((x1, x2), tail) = (x[..n].split_at(h), &x[n..]);
    let (y12, rest) = y.split_at_mut(n);
    let (y1, y2) = y12.split_at_mut(h);
    for i in 0..h {
        let (a, b, c) = (x1[i].to_acc(), x2[i].to_acc(), cos[i]);
        let s = if back { -sin[i] } else { sin[i] };
        y1[i] = T::from_acc(a * c - b * s);
        y2[i] = T::from_acc(b * c + a * s);
    }
    for (y, x) in rest.iter_mut().zip(tail) {
        *y = T::from_acc(x.to_acc());
    }
}
