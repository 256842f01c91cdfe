//! Where everything lies in the decoder's sequence.
//!
//! Sections 2 to 4 of the spec lay a sequence out as blocks of stride S, each a header (the previous chunk's
//! representation, and in the adaptive model a separator) and C tokens. The last token of a block is dead: nothing
//! attends to it but itself, and its output is never used. So is whatever follows the last wanted output. Felid
//! leaves those rows out. What remains has the same mask with stride `C - 1 + header`, the same positions, the same
//! outputs, and needs no padding: for a header of one it is the tokens themselves, each chunk's last one replaced by
//! the chunk's representation. That saves 1/S of the decoder: a sixth at C 4.

use crate::ops::Mask;

/// The decoder sequence for N tokens in chunks of C.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkPlan {
    /// C.
    pub chunk: usize,
    /// Rows before a block's tokens: 1 (representation) or 2 (representation, separator).
    pub header: usize,
    /// N.
    pub tokens: usize,
}

impl ChunkPlan {
    /// Rows from one representation to the next.
    pub fn stride(&self) -> usize {
        self.chunk - 1 + self.header
    }
    /// Chunks that are full, and so compressed.
    pub fn full_chunks(&self) -> usize {
        self.tokens / self.chunk
    }
    /// Tokens after the last full chunk.
    pub fn tail(&self) -> usize {
        self.tokens % self.chunk
    }
    /// L: rows of the sequence.
    pub fn len(&self) -> usize {
        self.full_chunks() * self.stride() + self.header + self.tail()
    }
    /// True when there are no tokens; the sequence then still has its first header.
    pub fn is_empty(&self) -> bool {
        self.tokens == 0
    }
    /// Which rows see which: [`Mask::Cat`] with this stride.
    pub fn mask(&self) -> Mask {
        Mask::Cat { stride: self.stride() }
    }
    /// RoPE position of each row: its place inside its block.
    pub fn positions(&self) -> Vec<usize> {
        (0..self.len()).map(|i| i % self.stride()).collect()
    }
    /// The rows whose output predicts tokens 1, 2, .., N, in that order.
    pub fn outputs(&self) -> Vec<usize> {
        // block 0 begins with what nobody reads: its header; later blocks' headers predict the block's first token
        (self.header..self.len()).filter(|i| i % self.stride() >= self.header - 1).collect()
    }
    /// The rows that hold representations: 0, S, 2S, ..
    pub fn slots(&self) -> Vec<usize> {
        (0..=self.full_chunks()).map(|k| k * self.stride()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The spec's own layout: padded to whole chunks, with every token, cut afterwards. Rows are named by what they hold.
    #[derive(Clone, Copy, PartialEq, Debug)]
    enum Row {
        Slot(usize),
        Separator(usize),
        Token(usize),
    }

    fn spec_rows(chunk: usize, header: usize, tokens: usize) -> Vec<Row> {
        let k = tokens.div_ceil(chunk);
        let head = |b: usize| [Row::Slot(b), Row::Separator(b)].into_iter().take(header);
        let mut rows: Vec<Row> = (0..k).flat_map(|b| head(b).chain((b * chunk..(b + 1) * chunk).map(Row::Token))).collect();
        rows.extend(head(k));
        rows
    }

    fn plan_rows(p: &ChunkPlan) -> Vec<Row> {
        let head = |b: usize| [Row::Slot(b), Row::Separator(b)].into_iter().take(p.header);
        let full = p.full_chunks();
        let mut rows: Vec<Row> =
            (0..full).flat_map(|b| head(b).chain((b * p.chunk..(b + 1) * p.chunk - 1).map(Row::Token))).collect();
        rows.extend(head(full).chain((full * p.chunk..p.tokens).map(Row::Token)));
        rows
    }

    proptest! {
        /// Same outputs, same positions, and every output sees the same rows as in the spec's layout.
        #[test]
        fn leaving_out_dead_rows_changes_nothing(chunk in 1usize..10, header in 1usize..3, tokens in 1usize..60) {
            let p = ChunkPlan { chunk, header, tokens };
            let (rows, spec) = (plan_rows(&p), spec_rows(chunk, header, tokens));
            prop_assert_eq!(rows.len(), p.len());
            let s = chunk + header;
            let spec_outputs: Vec<usize> = (header..spec.len() - 1).filter(|i| i % s >= header - 1 && i % s != s - 1)
                .chain([spec.len() - 1]).take(tokens).collect();
            let outputs = p.outputs();
            prop_assert_eq!(outputs.iter().map(|&i| rows[i]).collect::<Vec<_>>(), spec_outputs.iter().map(|&i| spec[i]).collect::<Vec<_>>());
            prop_assert_eq!(p.slots().iter().map(|&i| rows[i]).collect::<Vec<_>>(), (0..=p.full_chunks()).map(Row::Slot).collect::<Vec<_>>());
            let mask = Mask::Cat { stride: s };
            let at: Vec<usize> = rows.iter().map(|r| spec.iter().position(|x| x == r).unwrap()).collect();
            for (i, &si) in at.iter().enumerate() {
                prop_assert_eq!(p.positions()[i], si % s);
                let seen: Vec<usize> = (0..=i).filter(|&j| p.mask().allows(i, j)).map(|j| at[j]).collect();
                let spec_seen: Vec<usize> = (0..=si).filter(|&j| mask.allows(si, j)).collect();
                prop_assert_eq!(seen, spec_seen);
            }
        }
    }
}
