//! The gated product of hundreds of rows on Hopper: kernels/gated_rows.cu.

use super::super::fused_linear::FusedLinear;
use crate::Result;
use crate::cuda::{Gpu, Grid, Kind, boxes, kernels::gated_rows as kernel};
use crate::tensor::{DType, Tensor};
use std::ops::RangeInclusive;

/// Of a block, as in the kernel: rows, columns, threads, and bytes of shared memory.
const ROWS: usize = 160;
const COLUMNS: usize = 96;
const THREADS: usize = 416;
const SHARED: usize = 225_536;
/// Lines that a copy brings, of weights and of x.
const BOXES: [usize; 2] = [24, 80];
/// Rows for which it was seen ahead of cuBLASLt, whose tiles suit up to 256 better.
const TAKEN: RangeInclusive<usize> = 257..=320;

/// True for x `[R, I]` and a map, checked, that the kernel takes and is worth it.
pub(crate) fn takes(x: &Tensor, map: &FusedLinear) -> Result<bool> {
    let Some(up) = map.up else { return Ok(false) };
    let (gpu, rows, k, columns) = (x.gpu()?, x.dim(0), x.dim(1), map.weight.dim(0));
    let processors = gpu.multiprocessors as usize;
    // lines of 16 bytes throughout, as the copy engine has it
    let lines = |t: &Tensor| {
        let stride = t.layout().strides()[0];
        let aligned = t.pointer()?.is_multiple_of(16) && stride > 0 && stride.is_multiple_of(8);
        Ok::<_, crate::Error>(aligned && t.has_dense_rows())
    };
    Ok(gpu.capability == (9, 0)
        && gpu.shared_per_block as usize >= SHARED
        && matches!(x.dtype(), DType::BF16 | DType::F16)
        && TAKEN.contains(&rows)
        && k > 0
        && k.is_multiple_of(8)
        && columns.is_multiple_of(4)
        // one round of blocks, which are almost all multiprocessors
        && (processors * 3 / 4..=processors).contains(&blocks(rows, columns))
        && (map.norm.is_some() || lines(x)?)
        && lines(map.weight)?
        && lines(up)?)
}

fn blocks(rows: usize, columns: usize) -> usize {
    rows.div_ceil(ROWS) * columns.div_ceil(COLUMNS)
}

/// The result `[R, O]` for n `[R, I]`, after the norm; `None` where n does not lie as the copies take it.
pub(crate) fn product(n: &Tensor, map: &FusedLinear) -> Result<Option<Tensor>> {
    let Some(up) = map.up else { return Ok(None) };
    let (gpu, n, kind) = (n.gpu()?, n.dense_rows()?, if n.dtype() == DType::BF16 { Kind::BF16 } else { Kind::F16 });
    let (rows, k, columns) = (n.dim(0), n.dim(1), map.weight.dim(0));
    let matrix = |t: &Tensor, lines: usize| {
        let stride = t.layout().strides()[0];
        boxes(gpu as &Gpu, t.pointer()?, kind, [k, t.dim(0), 1], [1, stride, stride], lines)
    };
    let weights = matrix(map.weight, BOXES[0])?.zip(matrix(up, BOXES[0])?);
    let (Some((w, up)), Some(x)) = (weights, matrix(&n, BOXES[1])?) else { return Ok(None) };
    let mut y = Tensor::empty(&[rows, columns], n.dtype(), n.device())?;
    let words = [rows, k, columns, usize::from(map.settled)].map(|n| n as u64);
    let args = [w, up, x, y.write()?, words.into()];
    let grid = Grid::new(blocks(rows, columns), THREADS).shared(SHARED).early(map.settled);
    // SAFETY: the parameters are the maps of w, up and n, (y, words); shapes and dtypes are checked by the op, and the maps say
    // where each matrix ends; y is new, [rows, columns] and contiguous. Shared memory is what the kernel lays out. Weights are all
    // that is read before earlier kernels are done, if those have nothing to do with them (`settled`).
    unsafe { gpu.launch(kernel::gated_rows, n.variant()?, grid, &args)? };
    Ok(Some(y))
}
