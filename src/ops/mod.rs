//! Differentiable operations. `ops/<op>.rs` defines an op: formula, shapes, checks, choice of device, both
//! directions; `ops/cpu/<op>.rs` computes it.
//!
//! Letters: B batch, N tokens, L decoder length, C chunk size, K chunks, S block stride, D width, H heads,
//! d head width, V vocabulary, M feed-forward width, R rows (all leading dimensions together).

/// Call the implementation for a device: `on_device!(x.device(), rope::rotate(x, table, back))` is `cpu::rope::rotate` or
/// `cuda::rope::rotate`, twins of one signature. In profiles that is the op.
macro_rules! on_device {
    ($device:expr, $($path:ident)::+ ( $($arg:expr),* $(,)? )) => {{
        let _op = $crate::profile::enter(stringify!($($path)::+));
        match $device {
            $crate::tensor::Device::Cpu => $crate::ops::cpu::$($path)::+($($arg),*),
            #[cfg(feature = "cuda")]
            $crate::tensor::Device::Cuda(_) => $crate::ops::cuda::$($path)::+($($arg),*),
            #[cfg(not(feature = "cuda"))]
            other => Err($crate::tensor::no_backend(other)),
        }
    }};
}

pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;

mod adamw;
mod assemble_blocks;
mod attention;
mod cached_attention;
mod cached_step;
mod cast;
mod concat;
mod cross_entropy;
mod elementwise;
mod fused_linear;
mod gather;
mod interpolate;
mod matmul;
mod max;
mod qk_norm_rope;
mod reduce;
mod rms_norm;
mod rope;
mod sample;
mod shape;
mod softmax;
mod swiglu;
mod write_int8_rows;
mod write_rows;

pub use adamw::{AdamWParam, AdamWSettings, adamw, adamw_step, global_norm};
pub use assemble_blocks::assemble_blocks;
pub use attention::{Mask, attention};
pub use cached_attention::{CacheRows, cached_attention, cached_attention_int8};
pub(crate) use cached_step::step as settled_step;
pub use cached_step::{cached_step, cached_step_int8};
pub use cast::{cast, cast_tensor};
pub use concat::concat;
pub(crate) use concat::concat_tensors;
pub use cross_entropy::{cross_entropy, linear_cross_entropy};
pub use elementwise::{add, add_assign, div, exp, ln, mul, neg, scale, silu, sqrt, sub};
pub use fused_linear::{FusedLinear, fused_linear};
pub use gather::{embedding, index_select};
pub use interpolate::interpolate;
pub use matmul::{linear, linear_pair, matmul};
pub use max::{argmax, max};
pub use qk_norm_rope::{QkNorm, qk_norm_rope};
pub use reduce::{mean, sum, sum_all};
pub use rms_norm::{add_rms_norm, rms_norm};
pub use rope::{RopeTable, rope};
pub use sample::{Draw, LogProbs, Sampling, log_probs, sample};
pub use shape::{contiguous, expand, narrow, permute, reshape, split, transpose};
pub use softmax::{log_softmax, softmax};
pub use swiglu::{swiglu, swiglu_linear};
pub use write_int8_rows::{Int8Rows, write_int8_rows};
pub use write_rows::{write_row_pairs, write_rows};

use crate::autograd::Tape;

/// A tape whose gradients are summed by [`add_assign`].
pub fn tape() -> Tape {
    Tape::new(add_assign)
}
