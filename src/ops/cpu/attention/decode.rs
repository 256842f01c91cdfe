//! Attention for very few query rows: keys and values stream past them once, uncopied.

use super::forward::{Input, Rows};
use super::{store, zeros};
use crate::ops::attention::Mask;
use crate::ops::cpu::{dot, simd, sum_over};
use crate::tensor::{Float, Real};

/// With fewer query rows than this, transposing the keys would cost more than it saves.
pub const ROWS: usize = 4;

/// Keys of a step of the online softmax.
const KEYS: usize = 64;

pub(super) fn rows<T: Float>(x: &Input<T>, out: Rows<T>) {
    let (n, b, head) = (x.n, out.b, out.head);
    let Rows { y: out, lse, .. } = out;
    let lines = out.len() * n.group();
    // line i is query row i / group of query head i % group
    let queries: Vec<&[T]> = (0..lines).map(|i| x.q.row(b, head * n.group() + i % n.group(), i / n.group())).collect();
    let end = |i: usize| match n.mask {
        Mask::Causal => n.lk - n.lq + i / n.group() + 1,
        _ => n.lk,
    };
    stream(
        &queries,
        end,
        |j| x.k.row(b, head, j),
        |j| x.v.row(b, head, j),
        x.scale,
        |i, y, max, sum| {
            let (r, h) = (i / n.group(), i % n.group());
            store(&mut out[r][h * n.d..][..n.d], y, T::Acc::ONE / sum);
            lse[r][h] = max + sum.ln();
        },
    );
}

/// A row of keys or of values, as it is kept.
pub(super) trait Kept<T: Float> {
    /// `q . row`.
    fn dot(&self, q: &[T]) -> T::Acc;
    /// `y += p row`.
    fn add_to(&self, y: &mut [T::Acc], p: T::Acc);
}

impl<T: Float> Kept<T> for &[T] {
    #[inline(always)]
    fn dot(&self, q: &[T]) -> T::Acc {
        dot(q, self)
    }
    #[inline(always)]
    fn add_to(&self, y: &mut [T::Acc], p: T::Acc) {
        for (y, x) in y.iter_mut().zip(*self) {
            *y = p.fma(x.to_acc(), *y);
        }
    }
}

/// 8-bit numbers, and what they are multiplied by.
pub(super) struct Int8Row<'a> {
    pub numbers: &'a [i8],
    pub scale: f32,
}

impl<T: Float> Kept<T> for Int8Row<'_> {
    #[inline(always)]
    fn dot(&self, q: &[T]) -> T::Acc {
        let (n, x) = (q.len().min(self.numbers.len()), self.numbers);
        let (q, x) = (&q[..n], &x[..n]);
        sum_over(n, |i| q[i].to_acc() * T::Acc::of_i8(x[i])) * T::Acc::of(self.scale.into())
    }
    #[inline(always)]
    fn add_to(&self, y: &mut [T::Acc], p: T::Acc) {
        let p = p * T::Acc::of(self.scale.into());
        for (y, x) in y.iter_mut().zip(self.numbers) {
            *y = p.fma(T::Acc::of_i8(*x), *y);
        }
    }
}

/// Query i against keys `0..end(i)`; `take(i, y, max, sum)` is given its unnormed result, largest score and sum.
pub(super) fn stream<T: Float, K: Kept<T>>(
    queries: &[&[T]],
    end: impl Fn(usize) -> usize,
    k: impl Fn(usize) -> K,
    v: impl Fn(usize) -> K,
    scale: T::Acc,
    mut take: impl FnMut(usize, &[T::Acc], T::Acc, T::Acc),
) {
    let (lines, d) = (queries.len(), queries.first().map_or(0, |q| q.len()));
    let last = (0..lines).map(&end).max().unwrap_or(0);
    let (mut y, mut max, mut sum) = (zeros::<T::Acc>(lines * d), vec![T::Acc::NEG_INFINITY; lines], zeros::<T::Acc>(lines));
    for start in (0..last).step_by(KEYS) {
        for (i, q) in queries.iter().enumerate() {
            let end = end(i).min(start + KEYS);
            if end <= start {
                continue;
            }
            let y = &mut y[i * d..][..d];
            simd(
                #[inline(always)]
                || {
                    let mut p = [T::Acc::ZERO; KEYS];
                    let p = &mut p[..end - start];
                    let mut top = max[i];
                    for (p, j) in p.iter_mut().zip(start..) {
                        *p = k(j).dot(q) * scale;
                        top = p.maximum(top);
                    }
                    let shrink = (max[i] - top).exp();
                    max[i] = top;
                    for y in y.iter_mut() {
                        *y *= shrink;
                    }
                    sum[i] *= shrink;
                    for p in p.iter_mut() {
                        *p = (*p - top).exp();
                    }
                    for (p, j) in p.iter().zip(start..) {
                        sum[i] += *p;
                        v(j).add_to(y, *p);
                    }
                },
            )
        }
    }
    for i in 0..lines {
        take(i, &y[i * d..][..d], max[i], sum[i]);
    }
}
