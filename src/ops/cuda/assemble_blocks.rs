//! The decoder's sequence, built of blocks and taken apart on CUDA.

use super::packs::{pack, variant};
use super::rms_norm::sum_columns;
use crate::Result;
use crate::cuda::{Grid, kernels::assemble_blocks as kernel};
use crate::ops::assemble_blocks::Blocks;
use crate::tensor::{DType, Tensor, read_or_null};

const OP: &str = "assemble_blocks";

/// For rows like t's, the logarithm of the lanes that have one, and threads for `rows` of them.
fn lanes(t: &Tensor, rows: usize) -> (usize, Grid) {
    let lanes = t.last_dim().div_ceil(pack(t)).next_power_of_two().min(32);
    (lanes.trailing_zeros() as usize, Grid::new((rows * lanes).div_ceil(256), 256))
}

/// `[B, L, D]`, of slots `[B, K+1, D]`, a separator `[1, D]` and tokens `[B, N, D]`.
pub(crate) fn forward(slots: &Tensor, separator: Option<&Tensor>, tokens: &Tensor, blocks: Blocks) -> Result<Tensor> {
    let (slots, tokens) = (slots.dense_rows()?, tokens.dense_rows()?);
    let separator = separator.map(Tensor::contiguous).transpose()?;
    let (len, d) = (blocks.len(), tokens.last_dim());
    let mut y = Tensor::empty(&[tokens.dim(0), len, d], tokens.dtype(), tokens.device())?;
    let variant = variant(OP, &[&slots, separator.as_ref().unwrap_or(&slots), &tokens])?;
    let rows = tokens.dim(0) * len;
    let (shift, grid) = lanes(&y, rows);
    let (of_slots, of_tokens) = (slots.layout().strides(), tokens.layout().strides());
    let args = [
        y.write()?,
        slots.read()?,
        read_or_null(separator.as_ref())?,
        tokens.read()?,
        of_slots[0].into(),
        of_slots[1].into(),
        of_tokens[0].into(),
        of_tokens[1].into(),
        rows.into(),
        d.into(),
        blocks.chunk.into(),
        blocks.header.into(),
        len.into(),
        shift.into(),
    ];
    // SAFETY: the parameters are (y, slots, separator or null, tokens, two strides of slots and of tokens, rows of y, D, C,
    // header, L, logarithm of the lanes of a row); y is new and holds the rows; L, K and N follow from one another, as the op
    // has checked, so every row read lies in slots or tokens; the separator is there where header is 2, and holds D.
    unsafe { tokens.gpu()?.launch(kernel::assemble_blocks, variant, grid, &args)? };
    Ok(y)
}

/// The gradients of slots and tokens: rows of dy `[B, L, D]`, which are dense.
pub(crate) fn backward(dy: &Tensor, blocks: Blocks) -> Result<(Tensor, Tensor)> {
    let (batch, d) = (dy.dim(0), dy.last_dim());
    let mut dslots = Tensor::empty(&[batch, blocks.slots(), d], dy.dtype(), dy.device())?;
    let mut dtokens = Tensor::empty(&[batch, blocks.tokens, d], dy.dtype(), dy.device())?;
    let (shift, grid) = lanes(dy, batch * (blocks.slots() + blocks.tokens));
    let strides = dy.layout().strides();
    let args = [
        dslots.write()?,
        dtokens.write()?,
        dy.read()?,
        strides[0].into(),
        strides[1].into(),
        batch.into(),
        d.into(),
        blocks.chunk.into(),
        blocks.header.into(),
        blocks.tokens.into(),
        shift.into(),
    ];
    // SAFETY: the parameters are (dslots, dtokens, dy, two strides of dy, B, D, C, header, N, logarithm of the lanes of a row);
    // dslots and dtokens are new and hold B (K + 1) and B N rows; dy has the L rows that these numbers make.
    unsafe { dy.gpu()?.launch(kernel::assemble_blocks_backward, variant(OP, &[dy])?, grid, &args)? };
    Ok((dslots, dtokens))
}

/// `sum + the rows of dy that are separators`, `[1, D]`, kept in `dtype`: f32, or that of dy.
pub(crate) fn separator_gradient(dy: &Tensor, blocks: Blocks, sum: Option<Tensor>, dtype: DType) -> Result<Tensor> {
    const THREADS: usize = 128;
    let (gpu, d, separators) = (dy.gpu()?, dy.last_dim(), dy.dim(0) * blocks.slots());
    // enough to keep the device busy, but eight rows each
    let parts = separators.div_ceil(8).min(2 * gpu.multiprocessors as usize);
    let mut partial = Tensor::empty(&[parts, d], DType::F32, dy.device())?;
    let across = d.div_ceil(pack(dy)).div_ceil(THREADS);
    let grid = Grid { blocks: [across, parts, 1], ..Grid::new(across, THREADS) };
    let strides = dy.layout().strides();
    let args = [
        partial.write()?,
        dy.read()?,
        strides[0].into(),
        strides[1].into(),
        separators.into(),
        d.into(),
        blocks.slots().into(),
        blocks.stride().into(),
    ];
    // SAFETY: the parameters are (partial, dy, two strides of dy, B (K + 1), D, K + 1, stride); partial holds a row of D for
    // each block down the grid; every block of dy's sequences has a separator, its second row.
    unsafe { gpu.launch(kernel::assemble_blocks_separator, variant(OP, &[dy])?, grid, &args)? };
    let add = sum.is_some();
    let mut total = match sum {
        Some(sum) => sum,
        None => Tensor::empty(&[1, d], dtype, dy.device())?,
    };
    sum_columns(&mut total, &partial, dy, add)?;
    Ok(total)
}
