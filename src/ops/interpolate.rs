//! Linear interpolation along a dimension (spec section 3): how the compressor's projection is resized to a chunk size.
//!
//! Half-pixel centres, no antialiasing: with `r = old / new`, output j reads `p = max(0, (j + 0.5) r - 0.5)`, `i = floor(p)`,
//! `t = p - i`: `y[j] = (1 - t) x[i] + t x[min(i + 1, old - 1)]`. That is a sparse matrix along the dimension; backward
//! applies its transpose.

use super::cpu;
use crate::autograd::{Var, record_one};
use crate::tensor::Tensor;
use crate::{Error, Result};

/// A sparse matrix by rows: `y[j] = sum of weight * x[column]` over the entries `starts[j]..starts[j + 1]`.
pub(crate) struct SparseRows {
    pub starts: Vec<usize>,
    pub columns: Vec<usize>,
    pub weights: Vec<f64>,
}

impl SparseRows {
    /// From entries `(row, column, weight)`; those of a row stay in their order.
    fn new(rows: usize, entries: &[(usize, usize, f64)]) -> Self {
        let (starts, order) = cpu::gather::group(&entries.iter().map(|e| e.0).collect::<Vec<_>>(), rows);
        let columns = order.iter().map(|&k| entries[k].1).collect();
        Self { starts, columns, weights: order.iter().map(|&k| entries[k].2).collect() }
    }
    pub fn len(&self) -> usize {
        self.starts.len() - 1
    }
}

/// The entries `(j, i, weight)` of the interpolation from `old` to `new` elements.
fn entries(old: usize, new: usize) -> Vec<(usize, usize, f64)> {
    let ratio = old as f64 / new as f64;
    let mut entries = Vec::with_capacity(2 * new);
    for j in 0..new {
        let p = ((j as f64 + 0.5) * ratio - 0.5).max(0.0);
        let i = (p as usize).min(old - 1);
        let t = p - i as f64;
        if i + 1 < old && t > 0.0 {
            entries.extend([(j, i, 1.0 - t), (j, i + 1, t)]);
        } else {
            entries.push((j, i, 1.0));
        }
    }
    entries
}

/// Resize `dim` to `size` elements, smaller or larger, by linear interpolation.
pub fn interpolate(x: &Var, dim: usize, size: usize) -> Result<Var> {
    let old = match x.shape().get(dim) {
        Some(&old) if old > 0 && size > 0 => old,
        _ => {
            let detail = format!("cannot resize dimension {dim} of shape {:?} to {size}", x.shape());
            return Err(Error::shape("interpolate", detail));
        }
    };
    if size == old {
        return Ok(x.clone());
    }
    let entries = entries(old, size);
    let y = apply(x.value(), dim, &SparseRows::new(size, &entries))?;
    Ok(record_one("interpolate", &[x], y, move |flow| {
        let dy = flow.output()?;
        let transposed: Vec<_> = entries.iter().map(|&(j, i, weight)| (i, j, weight)).collect();
        flow.give(0, apply(&dy, dim, &SparseRows::new(old, &transposed))?)
    }))
}

fn apply(x: &Tensor, dim: usize, matrix: &SparseRows) -> Result<Tensor> {
    on_device!(x.device(), interpolate::apply(x, dim, matrix))
}
