//! write_rows on CUDA.
#![allow(unused_variables, clippy::too_many_arguments)]

use crate::Result;
use crate::tensor::Tensor;

pub(crate) fn write_rows(target: &mut Tensor, rows: &Tensor, at: usize) -> Result<()> {
    Err(super::missing("write_rows"))
}
