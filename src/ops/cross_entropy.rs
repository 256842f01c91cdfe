//! Cross-entropy (spec section 1), of logits, or of a linear layer whose logits are never held at once.
//!
//! `loss = mean of lse(logits) - logits[label]` over the rows whose label counts, `lse(z) = ln sum e^z`.
//! Backward: `dlogits = (e^(logits - lse) - onehot(label)) * dloss / count`, 0 in rows that do not count.

use super::cast::cast_tensor;
use super::elementwise::same_dtype;
use crate::autograd::{Var, is_recording, record_one};
use crate::tensor::{DType, Device, Tensor};
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
        for (row, &label) in labels.to_device(Device::Cpu)?.contiguous()?.as_slice::<i64>()?.iter().enumerate() {
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
    pub fn len(&self) -> usize {
        self.rows.len()
    }
}

/// The loss of a linear layer, and the gradients of its mean that were asked for: `dx [rows, D]`, `dw [V, D]`.
pub(crate) struct Joint {
    pub loss: Tensor,
    pub dx: Option<Tensor>,
    pub dw: Option<Tensor>,
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
    let (loss, lse) = on_device!(z.device(), cross_entropy::forward(z, &counted))?;
    let z = z.clone();
    Ok(record_one("cross_entropy", &[logits], loss, move |flow| {
        let dloss = flow.output()?;
        let dz = on_device!(z.device(), cross_entropy::backward(&z, &lse, &counted, &dloss))?;
        flow.give(0, dz)
    }))
}

/// `cross_entropy(linear(x, weight, None), labels, ignore_index)` in blocks of rows: x `[.., D]`, weight `[V, D]`, labels
/// int64 `[..]`; a scalar, f32 (f64 for f64).
///
/// While a tape records, the gradients are computed together with the loss, block by block, while its logits are at
/// hand: `dx = dlogits W`, `dW = sum of dlogits^T x`; they wait until backward scales them. On the CPU logits and gradients
/// are kept in the accumulator type; on CUDA logits and dx in x's dtype, dW in f32.
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

    let (shape, all) = (xv.shape().to_vec(), labels.numel());
    let x2 = xv.reshape(&[all, d])?;
    let Joint { loss, dx, dw } = on_device!(xv.device(), linear_cross_entropy::forward(&x2, w, &counted, want_x, want_w))?;
    Ok(record_one(OP, &[x, weight], loss, move |flow| {
        let seed = flow.output()?;
        for (i, grad) in [dx, dw].into_iter().enumerate() {
            if let (Some(grad), Some(dtype)) = (grad, flow.gradient_dtype(i)) {
                let grad = on_device!(seed.device(), linear_cross_entropy::scale(grad, &seed))?;
                let grad = cast_tensor(&grad, dtype)?;
                flow.give(i, if i == 0 { grad.reshape(&shape)? } else { grad })?;
            }
        }
        Ok(())
    }))
}
