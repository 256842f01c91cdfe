//! Sums and means.

use crate::autograd::{Var, record_one};
use crate::tensor::Tensor;
use crate::{Error, Result};

/// Sum over `dims`, which stay as size 1.
pub(crate) fn sum_tensor(x: &Tensor, dims: &[usize]) -> Result<Tensor> {
    on_device!(x.device(), reduce::sum(x, dims))
}

/// Sum over the dimensions that broadcasting `shape` to x's shape repeated: the backward of `expand`.
pub(crate) fn sum_to(x: &Tensor, shape: &[usize]) -> Result<Tensor> {
    if x.shape() == shape {
        return Ok(x.clone());
    }
    let lead = x.rank() - shape.len();
    let dims: Vec<usize> = (0..x.rank()).filter(|&d| d < lead || (shape[d - lead] == 1 && x.dim(d) != 1)).collect();
    sum_tensor(x, &dims)?.reshape(shape)
}

fn kept(op: &'static str, x: &Tensor, dims: &[usize]) -> Result<Vec<usize>> {
    let mut shape = x.shape().to_vec();
    for &d in dims {
        *shape.get_mut(d).ok_or_else(|| Error::shape(op, format!("dimension {d} of shape {:?}", x.shape())))? = 1;
    }
    Ok(shape)
}

/// Sum over `dims`, accumulated in f32; the dimensions stay, as size 1.
pub fn sum(x: &Var, dims: &[usize]) -> Result<Var> {
    kept("sum", x.value(), dims)?;
    let y = sum_tensor(x.value(), dims)?;
    let shape = x.shape().to_vec();
    Ok(record_one("sum", &[x], y, move |flow| {
        let dy = flow.output()?;
        flow.give(0, dy.expand(&shape)?)
    }))
}

/// Mean over `dims`; the dimensions stay, as size 1. Errors when there is nothing to average.
pub fn mean(x: &Var, dims: &[usize]) -> Result<Var> {
    let n = x.value().numel() / kept("mean", x.value(), dims)?.iter().product::<usize>().max(1);
    if n == 0 {
        return Err(Error::shape("mean", format!("nothing to average over dimensions {dims:?} of shape {:?}", x.shape())));
    }
    super::scale(&sum(x, dims)?, 1.0 / n as f64)
}

/// The sum of all elements, a scalar of shape `[]`.
pub fn sum_all(x: &Var) -> Result<Var> {
    let dims: Vec<usize> = (0..x.value().rank()).collect();
    super::reshape(&sum(x, &dims)?, &[])
}
