//! Rotary position embedding on CUDA, in the order in which x lies in memory.

use super::packs::{in_packs, pack};
use crate::Result;
use crate::cuda::{Grid, kernels::rope as kernel};
use crate::ops::rope::RopeTable;
use crate::tensor::Tensor;

/// Turn x `[.., L, d]` by the table's angles, or back by them.
pub(crate) fn rotate(x: &Tensor, table: &RopeTable, back: bool) -> Result<Tensor> {
    const OP: &str = "rope";
    let x = x.dense_rows()?;
    let (rank, d, n) = (x.rank(), x.last_dim(), table.width());
    let mut order: Vec<usize> = (0..rank - 1).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(x.layout().strides()[i]));
    order.push(rank - 1);
    let mut inverse = vec![0; rank];
    for (i, &o) in order.iter().enumerate() {
        inverse[o] = i;
    }
    let v = x.permute(&order)?;
    let mut y = Tensor::empty(v.shape(), x.dtype(), x.device())?;
    // consecutive rows that share a position
    let repeat: usize = v.shape()[inverse[rank - 2] + 1..rank - 1].iter().product();
    let rows = v.numel() / d.max(1);
    let [index, angles] = table.on(x.device())?;
    let packed = in_packs(OP, &v)? && (n / 2).is_multiple_of(pack(&v));
    let (symbol, items) = match packed {
        true => (kernel::rope_packed, (d - n / 2) / pack(&v)),
        false => (kernel::rope_single, d - n / 2),
    };
    let grid = Grid::new((rows * items).div_ceil(256), 256);
    let sign = if back { -1f32 } else { 1.0 };
    let args = [
        y.write()?,
        v.read()?,
        v.rows(OP)?.into(),
        angles.read()?,
        index.read()?,
        rows.into(),
        d.into(),
        n.into(),
        table.len().into(),
        repeat.into(),
        sign.into(),
    ];
    // SAFETY: the parameters are (y, x, rows of x, table, index, rows, d, n, positions, rows that share one, sign); y is new,
    // of v's shape; index has an element for each position, naming a row of the table, which is n wide; n <= d.
    unsafe { x.gpu()?.launch(symbol, x.variant()?, grid, &args)? };
    y.permute(&inverse)
}
