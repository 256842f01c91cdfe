//! Writing rows in 8 bits on CUDA, in place.

use super::packs::{in_packs, pack};
use crate::Result;
use crate::cuda::{Arg, Grid, kernels::write_int8_rows as kernel};
use crate::ops::{CacheRows, Int8Rows};
use crate::tensor::Tensor;

pub(crate) fn write_int8_rows(targets: [&mut Int8Rows; 2], xs: [&Tensor; 2], rows: &CacheRows) -> Result<()> {
    if xs[0].numel() == 0 {
        return Ok(());
    }
    let xs = [xs[0].dense_rows()?, xs[1].dense_rows()?];
    let (x, all) = (&xs[0], targets[0].numbers.dim(1));
    let (heads, n, d) = (x.dim(1), x.dim(2), x.dim(3));
    let mut packed = true;
    let mut args: Vec<Arg> = Vec::with_capacity(10);
    for (target, x) in targets.into_iter().zip(&xs) {
        target.numbers.make_owner()?;
        target.scales.make_owner()?;
        packed &= in_packs("write_int8_rows", x)?;
        let s = x.layout().strides();
        let to = [target.numbers.pointer()?, target.scales.pointer()?];
        // a target whose rows lie off four bytes is written byte by byte
        packed &= to[0].is_multiple_of(4);
        args.push([to[0], to[1], x.pointer()?, s[0] as u64, s[1] as u64, s[2] as u64].into());
    }
    let ends = rows.on(x.device())?.narrow(0, 1, 1)?;
    args.push(ends.read()?);
    let (count, lanes) = (x.numel() / d, d.div_ceil(pack(x)).next_power_of_two().min(32));
    args.extend([n, heads, d, all, count, lanes].map(Arg::from));
    args.push(packed.into());
    let mut grid = Grid::for_each(count * lanes, 128);
    grid.blocks[1] = 2;
    // SAFETY: the parameters are (pair, pair, ends, n, heads, d, targets' rows, rows of x, lanes, packed), a pair being
    // (numbers, scales, x, x's strides of batch, head and row); rows of x are dense, and begin and end on 16 bytes where `packed`
    // says so, so that numbers do on 4; targets are [heads, rows, d] and [heads, rows], contiguous and their own; there is an end
    // for each row of x, at most targets' rows.
    unsafe { x.gpu()?.launch(kernel::write_int8_rows, x.variant()?, grid.early(true), &args) }
}
