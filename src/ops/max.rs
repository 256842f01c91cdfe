//! Maxima. Where elements tie, the one of the lowest index counts; NaN counts as larger than any number.

use crate::autograd::{Var, record_one};
use crate::tensor::Tensor;
use crate::{Error, Result};

/// The largest element over `dims`, which stay, as size 1. Backward gives dy to that element (the first, of equals).
pub fn max(x: &Var, dims: &[usize]) -> Result<Var> {
    let mut shape = x.shape().to_vec();
    for &d in dims {
        *shape.get_mut(d).ok_or_else(|| Error::shape("max", format!("dimension {d} of shape {:?}", x.shape())))? = 1;
    }
    // the reduced dimensions go last, as one row of n
    let rank = shape.len();
    let order: Vec<usize> = (0..rank).filter(|d| !dims.contains(d)).chain((0..rank).filter(|d| dims.contains(d))).collect();
    let mut inverse = vec![0; rank];
    for (i, &o) in order.iter().enumerate() {
        inverse[o] = i;
    }
    let permuted = x.value().permute(&order)?;
    let permuted_shape = permuted.shape().to_vec();
    let rows: usize = shape.iter().product();
    let n = x.value().numel().checked_div(rows).unwrap_or(0);
    if n == 0 {
        return Err(Error::shape("max", format!("no elements over dimensions {dims:?} of shape {:?}", x.shape())));
    }
    let (y, at) = on_device!(x.value().device(), max::forward("max", &permuted.reshape(&[rows, n])?))?;
    Ok(record_one("max", &[x], y.reshape(&shape)?, move |flow| {
        let dy = flow.output()?.reshape(&[rows])?;
        let dx = on_device!(dy.device(), max::backward(&dy, &at, n))?;
        flow.give(0, dx.reshape(&permuted_shape)?.permute(&inverse)?)
    }))
}

/// The index of the largest element of each row of the last dimension: x `[.., V]`, result int64 `[..]`.
pub fn argmax(x: &Tensor) -> Result<Tensor> {
    let Some((&n, lead)) = x.shape().split_last().filter(|(n, _)| **n > 0) else {
        return Err(Error::shape("argmax", format!("no elements in the last dimension of shape {:?}", x.shape())));
    };
    let at = on_device!(x.device(), max::forward("argmax", &x.reshape(&[x.numel() / n, n])?))?.1;
    at.reshape(lead)
}
