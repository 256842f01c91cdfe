//! Writing rows into a larger tensor on the CPU.

use crate::tensor::Tensor;
use crate::{Result, with_element};

pub(crate) fn write_rows(target: &mut Tensor, rows: &Tensor, at: usize) -> Result<()> {
    let (n, d, all) = (rows.dim(2), rows.dim(3), target.dim(2));
    let rows = rows.dense_rows()?;
    with_element!(target.dtype(), "write_rows", T => {
        let src = rows.storage_slice::<T>()?;
        if all * d == 0 {
            return Ok(());
        }
        for (i, head) in target.as_mut_slice::<T>()?.chunks_exact_mut(all * d).enumerate() {
            for (r, out) in head[at * d..(at + n) * d].chunks_exact_mut(d).enumerate() {
                let from = rows.layout().row_offset(i * n + r);
                out.copy_from_slice(&src[from..from + d]);
            }
        }
        Ok(())
    })
}
