//! Joining along a dimension on the CPU.

use crate::tensor::Tensor;
use crate::{Result, with_element};
use rayon::prelude::*;

/// Each output run of the joined dimension (all dimensions before it fixed) copies one block from every input.
pub(crate) fn concat(xs: &[&Tensor], dim: usize, shape: &[usize]) -> Result<Tensor> {
    let dtype = xs[0].dtype();
    with_element!(dtype, "concat", T => {
        let mut y = Tensor::unspecified(shape, dtype);
        let inner: usize = shape[dim..].iter().product();
        let outer: usize = shape[..dim].iter().product();
        // rows are dense runs of the last dimension; when that is the joined one, each input has rows of its own width
        let mut inputs = Vec::with_capacity(xs.len());
        for t in xs.iter().filter(|t| t.numel() > 0) {
            inputs.push(t.dense_rows()?);
        }
        let sources = inputs.iter().map(|t| t.storage_slice::<T>()).collect::<Result<Vec<_>>>()?;
        if inner == 0 {
            return Ok(y);
        }
        let runs = (16_384 / inner).max(1);
        let copy_run = |o: usize, mut out: &mut [T]| {
            for (t, src) in inputs.iter().zip(&sources) {
                let w = t.last_dim();
                let rows = t.numel() / outer / w;
                for r in 0..rows {
                    let (head, tail) = out.split_at_mut(w);
                    let at = t.layout().row_offset(o * rows + r);
                    head.copy_from_slice(&src[at..at + w]);
                    out = tail;
                }
            }
        };
        y.as_mut_slice::<T>()?.par_chunks_mut(runs * inner).enumerate().for_each(|(task, chunk)| {
            for (i, out) in chunk.chunks_exact_mut(inner).enumerate() {
                copy_run(task * runs + i, out);
            }
        });
        Ok(y)
    })
}
