//! rope on CUDA.
#![allow(unused_variables, clippy::too_many_arguments)]

use crate::Result;
use crate::ops::rope::RopeTable;
use crate::tensor::Tensor;

pub(crate) fn rotate(x: &Tensor, table: &RopeTable, back: bool) -> Result<Tensor> {
    Err(super::missing("rope"))
}
