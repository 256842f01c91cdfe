//! Copies of strided views: the kernels that tensors themselves need.

use super::kernels::copy;
use super::{CudaBuffer, Gpu, Grid, Packs, View};
use crate::Result;

/// Elements in device memory: where the first lies, and the strides.
#[derive(Clone, Copy)]
pub(crate) struct Place<'a> {
    pub pointer: u64,
    pub strides: &'a [usize],
}

/// The elements of a view, in row-major order, as a new buffer: by the driver where they lie so already. `from` points at the
/// view's first element; `element` is what they are and `size` how many bytes one has.
pub(crate) fn copy_strided(
    gpu: &'static Gpu,
    from: u64,
    element: &'static str,
    size: usize,
    shape: &[usize],
    strides: &[usize],
) -> Result<CudaBuffer> {
    let n: usize = shape.iter().product();
    let buffer = CudaBuffer::new(gpu, n * size)?;
    let whole = n == 1 || n > 1 && View::new("copy", shape, strides)?.dims().eq([(n, 1)]);
    let (from, to) = (Place { pointer: from, strides }, buffer.pointer());
    // SAFETY: the caller's view lies inside its storage; the buffer is new and holds as many elements.
    unsafe {
        if whole {
            gpu.copy_bytes(from.pointer, to, n * size)?;
        } else if n > 0 && !copy_transposed(gpu, element, shape, to, from)? {
            copy_elements(gpu, element, size, shape, Place { pointer: to, strides: &row_major(shape) }, from)?;
        }
    }
    Ok(buffer)
}

/// The strides of row-major order without gaps.
fn row_major(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1; shape.len()];
    for d in (1..shape.len()).rev() {
        strides[d - 1] = strides[d] * shape[d];
    }
    strides
}

/// Copy elements of `shape` from one place to another.
///
/// # Safety
///
/// Both places hold such elements, of `size` bytes, in buffers of this device that live until this returns; what is
/// written is nobody else's.
pub(crate) unsafe fn copy_elements(
    gpu: &'static Gpu,
    element: &'static str,
    size: usize,
    shape: &[usize],
    to: Place,
    from: Place,
) -> Result<()> {
    let n: usize = shape.iter().product();
    if n == 0 {
        return Ok(());
    }
    let (y, x) = (View::new("copy", shape, to.strides)?, View::new("copy", shape, from.strides)?);
    let packs = x.packs(from.pointer, size);
    let mut args = vec![to.pointer.into(), y.into(), from.pointer.into(), x.into(), n.into()];
    // SAFETY: the parameters are (to, its view, from, its view, n), and `repeat` for packs; the views' elements are there,
    // as the caller says.
    unsafe {
        if packs != Packs::None && y.packs(to.pointer, size) == Packs::Dense {
            args.push((packs == Packs::Repeated).into());
            gpu.launch(copy::copy_packed, element.into(), Grid::for_each(n.div_ceil(16 / size), 256), &args)
        } else {
            gpu.launch(copy::copy_strided, element.into(), Grid::for_each(n, 256), &args)
        }
    }
}

/// Copy to contiguous elements by tiles, where the source is dense along another dimension than the last. False where it
/// is not, and nothing is copied.
///
/// # Safety
///
/// As [`copy_elements`].
unsafe fn copy_transposed(gpu: &Gpu, element: &'static str, shape: &[usize], to: u64, from: Place) -> Result<bool> {
    /// Below this, tiles would be mostly empty.
    const LEAST: usize = 8;
    const TILE: usize = 32;
    let dims: Vec<(usize, usize)> = View::new("copy", shape, from.strides)?.dims().collect();
    let (&(columns, from_column), lead) = match dims.split_last() {
        Some(split) if split.0.0 >= LEAST && split.0.1 > 1 => split,
        _ => return Ok(false),
    };
    let Some(row_dim) = lead.iter().position(|&(n, s)| s == 1 && n >= LEAST) else { return Ok(false) };
    let sizes: Vec<usize> = dims.iter().map(|d| d.0).collect();
    let to_strides = row_major(&sizes);
    let others = || (0..lead.len()).filter(|&d| d != row_dim);
    let other_sizes: Vec<usize> = others().map(|d| sizes[d]).collect();
    let to_view = View::new("copy", &other_sizes, &others().map(|d| to_strides[d]).collect::<Vec<_>>())?;
    let from_view = View::new("copy", &other_sizes, &others().map(|d| dims[d].1).collect::<Vec<_>>())?;
    let rows = sizes[row_dim];
    let tiles = rows.div_ceil(TILE) * columns.div_ceil(TILE) * other_sizes.iter().product::<usize>();
    let grid = Grid { blocks: [tiles, 1, 1], threads: [TILE, 8, 1], ..Grid::new(0, 0) };
    let (to_row, to, from) = (to_strides[row_dim], to.into(), from.pointer.into());
    let args = [to, to_view.into(), from, from_view.into(), rows.into(), columns.into(), to_row.into(), from_column.into()];
    // SAFETY: the parameters are (to, its other dimensions, from, its other dimensions, rows, columns, to_row,
    // from_column): together the dimensions of the caller's view, and of its row-major order.
    unsafe { gpu.launch(copy::copy_transposed, element.into(), grid, &args)? };
    Ok(true)
}
