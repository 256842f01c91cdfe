//! elementwise on CUDA.
#![allow(unused_variables, clippy::too_many_arguments)]

use crate::Result;
use crate::ops::elementwise::Binary;
use crate::ops::elementwise::Unary;
use crate::tensor::Tensor;

pub(crate) fn add_assign(sum: &mut Tensor, term: &Tensor) -> Result<()> {
    Err(super::missing("elementwise"))
}

pub(crate) fn binary(f: Binary, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    Err(super::missing("elementwise"))
}

pub(crate) fn unary(f: Unary, x: &Tensor) -> Result<Tensor> {
    Err(super::missing("elementwise"))
}

pub(crate) fn unary_backward(f: Unary, x: &Tensor, y: &Tensor, dy: &Tensor) -> Result<Tensor> {
    Err(super::missing("elementwise"))
}
