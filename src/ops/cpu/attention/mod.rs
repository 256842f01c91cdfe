//! Attention on the CPU. Every mask is cut into *blocks* of query rows in which row t sees columns `0..first + step*t` of
//! one dense tile of keys, so all that runs are small dense products with a plain staircase at the edge:
//!
//! - bidirectional: one block, step 0; causal: one block, step 1;
//! - CAT: block c of S rows. Its keys enter the tile at columns c..c+S: the slot takes column c for good, the local rows
//!   take the columns behind it until the next block overwrites them. Row t then sees slots 0..=c and its own block's
//!   rows up to itself, which is columns `0..c + 1 + t`.
//!
//! A task owns one (batch row, key head), or many where they are small, and runs its blocks in order.

mod backward;
pub mod cached;
mod decode;
mod forward;
mod tile;

pub(crate) use backward::backward;
pub(crate) use forward::forward;

use crate::Result;
use crate::ops::attention::Mask;
use crate::tensor::{Element, Float, Real, Tensor};
use std::ops::Range;

/// Sizes of one call. q is `[b, h, lq, d]`, k and v `[b, hkv, lk, d]`.
#[derive(Clone, Copy)]
struct Sizes {
    b: usize,
    h: usize,
    hkv: usize,
    lq: usize,
    lk: usize,
    d: usize,
    mask: Mask,
}

/// Rows of queries, the keys that they bring, and what they see.
struct Block {
    rows: Range<usize>,
    /// Keys to put into the tile for these rows, from column `at` on.
    keys: Range<usize>,
    at: usize,
    /// Row t of the block sees columns `0..first + step * t`.
    first: usize,
    step: usize,
}

impl Sizes {
    fn of(q: &Tensor, k: &Tensor, mask: Mask) -> Self {
        let mask = if mask == (Mask::Cat { stride: 1 }) { Mask::Causal } else { mask };
        Self { b: q.dim(0), h: q.dim(1), hkv: k.dim(1), lq: q.dim(2), lk: k.dim(2), d: q.dim(3), mask }
    }
    /// Query heads that share a key head.
    fn group(&self) -> usize {
        self.h / self.hkv.max(1)
    }
    /// Row length of tiles over the head width.
    fn width(&self) -> usize {
        self.d.next_multiple_of(tile::HALF)
    }
    /// Columns of the key tile.
    fn columns(&self) -> usize {
        match self.mask {
            Mask::Cat { stride } => self.lk.div_ceil(stride) - 1 + stride.min(self.lk),
            _ => self.lk,
        }
    }
    /// Rows that a block has at most.
    fn block_rows(&self) -> usize {
        match self.mask {
            Mask::Cat { stride } => stride,
            _ => self.lq,
        }
    }
    /// The blocks of query rows `rows`, which begin and end at block boundaries under a CAT mask.
    fn blocks(self, rows: Range<usize>) -> impl Iterator<Item = Block> {
        let size = match self.mask {
            Mask::Cat { stride } => stride,
            _ => rows.len().max(1),
        };
        rows.clone().step_by(size).map(move |start| {
            let rows = start..rows.end.min(start + size);
            match self.mask {
                Mask::Cat { stride } => {
                    let c = start / stride;
                    Block { keys: rows.clone(), rows, at: c, first: c + 1, step: 1 }
                }
                Mask::Causal => {
                    let past = self.lk - self.lq;
                    Block { keys: 0..past + rows.end, at: 0, first: past + rows.start + 1, step: 1, rows }
                }
                Mask::Bidirectional => Block { rows, keys: 0..self.lk, at: 0, first: self.lk, step: 0 },
            }
        })
    }
    /// Batch rows that one task takes: enough work to outweigh scheduling. Depends on shapes only.
    fn batch_per_task(&self) -> usize {
        let work = self.h * self.d * (self.mask.pairs(self.lq, self.lk) + 16 * self.lq);
        (1_000_000 / work.max(1)).clamp(1, self.b.max(1))
    }
}

/// A view `[B, H, L, d]` with dense rows.
#[derive(Clone, Copy)]
struct View<'a, T> {
    data: &'a [T],
    offset: usize,
    strides: [usize; 3],
    d: usize,
}

impl<'a, T: Element> View<'a, T> {
    fn of(t: &'a Tensor) -> Result<Self> {
        let (l, s) = (t.layout(), t.layout().strides());
        Ok(Self { data: t.storage_slice()?, offset: l.offset(), strides: [s[0], s[1], s[2]], d: t.dim(3) })
    }
    #[inline(always)]
    fn row(&self, b: usize, h: usize, r: usize) -> &'a [T] {
        let at = self.offset + b * self.strides[0] + h * self.strides[1] + r * self.strides[2];
        &self.data[at..at + self.d]
    }
}

/// Rows of the view into a dense tile with rows of `width`, times `scale`.
fn gather<'a, T: Float>(tile: &mut [T::Acc], width: usize, scale: T::Acc, rows: impl Iterator<Item = &'a [T]>) {
    super::simd(
        #[inline(always)]
        || {
            for (out, row) in tile.chunks_exact_mut(width).zip(rows) {
                for (y, x) in out.iter_mut().zip(row) {
                    *y = x.to_acc() * scale;
                }
            }
        },
    )
}

/// Hand out a `[rows, heads, piece]` run by head: for each of them, its piece of every row.
fn by_head<T>(data: &mut [T], heads: usize, piece: usize) -> Vec<Vec<&mut [T]>> {
    let rows = data.len() / (heads * piece).max(1);
    let mut of: Vec<Vec<&mut [T]>> = (0..heads).map(|_| Vec::with_capacity(rows)).collect();
    for row in data.chunks_exact_mut(heads * piece) {
        for (of, piece) in of.iter_mut().zip(row.chunks_exact_mut(piece)) {
            of.push(piece);
        }
    }
    of
}

fn store<T: Float>(out: &mut [T], row: &[T::Acc], factor: T::Acc) {
    for (y, x) in out.iter_mut().zip(row) {
        *y = T::from_acc(*x * factor);
    }
}

fn zeros<A: Real>(n: usize) -> Vec<A> {
    vec![A::ZERO; n]
}
