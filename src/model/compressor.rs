//! The compressor `f`: a small bidirectional transformer that turns each chunk of tokens into one vector (spec sections
//! 2 and 3).

use super::config::{ModelConfig, ModelType};
use super::layers::{Pass, Stack, linear_init};
use super::param::{Builder, Param};
use crate::autograd::Var;
use crate::ops::{self, FusedLinear, Mask, RopeTable, concat, expand, fused_linear, narrow, reshape};
use crate::tensor::Tensor;
use crate::{Error, Result};

/// Chunks of ids -> representations. Chunks do not see one another.
#[derive(Clone, Debug)]
pub struct Compressor {
    wte: Param,
    pos_tokens: Param,
    /// One row a chunk size, in the adaptive model.
    adaptive_token: Option<Param>,
    stack: Stack,
    proj_fx: Param,
    head_dim: usize,
    rope_base: f64,
}

/// What chunks of one size need beside weights, computed once.
#[derive(Clone, Debug)]
pub struct ForChunks {
    projection: Var,
    pub rope: RopeTable,
}

impl Compressor {
    pub fn new(b: &mut Builder, m: &ModelConfig) -> Result<Self> {
        let (Some(c), Some(chunk)) = (&m.compressor, m.chunk_size) else {
            return Err(Error::config("a CAT needs compressor and chunk_size"));
        };
        let init = linear_init(c.dim);
        let adaptive = m.model_type == ModelType::CatAdaptive;
        let positions = if adaptive { m.block_size } else { m.block_size / chunk };
        Ok(Self {
            wte: b.param("wte.weight", &[m.vocab_rows(), c.dim], init)?,
            pos_tokens: b.param("pos_tokens.weight", &[positions, c.dim], init)?,
            adaptive_token: match adaptive {
                true => Some(b.param("adaptive_token.weight", &[m.table_rows(), c.dim], init)?),
                false => None,
            },
            stack: Stack::new(b, c, None)?,
            proj_fx: b.param("proj_fx.weight", &[m.decoder.dim, chunk * c.dim], init)?,
            head_dim: c.head_dim(),
            rope_base: c.rope_base,
        })
    }

    /// ids `[B, K*C]`, whole texts from their beginnings -> `[B, K, D]`. `row` is the chunk size's row in the adaptive table.
    pub fn forward(&self, ids: &Tensor, chunk: usize, row: usize, recompute: bool) -> Result<Var> {
        let (b, k) = (ids.dim(0), ids.dim(1) / chunk);
        let d = self.wte.shape()[1];
        let tokens = reshape(&ops::embedding(ids, &self.wte)?, &[b, k, chunk, d])?;
        let place = expand(&reshape(&narrow(&self.pos_tokens, 0, 0, k)?, &[1, k, 1, d])?, &[b, k, 1, d])?;
        let rope = self.rope(chunk)?;
        ops::linear(&self.compress(tokens, place, row, rope, recompute)?, &self.projection(chunk)?, None)
    }
    /// Chunks of any texts, their embedded tokens `[R, C, Df]` and places `[R, Df]` -> `[R, D]`. Has no gradient.
    pub fn forward_chunks(&self, tokens: Tensor, place: Tensor, row: usize, sized: &ForChunks) -> Result<Tensor> {
        let &[r, chunk, d] = tokens.shape() else { return Err(Error::shape("chunks", format!("{:?}", tokens.shape()))) };
        let [apart, places] = [tokens.reshape(&[r, 1, chunk, d])?, place.reshape(&[r, 1, 1, d])?];
        drop((tokens, place));
        let rows = self.compress(apart.into(), places.into(), row, sized.rope.clone(), false)?;
        fused_linear(&rows.value().reshape(&[r, chunk * d])?, FusedLinear::new(sized.projection.value()))
    }
    /// Embedded tokens of chunks and their places, as [`Compressor::forward_chunks`] takes them, for ids `[R, C]` and their numbers
    /// in their texts, the first being 0.
    pub fn embedded(&self, ids: &Tensor, numbers: &[usize]) -> Result<[Tensor; 2]> {
        Ok([ops::embedding(ids, &self.wte)?.into_value(), ops::index_select(&self.pos_tokens, 0, numbers)?.into_value()])
    }
    /// The tables that [`Compressor::embedded`] takes them from: `[V, Df]`, and `[K, Df]` or more.
    #[cfg(feature = "cuda")]
    pub fn tables(&self) -> [&Tensor; 2] {
        [self.wte.value(), self.pos_tokens.value()]
    }
    /// What chunks of one size need beside weights.
    pub fn sized(&self, chunk: usize) -> Result<ForChunks> {
        Ok(ForChunks { projection: self.projection(chunk)?, rope: self.rope(chunk)? })
    }
    /// What maps a chunk's C output rows to its representation, `[D, C Df]`: the model's, or resized to C.
    fn projection(&self, chunk: usize) -> Result<Var> {
        ops::interpolate(&self.proj_fx, 1, chunk * self.wte.shape()[1])
    }
    /// Rows before a chunk's tokens.
    fn header(&self) -> usize {
        1 + usize::from(self.adaptive_token.is_some())
    }
    /// Angles of a chunk's rows.
    fn rope(&self, chunk: usize) -> Result<RopeTable> {
        RopeTable::new(&(0..self.header() + chunk).collect::<Vec<_>>(), self.head_dim, self.rope_base)
    }

    /// Tokens `[B, K, C, Df]` and the chunks' place tokens `[B, K, 1, Df]` -> the output rows of each chunk, `[B, K, C Df]`.
    fn compress(&self, tokens: Var, place: Var, row: usize, rope: RopeTable, recompute: bool) -> Result<Var> {
        let &[b, k, chunk, d] = tokens.shape() else { return Err(Error::shape("chunks", format!("{:?}", tokens.shape()))) };
        let mut parts = Vec::with_capacity(3);
        if let Some(table) = &self.adaptive_token {
            parts.push(expand(&reshape(&narrow(table, 0, row, 1)?, &[1, 1, 1, d])?, &[b, k, 1, d])?);
        }
        parts.push(place);
        parts.push(tokens);
        let (header, len) = (self.header(), self.header() + chunk);
        let x = reshape(&concat(&parts.iter().collect::<Vec<_>>(), 2)?, &[b * k, len, d])?;
        drop(parts);
        let mut pass = Pass::new(rope, Mask::Bidirectional);
        pass.keep = Some((header..len).collect());
        pass.recompute = recompute;
        reshape(&self.stack.forward(x, &pass)?, &[b, k, chunk * d])
    }

    pub fn collect<'a>(&'a mut self, out: &mut Vec<&'a mut Param>) {
        out.extend([&mut self.wte, &mut self.pos_tokens]);
        out.extend(&mut self.adaptive_token);
        self.stack.collect(out);
        out.push(&mut self.proj_fx);
    }
}
