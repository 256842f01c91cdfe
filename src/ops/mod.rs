//! Differentiable operations. `ops/<op>.rs` defines an op: formula, shapes, checks, choice of device, both
//! directions; `ops/cpu/<op>.rs` computes it.
//!
//! Letters: B batch, N tokens, L decoder length, C chunk size, K chunks, S block stride, D width, H heads,
//! d head width, V vocabulary, M feed-forward width, R rows (all leading dimensions together).

pub(crate) mod cpu;

mod elementwise;
mod matmul;
mod rms_norm;

use crate::autograd::Tape;

/// A tape whose gradients are summed by [`add_assign`].
pub fn tape() -> Tape {
    Tape::new(add_assign)
}
pub use elementwise::add_assign;
