//! Steps of decoding that a device takes by itself: as long as no chunk fills up, a step needs nothing from main memory, not
//! even the token of the step before, and can be submitted again and again as one captured graph.

use super::cache::{Cache, Text, TextId, layer_rows_at, rows_at};
use super::cat::Cat;
use super::config::ModelType;
use super::kv_cache::{CachedPass, LayerPass};
use super::layers::Pass;
use super::plan::ChunkPlan;
use crate::autograd::no_grad;
use crate::cuda::{Replay, Workspace};
pub(crate) use crate::ops::cuda::advance::MOST_STEPS;
use crate::ops::cuda::advance::{StepRow, Steps};
use crate::ops::{Mask, RopeTable, Sampling};
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
    workspace: Workspace,
    graph: Option<Replay>,
    /// What cannot be captured is submitted kernel by kernel.
    plain: bool,
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
    /// Steps that a text can take before the one that fills its chunk.
    pub(crate) fn open_steps(&self, cache: &mut Cache, id: TextId) -> Result<usize> {
        let text = cache.text(id)?;
        Ok(if text.chunk == 0 { MOST_STEPS } else { text.chunk - 1 - text.tokens % text.chunk })
    }

    /// Submit `n` steps of some texts, none of which fills a chunk, after which each has `n` new tokens, one more with
    /// [`First::Logits`]: see [`Ahead::tokens`]. The cache's texts count them only once [`Cache::landed`] is told.
    pub(crate) fn run_ahead(
        &self,
        cache: &mut Cache,
        before: Option<Ahead>,
        rows: &[AheadRow],
        (first, n, limit, graphs): (First, usize, usize, bool),
    ) -> Result<Ahead> {
        let (mut told, mut room, mut positions) = (Vec::with_capacity(rows.len()), Room::default(), 0);
        for (i, r) in rows.iter().enumerate() {
            let text = cache.text(r.text)?;
            let last = text.tokens + n.max(1);
            let need = self.cache_size(Some(text.chunk).filter(|c| *c > 0), last, last);
            if text.tokens == 0 || n > 0 && !cache.text(r.text)?.size().fits(need?) {
                return Err(Error::shape("run_ahead", format!("{n} steps have no room in the cache")));
            }
            let text = cache.text(r.text)?;
            room = room.with(text);
            let mut row = self.step_row(text, r);
            positions = positions.max(row.position + n).max(row.inside + n);
            if let First::Known(ids) = &first {
                row.newest = ids[i];
            }
            told.push(row);
        }
        no_grad(|| {
            cache.rope(self, &[positions])?;
            let table = cache.rope_table().clone();
            let greedy = told.iter().all(StepRow::is_greedy);
            let fits = |a: &Ahead| {
                let same = a.steps.len() == rows.len() && a.greedy == greedy && a.limit == limit && a.table.is(&table);
                same && (0..3).all(|i| room.most[i] <= a.room.most[i])
            };
            let mut ahead = match before.filter(fits) {
                Some(ahead) => ahead,
                None => Ahead {
                    steps: Steps::new(rows.len(), self.device())?,
                    greedy,
                    limit,
                    workspace: Workspace::new(self.output.value().gpu()?),
                    graph: None,
                    plain: false,
                    table,
                    room,
                },
            };
            ahead.room.least = room.least;
            ahead.steps.set(&told, matches!(first, First::Logits(_)))?;
            if let First::Logits(logits) = first {
                ahead.steps.choose(&logits, limit, greedy)?;
            }
            for done in 0..n {
                if let Some(graph) = &mut ahead.graph {
                    graph.submit()?;
                    continue;
                }
                let Ahead { workspace, steps, table, room, .. } = &mut ahead;
                workspace.run(|| self.open_step(cache, *room, steps, table, (limit, greedy)))?;
                if graphs && !ahead.plain && n - done > WORTH {
                    self.capture(cache, &mut ahead);
                }
            }
            Ok(ahead)
        })
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

    /// Capture a step, which has run in the workspace once.
    fn capture(&self, cache: &mut Cache, ahead: &mut Ahead) {
        let Ahead { workspace, steps, table, room, greedy, limit, .. } = ahead;
        // SAFETY: a step works on weights, cache, rope table and `steps`, whose storage stays where it is: `ahead` holds the
        // table and the steps, and who submits the graph does so for this model and this cache.
        let graph = unsafe { workspace.capture(|| self.open_step(cache, *room, steps, table, (*limit, *greedy))) };
        match graph {
            Ok(graph) => ahead.graph = Some(graph),
            Err(e) => {
                tracing::warn!("a step of decoding cannot be captured, so its kernels are submitted one by one: {e}");
                ahead.plain = true;
            }
        }
    }

    /// What a text reads in its next step, which does not fill its chunk.
    fn step_row(&self, text: &Text, r: &AheadRow) -> StepRow {
        let (c, n) = (self.config(), text.tokens + 1);
        let rows = rows_at(c, text.chunk, n);
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
            position: if self.chunks.is_some() { rows - n / text.chunk - 1 } else { text.tokens },
            inside: if c.model_type == ModelType::CatLayer { n % text.chunk } else { 0 },
            newest: 0,
            how: r.how,
            key: r.key,
            number: r.number,
        }
    }
}

impl Ahead {
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
        if text.chunk > 0 {
            text.pending.extend(read);
        }
        Ok(())
    }
}
