//! What steps of decoding read and move on by themselves, in device memory: no number passes through main memory between
//! two tokens, and every step has the same arguments.

use super::gather::gather_at;
use super::sample::{is_greedy, sample_at, words};
use crate::cuda::{Grid, kernels::advance as kernel};
use crate::ops::{CacheRows, RopeTable, Sampling};
use crate::random;
use crate::tensor::{DType, Device, Tensor};
use crate::{Error, Result};
use std::ops::Range;

/// Steps that are noted at most.
pub(crate) const MOST_STEPS: usize = 32;
/// Lists of `words` in advance.cu, and of `how`.
const LISTS: usize = 11;
const SETTINGS: usize = 5;

/// What one row reads in the first step.
#[derive(Clone, Debug)]
pub(crate) struct StepRow {
    /// What it sees: of dense attention, inside CAT layers, and there the place of its input.
    pub rows: Range<usize>,
    pub layer_rows: Range<usize>,
    pub open: Range<usize>,
    /// The same inside CAT layers.
    pub position: usize,
    pub inside: usize,
    /// The token that it is the row of.
    pub newest: i64,
    /// Ids of the block that it stands in, before the row's own.
    pub block: Vec<i64>,
    pub how: Sampling,
    /// Of its uniforms, and the number of the first.
    pub key: u64,
    pub number: usize,
}

/// R rows that take steps together.
#[derive(Debug)]
pub(crate) struct Steps {
    /// `[LISTS + SETTINGS + 1 + MOST_STEPS, R]`, i64: the lists, settings by row, steps taken, and the tokens noted. Its
    /// parts are views, which only kernels write to.
    all: Tensor,
    filling: Option<Filling>,
}

/// How rows fill chunks, all in the same step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Chunking {
    /// C.
    pub chunk: usize,
    /// Rows that follow a chunk's last token: its slot, and a separator where there is one.
    pub header: usize,
}

/// What steps that fill chunks need beside.
#[derive(Debug)]
struct Filling {
    chunking: Chunking,
    /// Ids of the open blocks, `[R, C]`.
    block: Tensor,
    /// What `fill_chunks` writes: i64 `[2, header R]`, `[R, 4]` and `[R]`.
    seen: Tensor,
    groups: Tensor,
    numbers: Tensor,
}

impl Filling {
    fn new(rows: usize, chunking: Chunking, device: Device) -> Result<Self> {
        let ids = |shape: &[usize]| Tensor::empty(shape, DType::I64, device);
        let Chunking { chunk, header } = chunking;
        let (block, seen) = (ids(&[rows, chunk])?, ids(&[2, header * rows])?);
        Ok(Self { chunking, block, seen, groups: ids(&[rows, 4])?, numbers: ids(&[rows])? })
    }
}

impl Steps {
    /// Which fill chunks too, where `chunking` says how.
    pub fn new(rows: usize, chunking: Option<Chunking>, device: Device) -> Result<Self> {
        let all = Tensor::empty(&[LISTS + SETTINGS + 1 + MOST_STEPS, rows], DType::I64, device)?;
        Ok(Self { all, filling: chunking.map(|c| Filling::new(rows, c, device)).transpose()? })
    }
    pub fn chunking(&self) -> Option<Chunking> {
        self.filling.as_ref().map(|f| f.chunking)
    }
    pub fn len(&self) -> usize {
        self.all.dim(1)
    }
    /// Begin anew, after the work submitted before; `behind` a step that only chooses.
    pub fn set(&mut self, rows: &[StepRow], behind: bool) -> Result<()> {
        let list = |of: &dyn Fn(&StepRow) -> i64| rows.iter().map(of).collect::<Vec<_>>();
        let (of, moved) = (|i: usize| i as i64, |i: usize| i as i64 - i64::from(behind));
        let lists = [
            list(&|r| of(r.rows.start)),
            list(&|r| moved(r.rows.end)),
            list(&|r| of(r.layer_rows.start)),
            list(&|r| moved(r.layer_rows.end)),
            list(&|r| moved(r.open.start)),
            list(&|r| moved(r.open.end)),
            list(&|r| moved(r.position)),
            list(&|r| moved(r.inside)),
            list(&|r| r.newest),
            list(&|r| r.key as i64),
            list(&|r| of(r.number)),
        ];
        let how = rows.iter().flat_map(|r| words(&r.how, random::uniform_at(r.key, r.number as u64)).map(|w| w as i64));
        let all: Vec<i64> = lists.concat().into_iter().chain(how).chain(rows.iter().map(|_| 0)).collect();
        self.all.overwrite(&all)?;
        let Some(f) = &mut self.filling else { return Ok(()) };
        let block = |r: &StepRow| {
            let own = (!behind).then_some(r.newest);
            let filled = r.block.iter().copied().chain(own).chain(std::iter::repeat(0));
            filled.take(f.chunking.chunk).collect::<Vec<_>>()
        };
        f.block.overwrite(&rows.iter().flat_map(block).collect::<Vec<_>>())
    }

    fn part(&self, at: usize, n: usize) -> Result<Tensor> {
        self.all.narrow(0, at, n)
    }
    /// Rows of dense attention, inside CAT layers, and the places of inputs there: runs of at most so many rows, in caches of
    /// at least so many.
    pub fn cache_rows(&self, most: [usize; 3], least: [usize; 3]) -> Result<[CacheRows; 3]> {
        let rows = |i: usize| Ok(CacheRows::on_device(self.part(2 * i, 2)?, most[i], least[i]));
        Ok([rows(0)?, rows(1)?, rows(2)?])
    }
    /// Angles at the rows' positions, and at those inside CAT layers, by a table that holds them all.
    pub fn rope(&self, table: &RopeTable) -> Result<[RopeTable; 2]> {
        let at = |i: usize| table.select_at(self.part(i, 1)?.reshape(&[self.len()])?);
        Ok([at(6)?, at(7)?])
    }
    /// Rows of a table `[V, D]` for the newest tokens, `[1, R, D]`.
    pub fn embedding(&self, table: &Tensor) -> Result<Tensor> {
        gather_at(table, 0, &self.part(8, 1)?)?.reshape(&[1, self.len(), table.dim(1)])
    }
    /// Choose a token of each row from its logits `[R, V]`, among ids below `limit`, and move on. `greedy` if all rows are.
    pub fn choose(&mut self, logits: &Tensor, limit: usize, greedy: bool) -> Result<()> {
        let how = self.part(LISTS, SETTINGS)?;
        let ids = sample_at(logits, limit.min(logits.dim(1)), &how, greedy)?;
        let (step, log) = (self.part(LISTS + SETTINGS, 1)?, self.part(LISTS + SETTINGS + 1, MOST_STEPS)?);
        let (rows, most) = (self.len().into(), MOST_STEPS.into());
        let (block, chunk, header) = match &self.filling {
            Some(f) => (f.block.read()?, f.chunking.chunk, f.chunking.header),
            None => (0u64.into(), 0, 0),
        };
        let args = [self.all.read()?, how.read()?, step.read()?, log.read()?, ids.read()?, rows, most];
        let args = [&args[..], &[block, chunk.into(), header.into()]].concat();
        // SAFETY: the parameters are (words, how, step, log, ids, rows, most, block or null, chunk, header): parts of `all`, which
        // is as large as they are together and written by nobody else (its views end with the steps that read them), a token for
        // each row, and `block`, [rows, chunk], of which the same is true.
        unsafe {
            logits.gpu()?.launch(kernel::advance, self.all.variant()?, Grid::for_each(self.len(), 128).early(true), &args)
        }
    }
    /// Begin the step that fills a chunk in every row: the places of the new rows, of which there are `header` a text, in that
    /// order. As [`Steps::cache_rows`].
    pub fn fill(&mut self, most: usize, least: usize) -> Result<CacheRows> {
        let f = self.filling()?;
        let Chunking { chunk, header } = f.chunking;
        let lists = [f.seen.read()?, f.groups.read()?, f.numbers.read()?];
        let args = [&[self.all.read()?][..], &lists, &[self.len().into(), chunk.into(), header.into()]].concat();
        // SAFETY: the parameters are (words, seen, groups, numbers, rows, chunk, header), as large as `Filling::new` makes them and
        // written by nobody else, as in `choose`.
        unsafe {
            let grid = Grid::for_each(self.len(), 128).early(true);
            self.all.gpu()?.launch(kernel::fill_chunks, self.all.variant()?, grid, &args)?;
        }
        match header {
            2 => Ok(CacheRows::pairs_on_device(f.seen.clone(), f.groups.clone(), most, least)),
            _ => Ok(CacheRows::on_device(f.seen.clone(), most, least)),
        }
    }
    /// Rows of a table `[V, D]` for the ids of some texts' blocks, `[n, C, D]`.
    pub fn block_embedding(&self, table: &Tensor, texts: Range<usize>) -> Result<Tensor> {
        let f = self.filling()?;
        let (n, chunk) = (texts.len(), f.chunking.chunk);
        gather_at(table, 0, &f.block.narrow(0, texts.start, n)?.reshape(&[n * chunk])?)?.reshape(&[n, chunk, table.dim(1)])
    }
    /// Rows of a table `[K, D]` for the numbers of the chunks that these texts fill, `[n, D]`.
    pub fn chunk_embedding(&self, table: &Tensor, texts: Range<usize>) -> Result<Tensor> {
        gather_at(table, 0, &self.filling()?.numbers.narrow(0, texts.start, texts.len())?)
    }
    fn filling(&self) -> Result<&Filling> {
        self.filling.as_ref().ok_or_else(|| Error::config("these steps fill no chunks"))
    }
    /// The tokens of the first `n` steps, `[n, R]`; waits for them.
    pub fn tokens(&self, n: usize) -> Result<Vec<i64>> {
        self.part(LISTS + SETTINGS + 1, n)?.to_vec()
    }
}

impl StepRow {
    /// True if its token is the likeliest, whatever number is drawn.
    pub fn is_greedy(&self) -> bool {
        is_greedy(&self.how)
    }
}
