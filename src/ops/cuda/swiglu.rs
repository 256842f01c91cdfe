//! SwiGLU's gate on CUDA.

use super::packs::{pack, variant};
use crate::Result;
use crate::cuda::{Grid, kernels::swiglu as kernel};
use crate::tensor::{Tensor, read_or_null};

const OP: &str = "swiglu";

/// Tensors of one shape as dense rows: one long row where all lie in one piece.
fn flat<const K: usize>(tensors: [&Tensor; K]) -> Result<[Tensor; K]> {
    let n = tensors[0].numel();
    let whole = tensors.iter().all(|t| t.is_contiguous());
    let mut rows = tensors.map(Tensor::clone);
    for t in &mut rows {
        *t = if whole { t.reshape(&[n])? } else { t.dense_rows()? };
    }
    Ok(rows)
}

/// Rows, their width, the number of 16 bytes in one, and a thread for each of these.
fn sizes(t: &Tensor) -> (usize, usize, usize, Grid) {
    let width = t.last_dim();
    let (rows, parts) = (t.numel() / width.max(1), width.div_ceil(pack(t)));
    (rows, width, parts, Grid::new((rows * parts).div_ceil(256), 256))
}

/// In the place of the gate where nobody else has that.
pub(crate) fn forward(gate: Tensor, up: &Tensor) -> Result<Tensor> {
    let y = place(&gate, gate.is_owner())?;
    let [g, u] = flat([&gate, up])?;
    let (rows, width, parts, grid) = sizes(&g);
    let variant = variant(OP, &[&g, &u])?;
    let (g_rows, u_rows) = (g.rows(OP)?.into(), u.rows(OP)?.into());
    let args = [y.read()?, g.read()?, u.read()?, g_rows, u_rows, rows.into(), width.into(), parts.into()];
    // SAFETY: the parameters are (y, gate, up, rows of gate, rows of up, rows, width, parts of a row); y holds rows x width
    // elements, and is new, or gate's own, of whom nobody else knows: a thread has read what it writes over; the views' rows lie
    // inside their tensors.
    unsafe { g.gpu()?.launch(kernel::swiglu, variant, grid.early(true), &args)? };
    Ok(y)
}

/// This tensor's own memory, or new of its shape.
fn place(t: &Tensor, in_place: bool) -> Result<Tensor> {
    match in_place {
        true => Ok(t.clone()),
        false => Tensor::empty(t.shape(), t.dtype(), t.device()),
    }
}

/// `(dgate, dup)` in the place of gate and up where nobody else has these, and if asked for, y in that of dy.
pub(crate) fn backward(gate: Tensor, up: Tensor, dy: Tensor, again: bool) -> Result<(Tensor, Tensor, Option<Tensor>)> {
    let both = gate.is_owner() && up.is_owner();
    let (dgate, dup) = (place(&gate, both)?, place(&up, both)?);
    let y = if again { Some(place(&dy, dy.is_owner() && dy.is_contiguous())?) } else { None };
    let [g, u, dy] = flat([&gate, &up, &dy])?;
    let (rows, width, parts, grid) = sizes(&g);
    let variant = variant(OP, &[&g, &u, &dy])?;
    let args = [
        dgate.read()?,
        dup.read()?,
        read_or_null(y.as_ref())?,
        g.read()?,
        u.read()?,
        dy.read()?,
        g.rows(OP)?.into(),
        u.rows(OP)?.into(),
        dy.rows(OP)?.into(),
        rows.into(),
        width.into(),
        parts.into(),
    ];
    // SAFETY: the parameters are (dgate, dup, y or null, gate, up, dy, rows of gate, of up, of dy, rows, width, parts of a row);
    // dgate, dup and y hold rows x width elements, and are new, or gate, up and dy of whom nobody else knows: a thread has read
    // what it writes over; the views' rows lie inside their tensors.
    unsafe { g.gpu()?.launch(kernel::swiglu_backward, variant, grid, &args)? };
    Ok((dgate, dup, y))
}
