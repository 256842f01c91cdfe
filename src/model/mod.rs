//! CAT models (`docs/model.md`): configuration, layers, the one [`Cat`], its cache, and checkpoint folders.
//!
//! Letters as in [`crate::ops`].

#[cfg(feature = "cuda")]
mod ahead;
mod cache;
mod cached;
mod cached_layers;
mod cat;
mod cat_layer;
mod checkpoint;
mod compressor;
mod config;
pub mod formats;
mod hf;
mod kv_cache;
mod layers;
mod param;
mod plan;

#[cfg(feature = "cuda")]
pub(crate) use ahead::{Ahead, AheadRow, First, MOST_STEPS};
pub use cache::{Cache, CacheSize, TextId};
pub use cached::Prompt;
pub use cat::{Cat, ForwardOptions, IGNORE_INDEX};
pub use checkpoint::{Checkpoint, FolderFormat, load, load_config, rename, save, write_json};
pub use config::{
    CAT_LAYER_HEAD_DIM, ChunkSizes, LayerType, ModelConfig, ModelType, PRESETS, TransformerConfig, swiglu_width,
};
pub use kv_cache::CacheFormat;
pub use param::{Builder, Init, Param};
pub use plan::ChunkPlan;
