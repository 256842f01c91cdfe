//! A sparse matrix applied along a dimension, on CUDA.

use super::rows::{Slices, float_variant};
use crate::cuda::{Grid, kernels::interpolate as kernel};
use crate::ops::interpolate::SparseRows;
use crate::tensor::Tensor;
use crate::{Error, Result};

/// Rows that a thread of `interpolate_last` takes (`ROWS` in the kernel).
const ROWS: usize = 8;
/// Threads of a block.
const THREADS: usize = 256;

/// `y[o, j, ..] = sum of weight * x[o, column, ..]` over the entries of row j, o over the dimensions before `dim`.
pub(crate) fn apply(x: &Tensor, dim: usize, matrix: &SparseRows) -> Result<Tensor> {
    let variant = float_variant("interpolate", x)?;
    let m = matrix.len();
    let mut shape = x.shape().to_vec();
    shape[dim] = m;
    let mut y = Tensor::empty(&shape, x.dtype(), x.device())?;
    let n = y.numel();
    if n == 0 {
        return Ok(y);
    }
    // columns and weights share 64 bits
    if x.dim(dim) > u32::MAX as usize {
        return Err(Error::shape("interpolate", format!("dimension {dim} of shape {:?} is too long", x.shape())));
    }
    let mut lists: Vec<i64> = matrix.starts.iter().map(|&s| s as i64).collect();
    let pairs = matrix.columns.iter().zip(&matrix.weights);
    lists.extend(pairs.map(|(&column, &weight)| ((column as u64) << 32 | u64::from((weight as f32).to_bits())) as i64));
    let count = lists.len();
    let lists = Tensor::from_vec(lists, &[count])?.to_device(x.device())?;
    let (starts, entries) = (lists.pointer()?, lists.pointer()? + (matrix.starts.len() * size_of::<i64>()) as u64);

    let last = Slices::new("interpolate", x, dim)?;
    // where neighbours along the dimension lie apart, a copy (by tiles) costs less than reading across
    let x = if last.width == 1 && last.stride > 1 { x.contiguous()? } else { x.clone() };
    let s = Slices::new("interpolate", &x, dim)?;
    let (to, from, lists) = (y.write()?, x.read()?, [starts.into(), entries.into()]);
    if s.width == 1 {
        let grid = Grid::new(m.div_ceil(THREADS) * s.leads.div_ceil(ROWS), THREADS);
        let args = [&[to, from, s.lead.into(), s.stride.into()][..], &lists, &[s.leads.into(), m.into()]].concat();
        // SAFETY: the parameters are (y, x, lead view, stride, starts, entries, leads, m); columns lie inside the dimension,
        // y is new and holds leads m elements.
        unsafe { x.gpu()?.launch(kernel::interpolate_last, variant, grid, &args)? };
    } else {
        let (symbol, each) = if s.packed { (kernel::interpolate_packed, s.pack) } else { (kernel::interpolate, 1) };
        let views = [to, from, s.lead.into(), s.inner.into(), s.stride.into()];
        let args = [&views[..], &lists, &[m.into(), s.width.into(), n.into()]].concat();
        // SAFETY: the parameters are (y, x, lead view, inner view, stride, starts, entries, m, w, n); columns lie inside the
        // dimension, y is new and holds n elements.
        unsafe { x.gpu()?.launch(symbol, variant, Grid::for_each(n / each, THREADS), &args)? };
    }
    Ok(y)
}
