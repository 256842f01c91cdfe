//! Softmax and its logarithm over the last dimension.
//!
//! With `l = ln sum e^x`: `softmax = e^(x - l)`, `log_softmax = x - l`. Backward, with `p = e^(x - l)`:
//! `dx = p (dy - sum(dy p))` and `dx = dy - p sum(dy)`. Both save x and l, for `p` from a rounded y would err more.

use crate::autograd::{Var, record_one};
use crate::{Error, Result};

/// `e^x / sum e^x` over the last dimension.
pub fn softmax(x: &Var) -> Result<Var> {
    normalize("softmax", x, false)
}

/// `x - ln sum e^x` over the last dimension.
pub fn log_softmax(x: &Var) -> Result<Var> {
    normalize("log_softmax", x, true)
}

fn normalize(op: &'static str, x: &Var, log: bool) -> Result<Var> {
    let xv = x.value();
    if xv.rank() == 0 {
        return Err(Error::shape(op, "needs at least one dimension"));
    }
    let (y, lse) = on_device!(xv.device(), softmax::forward(op, xv, log))?;
    let xv = xv.clone();
    Ok(record_one(op, &[x], y, move |flow| {
        let dy = flow.output()?;
        super::elementwise::same_dtype(op, &[&xv, &dy])?;
        let dx = on_device!(dy.device(), softmax::backward(op, &xv, &lse, &dy, log))?;
        flow.give(0, dx)
    }))
}
