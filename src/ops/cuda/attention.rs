//! attention on CUDA.
#![allow(unused_variables, clippy::too_many_arguments)]

use crate::Result;
use crate::ops::attention::Mask;
use crate::tensor::Tensor;

pub(crate) fn backward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    y: &Tensor,
    lse: &Tensor,
    dy: &Tensor,
    mask: Mask,
    scale: f64,
) -> Result<[Tensor; 3]> {
    Err(super::missing("attention"))
}

pub(crate) fn forward(q: &Tensor, k: &Tensor, v: &Tensor, mask: Mask, scale: f64) -> Result<(Tensor, Tensor)> {
    Err(super::missing("attention"))
}
