//! Felid: a tensor engine for Compress & Attend Transformers (CATs), from the formula to the kernel.
//!
//! A CAT reads text in chunks of C tokens. A small compressor turns each chunk into one vector, and the decoder attends
//! to the tokens of its own chunk and to the vectors of all past ones: about N/C rows instead of N. An adaptive CAT is
//! trained for several C at once, and C is chosen at each call.
//!
//! Train a tiny adaptive CAT on a few lines of text, save it, load it, and let it go on at another chunk size:
//!
//! ```
//! use felid::autograd::Gradients;
//! use felid::data::{BatchSampler, Dataset, Tokenizer};
//! use felid::generate::{Request, generate};
//! use felid::model::{Cat, FolderFormat, ForwardOptions, ModelConfig, ModelType, TransformerConfig, load, save};
//! use felid::ops::{self, AdamWSettings};
//! use felid::tensor::Tensor;
//! use felid::train::Optimizer;
//!
//! // what the model is: bytes, chunks of 1, 2 or 4, at most 64 tokens
//! let config = ModelConfig {
//!     model_type: ModelType::CatAdaptive,
//!     chunk_size: Some(4),
//!     compressor: Some(TransformerConfig::new(16, 1, 1, true)),
//!     ..ModelConfig::dense(256, 64, TransformerConfig::new(32, 2, 1, true))
//! };
//! let mut model = Cat::new(config, 0)?;
//!
//! // what it reads: windows of 32 bytes, 4 at a time
//! let text = Tokenizer::Bytes.encode(&"the cat sat on the mat. ".repeat(20))?;
//! let data = Dataset::from_tokens(&text, 256, 0.0)?;
//! let mut sampler = BatchSampler::new(0, 4, 32)?;
//!
//! // how it learns: the chunk sizes in turn, one a step
//! let mut optimizer = Optimizer::new(&model)?;
//! let settings = AdamWSettings { lr: 1e-2, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };
//! let mut losses = Vec::new();
//! for step in 0..12 {
//!     let batch = sampler.next(&data.train)?;
//!     let options = ForwardOptions { chunk_size: Some([2, 4][step % 2]), ..Default::default() };
//!     let (tape, mut grads) = (ops::tape(), Gradients::default());
//!     let loss = tape.record(|| model.loss(&batch.input_ids, &batch.labels, options))?;
//!     tape.backward(&loss, 1.0, &mut grads)?;
//!     optimizer.step(&mut model, &mut grads, step as u64 + 1, &settings, 1.0)?;
//!     losses.push(loss.value().item()?);
//! }
//! assert!(losses[11] < losses[0]);
//!
//! // a folder with config.json and model.safetensors
//! let dir = tempfile::tempdir().expect("a temporary folder");
//! save(dir.path(), &model, FolderFormat::Native, None)?;
//! let model = load(dir.path(), None)?.model;
//!
//! let prompt = Tensor::ids(&Tokenizer::Bytes.encode("the cat ")?, &[1, 8])?;
//! let like = Request { max_new_tokens: 8, chunk_size: Some(4), ..Default::default() };
//! let ids = generate(&model, &prompt, &like)?;
//! assert_eq!(ids.shape(), [1, 8]);
//! println!("{}", Tokenizer::Bytes.decode(&ids.to_vec()?)?);
//! # Ok::<(), felid::Error>(())
//! ```
//!
//! # Rooms
//!
//! Each module knows only those after it: [`train`], [`generate`], [`eval`], [`mod@bench`], then [`model`] (with [`data`]
//! beside it), [`ops`], [`autograd`], [`tensor`], and [`Error`].
//!
//! Nothing panics on bad input: fallible functions return [`Result`] with an [`Error`] that names the op, the shapes or
//! the file, and says what to do. Results are the same for any number of threads. `docs/` in the repository explains the
//! architecture, the model, the files, training, testing and measuring.
#![warn(missing_docs)]

// what unit tests share with those of tests/ knows the crate by this name
#[cfg(all(test, feature = "cuda"))]
extern crate self as felid;

pub mod autograd;
pub mod bench;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod data;
#[cfg(all(test, feature = "cuda"))]
#[path = "../tests/common/devices.rs"]
mod devices;
mod error;
pub mod eval;
pub mod generate;
pub mod memory;
pub mod model;
pub mod ops;
mod profile;
pub mod random;
pub mod tensor;
pub mod train;

pub use error::{Error, Result};

/// The Rust code in the README, compiled and run by `cargo test` so that it cannot fall behind.
#[cfg(doctest)]
mod guides {
    #[doc = include_str!("../README.md")]
    struct Readme;
}
