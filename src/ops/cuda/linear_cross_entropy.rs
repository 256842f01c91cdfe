//! Cross-entropy of a linear layer on CUDA, in blocks of rows: the logits of one block are all that exist at once.
//!
//! `dx = dlogits W`, `dW = sum of dlogits^T x`, with dlogits in the place of the logits, which are kept in x's dtype as
//! `cross_entropy(linear(x))` would keep them; dW is summed in f32 by the product itself. Where no gradient is wanted, logits
//! are f32.
//!
//! Bytes that must move for R rows of V classes in elements of s bytes, beside the products' own operands: the logits
//! written, read and written again as gradients, and read by two products, 5 s R V; and dW read and written once a block,
//! which is why blocks are as large as the scratch allows.

use super::cast::cast;
use super::cross_entropy::{in_place, mean};
use super::matmul::gemm;
use super::packs::{pack, variant};
use crate::Result;
use crate::cuda::{Arg, Grid, kernels::linear_cross_entropy as kernel};
use crate::ops::cross_entropy::{Counted, Joint};
use crate::tensor::{DType, Tensor};

/// Bytes of logits held at once. With V = 50,432 in 16 bits that is 4,864 rows.
const SCRATCH: usize = 480 << 20;
/// Blocks are multiples of this, which is what products cut their output into.
const TILE: usize = 128;

/// x `[rows, D]`, w `[V, D]`. dx is of x's dtype, dw f32.
pub(crate) fn forward(x: &Tensor, w: &Tensor, counted: &Counted, want_x: bool, want_w: bool) -> Result<Joint> {
    let (all, n, device) = (x.dim(0), counted.len(), x.device());
    let scale = (want_x || want_w).then_some((1.0 / n as f64) as f32);
    let kept = if scale.is_some() { x.dtype() } else { DType::F32 };
    let block = block_rows(n, w.dim(0) * kept.size());
    let upload = |list: &[usize]| {
        let list: Vec<i64> = list.iter().map(|&i| i as i64).collect();
        Tensor::ids(&list, &[n])?.to_device(device)
    };
    let labels = upload(&counted.labels)?;
    let losses = Tensor::empty(&[n], DType::F32, device)?;
    // rows that count are gathered where some do not, and their gradients put back
    let listed = if n == all { None } else { Some(upload(&counted.rows)?) };
    let x = if listed.is_some() { x.contiguous()? } else { x.clone() };
    let (mut dx, mut dw) = (None, None);
    for start in (0..n).step_by(block) {
        let len = block.min(n - start);
        let here = listed.as_ref().map(|l| l.narrow(0, start, len)).transpose()?;
        let here = here.as_ref().map_or(Rows::From(start), Rows::Listed);
        let xb = match here {
            Rows::From(_) => x.narrow(0, start, len)?,
            Rows::Listed(_) => {
                let mut xb = Tensor::empty(&[len, x.dim(1)], x.dtype(), device)?;
                move_rows(len, &mut xb, Rows::From(0), &x, here)?;
                xb
            }
        };
        let mut logits = gemm(&xb, &w.transpose(0, 1)?, None, kept)?;
        in_place(&mut logits, labels.pointer()? + 8 * start as u64, losses.pointer()? + 4 * start as u64, scale)?;
        if want_x {
            let part = gemm(&logits, w, None, x.dtype())?;
            dx = Some(match dx {
                None if len == all => part,
                dx => {
                    let mut dx = match dx {
                        Some(dx) => dx,
                        None if listed.is_some() => Tensor::zeros(x.shape(), x.dtype(), device)?,
                        None => Tensor::empty(x.shape(), x.dtype(), device)?,
                    };
                    move_rows(len, &mut dx, here, &part, Rows::From(0))?;
                    dx
                }
            });
        }
        if want_w {
            dw = Some(gemm(&logits.transpose(0, 1)?, &xb, dw, DType::F32)?);
        }
    }
    Ok(Joint { loss: mean(&losses, n)?, dx, dw })
}

/// How many of `n` rows one block has: blocks of about one size, whose logits (`bytes` a row) fit the scratch.
fn block_rows(n: usize, bytes: usize) -> usize {
    let most = (SCRATCH / bytes.max(1) / TILE * TILE).max(TILE);
    n.div_ceil(n.div_ceil(most)).next_multiple_of(TILE)
}

/// Rows of a matrix: from one on, or those that a list (i64, on the device) names.
#[derive(Clone, Copy)]
enum Rows<'a> {
    From(usize),
    Listed(&'a Tensor),
}

/// Copy `n` rows of a contiguous matrix to rows of another. A list of rows to write to names none twice.
fn move_rows(n: usize, to: &mut Tensor, to_rows: Rows, from: &Tensor, from_rows: Rows) -> Result<()> {
    let list = |rows: Rows| -> Result<[Arg; 2]> {
        match rows {
            Rows::From(start) => Ok([0u64.into(), start.into()]),
            Rows::Listed(list) => Ok([list.read()?, 0u64.into()]),
        }
    };
    let d = from.dim(1);
    let parts = d.div_ceil(pack(from));
    let variant = variant("linear_cross_entropy", &[from, to])?;
    let ([to_list, to_start], [from_list, from_start]) = (list(to_rows)?, list(from_rows)?);
    let grid = Grid::new((n * parts).div_ceil(256), 256);
    let args = [to.write()?, from.read()?, to_list, to_start, from_list, from_start, n.into(), d.into(), parts.into()];
    // SAFETY: the parameters are (to, from, rows of to or null, the first, rows of from or null, the first, n, d, parts of a
    // row); both matrices are contiguous, d wide, and have the rows named, n of each.
    unsafe { from.gpu()?.launch(kernel::linear_cross_entropy_rows, variant, grid, &args) }
}

/// `grad * seed`, the seed a scalar on the device; in place.
pub(crate) fn scale(mut grad: Tensor, seed: &Tensor) -> Result<Tensor> {
    let (seed, n, gpu) = (cast(seed, DType::F32)?, grad.numel(), grad.gpu()?);
    let to = grad.write()?;
    let variant = variant("linear_cross_entropy", &[&grad.reshape(&[n])?])?;
    // few blocks, each with much to do: mostly they have nothing to do
    let grid = Grid::new(n.div_ceil(pack(&grad) * 256).min(16 * gpu.multiprocessors as usize), 256);
    // SAFETY: the parameters are (grad, seed, n); grad is contiguous, of n elements, and seed has one.
    unsafe { gpu.launch(kernel::linear_cross_entropy_scale, variant, grid, &[to, seed.read()?, n.into()])? };
    Ok(grad)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_share_rows_evenly_and_fit_the_scratch() {
        assert_eq!(block_rows(32_768, 2 * 50_432), 4736);
        assert_eq!(block_rows(1, 2 * 50_432), 128);
        assert_eq!(block_rows(1000, 4 << 20), 128);
        for n in [1, 127, 128, 129, 5000, 36_880] {
            for bytes in [2, 514, 2 * 50_432, 4 * 50_432] {
                let block = block_rows(n, bytes);
                assert!(block * bytes <= SCRATCH && block > 0);
            }
        }
    }
}
