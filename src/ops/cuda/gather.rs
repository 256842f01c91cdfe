//! gather on CUDA.
#![allow(unused_variables, clippy::too_many_arguments)]

use crate::Result;
use crate::tensor::DType;
use crate::tensor::Tensor;

pub(crate) fn gather(x: &Tensor, dim: usize, index: &[usize]) -> Result<Tensor> {
    Err(super::missing("gather"))
}

pub(crate) fn scatter_add(
    dy: &Tensor,
    dim: usize,
    index: &[usize],
    shape: &[usize],
    sum: Option<Tensor>,
    dtype: DType,
) -> Result<Tensor> {
    Err(super::missing("gather"))
}
