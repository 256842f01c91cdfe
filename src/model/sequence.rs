//! Building the decoder's sequence from representations, separators and tokens.

use super::plan::ChunkPlan;
use crate::Result;
use crate::autograd::Var;
use crate::ops::{concat, expand, narrow, reshape};

/// slots `[B, K+1, D]` (dummy first), separator `[1, D]` (header 2) or none (header 1), tokens `[B, N, D]` ->
/// the sequence `[B, L, D]` laid out as `plan` says. K = full chunks.
pub(super) fn assemble(plan: &ChunkPlan, slots: &Var, separator: Option<&Var>, tokens: &Var) -> Result<Var> {
    let (b, d) = (tokens.shape()[0], tokens.shape()[2]);
    let (k, c, r) = (plan.full_chunks(), plan.chunk, plan.tail());
    // header rows of `n` blocks beginning with block `from`: [B, n, header, D]
    let header = |from: usize, n: usize| -> Result<Var> {
        let slot = reshape(&narrow(slots, 1, from, n)?, &[b, n, 1, d])?;
        match separator {
            None => Ok(slot),
            Some(s) => concat(&[&slot, &expand(&reshape(s, &[1, 1, 1, d])?, &[b, n, 1, d])?], 2),
        }
    };
    let mut parts = Vec::with_capacity(3);
    if k > 0 {
        let live = narrow(&reshape(&narrow(tokens, 1, 0, k * c)?, &[b, k, c, d])?, 2, 0, c - 1)?;
        parts.push(reshape(&concat(&[&header(0, k)?, &live], 2)?, &[b, k * plan.stride(), d])?);
    }
    parts.push(reshape(&header(k, 1)?, &[b, plan.header, d])?);
    if r > 0 {
        parts.push(narrow(tokens, 1, k * c, r)?);
    }
    concat(&parts.iter().collect::<Vec<_>>(), 1)
}
