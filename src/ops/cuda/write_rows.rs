//! Writing rows into larger tensors on CUDA, in place.

use super::packs::{in_packs, pack};
use crate::Result;
use crate::cuda::{Arg, Grid, kernels::write_rows as kernel};
use crate::ops::CacheRows;
use crate::tensor::Tensor;

/// One pair or two of target and x, all targets and all x of one shape.
pub(crate) fn write_rows(targets: &mut [&mut Tensor], xs: &[&Tensor], rows: &CacheRows) -> Result<()> {
    const OP: &str = "write_rows";
    if xs[0].numel() == 0 {
        return Ok(());
    }
    let xs = xs.iter().map(|x| x.dense_rows()).collect::<Result<Vec<_>>>()?;
    let (x, all) = (&xs[0], targets[0].dim(1));
    let (heads, n, d) = (x.dim(1), x.dim(2), x.dim(3));
    let mut packed = d.is_multiple_of(pack(x));
    let mut pairs = Vec::with_capacity(2);
    for (target, x) in targets.iter_mut().zip(&xs) {
        target.make_owner()?;
        packed &= in_packs(OP, x)? && in_packs(OP, target)?;
        let s = x.layout().strides();
        pairs.push([target.pointer()?, x.pointer()?, s[0] as u64, s[1] as u64, s[2] as u64]);
    }
    let (symbol, each) = if packed { (kernel::write_rows_packed, pack(x)) } else { (kernel::write_rows, 1) };
    let ends = rows.on(x.device())?.narrow(0, 1, 1)?;
    let mut args: Vec<Arg> = [pairs[0], pairs[pairs.len() - 1]].map(Arg::from).into();
    args.push(ends.read()?);
    args.extend([n, heads, d, all, x.numel()].map(Arg::from));
    let mut grid = Grid::for_each(x.numel() / each, 256);
    grid.blocks[1] = pairs.len();
    // SAFETY: the parameters are (pair, pair, ends, n, heads, d, target's rows, elements of x), a pair being (target, x, x's
    // strides of batch, head and row), the second unused where there is one; rows of x are dense; targets are [heads, rows, d],
    // contiguous and their own; there is an end for each row of x, at most target's rows.
    unsafe { x.gpu()?.launch(symbol, x.variant()?, grid.early(true), &args) }
}
