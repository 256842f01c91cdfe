//! Reading with a cache (spec section 5): whole prompts at once, then token by token. Every row of a step is told where
//! its text lies and what it sees, so texts of any lengths, phases and chunk sizes are read together; only chunks that
//! fill up are compressed apart, by size.

use super::cache::{Cache, Text, TextId, check_ids, in_order, layer_rows_at, plan_of, rows_at};
use super::cat::{Cat, Chunks};
use super::compressor::{Compressor, ForChunks};
use super::config::{LayerType, ModelType};
use super::kv_cache::{CachedPass, FullChunks, LayerPass};
use super::layers::Pass;
use super::plan::ChunkPlan;
use crate::autograd::{Var, no_grad};
use crate::ops::{self, CacheRows, Mask, concat, concat_tensors, expand, fused_linear, reshape};
use crate::tensor::Tensor;
use crate::{Error, Result};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Range;

/// Rows of whole prompts that are read at once: bounds what their activations take, at little loss of speed.
const ROWS_AT_ONCE: usize = 1 << 11;

/// Tokens whose chunks are compressed at once, for the same reason.
const COMPRESSED_AT_ONCE: usize = 1 << 11;

/// A text to be read from its beginning.
#[derive(Clone, Copy, Debug)]
pub struct Prompt<'a> {
    /// Where it is kept.
    pub text: TextId,
    /// Its tokens so far.
    pub ids: &'a [i64],
    /// C; the model's (largest) if not given.
    pub chunk_size: Option<usize>,
}

impl Cat {
    /// Read texts from their beginnings, whatever was read of them before: the logits of their next tokens, `[prompts, V]`.
    /// Those of one length and chunk size are read together, their full chunks compressed in pieces of bounded size.
    pub fn prefill(&self, cache: &mut Cache, prompts: &[Prompt]) -> Result<Tensor> {
        let c = self.config();
        let mut groups: BTreeMap<(usize, usize), Vec<usize>> = BTreeMap::new();
        for (i, p) in prompts.iter().enumerate() {
            let (chunk, n) = (c.resolve_chunk_size(p.chunk_size)?, p.ids.len());
            if n == 0 {
                return Err(Error::empty("the prompt", "give at least one token"));
            }
            check_ids(p.ids.iter().copied(), c.vocab_rows())?;
            let (need, have) =
                (self.cache_size(Some(chunk).filter(|c| *c > 0), n, n)?, cache.text(p.text).map(|t| t.size())?);
            if !have.fits(need) {
                return Err(Error::shape(
                    "prefill",
                    format!("{n} tokens need {need:?} of the cache, reserved are {have:?}"),
                ));
            }
            groups.entry((chunk, n)).or_default().push(i);
        }
        distinct("prefill", prompts.iter().map(|p| p.text))?;
        cache.sized.clear();
        let (mut parts, mut order) = (Vec::new(), vec![0; prompts.len()]);
        for ((chunk, n), group) in &groups {
            for piece in group.chunks((ROWS_AT_ONCE / rows_at(c, *chunk, *n)).max(1)) {
                let some: Vec<&Prompt> = piece.iter().map(|&i| &prompts[i]).collect();
                let read: usize = parts.iter().map(|p: &Tensor| p.dim(0)).sum();
                parts.push(no_grad(|| self.read_prompts(cache, &some, *chunk, *n))?);
                piece.iter().zip(read..).for_each(|(&i, at)| order[i] = at);
            }
        }
        match parts.is_empty() {
            true => Tensor::zeros(&[0, c.vocab_rows()], self.output.dtype(), self.device()),
            false => no_grad(|| self.last_logits(&in_order(&parts, &order)?)),
        }
    }

    /// Prompts of n tokens each: the last block's row of each that predicts its next token, `[prompts, D]`.
    fn read_prompts(&self, cache: &mut Cache, prompts: &[&Prompt], chunk: usize, n: usize) -> Result<Tensor> {
        let c = self.config();
        let b = prompts.len();
        let ids: Vec<i64> = prompts.iter().flat_map(|p| p.ids.iter().copied()).collect();
        let ids = Tensor::ids(&ids, &[b, n])?;
        let mut texts = Vec::with_capacity(b);
        for p in prompts {
            let text = cache.text(p.text)?;
            text.tokens = 0;
            texts.push(text.clone());
        }
        let plan = plan_of(c, chunk, n);
        // row i of a text lies at the i-th place of its run
        let runs = |len: usize, of: fn(&Text) -> &Range<usize>| {
            let seen = texts.iter().flat_map(|t| (1..=len).map(move |i| of(t).start..of(t).start + i));
            CacheRows::new(seen.collect())
        };
        let (x, mut pass, layer) = match (plan, &self.chunks) {
            (Some(plan), Some(_)) => {
                // slots see slots, the open block's rows see slots and one another: nothing else need be computed
                let (k, full) = (plan.full_chunks(), plan.full_chunks() * chunk);
                let fx = if k == 0 {
                    None
                } else {
                    let numbers: Vec<usize> = (0..b).flat_map(|_| 0..k).collect();
                    let ids = ids.narrow(1, 0, full)?.reshape(&[b * k, chunk])?;
                    let fx = self.compressed_ids(cache, &ids, &numbers)?;
                    Some(reshape(&fx.into(), &[b, k, c.decoder.dim])?)
                };
                let mut parts = vec![self.slots_of(b, chunk, fx)?];
                parts.extend(self.separator_rows(b)?);
                if plan.tail() > 0 {
                    parts.push(ops::embedding(&ids.narrow(1, full, plan.tail())?, &self.wte)?);
                }
                let positions: Vec<usize> = (0..=k).map(|_| 0).chain(1..plan.header + plan.tail()).collect();
                let x = concat(&parts.iter().collect::<Vec<_>>(), 1)?;
                (x, Pass::new(cache.rope(self, &positions)?, Mask::Causal), None)
            }
            (plan, _) => {
                let positions: Vec<usize> = (0..n).collect();
                let mut pass = Pass::new(cache.rope(self, &positions)?, Mask::Causal);
                let layer = match plan {
                    None => None,
                    Some(plan) => {
                        pass.layer_plan = Some((plan, cache.rope(self, &plan.positions())?));
                        let kept = kept_rows(&plan);
                        let (rows, open) = (runs(kept.len(), |t| &t.layer_rows)?, runs(plan.tail(), |t| &t.open)?);
                        Some(LayerPass { rows, kept, open, full: vec![], order: vec![] })
                    }
                };
                (ops::embedding(&ids, &self.wte)?, pass, layer)
            }
        };
        let len = x.shape()[1];
        pass.keep = Some(vec![len - 1]);
        let cached = CachedPass { rows: runs(len, |t| &t.rows)?, prompt: true, layer };
        let h = self.decoder.forward_cached(x.into_value(), &pass, &mut cache.layers, &cached)?;
        for p in prompts {
            let text = cache.text(p.text)?;
            (text.chunk, text.tokens) = (chunk, n);
            text.pending = n.checked_rem(chunk).map_or(vec![], |tail| p.ids[n - tail..].to_vec());
        }
        h.reshape(&[b, c.decoder.dim])
    }

    /// Append one token to each of some texts: the logits of their next, `[texts, V]`. Tokens that cannot be appended leave
    /// the cache as it was.
    pub fn step(&self, cache: &mut Cache, next: &[(TextId, i64)]) -> Result<Tensor> {
        let c = self.config();
        check_ids(next.iter().map(|n| n.1), c.vocab_rows())?;
        distinct("step", next.iter().map(|n| n.0))?;
        let mut texts = Vec::with_capacity(next.len());
        for &(id, _) in next {
            let text = cache.text(id)?.clone();
            let (n, have) = (text.tokens + 1, text.size());
            if text.tokens == 0 {
                return Err(Error::shape("step", "a text that has no prompt yet: prefill it first"));
            }
            // a text without chunks, read by a dense model, is none that this one can go on with if it has them
            let chunk = Some(text.chunk).filter(|chunk| *chunk > 0 || c.chunk_size.is_some());
            let need = self.cache_size(chunk, n, n)?;
            if !have.fits(need) {
                let detail = format!("token {n} of a text needs {need:?} of the cache, reserved are {have:?}: reserve more");
                return Err(Error::shape("step", detail));
            }
            texts.push(text);
        }
        if texts.is_empty() {
            return Tensor::zeros(&[0, c.vocab_rows()], self.output.dtype(), self.device());
        }
        no_grad(|| {
            let filled = Filled::new(&texts, next);
            let (x, keep, positions, cached) = match &self.chunks {
                Some(_) => self.chunk_step(cache, &texts, next, &filled)?,
                None => self.token_step(&texts, next, &filled)?,
            };
            let mut pass = Pass::new(cache.rope(self, &positions)?, Mask::Causal);
            if cached.layer.is_some() {
                let inside = texts.iter().map(|t| (t.tokens + 1) % t.chunk).collect::<Vec<_>>();
                let plan = ChunkPlan { chunk: 1, header: 1, tokens: 1 };
                pass.layer_plan = Some((plan, cache.rope(self, &inside)?));
            }
            pass.keep = (keep.len() < positions.len()).then_some(keep);
            let h = self.decoder.forward_cached(x.into_value(), &pass, &mut cache.layers, &cached)?;
            for &(id, token) in next {
                let text = cache.text(id)?;
                text.tokens += 1;
                if text.chunk > 0 {
                    text.pending.push(token);
                    if text.pending.len() == text.chunk {
                        text.pending.clear();
                    }
                }
            }
            self.last_logits(&h)
        })
    }

    /// A step of a model with slots: the rows `[1, R, D]`, which of them predict the next tokens, their positions and
    /// places. A text whose block is not full gets its token's row. Where it is full, its last token need not run: the
    /// chunk's representation takes its place, and in the adaptive model the separator follows.
    fn chunk_step(&self, cache: &mut Cache, texts: &[Text], next: &[(TextId, i64)], filled: &Filled) -> Result<Step> {
        let c = self.config();
        let open: Vec<i64> = filled.of_text.iter().zip(next).filter(|(f, _)| f.is_none()).map(|(_, n)| n.1).collect();
        let mut parts: Vec<Var> = Vec::new();
        if !open.is_empty() {
            parts.push(ops::embedding(&Tensor::ids(&open, &[1, open.len()])?, &self.wte)?);
        }
        for (&chunk, group) in &filled.groups {
            let ids = group.iter().flat_map(|&i| texts[i].pending.iter().copied().chain([next[i].1]));
            let ids = Tensor::ids(&ids.collect::<Vec<i64>>(), &[group.len(), chunk])?;
            let numbers: Vec<usize> = group.iter().map(|&i| texts[i].tokens / chunk).collect();
            let fx = self.compressed_ids(cache, &ids, &numbers)?;
            parts.push(reshape(&fx.into(), &[1, group.len(), c.decoder.dim])?);
        }
        let separator = if filled.groups.is_empty() { None } else { self.separator_rows(1)? };
        let has_separator = separator.is_some();
        parts.extend(separator);
        let all: usize = parts.iter().map(|p| p.shape()[1]).sum();
        let (mut order, mut keep, mut positions, mut seen) = (vec![], vec![], vec![], vec![]);
        let (mut token, header) = (0, if has_separator { 2 } else { 1 });
        for (text, place) in texts.iter().zip(&filled.of_text) {
            let (n, start) = (text.tokens + 1, text.rows.start);
            match place {
                None => {
                    order.push(token);
                    token += 1;
                    positions.push(rows_at(c, text.chunk, n) - n / text.chunk - 1);
                    seen.push(start..start + rows_at(c, text.chunk, n));
                }
                Some(place) => {
                    let slots = n / text.chunk + 1;
                    order.extend([open.len() + place, all - 1].into_iter().take(header));
                    positions.extend(0..header);
                    seen.extend((0..header).map(|i| start..start + slots + i));
                }
            }
            keep.push(order.len() - 1);
        }
        let x = concat(&parts.iter().collect::<Vec<_>>(), 1)?;
        let x = if order.iter().copied().eq(0..all) { x } else { ops::index_select(&x, 1, &order)? };
        Ok((x, keep, positions, CachedPass { rows: CacheRows::new(seen)?, prompt: false, layer: None }))
    }

    /// What the compressor needs for chunks of this size.
    pub(super) fn sized(&self, cache: &mut Cache, chunk: usize) -> Result<ForChunks> {
        let Some(chunks) = &self.chunks else { return Err(Error::config("a dense model has no chunks")) };
        Ok(match cache.sized.entry(chunk) {
            Entry::Occupied(known) => known.get().clone(),
            Entry::Vacant(new) => new.insert(chunks.f.sized(chunk)?).clone(),
        })
    }
    /// Chunks of any texts, ids `[R, C]`, and their numbers in their texts -> `[R, D]`.
    fn compressed_ids(&self, cache: &mut Cache, ids: &Tensor, numbers: &[usize]) -> Result<Tensor> {
        let sized = self.sized(cache, ids.dim(1))?;
        self.compressed(&sized, ids.dim(1), numbers.len(), |f, some| {
            f.embedded(&ids.narrow(0, some.start, some.len())?, &numbers[some])
        })
    }
    /// R chunks -> `[R, D]`, so many at once that their activations stay small; `embedded` is what `Compressor::embedded` gives for
    /// some of them.
    pub(super) fn compressed(
        &self,
        sized: &ForChunks,
        chunk: usize,
        r: usize,
        embedded: impl Fn(&Compressor, Range<usize>) -> Result<[Tensor; 2]>,
    ) -> Result<Tensor> {
        let Some(Chunks { f, .. }) = &self.chunks else { return Err(Error::config("a dense model has no chunks")) };
        let (row, piece) = (self.config().table_row(chunk), (COMPRESSED_AT_ONCE / chunk).max(1));
        let some = |at: usize| {
            let [tokens, place] = embedded(f, at..(at + piece).min(r))?;
            f.forward_chunks(tokens, place, row, sized)
        };
        let parts = (0..r).step_by(piece).map(some).collect::<Result<Vec<_>>>()?;
        match &parts[..] {
            [one] => Ok(one.clone()),
            _ => concat_tensors(&parts.iter().collect::<Vec<_>>(), 0),
        }
    }

    /// A step of a model whose rows are tokens.
    fn token_step(&self, texts: &[Text], next: &[(TextId, i64)], filled: &Filled) -> Result<Step> {
        let c = self.config();
        let ids: Vec<i64> = next.iter().map(|n| n.1).collect();
        let x = ops::embedding(&Tensor::ids(&ids, &[1, ids.len()])?, &self.wte)?;
        let rows = CacheRows::new(texts.iter().map(|t| t.rows.start..t.rows.start + t.tokens + 1).collect())?;
        let layer = match c.model_type {
            ModelType::CatLayer if (0..c.decoder.n_layer).any(|i| c.layer_type(i) == LayerType::Cat) => {
                let seen = |t: &Text| t.layer_rows.start..t.layer_rows.start + layer_rows_at(c, t.chunk, t.tokens + 1);
                let open = |t: &Text| t.open.start + t.tokens % t.chunk..t.open.start + t.tokens % t.chunk + 1;
                let full = filled.groups.iter().map(|(&chunk, group)| FullChunks {
                    chunk,
                    inputs: group.iter().flat_map(|&i| texts[i].open.start..texts[i].open.start + chunk).collect(),
                });
                let order = filled.of_text.iter().enumerate().map(|(i, place)| place.map_or(i, |p| texts.len() + p));
                Some(LayerPass {
                    rows: CacheRows::new(texts.iter().map(seen).collect())?,
                    kept: vec![],
                    open: CacheRows::new(texts.iter().map(open).collect())?,
                    full: full.collect(),
                    order: order.collect(),
                })
            }
            _ => None,
        };
        let positions = texts.iter().map(|t| t.tokens).collect();
        Ok((x, (0..texts.len()).collect(), positions, CachedPass { rows, prompt: false, layer }))
    }

    /// The separator for each row of a batch, `[B, 1, D]`, in models that have one.
    pub(super) fn separator_rows(&self, batch: usize) -> Result<Option<Var>> {
        let d = self.config().decoder.dim;
        self.separator().map(|s| expand(&reshape(s, &[1, 1, d])?, &[batch, 1, d])).transpose()
    }
    /// What the last block leaves, `[.., D]` -> `[rows, V]`.
    pub(super) fn last_logits(&self, h: &Tensor) -> Result<Tensor> {
        let y = fused_linear(h, self.decoder.norm.then(&self.output))?;
        y.reshape(&[y.numel() / y.last_dim().max(1), y.last_dim()])
    }
}

/// The rows of a step, those that predict the next tokens, positions, and places.
type Step = (Var, Vec<usize>, Vec<usize>, CachedPass);

/// Which texts' chunks the next token fills.
struct Filled {
    /// By chunk size, the texts.
    groups: BTreeMap<usize, Vec<usize>>,
    /// For each text, its number among all filled ones, in the order of the groups.
    of_text: Vec<Option<usize>>,
}

impl Filled {
    fn new(texts: &[Text], next: &[(TextId, i64)]) -> Self {
        let mut groups: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for (i, t) in texts.iter().enumerate() {
            if t.chunk > 0 && (t.tokens + 1) % t.chunk == 0 {
                groups.entry(t.chunk).or_default().push(i);
            }
        }
        let mut of_text = vec![None; next.len()];
        groups.values().flatten().enumerate().for_each(|(place, &i)| of_text[i] = Some(place));
        Self { groups, of_text }
    }
}

/// The rows of a sequence that decoding needs: slots, and the rows after the last of them.
fn kept_rows(plan: &ChunkPlan) -> Vec<usize> {
    let slots = plan.slots();
    let after = slots.last().map_or(0, |s| s + 1);
    slots.into_iter().chain(after..plan.len()).collect()
}

fn distinct(op: &'static str, texts: impl Iterator<Item = TextId>) -> Result<()> {
    let mut all: Vec<TextId> = texts.collect();
    all.sort_unstable();
    match all.windows(2).find(|w| w[0] == w[1]) {
        Some(w) => Err(Error::shape(op, format!("{:?} occurs twice: one row a text", w[0]))),
        None => Ok(()),
    }
}
