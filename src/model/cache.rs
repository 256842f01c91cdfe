//! The compressed cache of spec section 5, for many texts at once: of each, per layer, the keys and values of one slot a
//! past chunk, and of the current block's rows. At most K + C + 2 rows a layer instead of N.
//!
//! The rows of all texts lie in one tensor a layer, each text in a run of its own, as long as it will ever need: texts of
//! any lengths and chunk sizes share a cache, and what one leaves the next may take.

use super::cat::Cat;
use super::compressor::ForChunks;
use super::config::{LayerType, ModelConfig, ModelType};
use super::kv_cache::{CacheFormat, LayerCache};
use super::plan::ChunkPlan;
use crate::memory::{Category, counted_as};
use crate::ops::RopeTable;
use crate::tensor::Tensor;
use crate::{Error, Result};
use std::collections::BTreeMap;
use std::iter::{self, Sum};
use std::ops::{Add, Range};

/// Rows of a cache, in each layer of a kind: what one text needs, or many together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheSize {
    /// Of dense attention: slots and local rows, or one a token in models without slots.
    pub rows: usize,
    /// Inside CAT layers.
    pub layer_rows: usize,
    /// Inputs of CAT layers whose chunk is not full.
    pub open_rows: usize,
}

impl CacheSize {
    /// What serves either.
    pub fn max(self, o: Self) -> Self {
        let Self { rows, layer_rows, open_rows } = self;
        Self { rows: rows.max(o.rows), layer_rows: layer_rows.max(o.layer_rows), open_rows: open_rows.max(o.open_rows) }
    }
    /// True if a text of that need has room here.
    pub fn fits(self, need: Self) -> bool {
        self.max(need) == self
    }
}

impl Add for CacheSize {
    type Output = Self;
    fn add(self, o: Self) -> Self {
        Self {
            rows: self.rows + o.rows,
            layer_rows: self.layer_rows + o.layer_rows,
            open_rows: self.open_rows + o.open_rows,
        }
    }
}
impl Sum for CacheSize {
    fn sum<I: Iterator<Item = Self>>(it: I) -> Self {
        it.fold(Self::default(), Self::add)
    }
}

/// A text in a [`Cache`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TextId(usize);

/// Where a text's rows are, and how far it has been read.
#[derive(Clone, Debug)]
pub struct Text {
    pub rows: Range<usize>,
    pub layer_rows: Range<usize>,
    pub open: Range<usize>,
    /// C.
    pub chunk: usize,
    /// Tokens read; 0 before there is a prompt.
    pub tokens: usize,
    /// Ids of the block that is not full yet.
    pub pending: Vec<i64>,
}

impl Text {
    pub fn size(&self) -> CacheSize {
        CacheSize { rows: self.rows.len(), layer_rows: self.layer_rows.len(), open_rows: self.open.len() }
    }
}

/// What generation keeps of the past.
#[derive(Clone, Debug)]
pub struct Cache {
    pub(super) layers: Vec<LayerCache>,
    texts: Vec<Option<Text>>,
    rows: Runs,
    layer_rows: Runs,
    open: Runs,
    rope: RopeTable,
    /// What the compressor needs for a chunk size: computed once, not for every chunk that fills. Forgotten when a text is read
    /// from its beginning, since weights may have changed before that.
    pub(super) sized: BTreeMap<usize, ForChunks>,
}

impl Cat {
    /// The least that the cache of one text can be, which is `from` tokens long at first and `to` at last.
    pub fn cache_size(&self, chunk_size: Option<usize>, from: usize, to: usize) -> Result<CacheSize> {
        let (c, chunk) = (self.config(), self.config().resolve_chunk_size(chunk_size)?);
        let to = to.max(from);
        if to > c.block_size {
            return Err(Error::Length { len: to, block_size: c.block_size });
        }
        let most = |len: fn(&ModelConfig, usize, usize) -> usize| {
            // as long as the text grows inside a block, so do its rows: they are most at its end or at that of a block
            let block_end = (to + 1).checked_div(chunk).map_or(0, |k| k * chunk).saturating_sub(1);
            let all = len(c, chunk, to);
            if block_end >= from { all.max(len(c, chunk, block_end)) } else { all }
        };
        let dense = (0..c.decoder.n_layer).any(|i| c.layer_type(i) == LayerType::Dense);
        let layers = c.model_type == ModelType::CatLayer;
        Ok(CacheSize {
            rows: if dense { most(rows_at) } else { 0 },
            layer_rows: if layers { most(layer_rows_at) } else { 0 },
            open_rows: if layers { chunk } else { 0 },
        })
    }
    /// Bytes of a cache of this size.
    pub fn cache_bytes(&self, size: CacheSize, format: CacheFormat) -> u128 {
        self.decoder.blocks.iter().map(|b| b.cache_bytes(size, format)).sum()
    }
    /// An empty cache of this size. Errors where there is not enough memory.
    pub fn cache(&self, size: CacheSize, format: CacheFormat) -> Result<Cache> {
        let layers = counted_as(Category::Cache, || {
            self.decoder.blocks.iter().map(|b| b.new_cache(size, format)).collect::<Result<Vec<_>>>()
        })?;
        let [rows, layer_rows, open] = [size.rows, size.layer_rows, size.open_rows].map(Runs::new);
        Ok(Cache { layers, texts: vec![], rows, layer_rows, open, rope: self.rope(&[])?, sized: BTreeMap::new() })
    }
}

/// The layout of n tokens in chunks, in the decoder (`None` without chunks there) or inside CAT layers.
pub(super) fn plan_of(c: &ModelConfig, chunk: usize, tokens: usize) -> Option<ChunkPlan> {
    let header = match c.model_type {
        ModelType::Transformer => return None,
        ModelType::CatAdaptive => 2,
        ModelType::Cat | ModelType::CatLayer => 1,
    };
    Some(ChunkPlan { chunk, header, tokens })
}
/// Rows that dense attention keeps of n tokens.
pub(super) fn rows_at(c: &ModelConfig, chunk: usize, n: usize) -> usize {
    match plan_of(c, chunk, n) {
        Some(p) if c.model_type != ModelType::CatLayer => p.full_chunks() + p.header + p.tail(),
        _ => n,
    }
}
/// Rows that a CAT layer keeps of n tokens.
pub(super) fn layer_rows_at(c: &ModelConfig, chunk: usize, n: usize) -> usize {
    plan_of(c, chunk, n).map_or(0, |p| p.full_chunks() + p.header + p.tail())
}

impl Cache {
    /// Take room for a text; `None` where there is no run so long left. It may be given back with [`Cache::free`].
    pub fn reserve(&mut self, size: CacheSize) -> Option<TextId> {
        let rows = self.rows.take(size.rows)?;
        let Some(layer_rows) = self.layer_rows.take(size.layer_rows) else {
            self.rows.give(rows);
            return None;
        };
        let Some(open) = self.open.take(size.open_rows) else {
            self.rows.give(rows);
            self.layer_rows.give(layer_rows);
            return None;
        };
        let text = Text { rows, layer_rows, open, chunk: 0, tokens: 0, pending: vec![] };
        let at = self.texts.iter().position(Option::is_none).unwrap_or(self.texts.len());
        if at == self.texts.len() {
            self.texts.push(None);
        }
        self.texts[at] = Some(text);
        Some(TextId(at))
    }
    /// Give a text's room back. One that is not there is no error.
    pub fn free(&mut self, id: TextId) {
        if let Some(text) = self.texts.get_mut(id.0).and_then(Option::take) {
            self.rows.give(text.rows);
            self.layer_rows.give(text.layer_rows);
            self.open.give(text.open);
        }
    }
    /// Tokens of a text read so far.
    pub fn tokens(&self, id: TextId) -> usize {
        self.texts.get(id.0).and_then(Option::as_ref).map_or(0, |t| t.tokens)
    }
    /// The room that a text has.
    pub fn size(&self, id: TextId) -> CacheSize {
        self.texts.get(id.0).and_then(Option::as_ref).map_or(CacheSize::default(), Text::size)
    }
    /// Bytes held, whether rows are filled or not.
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(LayerCache::bytes).sum()
    }
    pub(super) fn text(&mut self, id: TextId) -> Result<&mut Text> {
        let missing =
            || Error::shape("cache", format!("there is no text {} in this cache: reserve room for it first", id.0));
        self.texts.get_mut(id.0).and_then(Option::as_mut).ok_or_else(missing)
    }
    /// The table that [`Cache::rope`] takes angles from.
    #[cfg(feature = "cuda")]
    pub(super) fn rope_table(&self) -> &RopeTable {
        &self.rope
    }
    /// Angles of rows at these positions. The table behind them is computed once and grows as positions do.
    pub(super) fn rope(&mut self, model: &Cat, positions: &[usize]) -> Result<RopeTable> {
        let need = positions.iter().max().map_or(0, |p| p + 1);
        if need > self.rope.len() {
            self.rope = model.rope(&(0..need.next_power_of_two()).collect::<Vec<_>>())?;
        }
        self.rope.select(positions)
    }
}

/// Rows `0..n` as runs that are taken and given back.
#[derive(Clone, Debug)]
struct Runs {
    /// What is free, in order; neighbours are joined.
    free: Vec<Range<usize>>,
}

impl Runs {
    fn new(n: usize) -> Self {
        Self { free: iter::once(0..n).collect() }
    }
    /// The first `n` rows in a run; none where no run is so long.
    fn take(&mut self, n: usize) -> Option<Range<usize>> {
        if n == 0 {
            return Some(0..0);
        }
        let run = self.free.iter_mut().find(|r| r.len() >= n)?;
        let taken = run.start..run.start + n;
        run.start += n;
        self.free.retain(|r| !r.is_empty());
        Some(taken)
    }
    fn give(&mut self, run: Range<usize>) {
        if run.is_empty() {
            return;
        }
        let at = self.free.partition_point(|r| r.start < run.start);
        self.free.insert(at, run);
        self.free.dedup_by(|next, before| {
            let joined = before.end == next.start;
            if joined {
                before.end = next.end;
            }
            joined
        });
    }
}

/// Ids as the model takes them, or the first that it does not.
pub(super) fn check_ids(ids: impl IntoIterator<Item = i64>, rows: usize) -> Result<()> {
    for (at, id) in ids.into_iter().enumerate() {
        if !usize::try_from(id).is_ok_and(|i| i < rows) {
            return Err(Error::index("embedding", format!("id {id} at position {at} is outside the vocabulary of {rows}")));
        }
    }
    Ok(())
}

/// Rows of parts `[n, w]` joined, number `order[i]` of them at i.
pub(super) fn in_order(parts: &[Tensor], order: &[usize]) -> Result<Tensor> {
    let joined = match parts {
        [one] => one.clone(),
        _ => crate::ops::concat_tensors(&parts.iter().collect::<Vec<_>>(), 0)?,
    };
    if order.iter().copied().eq(0..joined.dim(0)) {
        return Ok(joined);
    }
    Ok(crate::ops::index_select(&joined.into(), 0, order)?.into_value())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Runs never overlap, and what was given back can be taken again as one.
        #[test]
        fn runs_are_taken_once(sizes in prop::collection::vec(0usize..9, 1..40), keep in any::<u64>()) {
            let (mut runs, mut held, mut owner) = (Runs::new(60), Vec::new(), [false; 60]);
            for (i, &n) in sizes.iter().enumerate() {
                let free: usize = runs.free.iter().map(|r| r.len()).sum();
                prop_assert_eq!(free, owner.iter().filter(|o| !**o).count());
                match runs.take(n) {
                    Some(run) => {
                        prop_assert_eq!(run.len(), n);
                        run.clone().for_each(|r| assert!(!std::mem::replace(&mut owner[r], true)));
                        held.push(run);
                    }
                    None => prop_assert!(runs.free.iter().all(|r| r.len() < n)),
                }
                if keep >> (i % 64) & 1 == 1 && !held.is_empty() {
                    let run = held.swap_remove(i % held.len());
                    run.clone().for_each(|r| owner[r] = false);
                    runs.give(run);
                }
            }
            held.into_iter().for_each(|r| runs.give(r));
            prop_assert_eq!(runs.free, iter::once(0..60).collect::<Vec<_>>());
        }
    }
}
