//! CAT as a layer (spec section 4): attention over chunk representations inside one block of a transformer.

use super::config::{CAT_LAYER_HEAD_DIM, ModelConfig};
use super::kv_cache::{CatLayerCache, LayerCache};
use super::layers::{Attention, AttentionShape, Pass, linear_init};
use super::param::{Builder, Init, Param};
use super::plan::ChunkPlan;
use crate::autograd::Var;
use crate::ops::{self, Mask, RopeTable, concat};
use crate::{Error, Result};

/// Maps `[B, N, dim]` to `[B, N, dim]`, each output seeing its own chunk's tokens and all past chunks' representations.
#[derive(Clone, Debug)]
pub struct CatLayer {
    expand: Param,
    compressor: Param,
    compressor_bias: Param,
    dummy_fx: Param,
    attention: Attention,
    final_proj: Param,
    chunk_max: usize,
    /// Elements of each head that RoPE turns.
    rope_n_elem: usize,
    rope_base: f64,
}

impl CatLayer {
    pub fn new(b: &mut Builder, m: &ModelConfig) -> Result<Self> {
        let (dim, chunk) = (m.decoder.dim, m.chunk_size.unwrap_or(1));
        let dim_fx = m.dim_fx.ok_or_else(|| Error::config("cat_layer needs dim_fx"))?;
        let heads = dim_fx / CAT_LAYER_HEAD_DIM;
        let n_layer = m.decoder.n_layer;
        let shape = AttentionShape { dim: dim_fx, heads, kv_heads: heads, head_dim: CAT_LAYER_HEAD_DIM, n_layer };
        Ok(Self {
            expand: b.param("expand.weight", &[dim_fx, dim], linear_init(dim))?,
            compressor: b.param("compressor.weight", &[dim_fx, chunk * dim], linear_init(dim))?,
            compressor_bias: b.param("compressor.bias", &[dim_fx], Init::Zeros)?,
            dummy_fx: b.param("dummy_fx.weight", &[1, dim_fx], linear_init(dim_fx))?,
            attention: b.at("attention", |b| Attention::new(b, shape, &m.decoder))?,
            final_proj: b.param("final_proj.weight", &[dim, dim_fx], linear_init(dim))?,
            chunk_max: chunk,
            rope_n_elem: m.decoder.head_dim(),
            rope_base: m.decoder.rope_base,
        })
    }

    /// The angle table for rows at `positions` of their blocks.
    pub fn rope(m: &ModelConfig, positions: &[usize]) -> Result<RopeTable> {
        RopeTable::new(positions, m.decoder.head_dim(), m.decoder.rope_base)
    }

    /// Whole chunks of x, `[B, K*C, dim]` -> their representations `[B, K, dim_fx]`.
    fn compress(&self, x: &Var, chunk: usize) -> Result<Var> {
        let (b, n, dim) = (x.shape()[0], x.shape()[1], x.shape()[2]);
        let flat = ops::reshape(x, &[b, n / chunk, chunk * dim])?;
        if chunk == self.chunk_max {
            return ops::linear(&flat, &self.compressor, Some(&self.compressor_bias));
        }
        let resized = ops::interpolate(&self.compressor, 1, chunk * dim)?;
        ops::linear(&flat, &resized, Some(&self.compressor_bias))
    }

    /// The sequence of section 2 over x `[B, N, dim]`: `[B, L, dim_fx]`.
    fn sequence(&self, x: &Var, plan: &ChunkPlan) -> Result<Var> {
        let (b, dim_fx) = (x.shape()[0], self.dummy_fx.shape()[1]);
        let dummy = ops::expand(&ops::reshape(&self.dummy_fx, &[1, 1, dim_fx])?, &[b, 1, dim_fx])?;
        let full = plan.full_chunks() * plan.chunk;
        let slots = match full {
            0 => dummy,
            _ => concat(&[&dummy, &self.compress(&ops::narrow(x, 1, 0, full)?, plan.chunk)?], 1)?,
        };
        ops::assemble_blocks(&slots, None, &ops::linear(x, &self.expand, None)?, plan.chunk)
    }

    pub fn forward(&self, x: &Var, pass: &Pass) -> Result<Var> {
        let (plan, rope) = layer_plan(pass)?;
        let y = self.attention.forward(&self.sequence(x, plan)?, rope, plan.mask(), Some(&plan.outputs()), None)?;
        ops::linear(&y, &self.final_proj, None)
    }

    pub fn new_cache(&self, batch: usize, tokens: usize, chunk: usize) -> Result<LayerCache> {
        let kv = self.attention.new_cache(batch, tokens / chunk + 1 + chunk)?;
        Ok(LayerCache::Cat(CatLayerCache { kv, pending: None }))
    }

    /// New rows x `[B, n, dim]`: a whole prompt into an empty cache, or one token after it.
    pub fn forward_cached(&self, x: &Var, pass: &Pass, cache: &mut LayerCache) -> Result<Var> {
        let (plan, rope) = layer_plan(pass)?;
        let Some(cache) = cache.cat() else { return Err(Error::config("cache of another kind of layer")) };
        let y = if cache.kv.is_empty() {
            let full = plan.full_chunks() * plan.chunk;
            cache.pending = (plan.tail() > 0).then(|| x.value().narrow(1, full, plan.tail())?.copy()).transpose()?;
            self.attention.forward_filling(&self.sequence(x, plan)?, rope, plan, &mut cache.kv)?
        } else {
            let pending = match cache.pending.take() {
                Some(p) => concat(&[&p.into(), x], 1)?,
                None => x.clone(),
            };
            let n = pending.shape()[1];
            // the token that fills its chunk is replaced by the chunk's representation, at position 0
            let (row, position, slots) = match n == plan.chunk {
                true => (self.compress(&pending, plan.chunk)?, 0, 1),
                false => (ops::linear(x, &self.expand, None)?, n, 0),
            };
            if slots == 0 {
                cache.pending = Some(pending.value().clone());
            }
            let rope = RopeTable::new(&[position], self.rope_n_elem, self.rope_base)?;
            self.attention.forward(&row, &rope, Mask::Causal, None, Some((&mut cache.kv, slots)))?
        };
        ops::linear(&y, &self.final_proj, None)
    }

    pub fn collect<'a>(&'a mut self, out: &mut Vec<&'a mut Param>) {
        out.extend([&mut self.expand, &mut self.compressor, &mut self.compressor_bias, &mut self.dummy_fx]);
        self.attention.collect(out);
        out.push(&mut self.final_proj);
    }
}

fn layer_plan(pass: &Pass) -> Result<&(ChunkPlan, RopeTable)> {
    pass.layer_plan.as_ref().ok_or_else(|| Error::config("a CAT layer outside a cat_layer model"))
}
