//! rms_norm on CUDA.
#![allow(unused_variables, clippy::too_many_arguments)]

use crate::Result;
use crate::ops::cpu::rms_norm::Normed;
use crate::tensor::DType;
use crate::tensor::Tensor;

pub(crate) fn backward(
    x: &Tensor,
    w: &Tensor,
    rstd: &Tensor,
    dy: &Tensor,
    dh: Option<Tensor>,
    sum: Option<Tensor>,
    sum_dtype: DType,
) -> Result<(Tensor, Tensor)> {
    Err(super::missing("rms_norm"))
}

pub(crate) fn forward(x: &Tensor, residual: Option<&Tensor>, w: &Tensor, eps: f64) -> Result<Normed> {
    Err(super::missing("rms_norm"))
}
