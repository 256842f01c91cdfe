//! Differentiable operations. `ops/<op>.rs` defines an op: formula, shapes, checks, choice of device, both
//! directions; `ops/cpu/<op>.rs` computes it.
//!
//! Letters: B batch, N tokens, L decoder length, C chunk size, K chunks, S block stride, D width, H heads,
//! d head width, V vocabulary, M feed-forward width, R rows (all leading dimensions together).

pub(crate) mod cpu;

mod attention;
mod concat;
mod elementwise;
mod matmul;
mod reduce;
mod rms_norm;
mod shape;

pub use attention::{Mask, attention};
pub use concat::concat;
pub use elementwise::{add, add_assign, div, exp, ln, mul, neg, scale, silu, sqrt, sub};
pub use matmul::{linear, matmul};
pub use reduce::{mean, sum, sum_all};
pub use rms_norm::{add_rms_norm, rms_norm};
pub use shape::{contiguous, expand, narrow, permute, reshape, split, transpose};

use crate::autograd::Tape;

/// A tape whose gradients are summed by [`add_assign`].
pub fn tape() -> Tape {
    Tape::new(add_assign)
}
