//! Writing rows into a larger tensor on CUDA, in place.

use crate::Result;
use crate::cuda::{Place, copy_elements};
use crate::tensor::Tensor;

pub(crate) fn write_rows(target: &mut Tensor, rows: &Tensor, at: usize) -> Result<()> {
    if rows.numel() == 0 {
        return Ok(());
    }
    target.make_owner()?;
    let (element, size, strides) = (target.variant()?.element, target.dtype().size(), target.layout().strides());
    let to = Place { pointer: target.pointer()? + (at * strides[2] * size) as u64, strides };
    let from = Place { pointer: rows.pointer()?, strides: rows.layout().strides() };
    // SAFETY: the rows lie inside their storage, which is another than the target's; those that are written lie inside the
    // target, which is the only owner of its own.
    unsafe { copy_elements(target.gpu()?, element, size, rows.shape(), to, from) }
}
