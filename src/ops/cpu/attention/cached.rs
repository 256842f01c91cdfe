//! Attention to a cache on the CPU: a task for each row and key head.

use super::{View, decode, store};
use crate::ops::CacheRows;
use crate::tensor::{Float, Real, Tensor};
use crate::{Result, with_float};
use rayon::prelude::*;

/// Multiplications that a task should have at least.
const WORK: usize = 1 << 15;

pub(crate) fn forward(q: &Tensor, k: &Tensor, v: &Tensor, rows: &CacheRows, scale: f64) -> Result<Tensor> {
    let (b, heads, n, d) = (q.dim(0), q.dim(1), q.dim(2), q.dim(3));
    let mut y = Tensor::unspecified(&[b, n, heads, d], q.dtype());
    if y.numel() > 0 {
        let (key_heads, group) = (k.dim(0), heads / k.dim(0));
        let (k, v) = (k.reshape(&[&[1], k.shape()].concat())?, v.reshape(&[&[1], v.shape()].concat())?);
        let keys: usize = rows.seen().iter().map(|s| s.len()).sum();
        let least = (WORK * rows.len() / (keys * group * d).max(1)).max(1);
        with_float!(q.dtype(), "cached_attention", T => {
            let (q, k, v) = (View::<T>::of(q)?, View::<T>::of(&k)?, View::<T>::of(&v)?);
            let scale = <T as Float>::Acc::of(scale);
            y.as_mut_slice::<T>()?.par_chunks_mut(group * d).with_min_len(least).enumerate().for_each(|(task, y)| {
                let (r, head) = (task / key_heads, task % key_heads);
                let seen = &rows.seen()[r];
                let queries: Vec<&[T]> = (0..group).map(|h| q.row(r / n, head * group + h, r % n)).collect();
                let (k, v) = (|j| k.row(0, head, seen.start + j), |j| v.row(0, head, seen.start + j));
                decode::stream(&queries, |_| seen.len(), k, v, scale, |h, x, _, sum| {
                    store(&mut y[h * d..][..d], x, <T as Float>::Acc::ONE / sum);
                });
            });
            Ok(())
        })?;
    }
    y.permute(&[0, 2, 1, 3])
}
