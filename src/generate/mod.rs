//! Decoding: a [`Generator`] continues prompts with a cached model, many at once, each by its own [`Request`].
//!
//! - Texts of any lengths, budgets, stops and chunk sizes are continued together. One that ends leaves at once, and the next
//!   that waits takes its place ([`GeneratorOptions::max_batch`]); more may be asked for while others run
//!   ([`Generation::push`]).
//! - What comes of a request does not depend on what runs beside it. Its random numbers are a function of its seed and the
//!   token's number, and all that is computed for a row is computed from that row, with one reservation: a matrix product
//!   may sum in another order for another number of rows, so logits may differ in their last bits, and where two tokens
//!   are as good as equally likely the choice between them.
//! - Memory is known before it is taken ([`Generator::plan`]), and what cannot be done is refused before any work.

mod generation;
mod generator;
mod lookahead;
mod request;
mod text;

pub use generation::{Generation, Stats};
pub use generator::{Generator, GeneratorOptions, MemoryPlan};
pub use lookahead::Decoding;
pub use request::{Event, Finish, Output, Request};

pub use crate::model::CacheFormat;
use crate::model::Cat;
use crate::tensor::Tensor;
use crate::{Error, Result};

/// All tokens at once: prompts `[B, P]` of one length -> `[B, max_new_tokens]`. Rows are continued as `like` says, whose own
/// prompt is not used; row r draws by its seed plus r.
pub fn generate(model: &Cat, prompts: &Tensor, like: &Request) -> Result<Tensor> {
    let &[b, p] = prompts.shape() else {
        return Err(Error::shape("generate", format!("prompts must be [batch, tokens], got {:?}", prompts.shape())));
    };
    if !like.stop_tokens.is_empty() || !like.stop_strings.is_empty() {
        return Err(Error::Usage("rows that stop early are no tensor: use a Generator".into()));
    }
    let ids = prompts.to_vec::<i64>()?;
    let request = |r: usize| Request {
        prompt: ids[r * p..(r + 1) * p].to_vec(),
        seed: like.seed.wrapping_add(r as u64),
        ..like.clone()
    };
    let outputs = Generator::new(model).run((0..b).map(request).collect())?;
    Tensor::from_vec(outputs.into_iter().flat_map(|o| o.tokens).collect(), &[b, like.max_new_tokens])
}
