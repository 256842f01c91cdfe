//! What launchers over rows and slices share: dtypes that have arithmetic, how rows are given to threads, where slices lie.

use crate::cuda::{Grid, Packs, Variant, View};
use crate::tensor::Tensor;
use crate::{Error, Result};

/// What a kernel over x is compiled as. Errors where x holds no floats.
pub(crate) fn float_variant(op: &'static str, x: &Tensor) -> Result<Variant> {
    if !x.dtype().is_float() {
        return Err(Error::dtype(op, format!("needs a float dtype, got {}", x.dtype())));
    }
    x.variant()
}

/// Threads of a block, save for the longest rows.
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
            2049..=16_384 => Self { lanes: THREADS, grid: Grid::new(rows, THREADS) },
            _ => Self { lanes: 1024, grid: Grid::new(rows, 1024) },
        }
    }
}

/// A tensor as slices along one dimension: element `[o, j, k]` lies at `lead(o) + j * stride + inner(k)`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slices {
    /// The dimensions before, of `leads` elements.
    pub lead: View,
    pub leads: usize,
    pub stride: usize,
    /// The dimensions behind, of `width` elements.
    pub inner: View,
    pub width: usize,
    /// Elements in 16 bytes.
    pub pack: usize,
    /// True where every slice can be taken 16 bytes at a time.
    pub packed: bool,
}

impl Slices {
    pub fn new(op: &'static str, x: &Tensor, dim: usize) -> Result<Self> {
        let (shape, strides) = (x.shape(), x.layout().strides());
        let lead = View::new(op, &shape[..dim], &strides[..dim])?;
        let inner = View::new(op, &shape[dim + 1..], &strides[dim + 1..])?;
        let width = shape[dim + 1..].iter().product();
        let stride = if shape[dim] == 1 { 0 } else { strides[dim] };
        let (size, pack) = (x.dtype().size(), 16 / x.dtype().size());
        let packed = width % pack == 0
            && stride % pack == 0
            && lead.dims().all(|(_, s)| s % pack == 0)
            && inner.packs(x.pointer()?, size) == Packs::Dense;
        Ok(Self { lead, leads: shape[..dim].iter().product(), stride, inner, width, pack, packed })
    }
}
