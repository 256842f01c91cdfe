//! Attention backward on the CPU: one pass that computes the probabilities again. A task owns its key head's dK and dV
//! and runs the query heads and rows in order, so sums have one order whatever the threads.

use super::tile::{self, KEYS, Lanes, ROWS, Seen};
use super::{Sizes, View, by_head, gather, store, zeros};
use crate::ops::attention::Mask;
use crate::ops::cpu::{dot, simd};
use crate::tensor::{Float, Real, Tensor};
use crate::{Result, with_float};
use rayon::prelude::*;

/// `[dq, dk, dv]`, each lying as `[B, L, heads, d]`; `lse` is `[B, Lq, H]`.
#[allow(clippy::too_many_arguments)]
pub(crate) fn backward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    y: &Tensor,
    lse: &Tensor,
    dy: &Tensor,
    mask: Mask,
    scale: f64,
) -> Result<[Tensor; 3]> {
    let n = Sizes::of(q, k, mask);
    let mut dq = Tensor::unspecified(&[n.b, n.lq, n.h, n.d], q.dtype());
    let (mut dk, mut dv) = if dq.numel() > 0 {
        let keys = || Tensor::unspecified(&[n.b, n.lk, n.hkv, n.d], q.dtype());
        (keys(), keys())
    } else {
        // keys without queries
        let keys = || Tensor::zeros(&[n.b, n.lk, n.hkv, n.d], q.dtype(), q.device());
        (keys()?, keys()?)
    };
    if dq.numel() > 0 {
        with_float!(q.dtype(), "attention", T => {
            type A = <T as Float>::Acc;
            let [q, k, v, y, dy] = [View::of(q)?, View::of(k)?, View::of(v)?, View::of(y)?, View::of(dy)?];
            let input = Input::<T> { n, q, k, v, y, dy, lse: lse.as_slice()?, scale: A::of(scale) };
            input.run(dq.as_mut_slice()?, dk.as_mut_slice()?, dv.as_mut_slice()?);
            Ok(())
        })?;
    }
    Ok([dq.permute(&[0, 2, 1, 3])?, dk.permute(&[0, 2, 1, 3])?, dv.permute(&[0, 2, 1, 3])?])
}

struct Input<'a, T: Float> {
    n: Sizes,
    q: View<'a, T>,
    k: View<'a, T>,
    v: View<'a, T>,
    y: View<'a, T>,
    dy: View<'a, T>,
    lse: &'a [T::Acc],
    scale: T::Acc,
}

/// One key head's gradients: `[group, d]` a query row, `[d]` a key.
struct Head<'m, T> {
    b: usize,
    head: usize,
    dq: Vec<&'m mut [T]>,
    dk: Vec<&'m mut [T]>,
    dv: Vec<&'m mut [T]>,
}

/// A task's scratch memory; tiles are `[columns, width]` unless told otherwise.
struct Scratch<A> {
    k: Vec<A>,
    /// Transposed keys and values, in panels.
    kt: Vec<A>,
    vt: Vec<A>,
    /// New values on their way into the panels.
    new: Vec<A>,
    dk: Vec<A>,
    dv: Vec<A>,
    /// Query rows, their result's gradient and their own, `[ROWS, width]`.
    q: Vec<A>,
    dy: Vec<A>,
    dq: Vec<A>,
    /// Scores and then probabilities, and their gradients, `[ROWS, KEYS]`.
    s: Vec<A>,
    ds: Vec<A>,
    /// (log-sum-exp, delta) of the query rows.
    rows: Vec<(A, A)>,
}

impl<T: Float<Acc: Lanes>> Input<'_, T> {
    fn run(&self, dq: &mut [T], dk: &mut [T], dv: &mut [T]) {
        let n = self.n;
        let (per_task, q_len, k_len) = (n.batch_per_task(), n.lq * n.h * n.d, n.lk * n.hkv * n.d);
        let k = dk.par_chunks_mut(per_task * k_len).zip(dv.par_chunks_mut(per_task * k_len));
        dq.par_chunks_mut(per_task * q_len).zip(k).enumerate().for_each(|(task, (dq, (dk, dv)))| {
            let k = dk.chunks_exact_mut(k_len).zip(dv.chunks_exact_mut(k_len));
            let heads: Vec<_> = dq
                .chunks_exact_mut(q_len)
                .zip(k)
                .enumerate()
                .flat_map(|(b, (dq, (dk, dv)))| {
                    let k = by_head(dk, n.hkv, n.d).into_iter().zip(by_head(dv, n.hkv, n.d));
                    let heads = by_head(dq, n.hkv, n.group() * n.d).into_iter().zip(k).enumerate();
                    heads.map(move |(head, (dq, (dk, dv)))| Head { b: task * per_task + b, head, dq, dk, dv })
                })
                .collect();
            heads
                .into_par_iter()
                .with_min_len(if per_task > 1 { usize::MAX } else { 1 })
                .for_each_init(|| Scratch::new(n), |scratch, head| self.head(scratch, head));
        });
    }

    fn head(&self, scratch: &mut Scratch<T::Acc>, mut out: Head<T>) {
        let (n, d, width) = (self.n, self.n.d, self.n.width());
        let (b, head) = (out.b, out.head);
        // columns that stay in the tile when their block is over
        let slots = usize::from(matches!(n.mask, Mask::Cat { .. }));
        for block in n.blocks(0..n.lq) {
            let columns = block.at..block.at + block.keys.len();
            let x = &mut *scratch;
            gather(&mut x.k[block.at * width..], width, T::Acc::ONE, block.keys.clone().map(|j| self.k.row(b, head, j)));
            tile::pack(&mut x.kt, d, block.at, &x.k[block.at * width..columns.end * width], width);
            for start in block.keys.clone().step_by(ROWS) {
                let m = ROWS.min(block.keys.end - start);
                gather(&mut x.new, width, T::Acc::ONE, (start..start + m).map(|j| self.v.row(b, head, j)));
                tile::pack(&mut x.vt, d, block.at + start - block.keys.start, &x.new[..m * width], width);
            }
            x.dk[columns.start * width..columns.end * width].fill(T::Acc::ZERO);
            x.dv[columns.start * width..columns.end * width].fill(T::Acc::ZERO);
            for h in 0..n.group() {
                for start in block.rows.clone().step_by(ROWS) {
                    let m = ROWS.min(block.rows.end - start);
                    let first = block.first + block.step * (start - block.rows.start);
                    self.rows(x, b, head * n.group() + h, start, m, first, block.step);
                    for (dq, row) in x.dq.chunks_exact(width).zip(&mut out.dq[start..start + m]) {
                        store(&mut row[h * d..][..d], dq, self.scale);
                    }
                }
            }
            out.store_keys(x, width, columns.start + slots, (block.keys.start + slots..block.keys.end).step_by(1));
        }
        if let Mask::Cat { stride } = n.mask {
            out.store_keys(scratch, width, 0, (0..n.lk).step_by(stride));
        }
    }

    /// A tile of query rows against all columns that they see.
    #[allow(clippy::too_many_arguments)]
    fn rows(&self, x: &mut Scratch<T::Acc>, b: usize, h: usize, start: usize, m: usize, first: usize, step: usize) {
        let (n, width) = (self.n, self.n.width());
        let rows = start..start + m;
        gather(&mut x.q, width, self.scale, rows.clone().map(|r| self.q.row(b, h, r)));
        gather(&mut x.dy, width, T::Acc::ONE, rows.clone().map(|r| self.dy.row(b, h, r)));
        simd(
            #[inline(always)]
            || {
                for (at, r) in x.rows.iter_mut().zip(rows) {
                    let delta = dot(self.dy.row(b, h, r), self.y.row(b, h, r));
                    *at = (self.lse[(b * n.lq + r) * n.h + h], delta);
                }
            },
        );
        for tile_start in (0..first + step * (m - 1)).step_by(KEYS) {
            let seen = Seen { first, step, start: tile_start };
            tile::scores(m, n.d, &x.q, width, &x.kt, seen, &mut x.s);
            tile::scores(m, n.d, &x.dy, width, &x.vt, seen, &mut x.ds);
            tile::softmax_backward(m, seen, &mut x.s, &mut x.ds, &x.rows);
            tile::spread(m, &x.s, &x.dy, width, seen, &mut x.dv);
            tile::spread(m, &x.ds, &x.q, width, seen, &mut x.dk);
            tile::mix(m, &x.ds, &x.k, width, seen, &mut x.dq, tile_start > 0);
        }
    }
}

impl<T: Float> Head<'_, T> {
    /// Columns from `at` on are complete: write them as the gradients of `keys`.
    fn store_keys(&mut self, x: &Scratch<T::Acc>, width: usize, at: usize, keys: impl Iterator<Item = usize>) {
        let tiles = x.dk[at * width..].chunks_exact(width).zip(x.dv[at * width..].chunks_exact(width));
        for (j, (dk, dv)) in keys.zip(tiles) {
            store(self.dk[j], dk, T::Acc::ONE);
            store(self.dv[j], dv, T::Acc::ONE);
        }
    }
}

impl<A: Real> Scratch<A> {
    fn new(n: Sizes) -> Self {
        let (columns, width, rows) = (n.columns(), n.width(), ROWS.min(n.block_rows().max(1)));
        Self {
            k: zeros(columns * width),
            kt: zeros(tile::panels(columns, n.d)),
            vt: zeros(tile::panels(columns, n.d)),
            new: zeros(ROWS * width),
            dk: zeros(columns * width),
            dv: zeros(columns * width),
            q: zeros(rows * width),
            dy: zeros(rows * width),
            dq: zeros(rows * width),
            s: zeros(rows * KEYS),
            ds: zeros(rows * KEYS),
            rows: vec![(A::ZERO, A::ZERO); rows],
        }
    }
}
