//! What launchers over rows share: dtypes that have arithmetic, and how rows are given to threads.

use crate::cuda::{Grid, Variant};
use crate::tensor::Tensor;
use crate::{Error, Result};

/// What a kernel over x is compiled as. Errors where x holds no floats.
pub(crate) fn float_variant(op: &'static str, x: &Tensor) -> Result<Variant> {
    if !x.dtype().is_float() {
        return Err(Error::dtype(op, format!("needs a float dtype, got {}", x.dtype())));
    }
    x.variant()
}

/// Threads of a block.
const THREADS: usize = 256;

/// How rows are shared out: a warp takes a row, or a whole block (`Team` in kernels/rows.cuh).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Teams {
    /// Threads that share a row.
    pub lanes: usize,
    pub grid: Grid,
}

impl Teams {
    /// For `rows` rows of `width` elements. Depends on nothing else, so sums over rows have one order.
    pub fn new(rows: usize, width: usize) -> Self {
        match width {
            0..=2048 => Self { lanes: 32, grid: Grid::new(rows.div_ceil(THREADS / 32), THREADS) },
            _ => Self { lanes: THREADS, grid: Grid::new(rows, THREADS) },
        }
    }
}
