//! RMSNorm on CUDA.

use super::packs::{pack, variant};
use crate::Result;
use crate::cuda::{Arg, Grid, Variant, kernels::rms_norm as kernel};
use crate::ops::cpu::rms_norm::Normed;
use crate::tensor::{DType, Tensor, read_or_null};

const OP: &str = "rms_norm";
/// Threads of a block whose warps hold rows in registers.
const THREADS: usize = 128;
/// Threads of a block that has a long row.
const LONG: usize = 512;

/// How many lanes of a warp (as a power of two) hold a row of `packs` times 16 bytes.
fn shift(packs: usize) -> usize {
    packs.next_power_of_two().min(32).trailing_zeros() as usize
}

pub(crate) fn forward(x: &Tensor, residual: Option<&Tensor>, w: &Tensor, eps: f64) -> Result<Normed> {
    let (x, w) = (x.dense_rows()?, w.contiguous()?);
    let residual = residual.map(Tensor::dense_rows).transpose()?;
    let (gpu, d) = (x.gpu()?, x.last_dim());
    let (rows, packs) = (x.numel() / d.max(1), d.div_ceil(pack(&x)));
    let mut y = Tensor::empty(x.shape(), x.dtype(), x.device())?;
    let mut h = residual.as_ref().map(|_| Tensor::empty(x.shape(), x.dtype(), x.device())).transpose()?;
    let mut rstd = Tensor::empty(&[rows], DType::F32, x.device())?;
    let other = residual.as_ref().unwrap_or(&x);
    let variant = variant(OP, &[&x, other, &w])?;
    let to_h = h.as_mut().map_or(Ok(0u64.into()), Tensor::write)?;
    let (x_rows, other_rows, eps) = (x.rows(OP)?.into(), other.rows(OP)?.into(), (eps as f32).into());
    let residual = read_or_null(residual.as_ref())?;
    let mut args = vec![y.write()?, to_h, rstd.write()?, x.read()?, residual, w.read()?, x_rows, other_rows];
    args.extend::<[Arg; 3]>([rows.into(), d.into(), eps]);
    let symbol = match packs.div_ceil(32) {
        0..=1 => kernel::rms_norm_1,
        2 => kernel::rms_norm_2,
        3..=4 => kernel::rms_norm_4,
        5..=8 => kernel::rms_norm_8,
        _ => kernel::rms_norm_long,
    };
    let grid = if packs > 32 * 8 {
        Grid::new(rows, LONG)
    } else {
        args.push(shift(packs).into());
        Grid::new(rows.div_ceil(THREADS >> shift(packs)), THREADS)
    };
    // SAFETY: the parameters are (y, h or null, rstd, x, residual or null, w, rows of x, rows of residual, rows, d, eps), and
    // for rows held by lanes their number's logarithm; y and h are new, of x's shape; rstd has one element a row; the
    // views' rows lie inside their tensors; lanes times the kernel's packs cover d.
    unsafe { gpu.launch(symbol, variant, grid.early(true), &args)? };
    Ok(Normed { y, h, rstd })
}

/// `(dx + dh, dw + sum)`: the gradient of the normed rows, and of the weight, which is kept in `sum_dtype`.
#[allow(clippy::too_many_arguments)] // what backward needs is what forward had
pub(crate) fn backward(
    x: &Tensor,
    w: &Tensor,
    rstd: &Tensor,
    dy: &Tensor,
    dh: Option<Tensor>,
    sum: Option<Tensor>,
    sum_dtype: DType,
) -> Result<(Tensor, Tensor)> {
    let (x, dy, w) = (x.dense_rows()?, dy.dense_rows()?, w.contiguous()?);
    let dh = dh.map(|t| t.contiguous()).transpose()?;
    let (gpu, d) = (x.gpu()?, x.last_dim());
    let (rows, packs) = (x.numel() / d.max(1), d.div_ceil(pack(&x)));
    // threads of a block, rows that it has under way at once, and the threads that a multiprocessor has registers for
    let (symbol, threads, at_once, resident) = match packs {
        0..=32 => (kernel::rms_norm_backward_short, 256, 2 * (256 >> shift(packs)), 768),
        33..=256 => (kernel::rms_norm_backward_1, packs.next_multiple_of(32), 1, 768),
        257..=1024 => (kernel::rms_norm_backward_2, packs.div_ceil(2).next_multiple_of(32), 1, 512),
        _ => (kernel::rms_norm_backward_long, LONG, 1, 1024),
    };
    let blocks = (gpu.multiprocessors as usize * (resident / threads)).min(rows.div_ceil(at_once));
    let mut dx = Tensor::empty(x.shape(), x.dtype(), x.device())?;
    let mut partial = Tensor::empty(&[blocks, d], DType::F32, x.device())?;
    let variant = variant(OP, &[&x, &dy, &w, dh.as_ref().unwrap_or(&dy)])?;
    let mut args = vec![dx.write()?, partial.write()?, x.read()?, w.read()?, rstd.read()?, dy.read()?];
    args.extend::<[Arg; 5]>([read_or_null(dh.as_ref())?, x.rows(OP)?.into(), dy.rows(OP)?.into(), rows.into(), d.into()]);
    if packs <= 32 {
        args.push(shift(packs).into());
    }
    // SAFETY: the parameters are (dx, partial, x, w, rstd, dy, dh or null, rows of x, rows of dy, rows, d), and for short
    // rows the logarithm of the lanes that have one; dx is new, of x's shape, as is dh; partial has a row of d for each
    // block; the views' rows lie inside their tensors; threads times the kernel's packs cover d.
    unsafe { gpu.launch(symbol, variant, Grid::new(blocks, threads), &args)? };

    let add = sum.is_some();
    let mut dw = match sum {
        Some(sum) => sum,
        None => Tensor::empty(&[d], sum_dtype, x.device())?,
    };
    sum_columns(&mut dw, &partial, &x, add)?;
    Ok((dx, dw))
}

/// `dw = sum over rows of partial [parts, d] + (add ? dw : 0)`; dw is f32, or of x's dtype.
pub(super) fn sum_columns(dw: &mut Tensor, partial: &Tensor, x: &Tensor, add: bool) -> Result<()> {
    let wide = dw.dtype() == DType::F32;
    if !wide && dw.dtype() != x.dtype() {
        let detail = format!("the gradient of a weight in {} cannot be kept in {}", x.dtype(), dw.dtype());
        return Err(crate::Error::dtype(OP, detail));
    }
    let (parts, d) = (partial.dim(0), partial.dim(1));
    let variant = Variant { define: Some("PACKED=1"), ..x.variant()? }; // it moves single elements
    let grid = Grid { threads: [32, 16, 1], ..Grid::new(d.div_ceil(32), 0) };
    let args = [dw.write()?, partial.read()?, parts.into(), d.into(), wide.into(), add.into()];
    // SAFETY: the parameters are (dw, partial, parts, d, whether dw is f32, whether to add); dw holds d elements, partial
    // parts x d.
    unsafe { x.gpu()?.launch(kernel::rms_norm_weight, variant, grid, &args) }
}
