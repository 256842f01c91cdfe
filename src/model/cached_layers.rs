//! The blocks of `layers`, for new rows that a cache takes in: inference, a norm, gate or residual add being part of the linear
//! map beside it.
//!
//! Rows begin as gathered embeddings: whatever changed weights was submitted before that, so they are settled for all blocks. The
//! gather must not begin early: kernels that do follow one another without waiting for what is further back.

use super::kv_cache::{CachedPass, KvCache, LayerCache};
use super::layers::{Attention, Block, Mixer, Norm, Pass, Stack, kept};
use super::param::Param;
use crate::autograd::Var;
use crate::ops::{self, CacheRows, FusedLinear, Mask, RopeTable, fused_linear};
use crate::tensor::Tensor;
use crate::{Error, Result};

impl Norm {
    /// The linear map of this norm's output.
    pub(super) fn then<'a>(&'a self, weight: &'a Param) -> FusedLinear<'a> {
        FusedLinear::new(weight.value()).after_norm(self.weight.value(), self.eps).settled()
    }
}

impl Attention {
    /// What the output projection takes, `[B, L, H d]`, of new rows x `[B, L, D]` (normed, if `norm` is not given), which a cache
    /// takes in: at `rows`, all of them or those listed in `kept`. They attend to one another under `mask` where one is given,
    /// else each to what it sees of the cache.
    pub fn mixed_cached(
        &self,
        x: &Tensor,
        norm: Option<&Norm>,
        rope: &RopeTable,
        mask: Option<Mask>,
        (cache, rows, kept): (&mut KvCache, &CacheRows, Option<&[usize]>),
    ) -> Result<Tensor> {
        let map = norm.map_or(FusedLinear::new(self.wqkv.value()).settled(), |n| n.then(&self.wqkv));
        let joint = fused_linear(x, map.bias(self.wqkv_bias.as_ref().map(|b| b.value())))?;
        let (heads, norms) = ((self.shape.heads, self.shape.kv_heads), self.norms());
        let Some(mask) = mask else { return cache.step(&joint, heads, norms, rope, rows, self.scale()) };
        let [q, k, v] = ops::qk_norm_rope(&Var::constant(joint), heads.0, heads.1, norms, rope)?;
        match kept {
            None => cache.write(k.value(), v.value(), rows)?,
            Some(kept) => {
                let [k, v] = [ops::index_select(&k, 2, kept)?, ops::index_select(&v, 2, kept)?];
                cache.write(k.value(), v.value(), rows)?;
            }
        }
        Ok(self.joined(&ops::attention(&q, &k, &v, mask, self.scale())?)?.into_value())
    }
    /// The output projection.
    pub(super) fn out(&self) -> FusedLinear<'_> {
        FusedLinear::new(self.wo.value()).settled()
    }
}

/// The rows of `[B, L, D]` listed in `keep`, or all.
fn kept_of(x: Tensor, keep: Option<&[usize]>) -> Result<Tensor> {
    match keep {
        None => Ok(x),
        Some(_) => Ok(kept(&Var::constant(x), keep)?.into_value()),
    }
}

impl Stack {
    /// As [`Stack::forward`] for new rows that the caches (one a block) take in, but for the norm after the last block:
    /// `[B, L, D]` -> `[B, L', D]`.
    pub fn forward_cached(&self, x: Tensor, pass: &Pass, caches: &mut [LayerCache], cached: &CachedPass) -> Result<Tensor> {
        if caches.len() != self.blocks.len() {
            let detail =
                format!("a cache of {} layers for a model of {}: make one with Cat::cache", caches.len(), self.blocks.len());
            return Err(Error::shape("cache", detail));
        }
        let mut h = x;
        for (i, (block, cache)) in self.blocks.iter().zip(caches).enumerate() {
            let keep = if i + 1 == self.blocks.len() { pass.keep.as_deref() } else { None };
            h = block.forward_cached(h, pass, keep, cache, cached)?;
        }
        Ok(h)
    }
}

impl Block {
    fn forward_cached(
        &self,
        h: Tensor,
        pass: &Pass,
        keep: Option<&[usize]>,
        cache: &mut LayerCache,
        cached: &CachedPass,
    ) -> Result<Tensor> {
        let h = match (&self.mixer, cache) {
            (Mixer::Dense(a), LayerCache::Kv(kv)) => {
                let mask = cached.prompt.then_some(pass.mask);
                let norm = Some(&self.attention_norm);
                let mixed = a.mixed_cached(&h, norm, &pass.rope, mask, (kv, &cached.rows, None))?;
                fused_linear(&kept_of(mixed, keep)?, a.out().onto(kept_of(h, keep)?))?
            }
            (Mixer::Cat(c), LayerCache::Cat(cache)) => {
                let n = self.attention_norm.forward(&Var::constant(h.clone()))?;
                let y = kept_of(c.forward_cached(&n, pass, cache, cached)?, keep)?;
                ops::add(&Var::constant(kept_of(h, keep)?), &Var::constant(y))?.into_value()
            }
            _ => return Err(Error::config("cache of another kind of layer")),
        };
        let f = &self.feed_forward;
        let gated = fused_linear(&h, self.ffn_norm.then(&f.fc_1).gate_of(f.fc_2.value()))?;
        fused_linear(&gated, FusedLinear::new(f.proj.value()).settled().onto(h))
    }
}
