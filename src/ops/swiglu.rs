//! SwiGLU's gate (spec section 1): `y = silu(gate) * up`, `silu(g) = g sigmoid(g)`.
//!
//! Backward, with `s = sigmoid(gate)` computed again: `dgate = dy up s (1 + gate (1 - s))`, `dup = dy gate s`.

use super::elementwise::same_dtype;
use super::matmul::gemm;
use crate::autograd::{Var, compute_again, is_recording, record_one};
use crate::tensor::Tensor;
use crate::{Error, Result, profile};

/// `silu(gate) * up`, elementwise: gate, up and y of one shape, rows of any stride (halves of a joint projection).
///
/// Saves gate and up, from which y is computed again where backward needs it.
pub fn swiglu(gate: &Var, up: &Var) -> Result<Var> {
    let (g, u) = (gate.value().clone(), up.value().clone());
    let bytes = g.numel() * g.dtype().size();
    let y = gated(g.clone(), &u)?;
    let (g_again, u_again) = (g.clone(), u.clone());
    let mut y = record_one("swiglu", &[gate, up], y, move |flow| {
        let dy = flow.output()?;
        let (dgate, dup, _) = on_device!(dy.device(), swiglu::backward(g, u, dy, false))?;
        profile::moved(5 * bytes);
        flow.give(0, dgate)?;
        flow.give(1, dup)
    });
    compute_again(std::slice::from_mut(&mut y), move || {
        let y = on_device!(g_again.device(), swiglu::forward(g_again.clone(), &u_again))?;
        profile::moved(3 * bytes);
        Ok(vec![y])
    });
    Ok(y)
}

/// The gated product, on CUDA in the place of the gate where nobody else has that.
pub(crate) fn gated(gate: Tensor, up: &Tensor) -> Result<Tensor> {
    same_dtype("swiglu", &[&gate, up])?;
    if gate.shape() != up.shape() {
        return Err(Error::shape("swiglu", format!("gate {:?} and up {:?} differ", gate.shape(), up.shape())));
    }
    let bytes = gate.numel() * gate.dtype().size();
    let y = on_device!(gate.device(), swiglu::forward(gate, up))?;
    profile::moved(3 * bytes);
    Ok(y)
}

/// `swiglu(gate, up) W^T`: gate and up `[.., I]`, rows of any stride, weight `[O, I]`, y `[.., O]`; the end of a feed-forward
/// layer.
///
/// As [`swiglu`] and then [`linear`](super::linear), but the gated product is not saved: backward makes it in the pass that
/// makes the gradients of gate and up, after `dy W` and before `dW`. Gate and up are given up: without gradients their memory is
/// used again.
pub fn swiglu_linear(gate: Var, up: Var, weight: &Var) -> Result<Var> {
    const OP: &str = "swiglu_linear";
    let [of_gate, of_up] = [&gate, &up].map(Var::has_gradient);
    if !(is_recording() && of_gate && of_up && weight.has_gradient()) {
        let hidden = match of_gate || of_up {
            true => swiglu(&gate, &up)?,
            false => Var::constant(gated(gate.into_value(), up.value())?),
        };
        // up is given back with the gate, not before: of a pair of products either may be the one that was asked for first, which
        // captured work must not depend on
        let y = super::linear(&hidden, weight, None);
        drop((hidden, up));
        return y;
    }
    let (g, u, w) = (gate.value(), up.value(), weight.value());
    same_dtype(OP, &[g, u, w])?;
    if g.shape() != u.shape() || g.rank() == 0 || w.rank() != 2 || w.dim(1) != g.last_dim() {
        let detail = format!("gate {:?}, up {:?} and weight {:?} [out, in]", g.shape(), u.shape(), w.shape());
        return Err(Error::shape(OP, detail));
    }
    let hidden = on_device!(g.device(), swiglu::forward(g.clone(), u))?;
    let bytes = g.numel() * g.dtype().size();
    profile::moved(3 * bytes);
    let (i, o, mut shape) = (w.dim(1), w.dim(0), g.shape().to_vec());
    let rows = shape[..shape.len() - 1].iter().product();
    shape[g.rank() - 1] = o;
    let y = gemm(&hidden.reshape(&[rows, i])?, &w.transpose(0, 1)?, None, w.dtype())?.reshape(&shape)?;
    drop(hidden);
    let (g, u, w, inner) = (g.clone(), u.clone(), w.clone(), g.shape().to_vec());
    Ok(record_one(OP, &[&gate, &up, weight], y, move |flow| {
        let dy = flow.output()?.reshape(&[rows, o])?;
        let dh = gemm(&dy, &w, None, w.dtype())?.reshape(&inner)?;
        let (dgate, dup, hidden) = on_device!(dh.device(), swiglu::backward(g, u, dh, true))?;
        profile::moved(6 * bytes);
        flow.give(0, dgate)?;
        flow.give(1, dup)?;
        let (Some(dtype), Some(hidden)) = (flow.gradient_dtype(2), hidden) else { return Ok(()) };
        let sum = flow.take_sum(2);
        flow.put(2, gemm(&dy.transpose(0, 1)?, &hidden.reshape(&[rows, i])?, sum, dtype)?);
        Ok(())
    }))
}
