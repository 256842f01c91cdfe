//! Cross-entropy of a linear layer on the CPU, in blocks of rows: the logits of one block are all that exist at once.

use super::cast::cast;
use super::cross_entropy::{in_place, scalar};
use super::gather::{gather, scatter_add};
use super::matmul::gemm;
use super::rms_norm::acc_dtype;
use crate::Result;
use crate::ops::cross_entropy::{Counted, Joint};
use crate::ops::elementwise::Unary;
use crate::tensor::Tensor;

/// Bytes of logits held at once: small beside a last-level cache of tens of megabytes.
const BLOCK_BYTES: usize = 4 << 20;
/// Fewer rows than this would leave a product bound by reading the weight.
const BLOCK_ROWS: usize = 64;

/// x `[rows, D]`, w `[V, D]`. Gradients are kept in the accumulator type.
pub(crate) fn forward(x: &Tensor, w: &Tensor, counted: &Counted, want_x: bool, want_w: bool) -> Result<Joint> {
    let (dtype, all, classes) = (x.dtype(), x.dim(0), w.dim(0));
    let acc = acc_dtype(dtype);
    let w = cast(w, acc)?;
    let scale = 1.0 / counted.len() as f64;
    let block = (BLOCK_BYTES / (classes * acc.size())).max(BLOCK_ROWS);
    let (mut sum, mut dx_blocks, mut dw) = (0.0, Vec::new(), None);
    for (rows, labels) in counted.rows.chunks(block).zip(counted.labels.chunks(block)) {
        let whole = rows[rows.len() - 1] - rows[0] + 1 == rows.len();
        let xb = if whole { x.narrow(0, rows[0], rows.len())? } else { gather(x, 0, rows)? };
        let xb = cast(&xb, acc)?;
        let mut logits = gemm(&xb, &w.transpose(0, 1)?, None, acc)?;
        sum += in_place(&mut logits, labels, (want_x || want_w).then_some(scale))?;
        if want_x {
            dx_blocks.push(gemm(&logits, &w, None, acc)?);
        }
        if want_w {
            dw = Some(gemm(&logits.transpose(0, 1)?, &xb, dw, acc)?);
        }
    }
    let dx = if want_x { Some(spread(&dx_blocks, &counted.rows, all)?) } else { None };
    Ok(Joint { loss: scalar(sum * scale, dtype), dx, dw })
}

/// `grad * seed`, the seed a scalar.
pub(crate) fn scale(grad: Tensor, seed: &Tensor) -> Result<Tensor> {
    match seed.item()? {
        1.0 => Ok(grad),
        c => super::elementwise::unary(Unary::Scale(c), &grad),
    }
}

/// The rows of all blocks, put at `rows` of a matrix of `all` rows, the others 0.
fn spread(blocks: &[Tensor], rows: &[usize], all: usize) -> Result<Tensor> {
    let blocks: Vec<&Tensor> = blocks.iter().collect();
    let joined = crate::ops::concat_tensors(&blocks, 0)?;
    if rows.len() == all {
        return Ok(joined);
    }
    let shape = [all, joined.last_dim()];
    scatter_add(&joined, 0, rows, &shape, None, joined.dtype())
}
