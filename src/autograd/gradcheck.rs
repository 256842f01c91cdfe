//! Finite differences against the tape: the check that every op passes.

use super::{Gradients, Tape, Var, no_grad, tape::SumInto};
use crate::tensor::{DType, Tensor};
use crate::{Error, Result};

/// How [`check_gradients`] probes, and how much error it lets pass.
#[derive(Clone, Copy, Debug)]
pub struct GradCheck {
    /// Step h of the central difference over -2h, -h, h and 2h.
    pub step: f64,
    /// Largest difference allowed, relative to `1 + |gradient|`.
    pub tolerance: f64,
    /// At most this many elements of each input are probed, spread evenly.
    pub probes: usize,
}

impl Default for GradCheck {
    /// For f64 inputs: a central difference over four points errs by about step^4 / 30 times the fifth derivative, and by
    /// 1e-16/step = 1e-11 of rounding; 1e-6 leaves room for that derivative.
    fn default() -> Self {
        Self { step: 1e-5, tolerance: 1e-6, probes: 64 }
    }
}

/// Compare the gradients of `f` with central differences, for every input.
///
/// `inputs` must be f64 (finite differences drown in rounding below that). Outputs of any shape are reduced by a
/// fixed random weighting, so that every output element counts. Returns the largest error found, relative to
/// `1 + |gradient|`; errors when that passes `check.tolerance` or when an input gets no gradient at all.
pub fn check_gradients(
    op: &'static str,
    sum: SumInto,
    inputs: &[Tensor],
    check: GradCheck,
    f: impl Fn(&[Var]) -> Result<Vec<Var>>,
) -> Result<f64> {
    if let Some(t) = inputs.iter().find(|t| t.dtype() != DType::F64) {
        return Err(Error::dtype(op, format!("check_gradients needs f64 inputs, got {}", t.dtype())));
    }
    let vars: Vec<Var> = inputs.iter().map(|t| Var::parameter(t.clone())).collect();
    let tape = Tape::new(sum);
    let outputs = tape.record(|| f(&vars))?;
    let weights: Vec<Tensor> = outputs.iter().enumerate().map(|(i, y)| weighting(i, y.shape())).collect::<Result<_>>()?;
    let mut grads = Gradients::default();
    let seeds: Vec<_> = outputs.iter().zip(weights.iter().cloned()).filter(|(y, _)| y.has_gradient()).collect();
    tape.backward_from(&seeds, &mut grads)?;

    let weighted = |inputs: &[Var]| -> Result<f64> {
        let ys = no_grad(|| f(inputs))?;
        let mut total = 0.0;
        for (y, w) in ys.iter().zip(&weights) {
            total += y.value().to_f64_vec()?.iter().zip(w.to_f64_vec()?).map(|(a, b)| a * b).sum::<f64>();
        }
        Ok(total)
    };
    let mut worst = 0f64;
    for (i, input) in inputs.iter().enumerate() {
        if input.numel() == 0 {
            continue;
        }
        let grad = grads.get(&vars[i]).ok_or_else(|| Error::gradient(op, format!("input {i} got no gradient")))?;
        if grad.shape() != input.shape() {
            let detail = format!("input {i} has shape {:?}, its gradient {:?}", input.shape(), grad.shape());
            return Err(Error::gradient(op, detail));
        }
        let (grad, values) = (grad.to_f64_vec()?, input.to_f64_vec()?);
        let stride = values.len().div_ceil(check.probes).max(1);
        for j in (0..values.len()).step_by(stride) {
            let probe = |delta: f64| -> Result<f64> {
                let mut moved = values.clone();
                moved[j] += delta;
                let mut at: Vec<Var> = vars.iter().map(Var::detach).collect();
                at[i] = Var::constant(Tensor::from_vec(moved, input.shape())?);
                weighted(&at)
            };
            let h = check.step;
            let (near, far) = (probe(h)? - probe(-h)?, probe(2.0 * h)? - probe(-2.0 * h)?);
            let numeric = (8.0 * near - far) / (12.0 * h);
            let error = (numeric - grad[j]).abs() / (1.0 + numeric.abs());
            if error > check.tolerance || error.is_nan() {
                let got = grad[j];
                let detail =
                    format!("input {i} element {j}: gradient {got}, finite difference {numeric}, error {error:.2e}");
                return Err(Error::gradient(op, detail));
            }
            worst = worst.max(error);
        }
    }
    Ok(worst)
}

/// Fixed weights in [-1, 1) without a pattern that an error could cancel against (fractions of the golden ratio).
fn weighting(which: usize, shape: &[usize]) -> Result<Tensor> {
    let n: usize = shape.iter().product();
    let at = |i: usize| ((i + 1) as f64 * 0.618_033_988_749_895 + which as f64 * 0.37).fract() * 2.0 - 1.0;
    Tensor::from_vec((0..n).map(at).collect::<Vec<f64>>(), shape)
}
