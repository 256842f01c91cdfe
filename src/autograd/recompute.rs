//! Trading time for memory: a block keeps only its inputs, and runs again in backward.
//!
//! This is for what costs real work, and is asked for; single values that cost next to nothing are computed again anyway
//! (see `saved`), inside such blocks too.

use super::tape::{Tape, is_recording, no_grad, record_always};
use super::{Saved, Var, VarId};
use crate::Result;
use crate::tensor::DType;

/// Run `f(inputs)` without saving its activations; backward runs it again, recorded, and walks that.
///
/// `f` must compute the same both times. Gradients reach the inputs and every parameter that `f` uses.
pub fn recompute<F>(inputs: &[&Var], f: F) -> Result<Vec<Var>>
where
    F: Fn(&[Var]) -> Result<Vec<Var>> + Send + 'static,
{
    let values: Vec<Var> = inputs.iter().map(|&v| v.clone()).collect();
    if !is_recording() {
        return f(&values);
    }
    let outputs = no_grad(|| f(&values))?;
    let saved: Vec<(Saved, bool, Option<DType>)> =
        values.into_iter().map(|v| (v.save(), v.has_gradient(), v.gradient)).collect();
    let tensors = outputs.into_iter().map(Var::into_value).collect::<Vec<_>>();
    let n = tensors.len();
    Ok(record_always("recompute", inputs, tensors, move |flow| {
        let again: Vec<Var> = saved
            .into_iter()
            .map(|(v, has_gradient, gradient)| {
                Ok(Var { id: has_gradient.then(VarId::fresh), gradient, ..Var::constant(v.take()?) })
            })
            .collect::<Result<_>>()?;
        let seeds: Vec<_> = (0..n).map(|i| flow.output_at(i)).collect();
        let (grads, sum) = flow.nested();
        let tape = Tape::new(sum);
        let outputs = tape.record(|| f(&again))?;
        let seeded: Vec<_> =
            outputs.iter().zip(seeds).filter(|(v, _)| v.has_gradient()).filter_map(|(v, g)| Some((v, g?))).collect();
        tape.backward_from(&seeded, grads)?;
        let moved: Vec<_> = again.iter().map(|v| grads.take(v)).collect();
        for (i, g) in moved.into_iter().enumerate() {
            if let Some(g) = g {
                flow.give(i, g)?;
            }
        }
        Ok(())
    }))
}
