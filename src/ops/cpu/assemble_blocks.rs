//! The decoder's sequence, built of blocks and taken apart on the CPU, a row a time.

use super::elementwise::for_rows;
use super::rms_norm::total;
use super::{rows_per_task, simd};
use crate::ops::assemble_blocks::{Blocks, Row};
use crate::tensor::{DType, Float, Real, Tensor};
use crate::{Result, with_float};
use rayon::prelude::*;

/// `[B, L, D]`, of slots `[B, K+1, D]`, a separator `[1, D]` and tokens `[B, N, D]`.
pub(crate) fn forward(slots: &Tensor, separator: Option<&Tensor>, tokens: &Tensor, blocks: Blocks) -> Result<Tensor> {
    with_float!(tokens.dtype(), "assemble_blocks", T => {
        let (slots, separator, tokens) = (slots.dense_rows()?, separator.map(Tensor::contiguous).transpose()?, tokens.dense_rows()?);
        let (d, len, n) = (tokens.last_dim(), blocks.len(), blocks.tokens);
        let (of_slots, of_tokens) = (slots.storage_slice::<T>()?, tokens.storage_slice::<T>()?);
        let separator = separator.as_ref().map_or(Ok(&[][..]), |s| s.as_slice::<T>())?;
        let mut y = Tensor::unspecified(&[tokens.dim(0), len, d], tokens.dtype());
        for_rows(y.as_mut_slice::<T>()?, d, |i, y| {
            let b = i / len;
            y.copy_from_slice(match blocks.row(i % len) {
                Row::Slot(k) => &of_slots[slots.layout().row_offset(b * blocks.slots() + k)..][..d],
                Row::Separator => separator,
                Row::Token(j) => &of_tokens[tokens.layout().row_offset(b * n + j)..][..d],
            });
        });
        Ok(y)
    })
}

/// The gradients of slots and tokens: rows of dy `[B, L, D]`, which are dense.
pub(crate) fn backward(dy: &Tensor, blocks: Blocks) -> Result<(Tensor, Tensor)> {
    with_float!(dy.dtype(), "assemble_blocks", T => {
        let (batch, d, source) = (dy.dim(0), dy.last_dim(), dy.storage_slice::<T>()?);
        let part = |rows: usize, row: &(dyn Fn(usize) -> Option<usize> + Sync)| -> Result<Tensor> {
            let mut part = Tensor::unspecified(&[batch, rows, d], dy.dtype());
            for_rows(part.as_mut_slice::<T>()?, d, |i, to| match row(i % rows) {
                Some(row) => to.copy_from_slice(&source[dy.layout().row_offset(i / rows * blocks.len() + row)..][..d]),
                None => to.fill(T::from_acc(<T as Float>::Acc::ZERO)),
            });
            Ok(part)
        };
        Ok((part(blocks.slots(), &|k| Some(k * blocks.stride()))?, part(blocks.tokens, &|j| blocks.of_token(j))?))
    })
}

/// `sum + the rows of dy that are separators`, `[1, D]`, kept in `dtype`.
pub(crate) fn separator_gradient(dy: &Tensor, blocks: Blocks, sum: Option<Tensor>, dtype: DType) -> Result<Tensor> {
    with_float!(dy.dtype(), "assemble_blocks", T => {
        type A = <T as Float>::Acc;
        let (slots, d, source) = (blocks.slots(), dy.last_dim(), dy.storage_slice::<T>()?);
        let separators = if d == 0 { 0 } else { dy.dim(0) * slots };
        let task = rows_per_task(d);
        // per task, and then over tasks in order: the same sum for any number of threads
        let partial: Vec<Vec<A>> = (0..separators.div_ceil(task))
            .into_par_iter()
            .map(|t| {
                let mut partial = vec![A::ZERO; d];
                for i in t * task..separators.min((t + 1) * task) {
                    let at = dy.layout().row_offset(i / slots * blocks.len() + i % slots * blocks.stride() + 1);
                    let row = &source[at..at + d];
                    simd(#[inline(always)] || {
                        for (sum, x) in partial.iter_mut().zip(row) {
                            *sum += x.to_acc();
                        }
                    });
                }
                partial
            })
            .collect();
        total(&partial.concat(), d, sum, dtype)?.reshape(&[1, d])
    })
}
