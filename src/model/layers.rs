//! The building blocks of every model (spec section 1): attention, SwiGLU, and the pre-norm block around them.

use super::cache::CacheSize;
use super::cat_layer::CatLayer;
use super::config::{LayerType, ModelConfig, TransformerConfig};
use super::kv_cache::{CacheFormat, KvCache, LayerCache};
use super::param::{Builder, Init, Param};
use super::plan::ChunkPlan;
use crate::Result;
use crate::autograd::{Var, recompute};
use crate::ops::{self, Mask, QkNorm, RopeTable};

/// Initial scale of linear and embedding weights: `sqrt(2 / (5 dim))`.
pub(super) fn linear_init(dim: usize) -> Init {
    Init::Normal((2.0 / (5.0 * dim as f64)).sqrt())
}
/// Initial scale of the projections that write to the residual stream: `1 / (sqrt(dim) n_layer)`.
fn residual_init(dim: usize, n_layer: usize) -> Init {
    Init::Normal(1.0 / ((dim as f64).sqrt() * n_layer as f64))
}

/// RMSNorm's weight and eps.
#[derive(Clone, Debug)]
pub struct Norm {
    pub weight: Param,
    pub eps: f64,
}

impl Norm {
    pub fn new(b: &mut Builder, name: &str, dim: usize, eps: f64) -> Result<Self> {
        Ok(Self { weight: b.param(&format!("{name}.weight"), &[dim], Init::Ones)?, eps })
    }
    pub fn forward(&self, x: &Var) -> Result<Var> {
        ops::rms_norm(x, &self.weight, self.eps)
    }
    /// `h = x + residual`: (norm(h), h).
    pub fn add_forward(&self, x: &Var, residual: &Var) -> Result<(Var, Var)> {
        ops::add_rms_norm(x, residual, &self.weight, self.eps)
    }
}

/// Sizes of one attention.
#[derive(Clone, Copy, Debug)]
pub struct AttentionShape {
    /// Width of its input and output.
    pub dim: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub n_layer: usize,
}

/// Multi-head attention with RoPE, optional QK-norm and grouped queries.
#[derive(Clone, Debug)]
pub struct Attention {
    pub(super) shape: AttentionShape,
    pub(super) wqkv: Param,
    pub(super) wqkv_bias: Option<Param>,
    pub(super) wo: Param,
    qk_norm: Option<(Norm, Norm)>,
}

impl Attention {
    pub fn new(b: &mut Builder, shape: AttentionShape, c: &TransformerConfig) -> Result<Self> {
        let AttentionShape { dim, heads, kv_heads, head_dim: d, n_layer } = shape;
        let rows = (heads + 2 * kv_heads) * d;
        let eps = c.qk_norm_eps.unwrap_or(c.norm_eps);
        Ok(Self {
            shape,
            wqkv: b.param("wqkv.weight", &[rows, dim], linear_init(dim))?,
            wqkv_bias: c.qkv_bias.then(|| b.param("wqkv.bias", &[rows], Init::Zeros)).transpose()?,
            wo: b.param("wo.weight", &[dim, heads * d], residual_init(dim, n_layer))?,
            qk_norm: match c.use_qk_norm {
                true => Some((Norm::new(b, "q_norm", d, eps)?, Norm::new(b, "k_norm", d, eps)?)),
                false => None,
            },
        })
    }

    /// x `[B, L, D]` -> q `[B, H, L, d]`, k and v `[B, Hkv, L, d]`, normed and turned.
    fn qkv(&self, x: Var, rope: &RopeTable) -> Result<[Var; 3]> {
        let AttentionShape { heads, kv_heads, .. } = self.shape;
        let joint = ops::linear(&x, &self.wqkv, self.wqkv_bias.as_deref())?;
        drop(x);
        ops::qk_norm_rope(&joint, heads, kv_heads, self.norms(), rope)
    }
    pub(super) fn norms(&self) -> Option<QkNorm<'_>> {
        self.qk_norm.as_ref().map(|(q, k)| QkNorm { q: &q.weight, k: &k.weight, eps: q.eps })
    }

    /// x `[B, L, D]` -> `[B, L', D]`: all rows, or those listed in `keep`.
    pub fn forward(&self, x: Var, rope: &RopeTable, mask: Mask, keep: Option<&[usize]>) -> Result<Var> {
        let [q, k, v] = self.qkv(x, rope)?;
        let mixed = ops::attention(&q, &k, &v, mask, self.scale())?;
        drop([q, k, v]);
        self.project(&mixed, keep)
    }

    pub(super) fn scale(&self) -> f64 {
        1.0 / (self.shape.head_dim as f64).sqrt()
    }

    /// `[B, H, L, d]` -> `wo` of the kept rows, `[B, L', D]`.
    fn project(&self, mixed: &Var, keep: Option<&[usize]>) -> Result<Var> {
        ops::linear(&kept(&self.joined(mixed)?, keep)?, &self.wo, None)
    }
    /// `[B, H, L, d]` -> `[B, L, H d]`.
    pub(super) fn joined(&self, mixed: &Var) -> Result<Var> {
        let mixed = ops::transpose(mixed, 1, 2)?;
        let (b, l) = (mixed.shape()[0], mixed.shape()[1]);
        ops::reshape(&mixed, &[b, l, self.shape.heads * self.shape.head_dim])
    }

    pub fn new_cache(&self, rows: usize, format: CacheFormat) -> Result<KvCache> {
        KvCache::new([self.shape.kv_heads, rows, self.shape.head_dim], format, self.wqkv.value())
    }
    /// Bytes of the keys and values of one row.
    pub fn row_bytes(&self, format: CacheFormat) -> usize {
        format.row_bytes(2 * self.shape.kv_heads, self.shape.head_dim, self.wqkv.value().dtype())
    }

    pub fn collect<'a>(&'a mut self, out: &mut Vec<&'a mut Param>) {
        out.push(&mut self.wqkv);
        out.extend(&mut self.wqkv_bias);
        out.push(&mut self.wo);
        if let Some((q, k)) = &mut self.qk_norm {
            out.extend([&mut q.weight, &mut k.weight]);
        }
    }
}

/// The rows of `[B, L, D]` listed in `keep`, or all.
pub(super) fn kept(x: &Var, keep: Option<&[usize]>) -> Result<Var> {
    keep.map_or_else(|| Ok(x.clone()), |rows| ops::index_select(x, 1, rows))
}

/// `proj(silu(fc_1 x) * fc_2 x)`.
#[derive(Clone, Debug)]
pub struct FeedForward {
    pub(super) fc_1: Param,
    pub(super) fc_2: Param,
    pub(super) proj: Param,
}

impl FeedForward {
    fn new(b: &mut Builder, c: &TransformerConfig) -> Result<Self> {
        let (d, m) = (c.dim, c.ffn_width());
        Ok(Self {
            fc_1: b.param("fc_1.weight", &[m, d], linear_init(d))?,
            fc_2: b.param("fc_2.weight", &[m, d], linear_init(d))?,
            proj: b.param("proj.weight", &[d, m], residual_init(d, c.n_layer))?,
        })
    }
    fn forward(&self, x: Var) -> Result<Var> {
        let [gate, up] = ops::linear_pair(&x, [&self.fc_1, &self.fc_2])?;
        drop(x);
        ops::swiglu_linear(gate, up, &self.proj)
    }
}

/// What mixes tokens in a block.
#[derive(Clone, Debug)]
pub enum Mixer {
    Dense(Box<Attention>),
    Cat(Box<CatLayer>),
}

/// `h = x + mixer(attention_norm(x)); out = h + feed_forward(ffn_norm(h))`.
#[derive(Clone, Debug)]
pub struct Block {
    pub(super) attention_norm: Norm,
    pub(super) mixer: Mixer,
    pub(super) ffn_norm: Norm,
    pub(super) feed_forward: FeedForward,
}

/// What one pass through a stack of blocks has in common.
#[derive(Clone, Debug)]
pub struct Pass {
    pub rope: RopeTable,
    pub mask: Mask,
    /// The rows wanted after the last block; the others are left out as soon as nobody needs them.
    pub keep: Option<Vec<usize>>,
    /// The layout inside CAT layers.
    pub layer_plan: Option<(ChunkPlan, RopeTable)>,
    /// Save only block boundaries, and compute blocks again in backward.
    pub recompute: bool,
}

impl Pass {
    pub fn new(rope: RopeTable, mask: Mask) -> Self {
        Self { rope, mask, keep: None, layer_plan: None, recompute: false }
    }
}

/// A stack of blocks and the norm after it: the decoder, or the compressor.
#[derive(Clone, Debug)]
pub struct Stack {
    pub blocks: Vec<Block>,
    pub norm: Norm,
}

impl Stack {
    /// `model` is given for the decoder, whose layers may be of several types.
    pub fn new(b: &mut Builder, c: &TransformerConfig, model: Option<&ModelConfig>) -> Result<Self> {
        let shape = AttentionShape {
            dim: c.dim,
            heads: c.n_head,
            kv_heads: c.kv_heads(),
            head_dim: c.head_dim(),
            n_layer: c.n_layer,
        };
        let block = |b: &mut Builder, i: usize| -> Result<Block> {
            Ok(Block {
                attention_norm: Norm::new(b, "attention_norm", c.dim, c.norm_eps)?,
                mixer: match model {
                    Some(m) if m.layer_type(i) == LayerType::Cat => {
                        Mixer::Cat(Box::new(b.at("attention", |b| CatLayer::new(b, m))?))
                    }
                    _ => Mixer::Dense(Box::new(b.at("attention", |b| Attention::new(b, shape, c))?)),
                },
                ffn_norm: Norm::new(b, "ffn_norm", c.dim, c.norm_eps)?,
                feed_forward: b.at("feed_forward", |b| FeedForward::new(b, c))?,
            })
        };
        let blocks = (0..c.n_layer).map(|i| b.at(format!("layers.{i}"), |b| block(b, i))).collect::<Result<_>>()?;
        Ok(Self { blocks, norm: Norm::new(b, "norm", c.dim, c.norm_eps)? })
    }

    /// x `[B, L, D]` -> the normed output `[B, L', D]`, L' = L or the number of kept rows.
    ///
    /// Each norm is fused with the residual add before it, so blocks hand on the pair (normed, residual stream). They take it by
    /// value: nobody holds it longer than needed.
    pub fn forward(&self, x: Var, pass: &Pass) -> Result<Var> {
        let Some(first) = self.blocks.first() else { return self.norm.forward(&x) };
        let (mut n, mut h) = (first.attention_norm.forward(&x)?, x);
        for (i, block) in self.blocks.iter().enumerate() {
            let last = i + 1 == self.blocks.len();
            let next = self.blocks.get(i + 1).map_or(&self.norm, |b| &b.attention_norm);
            if pass.recompute {
                let (block, next, pass) = (block.clone(), next.clone(), pass.clone());
                let out = recompute(&[&n, &h], move |v| {
                    let (n, h) = block.forward(v[0].clone(), v[1].clone(), &next, &pass, last)?;
                    Ok(vec![n, h])
                })?;
                (n, h) = (out[0].clone(), out[1].clone());
            } else {
                (n, h) = block.forward(n, h, next, pass, last)?;
            }
        }
        Ok(n)
    }

    pub fn collect<'a>(&'a mut self, out: &mut Vec<&'a mut Param>) {
        for b in &mut self.blocks {
            out.push(&mut b.attention_norm.weight);
            match &mut b.mixer {
                Mixer::Dense(a) => a.collect(out),
                Mixer::Cat(c) => c.collect(out),
            }
            out.push(&mut b.ffn_norm.weight);
            out.extend([&mut b.feed_forward.fc_1, &mut b.feed_forward.fc_2, &mut b.feed_forward.proj]);
        }
        out.push(&mut self.norm.weight);
    }
}

impl Block {
    /// (normed, residual) -> the same pair for `next`, the norm that follows.
    fn forward(&self, n: Var, h: Var, next: &Norm, pass: &Pass, last: bool) -> Result<(Var, Var)> {
        let keep = if last { pass.keep.as_deref() } else { None };
        let a = match &self.mixer {
            Mixer::Dense(a) => a.forward(n, &pass.rope, pass.mask, keep)?,
            Mixer::Cat(c) => kept(&c.forward(&n, pass)?, keep)?,
        };
        let (n, sum) = self.ffn_norm.add_forward(&kept(&h, keep)?, &a)?;
        drop((h, a));
        let f = self.feed_forward.forward(n)?;
        next.add_forward(&sum, &f)
    }

    /// An empty cache for this block.
    pub fn new_cache(&self, size: CacheSize, format: CacheFormat) -> Result<LayerCache> {
        match &self.mixer {
            Mixer::Dense(a) => Ok(LayerCache::Kv(a.new_cache(size.rows, format)?)),
            Mixer::Cat(c) => c.new_cache(size, format),
        }
    }
    /// Bytes that it holds.
    pub fn cache_bytes(&self, size: CacheSize, format: CacheFormat) -> u128 {
        match &self.mixer {
            Mixer::Dense(a) => a.row_bytes(format) as u128 * size.rows as u128,
            Mixer::Cat(c) => c.cache_bytes(size, format),
        }
    }
}
