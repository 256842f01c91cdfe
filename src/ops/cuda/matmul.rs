//! matmul on CUDA.
#![allow(unused_variables, clippy::too_many_arguments)]

use crate::Result;
use crate::tensor::DType;
use crate::tensor::Tensor;

pub(crate) fn batched(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    Err(super::missing("matmul"))
}

pub(crate) fn gemm(a: &Tensor, b: &Tensor, start: Option<Tensor>, dtype: DType) -> Result<Tensor> {
    Err(super::missing("matmul"))
}
