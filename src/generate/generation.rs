//! Serving requests: who runs, who waits, and a turn of all that run.

use super::generator::{Generator, MemoryPlan};
use super::lookahead::Lookahead;
use super::request::{Event, Finish, Request};
use super::text::TextStream;
use crate::model::{Cache, CacheSize, Prompt, TextId};
use crate::ops::{Draw, LogProbs, log_probs, sample};
use crate::random;
use crate::tensor::{Device, Tensor};
use crate::{Error, Result};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// An iterator over the tokens of requests as they are chosen: at each turn one of every text that runs. After an error
/// nothing more comes.
#[derive(Debug)]
pub struct Generation {
    pub(super) generator: Generator,
    pub(super) cache: Cache,
    size: CacheSize,
    plan: MemoryPlan,
    pub(super) rows: Vec<Row>,
    /// Requests that wait, in the order of asking.
    pub(super) waiting: VecDeque<usize>,
    /// Requests that run.
    pub(super) running: Vec<usize>,
    /// Tokens of those that run that are chosen and not handed out.
    pub(super) ahead: Lookahead,
    events: VecDeque<Event>,
    begun: Instant,
    stats: Stats,
}

/// What a generation has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stats {
    /// Tokens of prompts read, those included that were read again at another chunk size.
    pub prompt_tokens: usize,
    /// Tokens chosen.
    pub new_tokens: usize,
    /// Those of the first turn among them, which come with the first token.
    pub first_tokens: usize,
    /// From the start to the first token.
    pub first_token: Option<Duration>,
    /// From the start to the latest token.
    pub last_token: Option<Duration>,
}

impl Stats {
    /// Tokens a second after the first turn's.
    pub fn tokens_per_second(&self) -> f64 {
        match (self.first_token, self.last_token) {
            (Some(a), Some(b)) if b > a => (self.new_tokens - self.first_tokens) as f64 / (b - a).as_secs_f64(),
            _ => 0.0,
        }
    }
}

/// How far a request has come.
#[derive(Debug)]
pub(super) struct Row {
    pub request: Request,
    /// The prompt and the new tokens.
    ids: Vec<i64>,
    pub produced: usize,
    chunk_size: Option<usize>,
    /// Changes of the chunk size made so far, of those the request names.
    pub changes: usize,
    need: CacheSize,
    pub text: Option<TextId>,
    /// Its text has to be read from the beginning.
    pub unread: bool,
    /// Ids that occurred, a bit each, where there is a repetition penalty.
    seen: Vec<u64>,
    stream: Option<TextStream>,
}

impl Row {
    fn new(generator: &Generator, request: Request) -> Result<Self> {
        let mut row = Self {
            need: request.cache_size(&generator.model)?,
            ids: request.prompt.clone(),
            produced: 0,
            chunk_size: request.chunk_size,
            changes: 0,
            text: None,
            unread: true,
            seen: vec![],
            stream: generator.tokenizer.as_ref().map(|t| TextStream::new(t, &request.stop_strings)),
            request,
        };
        if row.request.sampling.repetition_penalty != 1.0 {
            row.seen = vec![0; generator.model.config().vocab_rows().div_ceil(64)];
            row.ids.clone().into_iter().for_each(|id| row.see(id));
        }
        Ok(row)
    }
    fn see(&mut self, id: i64) {
        if let Some(word) = self.seen.get_mut(id as usize / 64) {
            *word |= 1 << (id % 64);
        }
    }
    fn draw(&self) -> Draw<'_> {
        let key = random::subkey(self.request.seed, 0);
        Draw { how: self.request.sampling, uniform: random::uniform_at(key, self.produced as u64), seen: &self.seen }
    }
    /// Take in a token: what is told of it.
    fn take(&mut self, row: usize, token: i64, logprobs: Option<LogProbs>) -> Result<Event> {
        self.produced += 1;
        self.ids.push(token);
        self.see(token);
        let mut event = Event { row, token, text: String::new(), logprobs, finish: None };
        if self.request.stop_tokens.contains(&token) {
            event.finish = Some(Finish::StopToken);
        } else if let Some(stream) = &mut self.stream {
            let (text, stopped) = stream.push(token)?;
            (event.text, event.finish) = (text, stopped.then_some(Finish::StopString));
        }
        if event.finish.is_none() && self.produced >= self.request.max_new_tokens {
            event.finish = Some(Finish::Length);
        }
        if matches!(event.finish, Some(Finish::StopToken | Finish::Length))
            && let Some(stream) = &mut self.stream
        {
            let (text, stopped) = stream.finish()?;
            event.text.push_str(&text);
            if stopped {
                event.finish = Some(Finish::StopString);
            }
        }
        Ok(event)
    }
    /// Make a change of the chunk size that is due.
    fn change_chunk_size(&mut self) {
        while let Some(&(_, chunk)) = self.request.chunk_changes.get(self.changes).filter(|c| c.0 <= self.produced) {
            self.changes += 1;
            self.unread |= self.chunk_size != Some(chunk);
            self.chunk_size = Some(chunk);
        }
    }
}

impl Generation {
    pub(super) fn new(generator: &Generator, requests: Vec<Request>) -> Result<Self> {
        let begun = Instant::now();
        let (size, plan) = generator.sized(&requests)?;
        let rows: Vec<Row> = requests.into_iter().map(|r| Row::new(generator, r)).collect::<Result<_>>()?;
        Ok(Self {
            cache: generator.model.cache(size, generator.options.cache)?,
            generator: generator.clone(),
            size,
            plan,
            waiting: (0..rows.len()).filter(|&r| rows[r].request.max_new_tokens > 0).collect(),
            rows,
            running: vec![],
            ahead: Lookahead::default(),
            events: VecDeque::new(),
            begun,
            stats: Stats::default(),
        })
    }
    /// One more request, which begins as soon as there is room; its number. Errors, and changes nothing, if it is wrong or
    /// can never fit into the cache, whose size was settled at the start.
    pub fn push(&mut self, request: Request) -> Result<usize> {
        self.generator.check(std::slice::from_ref(&request))?;
        let row = Row::new(&self.generator, request)?;
        if !self.size.fits(row.need) {
            return Err(self.no_room(row.need));
        }
        if row.request.max_new_tokens > 0 {
            self.waiting.push_back(self.rows.len());
        }
        self.rows.push(row);
        Ok(self.rows.len() - 1)
    }
    /// End a request now, whether it runs or waits; others go on. Its later events do not come.
    pub fn cancel(&mut self, row: usize) {
        self.waiting.retain(|&r| r != row);
        self.events.retain(|e| e.row != row);
        self.leave(row);
    }
    /// Go over to another chunk size from the next token on: all chunks so far are compressed again. Smaller chunks need
    /// more of the cache; errors, and changes nothing, where it has no room for that now. No error for one that has ended.
    pub fn set_chunk_size(&mut self, row: usize, chunk_size: usize) -> Result<()> {
        let model = &self.generator.model;
        model.config().resolve_chunk_size(Some(chunk_size))?;
        let Some(state) = self.rows.get(row) else {
            return Err(Error::Usage(format!("there is no request {row}")));
        };
        if state.text.is_none() && !self.waiting.contains(&row) {
            return Ok(());
        }
        let need = model.cache_size(Some(chunk_size), state.ids.len(), state.request.longest())?;
        let need = if state.request.chunk_changes.is_empty() { need } else { need.max(state.need) };
        if let Some(text) = state.text {
            if !self.cache.size(text).fits(need) {
                let held = self.cache.size(text);
                self.cache.free(text);
                let moved = self.cache.reserve(need);
                let state = &mut self.rows[row];
                // whichever it is, the text has to be read again
                state.unread = true;
                state.text = moved.or_else(|| self.cache.reserve(held));
                if moved.is_none() {
                    self.ahead.forget(row);
                    return Err(self.no_room(need));
                }
            }
        } else if !self.size.fits(need) {
            return Err(self.no_room(need));
        }
        let state = &mut self.rows[row];
        state.unread |= state.chunk_size != Some(chunk_size);
        (state.chunk_size, state.need) = (Some(chunk_size), need);
        if state.unread {
            self.ahead.forget(row);
        }
        Ok(())
    }
    /// What it holds.
    pub fn memory(&self) -> MemoryPlan {
        self.plan
    }
    /// What it has done so far.
    pub fn stats(&self) -> Stats {
        self.stats
    }
    /// Numbers of the requests that run now.
    pub fn running(&self) -> &[usize] {
        &self.running
    }

    fn no_room(&self, need: CacheSize) -> Error {
        let (need, all) = (self.generator.cache_bytes(need), self.plan.cache_bytes);
        Error::Usage(format!(
            "this needs {need} bytes of a cache of {all}, which has no such room: wait for others to end, or start with more"
        ))
    }
    fn leave(&mut self, row: usize) {
        self.running.retain(|&r| r != row);
        self.ahead.forget(row);
        if let Some(text) = self.rows.get_mut(row).and_then(|r| r.text.take()) {
            self.cache.free(text);
        }
    }

    /// The next token of every text that runs, once those that wait and have room have joined.
    fn turn(&mut self) -> Result<()> {
        self.land()?;
        if let Some(turn) = self.ahead.turns.pop_front() {
            return self.take(turn.into_iter().map(|(row, id)| (row, id, None)).collect());
        }
        let most = self.generator.options.max_batch.unwrap_or(usize::MAX);
        while self.running.len() < most
            && let Some(&row) = self.waiting.front()
            && let Some(text) = self.cache.reserve(self.rows[row].need)
        {
            self.waiting.pop_front();
            self.rows[row].text = Some(text);
            self.running.push(row);
        }
        self.running.iter().for_each(|&r| self.rows[r].change_chunk_size());
        let (unread, going): (Vec<usize>, Vec<usize>) = self.running.iter().partition(|&&r| self.rows[r].unread);
        let text = |r: &Row| r.text.ok_or_else(|| Error::config("a text that runs has no room in the cache"));
        if !going.is_empty() {
            let newest = |&r: &usize| Ok((text(&self.rows[r])?, self.rows[r].ids.last().copied().unwrap_or(0)));
            let next = going.iter().map(newest).collect::<Result<Vec<_>>>()?;
            if unread.is_empty() && self.run_ahead(&going, 0, next.iter().map(|n| n.1).collect())? {
                return self.turn();
            }
            let logits = self.generator.model.step(&mut self.cache, &next)?;
            self.choose(&going, &logits)?;
        }
        if !unread.is_empty() {
            let prompt = |&r: &usize| {
                let row = &self.rows[r];
                Ok(Prompt { text: text(row)?, ids: &row.ids, chunk_size: row.chunk_size })
            };
            let prompts = unread.iter().map(prompt).collect::<Result<Vec<_>>>()?;
            let logits = self.generator.model.prefill(&mut self.cache, &prompts)?;
            self.stats.prompt_tokens += prompts.iter().map(|p| p.ids.len()).sum::<usize>();
            unread.iter().for_each(|&r| self.rows[r].unread = false);
            self.choose(&unread, &logits)?;
        }
        Ok(())
    }

    /// Choose a token of each of these rows from its logits, `[rows, V]`.
    fn choose(&mut self, rows: &[usize], logits: &Tensor) -> Result<()> {
        let limit = self.generator.limit();
        let draws: Vec<Draw> = rows.iter().map(|&r| self.rows[r].draw()).collect();
        let ids = sample(logits, limit, &draws)?;
        let asked = |&r: &usize| self.rows[r].request.logprobs;
        let probs = match rows.iter().filter_map(asked).max() {
            Some(top) => log_probs(logits, limit, &ids, top)?.into_iter().map(Some).collect(),
            None => vec![None; rows.len()],
        };
        self.take(rows.iter().zip(ids).zip(probs).map(|((&row, id), probs)| (row, id, probs)).collect())
    }

    /// Take in the tokens of a turn.
    fn take(&mut self, tokens: Vec<(usize, i64, Option<LogProbs>)>) -> Result<()> {
        let now = self.begun.elapsed();
        self.stats.new_tokens += tokens.len();
        if self.stats.first_token.is_none() {
            (self.stats.first_tokens, self.stats.first_token) = (tokens.len(), Some(now));
        }
        self.stats.last_token = Some(now);
        for (row, id, mut probs) in tokens {
            let state = &mut self.rows[row];
            probs = probs.filter(|_| state.request.logprobs.is_some());
            if let (Some(p), Some(top)) = (&mut probs, state.request.logprobs) {
                p.top.truncate(top);
            }
            let event = state.take(row, id, probs)?;
            if event.finish.is_some() {
                self.leave(row);
            }
            self.events.push_back(event);
        }
        Ok(())
    }
}

impl Iterator for Generation {
    type Item = Result<Event>;
    fn next(&mut self) -> Option<Self::Item> {
        if let Some(event) = self.events.pop_front() {
            return Some(Ok(event));
        }
        if self.running.is_empty() && self.waiting.is_empty() {
            return None;
        }
        let turn = match self.generator.model.device() {
            // among the threads that share the work, handing out a piece costs less than from outside
            Device::Cpu => rayon::scope(|_| self.turn()),
            _ => self.turn(),
        };
        if let Err(e) = turn {
            // what the others chose in this turn too
            self.events.clear();
            self.waiting.clear();
            for row in std::mem::take(&mut self.running) {
                self.leave(row);
            }
            return Some(Err(e));
        }
        self.events.pop_front().map(Ok)
    }
}
