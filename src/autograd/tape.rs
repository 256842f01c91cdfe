//! The tape: nodes in the order they ran, and the walk back over them.

use super::{Var, VarId};
use crate::memory::{Category, counted_as};
use crate::tensor::{DType, Tensor};
use crate::{Error, Result, profile};
use std::cell::RefCell;
use std::collections::{HashMap, HashSet};

/// Sums a gradient into another of the same shape, of its dtype or a wider one: the one piece of arithmetic that the walk
/// needs, given by `ops`.
pub type SumInto = fn(&mut Tensor, &Tensor) -> Result<()>;
type Backward = Box<dyn FnOnce(&mut Flow) -> Result<()> + Send>;

struct Node {
    op: &'static str,
    /// Those that gradients flow to, and the dtypes of these gradients.
    inputs: Vec<Option<(VarId, DType)>>,
    outputs: Vec<VarId>,
    backward: Backward,
}

/// What a tape has recorded so far.
#[derive(Default)]
struct Recording {
    nodes: Vec<Node>,
    /// See [`Tape::saving_all`].
    save_all: bool,
}

thread_local! {
    /// Tapes under way on this thread, innermost last; `None` where `no_grad` suspends recording.
    static CURRENT: RefCell<Vec<Option<Recording>>> = const { RefCell::new(Vec::new()) };
}

/// Pops the innermost entry however the scope ends, so that an error or a panic inside leaves no tape behind.
struct Scope;
impl Scope {
    fn enter(recording: Option<Recording>) -> Self {
        CURRENT.with_borrow_mut(|c| c.push(recording));
        Self
    }
    fn leave(self) -> Option<Recording> {
        let recording = CURRENT.with_borrow_mut(|c| c.pop().flatten());
        std::mem::forget(self);
        recording
    }
}
impl Drop for Scope {
    fn drop(&mut self) {
        CURRENT.with_borrow_mut(|c| c.pop());
    }
}

/// True inside [`Tape::record`] and not inside [`no_grad`].
pub fn is_recording() -> bool {
    CURRENT.with_borrow(|c| matches!(c.last(), Some(Some(_))))
}

/// True where no value is to be computed again in backward.
pub(super) fn saves_all() -> bool {
    CURRENT.with_borrow(|c| matches!(c.last(), Some(Some(r)) if r.save_all))
}

/// Run `f` without recording: nothing is saved and no gradient flows.
pub fn no_grad<R>(f: impl FnOnce() -> R) -> R {
    let scope = Scope::enter(None);
    let r = f();
    scope.leave();
    r
}

/// Called by every op: wrap outputs and, if a tape records and any input has a gradient, put `backward` on the tape.
/// `backward` takes the gradients of the outputs from its [`Flow`] and gives those of the inputs.
pub fn record(
    op: &'static str,
    inputs: &[&Var],
    outputs: Vec<Tensor>,
    backward: impl FnOnce(&mut Flow) -> Result<()> + Send + 'static,
) -> Vec<Var> {
    if !is_recording() || inputs.iter().all(|v| v.id.is_none()) {
        return outputs.into_iter().map(Var::constant).collect();
    }
    record_always(op, inputs, outputs, backward)
}

pub(super) fn record_always(
    op: &'static str,
    inputs: &[&Var],
    outputs: Vec<Tensor>,
    backward: impl FnOnce(&mut Flow) -> Result<()> + Send + 'static,
) -> Vec<Var> {
    let outputs: Vec<Var> = outputs.into_iter().map(Var::parameter).collect();
    let node = Node {
        op,
        inputs: inputs.iter().map(|v| Some((v.id?, v.gradient_dtype()))).collect(),
        outputs: outputs.iter().filter_map(|v| v.id).collect(),
        backward: Box::new(backward),
    };
    CURRENT.with_borrow_mut(|c| {
        if let Some(Some(recording)) = c.last_mut() {
            recording.nodes.push(node);
        }
    });
    outputs
}

/// [`record`] for an op with one output.
pub fn record_one(
    op: &'static str,
    inputs: &[&Var],
    output: Tensor,
    backward: impl FnOnce(&mut Flow) -> Result<()> + Send + 'static,
) -> Var {
    match record(op, inputs, vec![output], backward).pop() {
        Some(v) => v,
        None => unreachable!("record returns as many values as it is given"),
    }
}

/// Gradients by value, kept across micro-batches.
#[derive(Default)]
pub struct Gradients {
    pub(super) of: HashMap<VarId, Tensor>,
}

impl Gradients {
    /// The gradient of a leaf, in its shape; `None` if none has flowed to it.
    pub fn get(&self, v: &Var) -> Option<&Tensor> {
        self.of.get(&v.id?)
    }
    /// The gradient of a leaf, for writing (clipping, scaling).
    pub fn get_mut(&mut self, v: &Var) -> Option<&mut Tensor> {
        self.of.get_mut(&v.id?)
    }
    /// Take the gradient of a leaf out; what flows to it afterwards starts anew.
    pub fn take(&mut self, v: &Var) -> Option<Tensor> {
        self.of.remove(&v.id?)
    }
    /// The values among `vars` that no gradient has flowed to.
    pub fn missing<'a>(&self, vars: impl IntoIterator<Item = &'a Var>) -> Vec<&'a Var> {
        vars.into_iter().filter(|v| self.get(v).is_none()).collect()
    }
    /// Forget all gradients.
    pub fn clear(&mut self) {
        self.of.clear();
    }
    /// Number of values that have a gradient.
    pub fn len(&self) -> usize {
        self.of.len()
    }
    /// True when no gradient has flowed.
    pub fn is_empty(&self) -> bool {
        self.of.is_empty()
    }
}

/// What a node's backward sees: gradients of its outputs to take, gradients of its inputs to give.
pub struct Flow<'a> {
    op: &'static str,
    inputs: &'a [Option<(VarId, DType)>],
    output_grads: Vec<Option<Tensor>>,
    grads: &'a mut Gradients,
    sum: SumInto,
}

impl Flow<'_> {
    /// Take the gradient of the only output (an error in an op with several).
    pub fn output(&mut self) -> Result<Tensor> {
        let op = self.op;
        self.output_at(0).ok_or_else(|| Error::gradient(op, "gradient of the output is missing"))
    }
    /// Take the gradient of output `i`; `None` if nothing depends on it.
    pub fn output_at(&mut self, i: usize) -> Option<Tensor> {
        self.output_grads.get_mut(i)?.take()
    }
    /// True when input `i` has a gradient; computing it otherwise is wasted.
    pub fn wants(&self, i: usize) -> bool {
        self.inputs.get(i).is_some_and(Option::is_some)
    }
    /// Add `grad` to the gradient of input `i`: moved there if it is the first, summed in place if not.
    pub fn give(&mut self, i: usize, grad: Tensor) -> Result<()> {
        let Some(&Some((id, dtype))) = self.inputs.get(i) else { return Ok(()) };
        put(self.grads, id, dtype, grad, self.sum)
    }
    /// The dtype that the gradient of input `i` is kept in. Ops that make it by themselves make it so.
    pub fn gradient_dtype(&self, i: usize) -> Option<DType> {
        self.inputs.get(i).copied().flatten().map(|(_, dtype)| dtype)
    }
    /// Take what has arrived for input `i` so far, for an op that accumulates into it by itself; give back the total
    /// with [`Flow::put`].
    pub fn take_sum(&mut self, i: usize) -> Option<Tensor> {
        self.grads.of.remove(&(*self.inputs.get(i)?)?.0)
    }
    /// Set the gradient of input `i`, after [`Flow::take_sum`].
    pub fn put(&mut self, i: usize, total: Tensor) {
        if let Some(Some((id, _))) = self.inputs.get(i) {
            self.grads.of.insert(*id, total);
        }
    }
    /// All gradients and how they are summed, for `recompute`, which walks a tape of its own.
    pub(super) fn nested(&mut self) -> (&mut Gradients, SumInto) {
        (self.grads, self.sum)
    }
}

/// Add `grad` to the gradient of `id`, which is kept in `dtype`.
fn put(grads: &mut Gradients, id: VarId, dtype: DType, grad: Tensor, sum: SumInto) -> Result<()> {
    let total = match grads.of.get_mut(&id) {
        Some(total) => return sum(total, &grad),
        None if grad.dtype() == dtype => grad,
        None => {
            let mut total = Tensor::zeros(grad.shape(), dtype, grad.device())?;
            sum(&mut total, &grad)?;
            total
        }
    };
    grads.of.insert(id, total);
    Ok(())
}

/// Records ops so that they can be differentiated. Make one with [`crate::ops::tape`].
pub struct Tape {
    sum: SumInto,
    recording: RefCell<Recording>,
}

impl Tape {
    /// An empty tape whose gradients `sum` adds up.
    pub fn new(sum: SumInto) -> Self {
        Self { sum, recording: RefCell::default() }
    }
    /// This tape, saving values even where computing them again is cheap ([`super::compute_again`]): more memory, and the
    /// time that backward then does not spend on them.
    pub fn saving_all(self) -> Self {
        self.recording.borrow_mut().save_all = true;
        self
    }
    /// Run `f`, recording what it does. May be called again: the tape grows.
    pub fn record<R>(&self, f: impl FnOnce() -> R) -> R {
        let scope = Scope::enter(Some(self.recording.take()));
        let r = f();
        if let Some(recording) = scope.leave() {
            self.recording.replace(recording);
        }
        r
    }
    /// Number of recorded nodes.
    pub fn len(&self) -> usize {
        self.recording.borrow().nodes.len()
    }
    /// True when nothing is recorded.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// The names of the recorded ops, in order: a trace to study.
    pub fn trace(&self) -> Vec<&'static str> {
        self.recording.borrow().nodes.iter().map(|n| n.op).collect()
    }
    /// Add `seed * d(output)/d(leaf)` to `grads` for every leaf. Consumes the tape, freeing node after node.
    /// `output` is mostly a scalar loss; for other shapes the gradient of its sum is taken.
    pub fn backward(self, output: &Var, seed: f64, grads: &mut Gradients) -> Result<()> {
        let seed = Tensor::full(seed, output.shape(), output.dtype(), output.value.device())?;
        self.backward_from(&[(output, seed)], grads)
    }
    /// Like [`Tape::backward`], from given gradients of several outputs, each of its output's shape, dtype and device.
    ///
    /// After an error (no memory left, say) `grads` holds no gradient of an activation, but those of leaves may be partly
    /// summed or gone: clear them.
    pub fn backward_from(self, outputs: &[(&Var, Tensor)], grads: &mut Gradients) -> Result<()> {
        let mut nodes = self.recording.into_inner().nodes;
        let produced: HashSet<VarId> = nodes.iter().flat_map(|n| n.outputs.iter().copied()).collect();
        for (v, g) in outputs {
            let id = v.id.ok_or_else(|| {
                Error::gradient("backward", "the output depends on no parameter, or was computed outside Tape::record")
            })?;
            if g.shape() != v.shape() {
                let detail = format!("gradient of shape {:?} for an output of shape {:?}", g.shape(), v.shape());
                return Err(Error::gradient("backward", detail));
            }
            if g.dtype() != v.dtype() || g.device() != v.value.device() {
                let (a, b) = ((g.dtype(), g.device()), (v.dtype(), v.value.device()));
                let detail = format!("gradient in {} on {} for an output in {} on {}", a.0, a.1, b.0, b.1);
                return Err(Error::gradient("backward", detail));
            }
            put(grads, id, v.gradient_dtype(), g.clone(), self.sum)?;
        }
        let walked = walk(&mut nodes, grads, self.sum);
        if walked.is_err() {
            // leave no half-way gradients of activations behind
            grads.of.retain(|id, _| !produced.contains(id));
        }
        walked
    }
}

fn walk(nodes: &mut Vec<Node>, grads: &mut Gradients, sum: SumInto) -> Result<()> {
    counted_as(Category::Gradients, || {
        no_grad(|| {
            while let Some(node) = nodes.pop() {
                let output_grads: Vec<_> = node.outputs.iter().map(|id| grads.of.remove(id)).collect();
                if output_grads.iter().any(Option::is_some) {
                    let mut flow = Flow { op: node.op, inputs: &node.inputs, output_grads, grads, sum };
                    let _op = profile::backward(node.op);
                    (node.backward)(&mut flow)?;
                }
            }
            Ok(())
        })
    })
}
