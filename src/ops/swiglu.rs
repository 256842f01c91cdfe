//! SwiGLU's gate (spec section 1): `y = silu(gate) * up`, `silu(g) = g sigmoid(g)`.
//!
//! Backward, with `s = sigmoid(gate)` computed again: `dgate = dy up s (1 + gate (1 - s))`, `dup = dy gate s`.

use super::elementwise::same_dtype;
use crate::autograd::{Var, compute_again, record_one};
use crate::{Error, Result, profile};

/// `silu(gate) * up`, elementwise: gate, up and y of one shape, rows of any stride (halves of a joint projection).
///
/// Saves gate and up, from which y is computed again where backward needs it.
pub fn swiglu(gate: &Var, up: &Var) -> Result<Var> {
    let (g, u) = (gate.value(), up.value());
    same_dtype("swiglu", &[g, u])?;
    if g.shape() != u.shape() {
        return Err(Error::shape("swiglu", format!("gate {:?} and up {:?} differ", g.shape(), u.shape())));
    }
    let y = on_device!(g.device(), swiglu::forward(g, u))?;
    let bytes = g.numel() * g.dtype().size();
    profile::moved(3 * bytes);
    let (g, u) = (g.clone(), u.clone());
    let (g_again, u_again) = (g.clone(), u.clone());
    let mut y = record_one("swiglu", &[gate, up], y, move |flow| {
        let dy = flow.output()?;
        let (dgate, dup) = on_device!(dy.device(), swiglu::backward(g, u, &dy))?;
        profile::moved(5 * bytes);
        flow.give(0, dgate)?;
        flow.give(1, dup)
    });
    compute_again(std::slice::from_mut(&mut y), move || {
        let y = on_device!(g_again.device(), swiglu::forward(&g_again, &u_again))?;
        profile::moved(3 * bytes);
        Ok(vec![y])
    });
    Ok(y)
}
