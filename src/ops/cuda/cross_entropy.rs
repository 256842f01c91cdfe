//! Cross-entropy on CUDA.

use super::cast::cast;
use super::packs::{pack, variant};
use crate::Result;
use crate::cuda::{Arg, Grid, Variant, kernels::cross_entropy as kernel};
use crate::ops::cross_entropy::Counted;
use crate::tensor::{DType, Tensor};

const OP: &str = "cross_entropy";

/// A block for each row: two warps at least, and at most this many threads.
fn grid(rows: usize, packs: usize, most: usize) -> Grid {
    Grid::new(rows, packs.next_power_of_two().clamp(64, most))
}

/// The label of each row of `logits`, -1 where it does not count.
fn labels_of(logits: &Tensor, rows: usize, counted: &Counted) -> Result<Tensor> {
    let mut labels = vec![-1; rows];
    for (&row, &label) in counted.rows.iter().zip(&counted.labels) {
        labels[row] = label as i64;
    }
    Tensor::ids(&labels, &[rows])?.to_device(logits.device())
}

/// `(mean of the counted rows' losses, log-sum-exp of the counted rows, 0 in others)`.
pub(crate) fn forward(logits: &Tensor, counted: &Counted) -> Result<(Tensor, Tensor)> {
    let z = logits.dense_rows()?;
    let width = z.last_dim();
    let rows = z.numel() / width.max(1);
    let labels = labels_of(&z, rows, counted)?;
    let mut lse = Tensor::empty(&[rows], DType::F32, z.device())?;
    let mut losses = Tensor::empty(&[rows], DType::F32, z.device())?;
    let grid = grid(rows, width.div_ceil(pack(&z)), 256); // small blocks: one rests at its end while others load
    let args = [lse.write()?, losses.write()?, z.read()?, z.rows(OP)?.into(), labels.read()?, width.into()];
    // SAFETY: the parameters are (lse, losses, logits, their rows, labels, width); lse, losses and labels have an element
    // for each row, a block each; labels are below the width, or -1.
    unsafe { z.gpu()?.launch(kernel::cross_entropy, variant(OP, &[&z])?, grid, &args)? };
    Ok((mean(&losses, counted.len())?, lse))
}

/// `(softmax - onehot) * dloss / count` in counted rows, 0 in others.
pub(crate) fn backward(logits: &Tensor, lse: &Tensor, counted: &Counted, dloss: &Tensor) -> Result<Tensor> {
    let (z, dloss) = (logits.dense_rows()?, cast(dloss, DType::F32)?);
    let width = z.last_dim();
    let rows = z.numel() / width.max(1);
    let labels = labels_of(&z, rows, counted)?;
    let mut dz = Tensor::empty(z.shape(), z.dtype(), z.device())?;
    let args = [
        dz.write()?,
        z.read()?,
        z.rows(OP)?.into(),
        lse.read()?,
        labels.read()?,
        dloss.read()?,
        width.into(),
        (counted.len() as f32).into(),
    ];
    let grid = grid(rows, width.div_ceil(pack(&z)), 512);
    // SAFETY: the parameters are (dz, logits, their rows, lse, labels, dloss, width, count); dz is new, of the logits' shape;
    // lse and labels have an element for each row, a block each; dloss has one.
    unsafe { z.gpu()?.launch(kernel::cross_entropy_backward, variant(OP, &[&z])?, grid, &args)? };
    Ok(dz)
}

/// Losses of the rows of `logits` `[rows, V]` (contiguous), from their labels (i64) at a device's address, written to f32
/// at another; with a scale, the logits become `(softmax - onehot) * scale`.
pub(super) fn in_place(logits: &mut Tensor, labels: u64, losses: u64, scale: Option<f32>) -> Result<()> {
    let (rows, width) = (logits.dim(0), logits.dim(1));
    let to = logits.write()?;
    let (gpu, variant, packs) = (logits.gpu()?, variant(OP, &[logits])?, width.div_ceil(pack(logits)));
    // a multiprocessor should hold two rows: one loads while the other computes
    let bytes = packs * 16;
    let staged = scale.is_some() && 2 * (bytes + 2048) <= gpu.shared_per_block as usize;
    let grid = grid(rows, packs, 512).shared(if staged { bytes } else { 0 });
    let want = scale.is_some().into();
    let args: [Arg; 7] = [to, losses.into(), labels.into(), width.into(), scale.unwrap_or(0.0).into(), want, staged.into()];
    // SAFETY: the parameters are (logits, losses, labels, width, scale, whether gradients are wanted, whether the row is
    // kept in shared memory, which then holds it); the caller's losses and labels have an element for each row, a block
    // each, and labels are below the width.
    unsafe { gpu.launch(kernel::cross_entropy_in_place, variant, grid, &args) }
}

/// `sum of losses / count`, a scalar on the device.
pub(super) fn mean(losses: &Tensor, count: usize) -> Result<Tensor> {
    let mut mean = Tensor::empty(&[], DType::F32, losses.device())?;
    let variant = Variant { define: Some("PACKED=1"), ..losses.variant()? }; // it moves single elements
    let args = [mean.write()?, losses.read()?, losses.numel().into(), count.into()];
    // SAFETY: the parameters are (mean, losses, their number, count); mean has one element.
    unsafe { losses.gpu()?.launch(kernel::cross_entropy_mean, variant, Grid::new(1, 1024), &args)? };
    Ok(mean)
}
