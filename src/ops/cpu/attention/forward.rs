//! Attention forward on the CPU: online softmax over tiles of keys.

use super::tile::{self, KEYS, Lanes, ROWS, Seen, Stat};
use super::{Sizes, View, by_head, decode, gather, store, zeros};
use crate::ops::attention::Mask;
use crate::ops::cpu::rms_norm::acc_dtype;
use crate::tensor::{Float, Real, Tensor};
use crate::{Result, with_float};
use rayon::prelude::*;
use std::iter::StepBy;
use std::ops::Range;

/// The result `[B, H, Lq, d]`, lying as `[B, Lq, H, d]`, and the log-sum-exp of every row, `[B, Lq, H]`.
pub(crate) fn forward(q: &Tensor, k: &Tensor, v: &Tensor, mask: Mask, scale: f64) -> Result<(Tensor, Tensor)> {
    let n = Sizes::of(q, k, mask);
    let mut y = Tensor::unspecified(&[n.b, n.lq, n.h, n.d], q.dtype());
    let mut lse = Tensor::unspecified(&[n.b, n.lq, n.h], acc_dtype(q.dtype()));
    if y.numel() > 0 {
        with_float!(q.dtype(), "attention", T => {
            type A = <T as Float>::Acc;
            let input = Input::<T> { n, q: View::of(q)?, k: View::of(k)?, v: View::of(v)?, scale: A::of(scale) };
            input.run(y.as_mut_slice::<T>()?, lse.as_mut_slice::<A>()?);
            Ok(())
        })?;
    }
    Ok((y.permute(&[0, 2, 1, 3])?, lse))
}

pub(super) struct Input<'a, T: Float> {
    pub n: Sizes,
    pub q: View<'a, T>,
    pub k: View<'a, T>,
    pub v: View<'a, T>,
    pub scale: T::Acc,
}

/// Rows of one key head that a task computes: `[group, d]` of the result and `[group]` of the log-sum-exp each.
pub(super) struct Rows<'o, 'm, T: Float> {
    pub b: usize,
    pub head: usize,
    pub start: usize,
    pub y: &'o mut [&'m mut [T]],
    pub lse: &'o mut [&'m mut [T::Acc]],
}

/// A task's scratch memory; tiles are `[columns, width]` unless told otherwise.
struct Scratch<A> {
    /// Transposed keys, in panels.
    kt: Vec<A>,
    v: Vec<A>,
    /// New keys on their way into the panels.
    new: Vec<A>,
    /// Query rows and results, `[ROWS, width]`.
    q: Vec<A>,
    y: Vec<A>,
    /// Scores, `[ROWS, KEYS]`.
    s: Vec<A>,
    stats: Vec<Stat<A>>,
}

impl<T: Float<Acc: Lanes>> Input<'_, T> {
    fn run(&self, y: &mut [T], lse: &mut [T::Acc]) {
        let n = self.n;
        let (per_task, row) = (n.batch_per_task(), n.lq * n.h);
        let y = y.par_chunks_mut(per_task * row * n.d).zip(lse.par_chunks_mut(per_task * row));
        y.enumerate().for_each(|(task, (y, lse))| {
            let mut pieces: Vec<_> = y
                .chunks_exact_mut(row * n.d)
                .zip(lse.chunks_exact_mut(row))
                .enumerate()
                .flat_map(|(b, (y, lse))| {
                    let heads = by_head(y, n.hkv, n.group() * n.d).into_iter().zip(by_head(lse, n.hkv, n.group()));
                    heads.enumerate().map(move |(head, (y, lse))| (task * per_task + b, head, y, lse))
                })
                .collect();
            let step = self.rows_per_piece();
            let rows = pieces.iter_mut().flat_map(|(b, head, y, lse)| {
                let (b, head) = (*b, *head);
                y.chunks_mut(step).zip(lse.chunks_mut(step)).enumerate().map(move |(i, (y, lse))| Rows {
                    b,
                    head,
                    start: i * step,
                    y,
                    lse,
                })
            });
            if n.lq < decode::ROWS && !matches!(n.mask, Mask::Cat { .. }) {
                rows.collect::<Vec<_>>().into_par_iter().for_each(|rows| decode::rows(self, rows));
            } else {
                let rows: Vec<_> = rows.collect();
                rows.into_par_iter()
                    .with_min_len(if per_task > 1 { usize::MAX } else { 1 })
                    .for_each_init(|| Scratch::new(n), |scratch, rows| self.rows(scratch, rows));
            }
        });
    }

    /// Query rows that a task takes of one head: all, unless there are so few heads that threads would idle.
    fn rows_per_piece(&self) -> usize {
        const PIECES: usize = 32;
        let n = self.n;
        let unit = match n.mask {
            Mask::Cat { stride } => stride * (ROWS / stride).max(1),
            _ => ROWS,
        };
        n.lq.div_ceil(PIECES.div_ceil(n.b * n.hkv)).next_multiple_of(unit)
    }

    fn rows(&self, scratch: &mut Scratch<T::Acc>, out: Rows<T>) {
        let (n, width) = (self.n, self.n.width());
        let (b, head) = (out.b, out.head);
        if let Mask::Cat { stride } = n.mask {
            self.put(scratch, b, head, (0..out.start).step_by(stride), 0);
        }
        for block in n.blocks(out.start..out.start + out.y.len()) {
            self.put(scratch, b, head, block.keys.clone().step_by(1), block.at);
            let Scratch { kt, v, q, y, s, stats, .. } = &mut *scratch;
            for h in 0..n.group() {
                for start in block.rows.clone().step_by(ROWS) {
                    let m = ROWS.min(block.rows.end - start);
                    gather(q, width, self.scale, (start..start + m).map(|r| self.q.row(b, head * n.group() + h, r)));
                    stats.fill(Stat { max: T::Acc::NEG_INFINITY, sum: T::Acc::ZERO });
                    let first = block.first + block.step * (start - block.rows.start);
                    for tile_start in (0..first + block.step * (m - 1)).step_by(KEYS) {
                        let seen = Seen { first, step: block.step, start: tile_start };
                        tile::scores(m, n.d, q, width, kt, seen, s);
                        tile::softmax(m, seen, s, stats, y, width);
                        tile::mix(m, s, v, width, seen, y, tile_start > 0);
                    }
                    for (r, stat) in stats[..m].iter().enumerate() {
                        let row = start - out.start + r;
                        store(&mut out.y[row][h * n.d..][..n.d], &y[r * width..], T::Acc::ONE / stat.sum);
                        out.lse[row][h] = stat.max + stat.sum.ln();
                    }
                }
            }
        }
    }
}

impl<T: Float<Acc: Lanes>> Input<'_, T> {
    /// Keys and their values enter the tile from column `at` on.
    fn put(&self, x: &mut Scratch<T::Acc>, b: usize, head: usize, keys: StepBy<Range<usize>>, at: usize) {
        let (d, width) = (self.n.d, self.n.width());
        gather(&mut x.v[at * width..], width, T::Acc::ONE, keys.clone().map(|j| self.v.row(b, head, j)));
        for start in (0..keys.len()).step_by(ROWS) {
            let some = keys.clone().skip(start).take(ROWS);
            let m = some.len();
            gather(&mut x.new, width, T::Acc::ONE, some.map(|j| self.k.row(b, head, j)));
            tile::pack(&mut x.kt, d, at + start, &x.new[..m * width], width);
        }
    }
}

impl<A: Real> Scratch<A> {
    fn new(n: Sizes) -> Self {
        let (columns, width, rows) = (n.columns(), n.width(), ROWS.min(n.block_rows().max(1)));
        Self {
            kt: zeros(tile::panels(columns, n.d)),
            v: zeros(columns * width),
            new: zeros(ROWS * width),
            q: zeros(rows * width),
            y: zeros(rows * width),
            s: zeros(rows * KEYS),
            stats: vec![Stat { max: A::NEG_INFINITY, sum: A::ZERO }; rows],
        }
    }
}
