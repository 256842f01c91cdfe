//! swiglu on CUDA.
#![allow(unused_variables, clippy::too_many_arguments)]

use crate::Result;
use crate::tensor::Tensor;

pub(crate) fn backward(gate: &Tensor, up: &Tensor, dy: &Tensor) -> Result<(Tensor, Tensor)> {
    Err(super::missing("swiglu"))
}

pub(crate) fn forward(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    Err(super::missing("swiglu"))
}
