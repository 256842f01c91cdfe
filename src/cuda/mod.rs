//! The CUDA runtime: libraries, devices, memory, compiled kernels, launches. Everything that calls the driver is here;
//! what is computed with it is in `ops/cuda`.
//!
//! One stream a device carries all its work, in the order in which it was submitted, so no event guards any buffer.
//! Nothing here is needed to build Felid: the driver, NVRTC and cuBLASLt are looked for when a device is first asked for,
//! and what is missing becomes an [`Error`](crate::Error) that lists what was tried and what to do.

mod blas;
mod copy;
mod gpu;
pub mod kernels;
mod launch;
pub mod libraries;
mod memory;
mod module;
mod replay;
mod spans;
mod tensor_map;
mod workspace;

pub use blas::{Gemm, gemm, set_gemm, set_tf32};
pub(crate) use blas::{Kind, Matrix, Product, has_blas};
pub(crate) use copy::{Place, copy_elements, copy_strided};
pub use gpu::{Gpu, Stopwatch, device_count, gpu};
pub(crate) use launch::{Arg, Grid, Packs, View};
pub(crate) use memory::CudaBuffer;
pub use memory::CudaMemory;
pub use module::{CompileReport, cache_folder, compile_for};
pub(crate) use module::{Symbol, Variant};
pub(crate) use replay::{Replay, Workspace, noted, outside};
pub(crate) use spans::{Span, Work, start as start_spans, stop as stop_spans};
pub(crate) use tensor_map::boxes;
pub(crate) use workspace::Needs;
