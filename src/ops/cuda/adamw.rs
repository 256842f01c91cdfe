//! adamw on CUDA.
#![allow(unused_variables, clippy::too_many_arguments)]

use crate::Result;
use crate::ops::adamw::AdamWParam;
use crate::ops::adamw::AdamWSettings;
use crate::tensor::Tensor;

pub(crate) fn square_sum(x: &Tensor) -> Result<f64> {
    Err(super::missing("adamw"))
}

pub(crate) fn step(
    param: &mut Tensor,
    grad: &Tensor,
    m: &mut Tensor,
    v: &mut Tensor,
    step: u64,
    h: &AdamWSettings,
    grad_scale: f64,
) -> Result<()> {
    Err(super::missing("adamw"))
}

pub(crate) fn update(params: &mut [AdamWParam], count: u64, h: &AdamWSettings, clip: f64) -> Result<Tensor> {
    Err(super::missing("adamw"))
}
