//! AdamW (Loshchilov & Hutter, arXiv 1711.05101, algorithm 2), and the norm that gradients are clipped by.
//!
//! `p -= lr wd p; m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2; p -= lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)`.

use super::elementwise::{same_device, same_dtype};
use crate::tensor::{DType, Tensor};
use crate::{Error, Result, profile};

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

/// One parameter in a step over all of them.
#[derive(Debug)]
pub struct AdamWParam<'a> {
    /// The weights.
    pub param: &'a mut Tensor,
    /// Their gradient, of the same shape: f32, or of param's dtype.
    pub grad: &'a Tensor,
    /// First moment, f32.
    pub m: &'a mut Tensor,
    /// Second moment, f32.
    pub v: &'a mut Tensor,
    /// The weights in f32, where they are 16 bits wide: the step is taken here, and the weights are its rounding.
    pub master: Option<&'a mut Tensor>,
    /// In place of the settings'.
    pub weight_decay: f64,
}

/// One step of AdamW (counted from 1) over all parameters, in place, with the global norm of the gradients clipped to
/// `clip` (0 for no clipping). Returns that norm before clipping, a scalar on the parameters' device: reading it waits for
/// the step, nothing else does. Where it is not finite nothing has changed.
pub fn adamw(params: &mut [AdamWParam], step: u64, h: &AdamWSettings, clip: f64) -> Result<Tensor> {
    for p in params.iter() {
        let wide = p.master.as_deref().unwrap_or(p.param);
        check(wide, p.grad, p.m, p.v, step)?;
        if p.param.shape() != p.grad.shape() || (p.grad.dtype() != p.param.dtype() && p.grad.dtype() != DType::F32) {
            let (p, g) = (&p.param, p.grad);
            let detail = format!("a gradient {} {:?} of {} {:?}", g.dtype(), g.shape(), p.dtype(), p.shape());
            return Err(Error::shape("adamw", detail));
        }
        same_device("adamw", &[p.param, wide, params[0].param])?;
        if let Some(master) = p.master.as_deref().filter(|m| m.dtype() != DType::F32) {
            return Err(Error::dtype("adamw", format!("masters must be f32, got {}", master.dtype())));
        }
    }
    match params.first().map(|p| p.param.device()) {
        None => Ok(Tensor::scalar(0f64)),
        Some(device) => {
            let norm = on_device!(device, adamw::update(params, step, h, clip))?;
            // gradients twice; moments, and masters or weights, read and written; weights of 16 bits written
            let of = |p: &AdamWParam| match p.master {
                Some(_) => 2 * p.grad.dtype().size() + 24 + p.param.dtype().size(),
                None => 2 * p.grad.dtype().size() + 16 + 2 * p.param.dtype().size(),
            };
            profile::moved(params.iter().map(|p| p.param.numel() * of(p)).sum());
            Ok(norm)
        }
    }
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
    check(param, grad, m, v, step)?;
    on_device!(param.device(), adamw::step(param, grad, m, v, step, h, grad_scale))
}

fn check(param: &Tensor, grad: &Tensor, m: &Tensor, v: &Tensor, step: u64) -> Result<()> {
    same_dtype("adamw", &[m, v])?;
    same_device("adamw", &[param, grad, m, v])?;
    if !param.dtype().is_float() {
        return Err(Error::dtype("adamw", format!("needs float parameters, got {}", param.dtype())));
    }
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
    Ok(())
}

/// `sqrt(sum of g^2)` over all elements of all gradients.
pub fn global_norm<'a>(grads: impl IntoIterator<Item = &'a Tensor>) -> Result<f64> {
    let mut sum = 0.0;
    for g in grads {
        sum += on_device!(g.device(), adamw::square_sum(g))?;
    }
    Ok(sum.sqrt())
}
