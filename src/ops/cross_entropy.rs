//! Cross-entropy (spec section 1), of logits, or of a linear layer whose logits are never held at once.
//!
//! `loss = mean of lse(logits) - logits[label]` over the rows whose label counts, `lse(z) = ln sum e^z`.
//! Backward: `dlogits = (e^(logits - lse) - onehot(label)) * dloss / count`, 0 in rows that do not count.

use super::cast::cast_tensor;
use super::cpu;
use super::elementwise::{Unary, same_dtype, unary_tensor};
use super::matmul::gemm;
use crate::autograd::{Var, is_recording, record_one};
use crate::tensor::{DType, Device, Real, Tensor};
use crate::{Error, Result};

/// Labels that count: the row of each, and which class it names.
#[derive(Clone)]
pub(crate) struct Counted {
    pub rows: Vec<usize>,
    pub labels: Vec<usize>,
}

impl Counted {
    fn new(op: &'static str, labels: &Tensor, lead: &[usize], classes: usize, ignore_index: i64) -> Result<Self> {
        if labels.dtype() != DType::I64 {
            return Err(Error::dtype(op, format!("labels must be i64, got {}", labels.dtype())));
        }
        if labels.shape() != lead {
            return Err(Error::shape(op, format!("labels {:?} do not fit rows {lead:?}", labels.shape())));
        }
        let mut counted = Self { rows: Vec::new(), labels: Vec::new() };
        for (row, &label) in labels.contiguous()?.as_slice::<i64>()?.iter().enumerate() {
            match usize::try_from(label) {
                _ if label == ignore_index => {}
                Ok(l) if l < classes => {
                    counted.rows.push(row);
                    counted.labels.push(l);
                }
                _ => {
                    let detail = format!("label {label} at position {row} is outside {classes} classes");
                    return Err(Error::index(op, detail));
                }
            }
        }
        if counted.rows.is_empty() {
            let fix = format!("give at least one label other than {ignore_index}");
            return Err(Error::empty(format!("{op}: the set of labels that count"), fix));
        }
        Ok(counted)
    }
    fn len(&self) -> usize {
        self.rows.len()
    }
}

/// A loss in the accumulator type of `dtype`.
fn scalar(loss: f64, dtype: DType) -> Tensor {
    if dtype == DType::F64 { Tensor::scalar(loss) } else { Tensor::scalar(f32::of(loss)) }
}

/// Mean cross-entropy of logits `[.., V]` against labels (int64 `[..]`), over labels other than `ignore_index`.
/// A scalar, f32 (f64 for f64 logits).
///
/// Saves the logits and one log-sum-exp a row. Errors on other labels outside `0..V`, and when no label counts.
pub fn cross_entropy(logits: &Var, labels: &Tensor, ignore_index: i64) -> Result<Var> {
    let z = logits.value();
    let Some((&classes, lead)) = z.shape().split_last() else {
        return Err(Error::shape("cross_entropy", "logits need a last dimension of classes"));
    };
    let counted = Counted::new("cross_entropy", labels, lead, classes, ignore_index)?;
    let (sum, lse) = match z.device() {
        Device::Cpu => cpu::cross_entropy::forward(z, &counted)?,
    };
    let (count, z) = (counted.len() as f64, z.clone());
    Ok(record_one("cross_entropy", &[logits], scalar(sum / count, z.dtype()), move |flow| {
        let scale = flow.output()?.item()? / count;
        let dz = match z.device() {
            Device::Cpu => cpu::cross_entropy::backward(&z, &lse, &counted, scale)?,
        };
        flow.give(0, dz)
    }))
}

/// Bytes of logits that [`linear_cross_entropy`] holds at once: small beside a last-level cache of tens of megabytes.
const BLOCK_BYTES: usize = 4 << 20;
/// Fewer rows than this would leave a product bound by reading the weight.
const BLOCK_ROWS: usize = 64;

/// `cross_entropy(linear(x, weight, None), labels, ignore_index)` in blocks of rows: x `[.., D]`, weight `[V, D]`, labels
/// int64 `[..]`; a scalar, f32 (f64 for f64).
///
/// While a tape records, the gradients are computed together with the loss, block by block, while its logits are at
/// hand: `dx = dlogits W`, `dW = sum of dlogits^T x`; they wait in the accumulator type, and backward scales them.
/// Rows that do not count are never multiplied.
pub fn linear_cross_entropy(x: &Var, weight: &Var, labels: &Tensor, ignore_index: i64) -> Result<Var> {
    const OP: &str = "linear_cross_entropy";
    let (xv, w) = (x.value(), weight.value());
    same_dtype(OP, &[xv, w])?;
    if xv.rank() == 0 || w.rank() != 2 || w.dim(1) != xv.last_dim() {
        return Err(Error::shape(OP, format!("x {:?} does not fit weight {:?} [classes, in]", xv.shape(), w.shape())));
    }
    let (classes, d) = (w.dim(0), w.dim(1));
    let counted = Counted::new(OP, labels, &xv.shape()[..xv.rank() - 1], classes, ignore_index)?;
    let wants = |v: &Var| is_recording() && v.has_gradient();
    let (want_x, want_w) = (wants(x), wants(weight));

    let (dtype, shape) = (xv.dtype(), xv.shape().to_vec());
    let acc = cpu::rms_norm::acc_dtype(dtype);
    let all = labels.numel();
    let x2 = xv.reshape(&[all, d])?;
    let w = cast_tensor(w, acc)?;
    let scale = 1.0 / counted.len() as f64;
    let block = (BLOCK_BYTES / (classes * acc.size())).max(BLOCK_ROWS);
    let (mut sum, mut dx_blocks, mut dw) = (0.0, Vec::new(), None);
    for (rows, labels) in counted.rows.chunks(block).zip(counted.labels.chunks(block)) {
        let whole = rows[rows.len() - 1] - rows[0] + 1 == rows.len();
        let xb = if whole { x2.narrow(0, rows[0], rows.len())? } else { cpu::gather::gather(&x2, 0, rows)? };
        let xb = cast_tensor(&xb, acc)?;
        let mut logits = gemm(&xb, &w.transpose(0, 1)?, None)?;
        sum += match logits.device() {
            Device::Cpu => cpu::cross_entropy::in_place(&mut logits, labels, (want_x || want_w).then_some(scale))?,
        };
        if want_x {
            dx_blocks.push(gemm(&logits, &w, None)?);
        }
        if want_w {
            dw = Some(gemm(&logits.transpose(0, 1)?, &xb, dw)?);
        }
    }
    let loss = scalar(sum * scale, dtype);
    let dx = match want_x {
        true => Some(spread(&dx_blocks, &counted.rows, all)?.reshape(&shape)?),
        false => None,
    };
    drop(dx_blocks);
    Ok(record_one(OP, &[x, weight], loss, move |flow| {
        let seed = flow.output()?.item()?;
        for (i, grad) in [dx, dw].into_iter().enumerate() {
            if let Some(grad) = grad {
                let grad = if seed == 1.0 { grad } else { unary_tensor(Unary::Scale(seed), &grad)? };
                flow.give(i, cast_tensor(&grad, dtype)?)?;
            }
        }
        Ok(())
    }))
}

/// The rows of all blocks, put at `rows` of a matrix of `all` rows, the others 0.
fn spread(blocks: &[Tensor], rows: &[usize], all: usize) -> Result<Tensor> {
    let blocks: Vec<&Tensor> = blocks.iter().collect();
    let joined = super::concat::concat_tensors(&blocks, 0)?;
    if rows.len() == all {
        return Ok(joined);
    }
    let shape = [all, joined.last_dim()];
    cpu::gather::scatter_add(&joined, 0, rows, &shape, None)
}
