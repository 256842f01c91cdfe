//! Writing rows into a larger tensor on CUDA, in place.

use super::packs::{in_packs, pack};
use crate::Result;
use crate::cuda::{Arg, Grid, kernels::write_rows as kernel};
use crate::ops::CacheRows;
use crate::tensor::Tensor;

pub(crate) fn write_rows(target: &mut Tensor, x: &Tensor, rows: &CacheRows) -> Result<()> {
    if x.numel() == 0 {
        return Ok(());
    }
    let x = x.dense_rows()?;
    let (heads, n, d, all) = (x.dim(1), x.dim(2), x.dim(3), target.dim(1));
    let lists = rows.on(x.device())?;
    let to = target.write()?;
    let packed = d.is_multiple_of(pack(&x)) && in_packs("write_rows", &x)? && in_packs("write_rows", target)?;
    let (symbol, each) = if packed { (kernel::write_rows_packed, pack(&x)) } else { (kernel::write_rows, 1) };
    let s = x.layout().strides();
    let ends = lists.narrow(0, 1, 1)?;
    let mut args = vec![to, x.read()?, ends.read()?];
    args.extend([s[0], s[1], s[2], n, heads, d, all, x.numel()].map(Arg::from));
    // SAFETY: the parameters are (target, x, ends, x's strides of batch, head and row, n, heads, d, target's rows, elements of
    // x); x's rows are dense; target is [heads, rows, d], contiguous and its own; there is an end for each row of x, at
    // most target's rows.
    unsafe { x.gpu()?.launch(symbol, x.variant()?, Grid::for_each(x.numel() / each, 256), &args) }
}
