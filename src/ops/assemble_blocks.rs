//! The decoder's sequence (spec sections 2 to 4), built of blocks in one pass.
//!
//! For N tokens in chunks of C there are K = N / C full blocks of stride `S = C - 1 + header`: a slot (the representation of
//! the chunks before), in the adaptive model the separator, and the chunk's tokens but the last, which nobody reads. The last
//! slot's header and the remaining tokens follow: `y[b, k S] = slots[b, k]`, `y[b, k S + 1] = separator` (header 2),
//! `y[b, k S + header + t] = tokens[b, k C + t]`.
//!
//! Backward: slots and tokens get their rows of dy, tokens left out zeros; `dseparator = sum over b and k of dy[b, k S + 1]`.

use super::elementwise::same_dtype;
use crate::autograd::{Var, record_one};
use crate::{Error, Result};

/// How N tokens lie in blocks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Blocks {
    /// C.
    pub chunk: usize,
    /// Rows before a block's tokens: the slot, and maybe the separator.
    pub header: usize,
    /// N.
    pub tokens: usize,
}

/// What a row of the sequence is.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Row {
    Slot(usize),
    Separator,
    Token(usize),
}

impl Blocks {
    /// S: rows from one slot to the next.
    pub fn stride(self) -> usize {
        self.chunk - 1 + self.header
    }
    /// K + 1.
    pub fn slots(self) -> usize {
        self.tokens / self.chunk + 1
    }
    /// L.
    pub fn len(self) -> usize {
        (self.slots() - 1) * self.stride() + self.header + self.tokens % self.chunk
    }
    /// What row `i < L` is.
    pub fn row(self, i: usize) -> Row {
        match (i / self.stride(), i % self.stride()) {
            (k, 0) => Row::Slot(k),
            (_, t) if t < self.header => Row::Separator,
            (k, t) => Row::Token(k * self.chunk + t - self.header),
        }
    }
    /// The row that token `j < N` is, if it is one.
    pub fn of_token(self, j: usize) -> Option<usize> {
        let (k, t) = (j / self.chunk, j % self.chunk);
        (k + 1 == self.slots() || t + 1 < self.chunk).then(|| k * self.stride() + self.header + t)
    }
}

/// slots `[B, K+1, D]`, separator `[1, D]` or none, tokens `[B, N, D]`, K = N / `chunk` -> `[B, L, D]`. Rows of any stride.
pub fn assemble_blocks(slots: &Var, separator: Option<&Var>, tokens: &Var, chunk: usize) -> Result<Var> {
    const OP: &str = "assemble_blocks";
    let (s, t, one) = (slots.value(), tokens.value(), separator.map(Var::value));
    same_dtype(OP, &[s, t].into_iter().chain(one).collect::<Vec<_>>())?;
    if !t.dtype().is_float() {
        return Err(Error::dtype(OP, format!("needs a float dtype, got {}", t.dtype())));
    }
    if chunk == 0 || s.rank() != 3 || t.rank() != 3 || [s.dim(0), s.dim(2)] != [t.dim(0), t.dim(2)] {
        let detail = format!("slots {:?} and tokens {:?} are not [B, K+1, D] and [B, N, D]", s.shape(), t.shape());
        return Err(Error::shape(OP, format!("{detail} in chunks of {chunk}")));
    }
    let blocks = Blocks { chunk, header: 1 + usize::from(separator.is_some()), tokens: t.dim(1) };
    if s.dim(1) != blocks.slots() || one.is_some_and(|o| o.shape() != [1, t.dim(2)]) {
        let (n, one) = (blocks.slots(), one.map(|o| o.shape()));
        let detail = format!("{} tokens in chunks of {chunk} take {n} slots and a separator [1, D]", blocks.tokens);
        return Err(Error::shape(OP, format!("{detail}, got {:?} and {one:?}", s.shape())));
    }
    let y = on_device!(t.device(), assemble_blocks::forward(s, one, t, blocks))?;
    let inputs: Vec<&Var> = [slots, tokens].into_iter().chain(separator).collect();
    Ok(record_one(OP, &inputs, y, move |flow| {
        let dy = flow.output()?.dense_rows()?;
        let (dslots, dtokens) = on_device!(dy.device(), assemble_blocks::backward(&dy, blocks))?;
        flow.give(0, dslots)?;
        flow.give(1, dtokens)?;
        if let Some(dtype) = flow.gradient_dtype(2) {
            let sum = flow.take_sum(2);
            let total = on_device!(dy.device(), assemble_blocks::separator_gradient(&dy, blocks, sum, dtype))?;
            flow.put(2, total);
        }
        Ok(())
    }))
}
