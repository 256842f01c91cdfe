//! Writing rows into a larger tensor on the CPU.

use crate::ops::CacheRows;
use crate::tensor::Tensor;
use crate::{Result, with_element};

pub(crate) fn write_rows(targets: &mut [&mut Tensor], xs: &[&Tensor], rows: &CacheRows) -> Result<()> {
    targets.iter_mut().zip(xs).try_for_each(|(target, x)| write(target, x, rows))
}

fn write(target: &mut Tensor, x: &Tensor, rows: &CacheRows) -> Result<()> {
    let (heads, n, d, all) = (x.dim(1), x.dim(2), x.dim(3), target.dim(1));
    let x = x.dense_rows()?;
    with_element!(target.dtype(), "write_rows", T => {
        let (src, l) = (x.storage_slice::<T>()?, x.layout());
        let to = target.as_mut_slice::<T>()?;
        for (r, seen) in rows.seen().iter().enumerate() {
            for h in 0..heads {
                let (at, from) = ((h * all + seen.end - 1) * d, l.row_offset((r / n * heads + h) * n + r % n));
                to[at..at + d].copy_from_slice(&src[from..from + d]);
            }
        }
        Ok(())
    })
}
