//! CAT as a layer (spec section 4): attention over chunk representations inside one block of a transformer.

use super::cache::CacheSize;
use super::config::{CAT_LAYER_HEAD_DIM, ModelConfig};
use super::kv_cache::{CacheFormat, CachedPass, CatLayerCache, LayerCache};
use super::layers::{Attention, AttentionShape, Pass, linear_init};
use super::param::{Builder, Init, Param};
use super::plan::ChunkPlan;
use crate::autograd::Var;
use crate::ops::{self, FusedLinear, RopeTable, concat, fused_linear};
use crate::tensor::Tensor;
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
        })
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
        let y = self.attention.forward(self.sequence(x, plan)?, rope, plan.mask(), Some(&plan.outputs()))?;
        ops::linear(&y, &self.final_proj, None)
    }

    pub fn new_cache(&self, size: CacheSize, format: CacheFormat) -> Result<LayerCache> {
        let like = self.expand.value();
        let open = Tensor::zeros(&[1, size.open_rows, like.dim(1)], like.dtype(), like.device())?;
        Ok(LayerCache::Cat(CatLayerCache { kv: self.attention.new_cache(size.layer_rows, format)?, open }))
    }
    pub fn cache_bytes(&self, size: CacheSize, format: CacheFormat) -> u128 {
        let (row, like) = (self.attention.row_bytes(format) as u128, self.expand.value());
        row * size.layer_rows as u128 + (like.dim(1) * like.dtype().size()) as u128 * size.open_rows as u128
    }

    /// New rows x: whole prompts `[B, n, dim]`, or the newest tokens of any texts, `[1, R, dim]`.
    pub fn forward_cached(&self, x: &Var, pass: &Pass, cache: &mut CatLayerCache, cached: &CachedPass) -> Result<Tensor> {
        let Some(layer) = &cached.layer else { return Err(Error::config("a CAT layer outside a cat_layer model")) };
        let (plan, rope) = layer_plan(pass)?;
        let &[b, n, dim] = x.shape() else { return Err(Error::shape("cat_layer", "rows need three dimensions")) };
        let new = x.value().reshape(&[b, 1, n, dim])?;
        let mixed = if cached.prompt {
            if plan.tail() > 0 {
                let tail = new.narrow(2, plan.full_chunks() * plan.chunk, plan.tail())?;
                ops::write_rows(&mut cache.open, &tail, &layer.open)?;
            }
            let to = (&mut cache.kv, &layer.rows, Some(&layer.kept[..]));
            let all = self.attention.mixed_cached(self.sequence(x, plan)?.value(), None, rope, Some(plan.mask()), to)?;
            ops::index_select(&Var::constant(all), 1, &plan.outputs())?.into_value()
        } else {
            ops::write_rows(&mut cache.open, &new, &layer.open)?;
            let mut rows = Var::constant(fused_linear(x.value(), FusedLinear::new(self.expand.value()))?);
            if !layer.full.is_empty() {
                // the tokens that fill their chunks are replaced by the chunks' representations
                let open = Var::constant(cache.open.clone());
                let mut parts = vec![rows];
                for full in &layer.full {
                    parts.push(self.compress(&ops::index_select(&open, 1, &full.inputs)?, full.chunk)?);
                }
                rows = ops::index_select(&concat(&parts.iter().collect::<Vec<_>>(), 1)?, 1, &layer.order)?;
            }
            self.attention.mixed_cached(rows.value(), None, rope, None, (&mut cache.kv, &layer.rows, None))?
        };
        let y = fused_linear(&mixed, self.attention.out())?;
        fused_linear(&y, FusedLinear::new(self.final_proj.value()))
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
