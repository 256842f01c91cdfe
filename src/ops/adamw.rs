//! AdamW (Loshchilov & Hutter, arXiv 1711.05101, algorithm 2), and the norm that gradients are clipped by.
//!
//! `p -= lr wd p; m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2; p -= lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)`.

use super::cpu;
use super::elementwise::same_dtype;
use crate::tensor::{DType, Device, Tensor};
use crate::{Error, Result};

/// What stays the same from parameter to parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWSettings {
    /// Rate of this step.
    pub lr: f64,
    /// b1: what the first moment keeps of itself at each step.
    pub beta1: f64,
    /// b2: the same of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// wd: share of the parameter, times the rate, that is taken off.
    pub weight_decay: f64,
}

/// One step of AdamW on one parameter, in place, in one pass.
///
/// `grad` has param's shape and dtype and counts `grad_scale` times (1, or what clipping leaves); the moments m and v are
/// f32 of that shape; `step` is t, counted from 1.
pub fn adamw_step(
    param: &mut Tensor,
    grad: &Tensor,
    m: &mut Tensor,
    v: &mut Tensor,
    step: u64,
    h: &AdamWSettings,
    grad_scale: f64,
) -> Result<()> {
    same_dtype("adamw", &[param, grad])?;
    if m.dtype() != DType::F32 || v.dtype() != DType::F32 {
        return Err(Error::dtype("adamw", format!("moments must be f32, got {} and {}", m.dtype(), v.dtype())));
    }
    if [grad.shape(), m.shape(), v.shape()].iter().any(|s| *s != param.shape()) {
        let shapes = [grad.shape(), m.shape(), v.shape()];
        return Err(Error::shape("adamw", format!("gradient and moments {shapes:?} do not fit {:?}", param.shape())));
    }
    if step == 0 {
        return Err(Error::config("adamw: steps count from 1"));
    }
    match param.device() {
        Device::Cpu => cpu::adamw::step(param, grad, m, v, step, h, grad_scale),
    }
}

/// `sqrt(sum of g^2)` over all elements of all gradients.
pub fn global_norm<'a>(grads: impl IntoIterator<Item = &'a Tensor>) -> Result<f64> {
    let mut sum = 0.0;
    for g in grads {
        sum += match g.device() {
            Device::Cpu => cpu::adamw::square_sum(g)?,
        };
    }
    Ok(sum.sqrt())
}
