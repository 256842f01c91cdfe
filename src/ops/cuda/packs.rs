//! Rows as kernels move them: 16 bytes at a time where all of them allow it.

use crate::cuda::Variant;
use crate::tensor::Tensor;
use crate::{Error, Result};

/// Elements of 16 bytes.
pub(super) fn pack(t: &Tensor) -> usize {
    16 / t.dtype().size()
}

/// True where every row of `t` (dense along the last dimension) begins and ends on 16 bytes.
pub(super) fn in_packs(op: &'static str, t: &Tensor) -> Result<bool> {
    in_packs_of(16, op, t)
}

/// The same for packs of another number of bytes.
pub(super) fn in_packs_of(bytes: usize, op: &'static str, t: &Tensor) -> Result<bool> {
    let n = bytes / t.dtype().size();
    let outer = t.rows(op)?;
    Ok(t.pointer()?.is_multiple_of(bytes as u64)
        && t.last_dim().is_multiple_of(n)
        && outer.dims().all(|(_, stride)| stride.is_multiple_of(n)))
}

/// The module for rows of these tensors: `PACKED=1` where all are [`in_packs`], else `PACKED=0`. They are of one dtype, as
/// kernels take for granted.
pub(super) fn variant(op: &'static str, tensors: &[&Tensor]) -> Result<Variant> {
    let mut packed = true;
    let element = super::rows::float_variant(op, tensors[0])?;
    for t in tensors {
        if t.dtype() != tensors[0].dtype() {
            return Err(Error::dtype(op, format!("{} beside {}: cast one of them", t.dtype(), tensors[0].dtype())));
        }
        packed &= in_packs(op, t)?;
    }
    let define = Some(if packed { "PACKED=1" } else { "PACKED=0" });
    Ok(Variant { define, ..element })
}
