//! Felid: a tensor engine for Compress & Attend Transformers (CATs), from the formula to the kernel.
#![warn(missing_docs)]

pub mod autograd;
pub mod bench;
pub mod data;
mod error;
pub mod eval;
pub mod generate;
pub mod model;
pub mod ops;
pub mod random;
pub mod tensor;
pub mod train;

pub use error::{Error, Result};
