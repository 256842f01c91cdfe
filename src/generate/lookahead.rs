//! Runs of tokens that a device chooses by itself, and that are handed out afterwards turn by turn: while they are, the next
//! run is under way. What comes of a request is what it would be token by token: a text that ends inside a run, or goes over
//! to another chunk size, loses what was chosen past that.

use super::generation::Generation;
use crate::Result;
use std::collections::VecDeque;

/// How tokens follow one another on a CUDA device. The tokens are the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Decoding {
    /// Runs of steps without a word from main memory, to where the chunks of some texts fill up and not those of all; each step
    /// one captured graph.
    #[default]
    Graphs,
    /// The same runs, kernel by kernel.
    Runs,
    /// Token by token: each is known in main memory before the next step begins.
    Single,
}

impl std::str::FromStr for Decoding {
    type Err = crate::Error;
    fn from_str(s: &str) -> Result<Self> {
        match s {
            "graphs" => Ok(Self::Graphs),
            "runs" => Ok(Self::Runs),
            "single" => Ok(Self::Single),
            _ => Err(crate::Error::Usage(format!("unknown decoding '{s}': use graphs, runs or single"))),
        }
    }
}

/// What was chosen and not handed out yet.
#[derive(Debug, Default)]
pub(super) struct Lookahead {
    /// By turn, requests and their tokens; no turn is empty.
    pub turns: VecDeque<Vec<(usize, i64)>>,
    #[cfg(feature = "cuda")]
    runs: runs::Runs,
}

impl Lookahead {
    /// Drop what was chosen for a request.
    pub fn forget(&mut self, row: usize) {
        self.turns.iter_mut().for_each(|t| t.retain(|(r, _)| *r != row));
        self.turns.retain(|t| !t.is_empty());
        #[cfg(feature = "cuda")]
        self.runs.forget(row);
    }
}

#[cfg(not(feature = "cuda"))]
impl Generation {
    pub(super) fn land(&mut self) -> Result<()> {
        Ok(())
    }
    pub(super) fn run_ahead(&mut self, _: &[usize], _: usize, _: Vec<i64>) -> Result<bool> {
        Ok(false)
    }
}

#[cfg(feature = "cuda")]
mod runs {
    use super::{Decoding, Generation};
    use crate::model::{Ahead, AheadRow, First, MOST_STEPS, TextId};
    use crate::random;
    use crate::tensor::Device;
    use crate::{Error, Result};

    #[derive(Debug, Default)]
    pub struct Runs {
        under_way: Option<Run>,
        /// What the last run left for the next.
        kept: Option<Ahead>,
    }

    /// A run under way.
    #[derive(Debug)]
    struct Run {
        /// By column, requests that still want their tokens.
        rows: Vec<Option<(usize, TextId)>>,
        /// The tokens that its first step reads, if they were known.
        newest: Option<Vec<i64>>,
        /// New tokens of each.
        tokens: usize,
        ahead: Ahead,
    }

    impl Runs {
        pub fn forget(&mut self, row: usize) {
            let rows = self.under_way.iter_mut().flat_map(|r| &mut r.rows);
            rows.filter(|r| r.is_some_and(|r| r.0 == row)).for_each(|r| *r = None);
        }
    }

    impl Generation {
        /// Submit a run of some requests, to be followed by [`Generation::land`]; false where it takes the way of single
        /// steps. `lag` tokens of each are chosen and not handed out, the last of them or of all is `newest`.
        pub(in super::super) fn run_ahead(&mut self, rows: &[usize], lag: usize, newest: Vec<i64>) -> Result<bool> {
            let (model, how) = (&self.generator.model, self.generator.options.decoding);
            if !matches!(model.device(), Device::Cuda(_)) || how == Decoding::Single {
                return Ok(false);
            }
            let (mut left, mut next) = (MOST_STEPS, Vec::with_capacity(rows.len()));
            let mut columns = Vec::with_capacity(rows.len());
            for (&r, &id) in rows.iter().zip(&newest) {
                let row = &self.rows[r];
                let q = &row.request;
                if q.logprobs.is_some() || q.sampling.repetition_penalty != 1.0 {
                    return Ok(false);
                }
                let change = q.chunk_changes.get(row.changes).map_or(usize::MAX, |c| c.0);
                left = left.min(q.max_new_tokens.min(change).saturating_sub(row.produced + lag));
                let text = row.text.ok_or_else(|| Error::config("a text that runs has no room in the cache"))?;
                next.push((text, id));
                let (key, number) = (random::subkey(q.seed, 0), row.produced + lag);
                columns.push(AheadRow { text, how: q.sampling, key, number });
            }
            if left == 0 || rows.is_empty() {
                return Ok(false);
            }
            let texts: Vec<TextId> = next.iter().map(|n| n.0).collect();
            let steps = model.steps_ahead(&mut self.cache, &texts)?.min(left);
            let (first, steps, tokens) = if steps > 0 {
                (First::Known(newest.clone()), steps, steps)
            } else {
                // a step that fills the chunks of some has to be told
                let logits = model.step(&mut self.cache, &next)?;
                let steps = model.steps_ahead(&mut self.cache, &texts)?.min(left - 1);
                (First::Logits(logits), steps, steps + 1)
            };
            let known = matches!(first, First::Known(_));
            let limit = self.generator.limit();
            let kept = self.ahead.runs.kept.take();
            let run = (first, steps, limit, how == Decoding::Graphs);
            let ahead = model.run_ahead(&mut self.cache, kept, &columns, run)?;
            let rows = rows.iter().zip(next).map(|(&r, (text, _))| Some((r, text))).collect();
            self.ahead.runs.under_way = Some(Run { rows, newest: known.then_some(newest), tokens, ahead });
            Ok(true)
        }

        /// Take in the tokens of a run under way, if none are left to hand out, and let the next follow.
        pub(in super::super) fn land(&mut self) -> Result<()> {
            if !self.ahead.turns.is_empty() {
                return Ok(());
            }
            let Some(run) = self.ahead.runs.under_way.take() else { return Ok(()) };
            let (all, columns) = (run.ahead.tokens(run.tokens)?, run.rows.len());
            self.ahead.runs.kept = Some(run.ahead);
            let (mut rows, mut newest, mut goes_on) = (vec![], vec![], self.waiting.is_empty());
            for (column, &(row, text)) in run.rows.iter().enumerate().filter_map(|(i, r)| Some((i, r.as_ref()?))) {
                let mine: Vec<i64> = all[column..].iter().step_by(columns).copied().collect();
                let first = run.newest.iter().map(|ids| ids[column]);
                let read = run.tokens - 1 + first.len();
                self.cache.landed(text, &first.chain(mine.iter().copied()).take(read).collect::<Vec<_>>())?;
                goes_on &= !mine.iter().any(|id| self.rows[row].request.stop_tokens.contains(id)) && !self.rows[row].unread;
                newest.extend(mine.last());
                rows.push(row);
            }
            if rows.is_empty() {
                return Ok(());
            }
            for step in all.chunks_exact(columns) {
                let alive = run.rows.iter().zip(step).filter_map(|(r, &id)| Some(((*r)?.0, id)));
                self.ahead.turns.push_back(alive.collect());
            }
            if goes_on && rows.len() == self.running.len() {
                self.run_ahead(&rows, run.tokens, newest)?;
            }
            Ok(())
        }
    }
}
