//! Copies of strided views: the one kernel that tensors themselves need.

use super::kernels::copy;
use super::{CudaBuffer, Gpu, Grid, View};
use crate::Result;

/// The elements of a view, in row-major order, as a new buffer. `from` points at the view's first element; `element` is
/// what they are and `size` how many bytes one has.
pub(crate) fn copy_strided(
    gpu: &'static Gpu,
    from: u64,
    element: &'static str,
    size: usize,
    shape: &[usize],
    strides: &[usize],
) -> Result<CudaBuffer> {
    let n: usize = shape.iter().product();
    let to = CudaBuffer::new(gpu, n * size)?;
    if n == 0 {
        return Ok(to);
    }
    let view = View::new("copy", shape, strides)?;
    let (width, stride) = view.innermost();
    let pack = 16 / size;
    let packed = stride == 1 && from % 16 == 0 && width % pack == 0 && view.outer_strides().all(|s| s % pack == 0);
    let (symbol, items) = if packed { (copy::copy_packed, n / pack) } else { (copy::copy_strided, n) };
    // SAFETY: the parameters are (to, from, view, n); the view's elements lie inside its tensor's storage, `to` holds n.
    unsafe {
        let args = [to.pointer().into(), from.into(), view.into(), n.into()];
        gpu.launch(symbol, element.into(), Grid::for_each(items, 256), &args)?;
    }
    Ok(to)
}
