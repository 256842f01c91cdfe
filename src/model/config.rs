//! What a model is: the fields of a native `config.json` (spec section 6), presets, and the checks between them.

use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// The kind of model, as `model_type` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ModelType {
    /// Dense "Transformer++" (spec section 1).
    Transformer,
    /// CAT with one chunk size (section 2).
    Cat,
    /// CAT whose chunk size is chosen at each call (section 3).
    CatAdaptive,
    /// CAT as a layer, and hybrids of such layers with dense ones (section 4).
    CatLayer,
}

/// What mixes tokens in one layer of a [`ModelType::CatLayer`] model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LayerType {
    /// Causal attention over all tokens.
    Dense,
    /// CAT as a layer: own chunk's tokens and all past chunks' representations (section 4).
    Cat,
}

/// Which chunk sizes an adaptive model takes, and how its per-size tables are indexed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ChunkSizes {
    /// 1, 2, 4, .., `chunk_size`; tables have `log2(chunk_size)+1` rows, row log2 C.
    #[default]
    PowersOfTwo,
    /// 1, 2, 3, .., `chunk_size`; tables have `chunk_size+1` rows, row C (the Hugging Face variant).
    Any,
}

/// One transformer: the decoder or the compressor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TransformerConfig {
    /// D: width of the residual stream (Df in the compressor).
    pub dim: usize,
    /// Number of blocks.
    pub n_layer: usize,
    /// H: query heads, each dim / n_head wide.
    pub n_head: usize,
    /// Key/value heads; fewer than `n_head` is grouped-query attention.
    #[serde(default)]
    pub n_local_heads: Option<usize>,
    /// M: width of SwiGLU; [`swiglu_width`] of ratio 4 if absent.
    #[serde(default)]
    pub intermediate_size: Option<usize>,
    /// Base of RoPE's angles.
    #[serde(default = "default_rope_base")]
    pub rope_base: f64,
    /// eps of RMSNorm.
    #[serde(default = "default_eps")]
    pub norm_eps: f64,
    /// RMSNorm on the queries and keys of each head, before RoPE.
    #[serde(default)]
    pub use_qk_norm: bool,
    /// eps of QK-norm where it differs from `norm_eps`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qk_norm_eps: Option<f64>,
    /// Biases on the q, k and v projections.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub qkv_bias: bool,
}

fn default_rope_base() -> f64 {
    10_000.0
}
fn default_eps() -> f64 {
    1e-5
}

/// `2/3 * ratio * dim`, truncated, then rounded up to a multiple of 256: the width of SwiGLU (ratio 4 by default).
pub fn swiglu_width(dim: usize, ratio: f64) -> usize {
    let n = (2.0 * ratio * dim as f64 / 3.0) as usize;
    up_to_256(n.max(1))
}

/// Rounded up to a multiple of 256, or as far as integers go: sizes out of files are checked after this.
fn up_to_256(n: usize) -> usize {
    n.checked_next_multiple_of(256).unwrap_or(usize::MAX)
}

impl TransformerConfig {
    /// A transformer of these sizes, everything else at its default.
    pub fn new(dim: usize, n_head: usize, n_layer: usize, use_qk_norm: bool) -> Self {
        Self {
            dim,
            n_layer,
            n_head,
            n_local_heads: None,
            intermediate_size: None,
            rope_base: default_rope_base(),
            norm_eps: default_eps(),
            use_qk_norm,
            qk_norm_eps: None,
            qkv_bias: false,
        }
    }
    /// Hkv: key/value heads.
    pub fn kv_heads(&self) -> usize {
        self.n_local_heads.unwrap_or(self.n_head)
    }
    /// d: width of a head.
    pub fn head_dim(&self) -> usize {
        self.dim / self.n_head.max(1)
    }
    /// M: width of SwiGLU.
    pub fn ffn_width(&self) -> usize {
        self.intermediate_size.unwrap_or_else(|| swiglu_width(self.dim, 4.0))
    }
    fn check(&self, what: &str) -> Result<()> {
        let fail = |why: String| Err(Error::config(format!("{what}: {why}")));
        let sizes = [self.dim, self.n_layer, self.n_head, self.kv_heads(), self.ffn_width()];
        if sizes.iter().any(|&n| n == 0 || n > MAX_SIZE) {
            return fail(format!(
                "dim, n_layer, n_head, n_local_heads, intermediate_size = {sizes:?} must be 1..={MAX_SIZE}"
            ));
        }
        if self.n_layer > MAX_LAYERS {
            return fail(format!("n_layer {} must be at most {MAX_LAYERS}", self.n_layer));
        }
        if !self.dim.is_multiple_of(self.n_head) || !self.head_dim().is_multiple_of(2) {
            return fail(format!("dim {} must split into {} heads of even width", self.dim, self.n_head));
        }
        if !self.n_head.is_multiple_of(self.kv_heads()) {
            return fail(format!("n_head {} must be a multiple of n_local_heads {}", self.n_head, self.kv_heads()));
        }
        let eps = self.qk_norm_eps.unwrap_or(self.norm_eps);
        if ![self.norm_eps, eps].iter().all(|e| (0.0..1.0).contains(e)) {
            return fail(format!("norm_eps {} and qk_norm_eps {eps} must be in 0..1", self.norm_eps));
        }
        if !(self.rope_base > 0.0 && self.rope_base.is_finite()) {
            return fail(format!("rope_base {} must be positive", self.rope_base));
        }
        Ok(())
    }
}

/// No size in a config may pass this: it keeps products of sizes inside 64 bits, whatever a file says.
const MAX_SIZE: usize = 1 << 24;
/// Nor may the number of layers pass this: each costs memory before its weights do.
const MAX_LAYERS: usize = 1 << 12;

/// A whole model: the fields of `config.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    /// The kind of model.
    pub model_type: ModelType,
    /// Ids that a tokenizer may use: `0..vocab_size`.
    pub vocab_size: usize,
    /// Rows of embedding tables and width of logits; `vocab_size` rounded up to a multiple of 256 if absent.
    #[serde(default)]
    pub padded_vocab_size: Option<usize>,
    /// The most tokens of a sequence.
    pub block_size: usize,
    /// The decoder, or the whole of a dense model.
    pub decoder: TransformerConfig,
    /// The chunk size; the largest one of an adaptive model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chunk_size: Option<usize>,
    /// The compressor `f`; needed by `cat` and `cat_adaptive`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compressor: Option<TransformerConfig>,
    /// Width inside a CAT layer; a multiple of 64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dim_fx: Option<usize>,
    /// `dense` or `cat` for each layer of a `cat_layer` model; all `cat` if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layer_types: Option<Vec<LayerType>>,
    /// `cat_layer` only: any power of two up to `chunk_size` may be asked for.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub adaptive_layers: bool,
    /// Which sizes an adaptive model takes; the powers of two if absent.
    #[serde(default, skip_serializing_if = "is_default")]
    pub chunk_sizes: ChunkSizes,
}

fn is_default<T: Default + PartialEq>(x: &T) -> bool {
    *x == T::default()
}

/// Head width inside a CAT layer (spec section 4).
pub const CAT_LAYER_HEAD_DIM: usize = 64;

/// The names that `preset` takes.
pub const PRESETS: [&str; 6] = ["nano", "cpu-small", "paper-31m", "paper-92m", "paper-1b", "paper-dense"];

impl ModelConfig {
    /// A model by name. Sizes: `nano` 0.7M and `cpu-small` 4.4M (byte vocabulary), `paper-1b` 985M (spec sections 6
    /// and 7) and its dense peer `paper-dense` 257M (gpt2 vocabulary). `paper-31m` and `paper-92m` are to dense models of 31M
    /// and 92M parameters (D 256 x 6, D 512 x 12) what `paper-1b` is to `paper-dense`: twice as wide, with a compressor as wide
    /// as the dense model.
    pub fn preset(name: &str) -> Result<Self> {
        let adaptive = |vocab, block, chunk, decoder, compressor| Self {
            model_type: ModelType::CatAdaptive,
            chunk_size: Some(chunk),
            compressor: Some(compressor),
            ..Self::dense(vocab, block, decoder)
        };
        let t = TransformerConfig::new;
        Ok(match name {
            "nano" => adaptive(256, 128, 16, t(96, 3, 4, true), t(64, 2, 1, true)),
            "cpu-small" => adaptive(256, 256, 16, t(256, 4, 4, true), t(128, 2, 1, true)),
            "paper-31m" => adaptive(50_257, 4096, 32, t(512, 8, 6, true), t(256, 4, 2, true)),
            "paper-92m" => adaptive(50_257, 4096, 32, t(1024, 16, 12, true), t(512, 8, 3, true)),
            "paper-1b" => adaptive(50_257, 4096, 32, t(2048, 32, 12, true), t(1024, 16, 3, true)),
            "paper-dense" => Self::dense(50_257, 4096, t(1024, 16, 12, true)),
            _ => return Err(Error::Usage(format!("unknown preset '{name}': use one of {}", PRESETS.join(", ")))),
        })
    }
    /// A dense transformer, the base of the other kinds.
    pub fn dense(vocab_size: usize, block_size: usize, decoder: TransformerConfig) -> Self {
        Self {
            model_type: ModelType::Transformer,
            vocab_size,
            padded_vocab_size: None,
            block_size,
            decoder,
            chunk_size: None,
            compressor: None,
            dim_fx: None,
            layer_types: None,
            adaptive_layers: false,
            chunk_sizes: ChunkSizes::PowersOfTwo,
        }
    }
    /// Parse and check a native `config.json`.
    pub fn from_json(text: &str) -> Result<Self> {
        let c: Self = serde_json::from_str(text).map_err(|e| Error::config(format!("not a native model config: {e}")))?;
        c.check()?;
        Ok(c)
    }
    /// V: rows of embedding tables and width of logits.
    pub fn vocab_rows(&self) -> usize {
        self.padded_vocab_size.unwrap_or_else(|| up_to_256(self.vocab_size))
    }
    /// What layer `i` of the decoder mixes tokens with.
    pub fn layer_type(&self, i: usize) -> LayerType {
        match (&self.layer_types, self.model_type) {
            (Some(types), ModelType::CatLayer) => types.get(i).copied().unwrap_or(LayerType::Cat),
            (None, ModelType::CatLayer) => LayerType::Cat,
            _ => LayerType::Dense,
        }
    }
    /// True when the chunk size may be chosen at each call.
    pub fn is_adaptive(&self) -> bool {
        self.model_type == ModelType::CatAdaptive || (self.model_type == ModelType::CatLayer && self.adaptive_layers)
    }
    /// Chunk sizes that the model may be called with, ascending; empty for a dense model.
    pub fn allowed_chunk_sizes(&self) -> Vec<usize> {
        match (self.chunk_size, self.is_adaptive(), self.chunk_sizes) {
            (None, ..) => vec![],
            (Some(c), false, _) => vec![c],
            (Some(max), true, ChunkSizes::Any) => (1..=max).collect(),
            (Some(max), true, ChunkSizes::PowersOfTwo) => {
                (0..usize::BITS).map(|p| 1 << p).take_while(|&c| c <= max).collect()
            }
        }
    }
    /// The sizes that training goes round (spec section 3): 4, 8, .., `chunk_size`, or the only one there is. `[0]` for
    /// a dense model, whose one "size" has no meaning.
    pub fn training_chunk_sizes(&self) -> Vec<usize> {
        let allowed = self.allowed_chunk_sizes();
        let round: Vec<usize> = allowed.iter().copied().filter(|c| *c >= 4 && c.is_power_of_two()).collect();
        match (round.is_empty(), allowed.last()) {
            (false, _) => round,
            (true, Some(&c)) => vec![c],
            (true, None) => vec![0],
        }
    }
    /// The chunk size to use when `asked` is given or not (then the largest); an error if it is not allowed. For a
    /// dense model the answer means nothing and asking is an error.
    pub fn resolve_chunk_size(&self, asked: Option<usize>) -> Result<usize> {
        let allowed = self.allowed_chunk_sizes();
        match (asked, self.chunk_size) {
            (None, c) => Ok(c.unwrap_or(0)),
            (Some(c), _) if allowed.contains(&c) => Ok(c),
            (Some(asked), None) => Err(Error::ChunkSize { asked, allowed: "none, it is dense (leave it out)".into() }),
            (Some(asked), Some(max)) => {
                let allowed = match self.chunk_sizes {
                    ChunkSizes::Any if self.is_adaptive() => format!("any of 1..={max}"),
                    _ => allowed.iter().map(usize::to_string).collect::<Vec<_>>().join(", "),
                };
                Err(Error::ChunkSize { asked, allowed })
            }
        }
    }
    /// That all of these are allowed; a dense model, which has no use for them, takes any.
    pub(crate) fn check_chunk_sizes(&self, sizes: &[usize]) -> Result<()> {
        let asked = if self.chunk_size.is_some() { sizes } else { &[] };
        asked.iter().try_for_each(|&c| self.resolve_chunk_size(Some(c)).map(drop))
    }
    /// Row of the per-size tables (`dummy_fx`, `adaptive_token`) for chunk size `c`.
    pub fn table_row(&self, c: usize) -> usize {
        match self.chunk_sizes {
            _ if self.model_type != ModelType::CatAdaptive => 0,
            ChunkSizes::PowersOfTwo => c.max(1).ilog2() as usize,
            ChunkSizes::Any => c,
        }
    }
    /// Rows of the per-size tables.
    pub fn table_rows(&self) -> usize {
        self.chunk_size.map_or(1, |c| self.table_row(c) + 1)
    }
    /// Everything that must hold between the fields.
    pub fn check(&self) -> Result<()> {
        let fail = |why: String| Err(Error::config(why));
        self.decoder.check("decoder")?;
        let v = self.vocab_rows();
        if self.vocab_size == 0 || self.block_size == 0 || v > MAX_SIZE || self.block_size > MAX_SIZE {
            return fail(format!(
                "vocab_size {} and block_size {} must be 1..={MAX_SIZE}",
                self.vocab_size, self.block_size
            ));
        }
        if v < self.vocab_size {
            return fail(format!("padded_vocab_size {v} is below vocab_size {}", self.vocab_size));
        }
        let chunked = self.model_type != ModelType::Transformer;
        match self.chunk_size {
            None if chunked => return fail("a CAT needs chunk_size".into()),
            Some(_) if !chunked => return fail("model_type transformer takes no chunk_size".into()),
            Some(c) if c == 0 || c > self.block_size => {
                return fail(format!("chunk_size {c} must be 1..=block_size {}", self.block_size));
            }
            Some(c) if self.is_adaptive() && self.chunk_sizes == ChunkSizes::PowersOfTwo && !c.is_power_of_two() => {
                return fail(format!("chunk_size {c} of an adaptive model must be a power of two"));
            }
            _ => {}
        }
        match (&self.compressor, self.model_type) {
            (Some(f), ModelType::Cat | ModelType::CatAdaptive) => f.check("compressor")?,
            (None, ModelType::Cat | ModelType::CatAdaptive) => return fail("a CAT needs a compressor".into()),
            _ => {}
        }
        if self.model_type == ModelType::CatLayer {
            match self.dim_fx {
                Some(d) if d > 0 && d % CAT_LAYER_HEAD_DIM == 0 && d <= MAX_SIZE => {}
                other => return fail(format!("cat_layer needs dim_fx, a multiple of {CAT_LAYER_HEAD_DIM}, got {other:?}")),
            }
            if self.decoder.head_dim() > CAT_LAYER_HEAD_DIM {
                let (d, most) = (self.decoder.head_dim(), CAT_LAYER_HEAD_DIM);
                return fail(format!("decoder dim / n_head = {d} is the width RoPE turns in a CAT layer: at most {most}"));
            }
        }
        if let Some(types) = &self.layer_types
            && (types.len() != self.decoder.n_layer || self.model_type != ModelType::CatLayer)
        {
            let (n, l) = (types.len(), self.decoder.n_layer);
            return fail(format!(
                "layer_types has {n} entries: it needs model_type cat_layer and one for each of {l} layers"
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_are_sound() {
        for name in PRESETS {
            let c = ModelConfig::preset(name).unwrap();
            c.check().unwrap();
            assert_eq!(ModelConfig::from_json(&serde_json::to_string(&c).unwrap()).unwrap(), c);
        }
        assert_eq!(ModelConfig::preset("paper-1b").unwrap().training_chunk_sizes(), [4, 8, 16, 32]);
        assert_eq!(ModelConfig::preset("nano").unwrap().training_chunk_sizes(), [4, 8, 16]);
        let nano = ModelConfig::preset("nano").unwrap();
        assert!(matches!(nano.resolve_chunk_size(Some(3)), Err(Error::ChunkSize { .. })));
        assert_eq!(ModelConfig { chunk_size: Some(0), ..nano }.table_rows(), 1, "no panic before check has refused it");
    }

    #[test]
    fn swiglu_widths() {
        assert_eq!([32, 128, 256, 1024, 2048].map(|d| swiglu_width(d, 4.0)), [256, 512, 768, 2816, 5632]);
    }
}
