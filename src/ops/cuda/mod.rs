//! Launchers of the CUDA kernels: the twins of `ops/cpu`, with the same names and signatures.
//!
//! A launcher brings its arguments into the form that its kernel takes (dense rows, merged dimensions), chooses the grid,
//! and says why the launch is sound. The mathematics stands in `kernels/<op>.cu`.

pub mod adamw;
pub mod advance;
pub mod assemble_blocks;
pub mod attention;
pub mod attention_ladder;
mod attention_sm90;
pub mod cached_attention;
pub mod cached_step;
pub mod cast;
pub mod concat;
pub mod cross_entropy;
pub mod elementwise;
pub mod few_rows;
pub mod gated_rows;
pub mod gather;
pub mod gemm_native;
pub mod interpolate;
pub mod linear_cross_entropy;
pub mod matmul;
pub mod max;
mod packs;
pub mod qk_norm_rope;
pub mod reduce;
pub mod rms_norm;
pub mod rope;
mod rows;
pub mod sample;
pub mod softmax;
pub mod swiglu;
pub mod write_int8_rows;
pub mod write_rows;
