//! RMSNorm (spec section 1), alone or fused with the residual add that precedes it in every block.
//!
//! `y = x * rstd * w`, `rstd = 1 / sqrt(mean(x^2) + eps)`, over the last dimension D, in f32.
//!
//! Backward, with `g = dy * w` and `m = mean(g * x) * rstd^2`: `dx = rstd * (g - x * m)`, `dw = sum over rows of dy * x * rstd`.

use super::elementwise::same_dtype;
use crate::autograd::{Flow, Var, compute_again, record};
use crate::tensor::Tensor;
use crate::{Error, Result, profile};

/// `y = rms_norm(x) * weight` over the last dimension: x `[.., D]` (rows of any stride), weight `[D]`, y like x.
///
/// Saves x and `1/rms` (one accumulator a row), from which y is computed again where backward needs it.
pub fn rms_norm(x: &Var, weight: &Var, eps: f64) -> Result<Var> {
    Ok(forward("rms_norm", x, None, weight, eps)?.0)
}

/// `h = x + residual; y = rms_norm(h) * weight`, one pass: returns (y, h). All `[.., D]`, weight `[D]`.
///
/// The gradient of x and of residual is the same tensor.
pub fn add_rms_norm(x: &Var, residual: &Var, weight: &Var, eps: f64) -> Result<(Var, Var)> {
    let (y, h) = forward("add_rms_norm", x, Some(residual), weight, eps)?;
    Ok((y, h.unwrap_or_else(|| x.clone())))
}

fn forward(op: &'static str, x: &Var, residual: Option<&Var>, weight: &Var, eps: f64) -> Result<(Var, Option<Var>)> {
    let (xv, w) = (x.value(), weight.value());
    same_dtype(op, &[xv, w])?;
    if xv.rank() == 0 || w.shape() != [xv.last_dim()] {
        return Err(Error::shape(
            op,
            format!("x {:?} needs a weight of its last dimension, got {:?}", xv.shape(), w.shape()),
        ));
    }
    if let Some(r) = residual {
        same_dtype(op, &[xv, r.value()])?;
        if r.shape() != x.shape() {
            return Err(Error::shape(op, format!("x {:?} and residual {:?} differ", x.shape(), r.shape())));
        }
    }
    let out = on_device!(xv.device(), rms_norm::forward(xv, residual.map(Var::value), w, eps))?;
    let bytes = xv.numel() * xv.dtype().size();
    profile::moved(if residual.is_some() { 4 * bytes } else { 2 * bytes });
    let (h, rstd, wv) = (out.h.clone().unwrap_or_else(|| xv.clone()), out.rstd, w.clone());
    let (h_again, w_again) = (h.clone(), w.clone());
    let backward = move |flow: &mut Flow, dh: Option<Tensor>, weight_at: usize| -> Result<Option<Tensor>> {
        let Some(dy) = flow.output_at(0) else { return Ok(dh) };
        let dtype = flow.gradient_dtype(weight_at).unwrap_or(wv.dtype());
        let sum = flow.take_sum(weight_at);
        if let Some(sum) = &sum {
            super::elementwise::check_sum(op, sum, wv.shape(), dtype, &dy)?;
        }
        let through_h = dh.is_some();
        let (dx, dw) = on_device!(h.device(), rms_norm::backward(&h, &wv, &rstd, &dy, dh, sum, dtype))?;
        profile::moved(if through_h { 4 * bytes } else { 3 * bytes });
        flow.put(weight_at, dw);
        Ok(Some(dx))
    };
    let mut vars = match (residual, out.h) {
        (Some(residual), Some(h)) => record(op, &[x, residual, weight], vec![out.y, h], move |flow| {
            let dh = flow.output_at(1);
            if let Some(dx) = backward(flow, dh, 2)? {
                flow.give(0, dx.clone())?;
                flow.give(1, dx)?;
            }
            Ok(())
        }),
        _ => record(op, &[x, weight], vec![out.y], move |flow| match backward(flow, None, 1)? {
            Some(dx) => flow.give(0, dx),
            None => Ok(()),
        }),
    };
    // after the add, y is the norm of h alone: the sum was rounded before it was normed
    compute_again(&mut vars[..1], move || {
        let y = on_device!(h_again.device(), rms_norm::forward(&h_again, None, &w_again, eps))?.y;
        profile::moved(2 * bytes);
        Ok(vec![y])
    });
    let mut vars = vars.into_iter();
    match vars.next() {
        Some(y) => Ok((y, vars.next())),
        None => Err(Error::shape(op, "no output")),
    }
}
