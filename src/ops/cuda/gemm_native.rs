//! Felid's own matrix product on CUDA.

use crate::Result;
use crate::cuda::{Gpu, Product};
use crate::tensor::Tensor;

/// `D = A B (+ D)`: `b` and `y` are the tensors that the product's B and D are of.
pub(crate) fn native_product(_gpu: &'static Gpu, _b: &Tensor, _y: &mut Tensor, _product: &Product) -> Result<()> {
    Err(super::missing("gemm"))
}
