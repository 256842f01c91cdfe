//! Attention for very few query rows: keys and values stream past them once, uncopied.

use super::forward::{Input, Rows};
use super::{store, zeros};
use crate::ops::attention::Mask;
use crate::ops::cpu::{dot, simd};
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

/// Query i against keys `0..end(i)`; `take(i, y, max, sum)` is given its unnormed result, largest score and sum.
pub(super) fn stream<'a, T: Float>(
    queries: &[&[T]],
    end: impl Fn(usize) -> usize,
    k: impl Fn(usize) -> &'a [T],
    v: impl Fn(usize) -> &'a [T],
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
                        *p = dot(q, k(j)) * scale;
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
                        for (y, v) in y.iter_mut().zip(v(j)) {
                            *y = p.fma(v.to_acc(), *y);
                        }
                    }
                },
            )
        }
    }
    for i in 0..lines {
        take(i, &y[i * d..][..d], max[i], sum[i]);
    }
}
