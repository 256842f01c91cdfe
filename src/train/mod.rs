//! The training loop: micro-batches in turn over chunk sizes, AdamW with warm-up and cosine, validation, and a state
//! that resumes to the same bits.

mod config;
mod optimizer;
mod state;
mod trainer;

pub(crate) use config::MAX_BATCH;
pub use config::{MqarConfig, Task, TrainConfig};
pub use optimizer::Optimizer;
pub use trainer::{Source, StepReport, Trainer};
pub(crate) use trainer::{micro_step, prepare, training_tape};
