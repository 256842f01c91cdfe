//! What one layer keeps of the past (spec section 5), of all texts of a cache in one run of rows.

use crate::Result;
use crate::ops::{self, CacheRows, QkNorm, RopeTable};
use crate::tensor::Tensor;

/// Keys and values of one attention, `[Hkv, T, d]` each. Which text a row belongs to, the [`Cache`](super::Cache) knows.
///
/// A text's rows lie in one run: slots first, then the current block's local rows. A new slot ends the block and takes the
/// place of the first local row, so what a row sees is always a run that ends with itself.
#[derive(Clone, Debug)]
pub struct KvCache {
    k: Tensor,
    v: Tensor,
}

impl KvCache {
    /// Room for `rows` rows, in the dtype and on the device of `like`.
    pub fn new(kv_heads: usize, rows: usize, head_dim: usize, like: &Tensor) -> Result<Self> {
        let zeros = || Tensor::zeros(&[kv_heads, rows, head_dim], like.dtype(), like.device());
        Ok(Self { k: zeros()?, v: zeros()? })
    }
    pub fn bytes(&self) -> usize {
        bytes(&self.k) + bytes(&self.v)
    }
    /// New rows of k and v, `[B, Hkv, n, d]`, at their places.
    pub fn write(&mut self, k: &Tensor, v: &Tensor, rows: &CacheRows) -> Result<()> {
        ops::write_row_pairs([&mut self.k, &mut self.v], [k, v], rows)
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
        // weights are settled: see cached_layers
        ops::settled_step(joint, (heads, kv_heads), norms, rope, [&mut self.k, &mut self.v], rows, scale, true)
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
