//! Attention to a cache on the CPU: a task for each row and key head.

use super::decode::{self, Int8Row, Kept};
use super::{View, store};
use crate::ops::{CacheRows, Int8Rows};
use crate::tensor::{Element, Float, Real, Tensor};
use crate::{Result, with_float};
use rayon::prelude::*;

/// Multiplications that a task should have at least.
const WORK: usize = 1 << 15;

pub(crate) fn forward(q: &Tensor, k: &Tensor, v: &Tensor, rows: &CacheRows, scale: f64) -> Result<Tensor> {
    with_float!(q.dtype(), "cached_attention", T => {
        let (k, v) = (Rows::<T>::of(k)?, Rows::<T>::of(v)?);
        attend::<T, _>(q, k.heads, |h, j| k.row(h, j), |h, j| v.row(h, j), rows, scale)
    })
}

pub(crate) fn forward_int8(q: &Tensor, k: &Int8Rows, v: &Int8Rows, rows: &CacheRows, scale: f64) -> Result<Tensor> {
    with_float!(q.dtype(), "cached_attention", T => {
        let (k_scales, v_scales) = (k.scales.as_slice::<f32>()?, v.scales.as_slice::<f32>()?);
        let (k, v) = (Rows::<i8>::of(&k.numbers)?, Rows::<i8>::of(&v.numbers)?);
        let key = |h, j| Int8Row { numbers: k.row(h, j), scale: k_scales[h * k.all + j] };
        let value = |h, j| Int8Row { numbers: v.row(h, j), scale: v_scales[h * v.all + j] };
        attend::<T, _>(q, k.heads, key, value, rows, scale)
    })
}

/// Rows `[heads, all, d]`, each dense.
struct Rows<'a, T> {
    data: &'a [T],
    offset: usize,
    strides: [usize; 2],
    heads: usize,
    all: usize,
    d: usize,
}

impl<'a, T: Element> Rows<'a, T> {
    fn of(t: &'a Tensor) -> Result<Self> {
        let (l, s) = (t.layout(), t.layout().strides());
        let (heads, all, d) = (t.dim(0), t.dim(1), t.dim(2));
        Ok(Self { data: t.storage_slice()?, offset: l.offset(), strides: [s[0], s[1]], heads, all, d })
    }
    #[inline(always)]
    fn row(&self, h: usize, j: usize) -> &'a [T] {
        let at = self.offset + h * self.strides[0] + j * self.strides[1];
        &self.data[at..at + self.d]
    }
}

/// Queries against the keys and values of number j of a key head.
fn attend<T: Float, K: Kept<T>>(
    q: &Tensor,
    key_heads: usize,
    k: impl Fn(usize, usize) -> K + Sync,
    v: impl Fn(usize, usize) -> K + Sync,
    rows: &CacheRows,
    scale: f64,
) -> Result<Tensor> {
    let (b, heads, n, d) = (q.dim(0), q.dim(1), q.dim(2), q.dim(3));
    let mut y = Tensor::unspecified(&[b, n, heads, d], q.dtype());
    if y.numel() > 0 {
        let group = heads / key_heads;
        let keys: usize = rows.seen().iter().map(|s| s.len()).sum();
        let least = (WORK * rows.len() / (keys * group * d).max(1)).max(1);
        let (q, scale) = (View::<T>::of(q)?, <T as Float>::Acc::of(scale));
        y.as_mut_slice::<T>()?.par_chunks_mut(group * d).with_min_len(least).enumerate().for_each(|(task, y)| {
            let (r, head) = (task / key_heads, task % key_heads);
            let seen = &rows.seen()[r];
            let queries: Vec<&[T]> = (0..group).map(|h| q.row(r / n, head * group + h, r % n)).collect();
            let (k, v) = (|j| k(head, seen.start + j), |j| v(head, seen.start + j));
            decode::stream(
                &queries,
                |_| seen.len(),
                k,
                v,
                scale,
                |h, x, _, sum| {
                    store(&mut y[h * d..][..d], x, <T as Float>::Acc::ONE / sum);
                },
            );
        });
    }
    y.permute(&[0, 2, 1, 3])
}
