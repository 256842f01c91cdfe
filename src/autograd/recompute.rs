//! Trading time for memory: a block keeps only its inputs, and runs again in backward.

use super::tape::{Tape, is_recording, no_grad, record_always};
use super::{Var, VarId};
use crate::Result;

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
    let tensors = outputs.into_iter().map(Var::into_value).collect::<Vec<_>>();
    let n = tensors.len();
    Ok(record_always("recompute", inputs, tensors, move |flow| {
        let again: Vec<Var> = values.iter().map(|v| Var { id: v.id.map(|_| VarId::fresh()), ..v.clone() }).collect();
        drop(values);
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
