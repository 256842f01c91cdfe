//! Reverse-mode differentiation on a tape. Knows no op: an op computes its output tensors and, while a tape records,
//! leaves behind a closure that turns the outputs' gradients into the inputs' ([`record`]).
//!
//! ```
//! use felid::{autograd::{Gradients, Tape, Var}, ops, tensor::Tensor};
//! let x = Var::parameter(Tensor::from_slice(&[1f32, 2.0, 3.0], &[3])?);
//! let mut grads = Gradients::default();
//! let tape = ops::tape();
//! let y = tape.record(|| ops::sum_all(&ops::mul(&x, &x)?))?;
//! tape.backward(&y, 1.0, &mut grads)?;
//! assert_eq!(grads.get(&x).unwrap().to_vec::<f32>()?, [2.0, 4.0, 6.0]);
//! # Ok::<(), felid::Error>(())
//! ```
//!
//! - The tape is current for one thread, inside [`Tape::record`]; [`no_grad`] suspends it. Without one, nothing is saved.
//! - [`Tape::backward`] consumes the tape: each node, and the activations it saved, is freed as the walk passes it.
//! - An output that is cheap to compute again is not kept for its consumers' backward: see [`compute_again`].
//! - Gradients are moved into place where they are the first to arrive and summed in place where they are not;
//!   calling backward again (another micro-batch) with the same [`Gradients`] accumulates.

mod gradcheck;
mod recompute;
mod saved;
mod tape;

pub use gradcheck::{GradCheck, check_gradients};
pub use recompute::recompute;
pub use saved::{Saved, compute_again};
pub use tape::{Flow, Gradients, Tape, is_recording, no_grad, record, record_one};

use crate::tensor::{DType, Tensor};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Identity of a value that gradients flow to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct VarId(u64);

impl VarId {
    fn fresh() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Relaxed))
    }
}

/// A tensor, and whether gradients flow to it. Cloning shares both.
#[derive(Clone, Debug)]
pub struct Var {
    value: Tensor,
    id: Option<VarId>,
    /// The gradient's dtype, where it is not the value's.
    gradient: Option<DType>,
    /// How to compute the value again, where that is cheap.
    again: Option<saved::Again>,
}

impl Var {
    /// A leaf that gradients are wanted for.
    pub fn parameter(value: Tensor) -> Self {
        Self { value, id: Some(VarId::fresh()), gradient: None, again: None }
    }
    /// A leaf whose gradient is kept in `dtype`: f32 for 16-bit weights, so that summing over uses and micro-batches, and
    /// in ops that add into it by themselves over rows too, rounds nothing away.
    pub fn parameter_with_gradient(value: Tensor, dtype: DType) -> Self {
        Self { gradient: Some(dtype), ..Self::parameter(value) }
    }
    /// A value that no gradient flows to.
    pub fn constant(value: Tensor) -> Self {
        Self { value, id: None, gradient: None, again: None }
    }
    /// The tensor.
    pub fn value(&self) -> &Tensor {
        &self.value
    }
    /// For optimizers: write a leaf's elements. Values computed from it before keep the old ones (copy on write).
    pub fn value_mut(&mut self) -> &mut Tensor {
        self.again = None;
        &mut self.value
    }
    /// The tensor, by value.
    pub fn into_value(self) -> Tensor {
        self.value
    }
    /// What gradients are found by; `None` for a constant.
    pub fn id(&self) -> Option<VarId> {
        self.id
    }
    /// True when gradients flow to this value.
    pub fn has_gradient(&self) -> bool {
        self.id.is_some()
    }
    /// The same value with the flow of gradients cut.
    pub fn detach(&self) -> Self {
        Self::constant(self.value.clone())
    }
    /// The tensor's shape.
    pub fn shape(&self) -> &[usize] {
        self.value.shape()
    }
    /// The tensor's dtype.
    pub fn dtype(&self) -> DType {
        self.value.dtype()
    }
    /// The dtype of its gradient: the tensor's, unless it was made with [`Var::parameter_with_gradient`].
    pub fn gradient_dtype(&self) -> DType {
        self.gradient.unwrap_or(self.dtype())
    }
}

impl From<Tensor> for Var {
    fn from(value: Tensor) -> Self {
        Self::constant(value)
    }
}
