//! The readable CPU implementations: what runs without a GPU, and the reference that kernels are checked against.
//!
//! Every function here takes checked arguments (the op's definition in `ops/<op>.rs` does that), computes in
//! [`Float::Acc`](crate::tensor::Float) (f32, or f64 for f64 elements) and is deterministic: results do not depend
//! on the number of threads, because work is cut by shape and never by thread.

pub mod adamw;
pub mod assemble_blocks;
pub mod attention;
pub use attention::cached as cached_attention;
pub mod cast;
pub mod concat;
pub mod cross_entropy;
pub mod elementwise;
mod few_rows;
pub mod gather;
pub mod interpolate;
pub mod linear_cross_entropy;
pub mod matmul;
pub mod max;
pub mod qk_norm_rope;
pub mod reduce;
pub mod rms_norm;
pub mod rope;
pub mod sample;
pub mod softmax;
pub mod swiglu;
pub mod write_int8_rows;
pub mod write_rows;

/// Run `f` compiled for the widest vector instructions this CPU has (AVX2 + FMA, AVX-512, NEON).
///
/// `f` and what it calls must inline (`#[inline(always)]`) to gain; loops in it then vectorise.
#[inline(always)]
pub(crate) fn simd<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}

/// How many rows of `width` elements one parallel task takes: about 16k elements, so that tasks outweigh scheduling.
/// Depends on the shape only, which keeps fixed-order reductions over tasks independent of the thread count.
pub(crate) fn rows_per_task(width: usize) -> usize {
    (16_384 / width.max(1)).max(1)
}

/// Lanes that reductions accumulate in: enough independent sums to fill two AVX-512 or four AVX2 registers.
pub(crate) const LANES: usize = 32;

use crate::tensor::{Float, Real};

/// `sum_i f(i)` over `0..n` in `LANES` independent partial sums, then pairwise: vectorises, errs less than a running sum.
#[inline(always)]
pub(crate) fn sum_over<A: Real>(n: usize, f: impl Fn(usize) -> A) -> A {
    let mut lanes = [A::ZERO; LANES];
    let whole = n / LANES * LANES;
    let mut i = 0;
    while i < whole {
        for (l, lane) in lanes.iter_mut().enumerate() {
            *lane += f(i + l);
        }
        i += LANES;
    }
    for (l, lane) in lanes.iter_mut().enumerate().take(n - whole) {
        *lane += f(whole + l);
    }
    let mut half = LANES / 2;
    while half > 0 {
        for l in 0..half {
            let other = lanes[l + half];
            lanes[l] += other;
        }
        half /= 2;
    }
    lanes[0]
}

/// `sum_i a[i] * b[i]` in the accumulator type.
#[inline(always)]
pub(crate) fn dot<T: Float>(a: &[T], b: &[T]) -> T::Acc {
    let n = a.len().min(b.len());
    let (a, b) = (&a[..n], &b[..n]);
    sum_over(n, |i| a[i].to_acc() * b[i].to_acc())
}
