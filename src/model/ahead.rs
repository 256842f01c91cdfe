//! Steps of decoding that a device takes by itself: as long as no chunk fills up, or all do in the same step, a step needs nothing
//! from main memory, not even the token of the step before, and can be submitted again and again as one captured graph.

use super::cache::{Cache, Text, TextId, layer_rows_at, rows_at};
use super::cat::Cat;
use super::compressor::ForChunks;
use super::config::ModelType;
use super::kv_cache::{CachedPass, LayerPass};
use super::layers::Pass;
use super::plan::ChunkPlan;
use crate::autograd::no_grad;
use crate::cuda::{Needs, Replay, Workspace, noted};
pub(crate) use crate::ops::cuda::advance::MOST_STEPS;
use crate::ops::cuda::advance::{Chunking, StepRow, Steps};
use crate::ops::{Mask, RopeTable, Sampling, concat_tensors};
use crate::tensor::Tensor;
use crate::{Error, Result};

/// A text that takes steps, and how its tokens are chosen.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AheadRow {
    pub text: TextId,
    pub how: Sampling,
    /// Of its uniforms, and the number of the next.
    pub key: u64,
    pub number: usize,
}

/// Where the first token of a run comes from.
pub(crate) enum First {
    /// These are known, and the next to be read.
    Known(Vec<i64>),
    /// It is chosen from these logits, `[R, V]`.
    Logits(Tensor),
}

/// Steps of some rows under way, and what the next can use of them.
#[derive(Debug)]
pub(crate) struct Ahead {
    steps: Steps,
    greedy: bool,
    limit: usize,
    table: RopeTable,
    room: Room,
    /// Of all kinds of steps that ran.
    workspace: Option<Workspace>,
    /// What cannot be captured is submitted kernel by kernel.
    plain: bool,
    open: Work,
    /// What fills chunks, where all rows do so in the same steps.
    fill: Option<(Fill, Work)>,
}

/// What steps that fill chunks need beside.
#[derive(Debug)]
struct Fill {
    sized: ForChunks,
    /// Angles of the new rows, `header` a text.
    rope: RopeTable,
}

/// A kind of step.
#[derive(Debug, Default)]
struct Work {
    /// What memory it takes, once it ran.
    needs: Option<Needs>,
    graph: Option<Replay>,
}

/// Of the three kinds of cache rows (`Steps::cache_rows`), the most that a row may ever see, on which launches depend, and
/// the least that caches hold.
#[derive(Clone, Copy, Debug, Default)]
struct Room {
    most: [usize; 3],
    least: [usize; 3],
}

impl Room {
    /// With a text's.
    fn with(self, text: &Text) -> Self {
        let runs = [&text.rows, &text.layer_rows, &text.open];
        Self {
            most: std::array::from_fn(|i| self.most[i].max(runs[i].len())),
            least: std::array::from_fn(|i| self.least[i].max(runs[i].end)),
        }
    }
}

/// Runs shorter than this are not worth a capture.
const WORTH: usize = 4;

impl Cat {
    /// Steps that texts can take together in a run: none that fills a chunk, unless all do so in the same step.
    pub(crate) fn steps_ahead(&self, cache: &mut Cache, texts: &[TextId]) -> Result<usize> {
        if self.chunking(cache, texts)?.is_some() {
            return Ok(MOST_STEPS);
        }
        let mut least = MOST_STEPS;
        for &id in texts {
            let text = cache.text(id)?;
            least = least.min(text.tokens.checked_rem(text.chunk).map_or(MOST_STEPS, |tail| text.chunk - 1 - tail));
        }
        Ok(least)
    }
    /// How these texts fill chunks, if all do so in the same steps, of a model with slots.
    fn chunking(&self, cache: &mut Cache, texts: &[TextId]) -> Result<Option<Chunking>> {
        let (Some(_), Some(&first)) = (&self.chunks, texts.first()) else { return Ok(None) };
        let (chunk, tokens) = cache.text(first).map(|t| (t.chunk, t.tokens))?;
        for &id in texts {
            let text = cache.text(id)?;
            if chunk == 0 || text.chunk != chunk || text.tokens % chunk != tokens % chunk {
                return Ok(None);
            }
        }
        Ok(Some(Chunking { chunk, header: if self.separator().is_some() { 2 } else { 1 } }))
    }

    /// Submit `n` steps of some texts, no more than [`Cat::steps_ahead`], after which each has `n` new tokens, one more with
    /// [`First::Logits`]: see [`Ahead::tokens`]. The cache's texts count them only once [`Cache::landed`] is told.
    pub(crate) fn run_ahead(
        &self,
        cache: &mut Cache,
        before: Option<Ahead>,
        rows: &[AheadRow],
        (first, n, limit, graphs): (First, usize, usize, bool),
    ) -> Result<Ahead> {
        let (mut told, mut room, mut positions) = (Vec::with_capacity(rows.len()), Room::default(), 0);
        let chunking = self.chunking(cache, &rows.iter().map(|r| r.text).collect::<Vec<_>>())?;
        let mut tail = 0;
        for (i, r) in rows.iter().enumerate() {
            let text = cache.text(r.text)?;
            let last = text.tokens + n.max(1);
            tail = text.pending.len();
            let need = self.cache_size(Some(text.chunk).filter(|c| *c > 0), text.tokens + 1, last);
            if text.tokens == 0 || n > 0 && !cache.text(r.text)?.size().fits(need?) {
                return Err(Error::shape("run_ahead", format!("{n} steps have no room in the cache")));
            }
            let text = cache.text(r.text)?;
            room = room.with(text);
            let mut row = self.step_row(text, r);
            let last = chunking.map_or(row.position + n, |c| c.header + c.chunk);
            positions = positions.max(last).max(row.inside + n);
            if let First::Known(ids) = &first {
                row.newest = ids[i];
            }
            told.push(row);
        }
        no_grad(|| {
            cache.rope(self, &[positions])?;
            let table = cache.rope_table().clone();
            let greedy = told.iter().all(StepRow::is_greedy);
            let sized = chunking.map(|c| self.sized(cache, c.chunk)).transpose()?;
            let fits = |a: &Ahead| {
                let same = a.steps.len() == rows.len() && a.greedy == greedy && a.limit == limit && a.table.is(&table);
                let fills = match (&a.fill, &sized) {
                    (Some((fill, _)), Some(sized)) => fill.sized.rope.is(&sized.rope),
                    (fill, sized) => fill.is_none() && sized.is_none(),
                };
                same && fills && (0..3).all(|i| room.most[i] <= a.room.most[i])
            };
            let mut ahead = match before.filter(fits) {
                Some(ahead) => ahead,
                None => {
                    let fill = |(sized, c): (ForChunks, Chunking)| -> Result<_> {
                        let positions: Vec<usize> = (0..rows.len()).flat_map(|_| 0..c.header).collect();
                        Ok((Fill { sized, rope: table.select(&positions)? }, Work::default()))
                    };
                    Ahead {
                        steps: Steps::new(rows.len(), chunking, self.device())?,
                        greedy,
                        limit,
                        workspace: None,
                        plain: false,
                        open: Work::default(),
                        fill: sized.zip(chunking).map(fill).transpose()?,
                        table,
                        room,
                    }
                }
            };
            ahead.room.least = room.least;
            ahead.steps.set(&told, matches!(first, First::Logits(_)))?;
            if let First::Logits(logits) = first {
                ahead.steps.choose(&logits, limit, greedy)?;
            }
            for done in 0..n {
                let fills = chunking.is_some_and(|c| (tail + done + 1) % c.chunk == 0);
                self.submit(cache, &mut ahead, fills, graphs && (fills || n - done > WORTH))?;
            }
            Ok(ahead)
        })
    }

    /// Submit a step; where its kind ran before, it is captured if that is `wanted`.
    fn submit(&self, cache: &mut Cache, ahead: &mut Ahead, fills: bool, wanted: bool) -> Result<()> {
        if ahead.works().nth(usize::from(fills)).is_some_and(|w| w.needs.is_none()) {
            // What it needs joins what others do, so those are captured again. Meanwhile nothing is held for them.
            if ahead.works().any(|w| w.graph.is_some()) {
                self.output.value().gpu()?.synchronize()?;
            }
            ahead.forget_graphs();
        } else if wanted && !ahead.plain && ahead.workspace.is_none() {
            let needs: Vec<&Needs> = ahead.works().filter_map(|w| w.needs.as_ref()).collect();
            match Workspace::new(self.output.value().gpu()?, &needs) {
                Ok(workspace) => ahead.workspace = Some(workspace),
                Err(e) => ahead.give_up(&e),
            }
        }
        let Ahead { steps, greedy, limit, table, room, workspace, plain, open, fill } = &mut *ahead;
        let (room, how) = (*room, (*limit, *greedy));
        let (fill, work) = match fill {
            Some((fill, work)) if fills => (Some(&*fill), work),
            _ => (None, open),
        };
        let mut step = || match fill {
            Some(fill) => self.filling_step(cache, room, steps, fill, how),
            None => self.open_step(cache, room, steps, table, how),
        };
        let mut refused = None;
        if let (Work { needs: Some(needs), graph: graph @ None }, Some(workspace)) = (&mut *work, workspace)
            && wanted
            && !*plain
        {
            // SAFETY: a step works on weights, cache, rope tables and `steps`, whose storage stays where it is: `ahead` holds the
            // tables, what is computed of weights for a chunk size, and the steps; and who submits the graph does so for this model
            // and this cache.
            match unsafe { workspace.capture(needs, &mut step) } {
                Ok(captured) => *graph = Some(captured),
                Err(e) => refused = Some(e),
            }
        }
        let submitted = match &mut work.graph {
            Some(graph) => graph.submit(),
            None => noted(step).map(|needs| {
                work.needs.get_or_insert(needs);
            }),
        };
        if let Some(e) = refused {
            ahead.give_up(&e);
        }
        submitted
    }

    /// A step by what `steps` says.
    fn open_step(
        &self,
        cache: &mut Cache,
        room: Room,
        steps: &mut Steps,
        table: &RopeTable,
        (limit, greedy): (usize, bool),
    ) -> Result<()> {
        let ([rows, layer_rows, open], [rope, inside]) = (steps.cache_rows(room.most, room.least)?, steps.rope(table)?);
        let mut pass = Pass::new(rope, Mask::Causal);
        let layer = (self.config().model_type == ModelType::CatLayer).then(|| {
            pass.layer_plan = Some((ChunkPlan { chunk: 1, header: 1, tokens: 1 }, inside));
            LayerPass { rows: layer_rows, kept: vec![], open, full: vec![], order: vec![] }
        });
        let x = steps.embedding(self.wte.value())?;
        let cached = CachedPass { rows, prompt: false, layer };
        let h = self.decoder.forward_cached(x, &pass, &mut cache.layers, &cached)?;
        steps.choose(&self.last_logits(&h)?, limit, greedy)
    }

    /// A step in which every text's chunk fills up: its last token need not run, as in `chunk_step`.
    fn filling_step(
        &self,
        cache: &mut Cache,
        room: Room,
        steps: &mut Steps,
        fill: &Fill,
        (limit, greedy): (usize, bool),
    ) -> Result<()> {
        let rows = steps.fill(room.most[0], room.least[0])?;
        let (r, header) = (steps.len(), rows.len() / steps.len());
        let chunk = steps.chunking().map_or(0, |c| c.chunk);
        let fx = self.compressed(&fill.sized, chunk, r, |f, some| {
            let [ids, places] = f.tables();
            Ok([steps.block_embedding(ids, some.clone())?, steps.chunk_embedding(places, some)?])
        })?;
        let d = fx.dim(1);
        let x = match self.separator_rows(r)? {
            Some(separator) => {
                let both = concat_tensors(&[&fx.reshape(&[r, 1, d])?, separator.value()], 1)?;
                drop(fx);
                both.reshape(&[1, header * r, d])?
            }
            None => {
                let x = fx.reshape(&[1, header * r, d])?;
                drop(fx);
                x
            }
        };
        let mut pass = Pass::new(fill.rope.clone(), Mask::Causal);
        pass.keep = (header > 1).then(|| (0..r).map(|i| header * i + header - 1).collect());
        let cached = CachedPass { rows, prompt: false, layer: None };
        let h = self.decoder.forward_cached(x, &pass, &mut cache.layers, &cached)?;
        steps.choose(&self.last_logits(&h)?, limit, greedy)
    }

    /// What a text reads in its next step.
    fn step_row(&self, text: &Text, r: &AheadRow) -> StepRow {
        let (c, n) = (self.config(), text.tokens + 1);
        // as if its chunk went on, where it is the row of the chunk's last token
        let rows = rows_at(c, text.chunk, text.tokens) + 1;
        let within = |start: usize, from: usize, to: usize| start + from..start + to;
        let (layer, at) = match c.model_type {
            ModelType::CatLayer => (layer_rows_at(c, text.chunk, n), text.tokens % text.chunk),
            _ => (1, 0),
        };
        StepRow {
            rows: within(text.rows.start, 0, rows),
            layer_rows: within(text.layer_rows.start, 0, layer),
            open: within(text.open.start, at, at + 1),
            // slots take positions of their own
            position: if self.chunks.is_some() { rows - text.tokens / text.chunk - 1 } else { text.tokens },
            inside: if c.model_type == ModelType::CatLayer { n % text.chunk } else { 0 },
            newest: 0,
            block: text.pending.clone(),
            how: r.how,
            key: r.key,
            number: r.number,
        }
    }
}

impl Ahead {
    /// Of steps inside a chunk, and of those that fill one.
    fn works(&self) -> impl Iterator<Item = &Work> {
        std::iter::once(&self.open).chain(self.fill.iter().map(|(_, work)| work))
    }
    fn forget_graphs(&mut self) {
        self.open.graph = None;
        if let Some((_, work)) = &mut self.fill {
            work.graph = None;
        }
        self.workspace = None;
    }
    /// Capture nothing any more.
    fn give_up(&mut self, e: &Error) {
        tracing::warn!("a step of decoding cannot be captured, so its kernels are submitted one by one: {e}");
        self.plain = true;
        if self.works().all(|w| w.graph.is_none()) {
            self.workspace = None;
        }
    }
    /// The new tokens of a run, `[n, R]`, n counting one more step with [`First::Logits`]; waits for them.
    pub fn tokens(&self, n: usize) -> Result<Vec<i64>> {
        self.steps.tokens(n)
    }
}

impl Cache {
    /// Count tokens that a text has read in a run.
    pub(crate) fn landed(&mut self, id: TextId, read: &[i64]) -> Result<()> {
        let text = self.text(id)?;
        text.tokens += read.len();
        if let Some(tail) = text.tokens.checked_rem(text.chunk) {
            text.pending.extend(read);
            text.pending.drain(..text.pending.len() - tail);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{CacheFormat, ModelConfig, Prompt, TransformerConfig};

    /// Results cannot show whether steps are captured: this does.
    #[test]
    fn all_kinds_of_steps_are_captured() {
        let Some(cuda) = crate::devices::cuda() else { return };
        for model_type in [ModelType::CatAdaptive, ModelType::Cat, ModelType::Transformer] {
            let chunked = model_type != ModelType::Transformer;
            let config = ModelConfig {
                model_type,
                chunk_size: chunked.then_some(4),
                compressor: chunked.then(|| TransformerConfig::new(64, 1, 1, true)),
                ..ModelConfig::dense(256, 64, TransformerConfig::new(64, 1, 2, true))
            };
            let m = Cat::new(config, 3).unwrap().to_device(cuda).unwrap();
            let size = m.cache_size(None, 6, 60).unwrap();
            let mut cache = m.cache(size + size, CacheFormat::Plain).unwrap();
            let texts = [cache.reserve(size).unwrap(), cache.reserve(size).unwrap()];
            let prompts = texts.map(|text| Prompt { text, ids: &[1, 2, 3, 4, 5, 6], chunk_size: None });
            m.prefill(&mut cache, &prompts).unwrap();
            let rows = texts.map(|text| AheadRow { text, how: Sampling::default(), key: 0, number: 0 });
            let n = m.steps_ahead(&mut cache, &texts).unwrap();
            assert_eq!(n, MOST_STEPS);
            let ahead = m.run_ahead(&mut cache, None, &rows, (First::Known(vec![7, 8]), n, 256, true)).unwrap();
            assert_eq!(ahead.tokens(n).unwrap().len(), 2 * n);
            assert_eq!(ahead.works().count(), if chunked { 2 } else { 1 });
            assert!(!ahead.plain && ahead.works().all(|w| w.graph.is_some()), "{model_type:?}: {ahead:?}");
        }
    }
}
