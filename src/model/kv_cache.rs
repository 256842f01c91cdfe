//! What one layer keeps of the past (spec section 5), of all texts of a cache in one run of rows.

use crate::ops::{self, CacheRows, Int8Rows, QkNorm, RopeTable};
use crate::tensor::{DType, Tensor};
use crate::{Error, Result};

/// How a cache keeps keys and values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CacheFormat {
    /// As they are computed, in the dtype of the weights.
    #[default]
    Plain,
    /// As 8-bit integers, with one f32 scale for the d elements of a row and head ([`Int8Rows`]): `1 + 4/d` bytes an element.
    /// What is read of the past is rounded, so logits are not those of the whole model: `docs/generate.md` says how far off.
    Int8,
}

impl CacheFormat {
    /// Bytes of `rows` rows of width `d`, computed in `dtype`.
    pub(crate) fn row_bytes(self, rows: usize, d: usize, dtype: DType) -> usize {
        match self {
            Self::Plain => rows * d * dtype.size(),
            Self::Int8 => Int8Rows::bytes(rows, d),
        }
    }
}

impl std::str::FromStr for CacheFormat {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        match s {
            "plain" => Ok(Self::Plain),
            "int8" => Ok(Self::Int8),
            _ => Err(Error::Usage(format!("unknown cache format '{s}': use plain or int8"))),
        }
    }
}

/// Keys and values of one attention, `[Hkv, T, d]` each. Which text a row belongs to, the [`Cache`](super::Cache) knows.
///
/// A text's rows lie in one run: slots first, then the current block's local rows. A new slot ends the block and takes the
/// place of the first local row, so what a row sees is always a run that ends with itself.
#[derive(Clone, Debug)]
pub enum KvCache {
    Plain([Tensor; 2]),
    Int8([Int8Rows; 2]),
}

impl KvCache {
    /// Room for rows `[Hkv, T, d]`, on the device of `like` and, if they are plain, in its dtype.
    pub fn new(shape: [usize; 3], format: CacheFormat, like: &Tensor) -> Result<Self> {
        match format {
            CacheFormat::Plain => {
                let zeros = || Tensor::zeros(&shape, like.dtype(), like.device());
                Ok(Self::Plain([zeros()?, zeros()?]))
            }
            CacheFormat::Int8 => {
                let zeros = || Int8Rows::zeros(shape, like.device());
                Ok(Self::Int8([zeros()?, zeros()?]))
            }
        }
    }
    pub fn bytes(&self) -> usize {
        match self {
            Self::Plain(kv) => kv.iter().map(bytes).sum(),
            Self::Int8(kv) => kv.iter().map(|r| bytes(r.numbers()) + bytes(r.scales())).sum(),
        }
    }
    /// New rows of k and v, `[B, Hkv, n, d]`, at their places.
    pub fn write(&mut self, k: &Tensor, v: &Tensor, rows: &CacheRows) -> Result<()> {
        match self {
            Self::Plain([to_k, to_v]) => ops::write_row_pairs([to_k, to_v], [k, v], rows),
            Self::Int8([to_k, to_v]) => ops::write_int8_rows([to_k, to_v], [k, v], rows),
        }
    }
    /// New rows that are newest rows of their texts, from their projection `[1, R, (H + 2 Hkv) d]`: taken in, and what each of
    /// them sees, `[1, R, H d]`.
    pub fn step(
        &mut self,
        joint: &Tensor,
        (heads, kv_heads): (usize, usize),
        norms: Option<QkNorm>,
        rope: &RopeTable,
        rows: &CacheRows,
        scale: f64,
    ) -> Result<Tensor> {
        match self {
            // weights are settled: see cached_layers
            Self::Plain([k, v]) => ops::settled_step(joint, (heads, kv_heads), norms, rope, [k, v], rows, scale, true),
            Self::Int8([k, v]) => ops::cached_step_int8(joint, (heads, kv_heads), norms, rope, [k, v], rows, scale),
        }
    }
}

/// What a CAT layer keeps: its rows, and the inputs of chunks that are not full yet, `[1, T', dim]`.
#[derive(Clone, Debug)]
pub struct CatLayerCache {
    pub kv: KvCache,
    pub open: Tensor,
}

/// The cache of one block.
#[derive(Clone, Debug)]
pub enum LayerCache {
    Kv(KvCache),
    Cat(CatLayerCache),
}

impl LayerCache {
    pub fn bytes(&self) -> usize {
        match self {
            Self::Kv(kv) => kv.bytes(),
            Self::Cat(c) => c.kv.bytes() + bytes(&c.open),
        }
    }
}

fn bytes(t: &Tensor) -> usize {
    t.numel() * t.dtype().size()
}

/// Where the new rows of a pass through cached layers go.
#[derive(Clone, Debug)]
pub struct CachedPass {
    /// Of dense attention: one a row of the pass.
    pub rows: CacheRows,
    /// The rows are whole texts from their beginnings, `[B, L, D]`, which see one another under the pass's mask and nothing
    /// else. If not, they are the newest rows of any texts, `[1, R, D]`.
    pub prompt: bool,
    /// Of CAT layers, in models that have them.
    pub layer: Option<LayerPass>,
}

/// Where the rows inside CAT layers go.
#[derive(Clone, Debug)]
pub struct LayerPass {
    /// One a row that is kept.
    pub rows: CacheRows,
    /// Of a prompt: the rows of each sequence that are kept.
    pub kept: Vec<usize>,
    /// Where the inputs of chunks that are not full go, those included that fill them now.
    pub open: CacheRows,
    /// Of new rows: the chunks that they fill.
    pub full: Vec<FullChunks>,
    /// Where the rows come from, if chunks are filled: row r of the pass, or number `R + i` of the filled ones.
    pub order: Vec<usize>,
}

/// Chunks of one size whose inputs are all there.
#[derive(Clone, Debug)]
pub struct FullChunks {
    pub chunk: usize,
    /// The places of their inputs, a chunk after the other.
    pub inputs: Vec<usize>,
}
