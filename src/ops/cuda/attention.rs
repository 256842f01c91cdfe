//! Attention under structured masks on CUDA: how a mask becomes tiles, and the launches. kernels/attention.cuh explains
//! the tiles.

use super::attention_sm90::Hopper;
use crate::cuda::kernels::{attention as half, attention_backward as half_backward, attention_f32 as full, attention_sum};
use crate::cuda::{Arg, Grid, Variant};
use crate::ops::attention::Mask;
use crate::tensor::{DType, Tensor};
use crate::{Error, Result};

const OP: &str = "attention";

/// Head widths that the kernels are compiled for; a narrower head is filled up with zeros.
const WIDTHS: [(usize, &str); 6] = [
    (16, "HEAD_DIM=16"),
    (32, "HEAD_DIM=32"),
    (64, "HEAD_DIM=64"),
    (96, "HEAD_DIM=96"),
    (128, "HEAD_DIM=128"),
    (256, "HEAD_DIM=256"),
];

/// Sizes of the compiled kernels, as in kernels/attention_mma.cuh, kernels/attention_f32.cu and kernels/attention_sm90*.cu.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tiles {
    /// Rows of an own tile of queries, and of slots; rows of a tile that streams past (ROWS, KEYS; TILE).
    pub rows: usize,
    pub slots: usize,
    pub keys: usize,
    pub threads: usize,
    /// Blocks that share the columns of dk and dv (PARTS).
    pub parts: usize,
    /// Bytes of shared memory.
    pub forward: usize,
    pub backward: usize,
}

impl Tiles {
    fn new(dtype: DType, width: usize) -> Self {
        if dtype == DType::F32 {
            let tile = if width <= 128 { 64 } else { 32 };
            let (row, p) = (width + 4, tile * (tile + 4));
            let forward = 4 * (3 * tile * row + p);
            let backward = 4 * (4 * tile * row + p + 2 * tile);
            return Self { rows: tile, slots: tile, keys: tile, threads: 256, parts: 1, forward, backward };
        }
        let (rows, threads) = if width <= 64 { (128, 256) } else { (64, 128) };
        let (keys, parts) = if width <= 128 { (64, 1) } else { (32, 2) };
        let (row, stages) = (2 * (width + 8), 2);
        let stats = 4 * (2 * rows).max(2 * stages * keys);
        let forward = (rows + 2 * stages * keys) * row;
        let backward = (2 * rows + 2 * stages * keys) * row + stats;
        Self { rows, slots: rows, keys, threads, parts, forward, backward }
    }
}

/// Which masks the kernels know (kernels/attention.cuh).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Causal = 0,
    Full = 1,
    Cat = 2,
    /// Bidirectional inside short sequences: all batches are one run of rows, and blocks of it see themselves.
    Joined = 3,
}

/// How a call is cut up.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    pub tiles: Tiles,
    pub variant: Variant,
    pub kind: Kind,
    pub batch: usize,
    pub heads: usize,
    pub key_heads: usize,
    pub lq: usize,
    pub lk: usize,
    pub d: usize,
    pub stride: usize,
    pub span: usize,
    pub span_tiles: usize,
    pub row_tiles: usize,
    pub slots: usize,
    pub key_tiles: usize,
    pub splits: usize,
    pub split_rows: usize,
    pub local_keys: bool,
    pub scale: f64,
}

impl Plan {
    pub(super) fn new(q: &Tensor, k: &Tensor, mask: Mask, scale: f64) -> Result<Self> {
        let d = q.dim(3);
        let Some((width, define)) = WIDTHS.into_iter().find(|(w, _)| d <= *w) else {
            return Err(Error::shape(OP, format!("heads of width {d} have no kernel on {}: use at most 256", q.device())));
        };
        Self::with(Tiles::new(q.dtype(), width), define, q, k, mask, scale)
    }

    /// A plan for kernels of these sizes.
    pub(super) fn with(tiles: Tiles, define: &'static str, q: &Tensor, k: &Tensor, mask: Mask, scale: f64) -> Result<Self> {
        let (batch, heads, lq, d) = (q.dim(0), q.dim(1), q.dim(2), q.dim(3));
        let (key_heads, lk) = (k.dim(1), k.dim(2));
        let most = i32::MAX as usize - 256; // rows are counted in 32 bits
        if lq > most || lk > most {
            return Err(Error::shape(OP, format!("{lq} queries and {lk} keys are more than the kernel can number")));
        }
        let (kind, stride) = match mask {
            Mask::Cat { stride } if stride > 1 && stride < lk => (Kind::Cat, stride),
            Mask::Causal | Mask::Cat { .. } => (Kind::Causal, 1),
            Mask::Bidirectional if lq == lk && 2 * lq <= tiles.rows && batch <= most / lq => (Kind::Joined, lq),
            Mask::Bidirectional => (Kind::Full, 1),
        };
        let rows = if kind == Kind::Joined { batch * lq } else { lq };
        let blocks = matches!(kind, Kind::Cat | Kind::Joined);
        let span = match blocks {
            true if stride <= tiles.rows => tiles.rows / stride * stride,
            true => stride,
            false => rows,
        };
        let span_tiles = span.div_ceil(tiles.rows);
        let slots = if kind == Kind::Joined { 0 } else { lk.div_ceil(stride) };
        let key_tiles = slots.div_ceil(tiles.slots);
        // Too few blocks to fill the device are split, though not into runs of less than two tiles of rows: on an H100
        // splits that only even out several waves cost as much as they gain.
        let units = (key_tiles * tiles.parts * key_heads * batch).max(1);
        let wanted = if d.is_multiple_of(2) { (4 * q.gpu()?.multiprocessors as usize / units).clamp(1, 8) } else { 1 };
        let split_rows = lq.div_ceil(wanted.min(lq.div_ceil(2 * tiles.keys))).next_multiple_of(tiles.keys);
        Ok(Self {
            tiles,
            variant: Variant { define: Some(define), ..q.variant()? },
            kind,
            batch,
            heads,
            key_heads,
            lq,
            lk,
            d,
            stride,
            span,
            span_tiles,
            row_tiles: rows.div_ceil(span) * span_tiles,
            slots,
            key_tiles,
            splits: lq.div_ceil(split_rows),
            split_rows,
            local_keys: blocks && span_tiles == 1 && heads == key_heads && q.dtype() != DType::F32,
            scale,
        })
    }

    /// `Attention` in kernels/attention.cuh, over tensors with dense rows. Forward has no `dy`, and gives q.
    pub(super) fn words(&self, q: &Tensor, k: &Tensor, v: &Tensor, dy: &Tensor) -> Result<Arg> {
        let per = 16 / q.dtype().size();
        let out = self.d.is_multiple_of(per);
        let mut vector = out;
        let mut words = [0u64; 30];
        for (t, to) in [q, k, v, dy].into_iter().zip(words.chunks_mut(3)) {
            vector &= t.pointer()?.is_multiple_of(16);
            for (dim, to) in to.iter_mut().enumerate() {
                // batch, head, row; where there is one only, its stride means nothing
                let stride = if t.dim(dim) == 1 { 0 } else { t.layout().strides()[dim] };
                vector &= stride.is_multiple_of(per);
                *to = stride as u64;
            }
        }
        let group = self.heads / self.key_heads;
        let sizes = [
            self.batch,
            self.heads,
            group,
            self.lq,
            self.lk,
            self.d,
            self.kind as usize,
            self.stride,
            self.span,
            self.span_tiles,
            self.row_tiles,
            self.key_tiles,
            self.splits,
            self.split_rows,
            vector.into(),
            out.into(),
            self.local_keys.into(),
            (self.scale as f32).to_bits() as usize,
        ];
        words[12..].iter_mut().zip(sizes).for_each(|(to, x)| *to = x as u64);
        Ok(words.into())
    }

    /// Batches that the grid has blocks for.
    pub(super) fn batches(&self) -> usize {
        if self.kind == Kind::Joined { 1 } else { self.batch }
    }
    /// A block for each tile of query rows.
    fn row_grid(&self, shared: usize) -> Grid {
        Grid::new(self.row_tiles * self.heads * self.batches(), self.tiles.threads).shared(shared)
    }
    /// `[q, k, v]` have dense rows; y `[B, Lq, H, d]` and lse `[B, H, Lq]` are overwritten.
    pub(super) fn forward(&self, [q, k, v]: [&Tensor; 3], y: &mut Tensor, lse: &mut Tensor) -> Result<()> {
        let symbol = either(q.dtype(), full::attention_forward, half::attention_forward);
        let args = [q.read()?, k.read()?, v.read()?, y.write()?, lse.write()?, self.words(q, k, v, q)?];
        // SAFETY: the parameters are (q, k, v, y, lse, Attention); the plan's sizes and strides are those of q, k and v, of one
        // dtype and with dense rows; y and lse are as large as the plan says.
        unsafe { q.gpu()?.launch(symbol, self.variant, self.row_grid(self.tiles.forward), &args) }
    }
    /// Blocks over `tiles` tiles of keys.
    fn key_grid(&self, tiles: usize) -> Grid {
        let blocks = tiles * self.tiles.parts * self.key_heads * self.batches();
        Grid::new(blocks, self.tiles.threads).shared(self.tiles.backward)
    }
}

/// The entry point for a dtype, of those of f32 and of 16 bits.
fn either<S>(dtype: DType, of_f32: S, of_16: S) -> S {
    if dtype == DType::F32 { of_f32 } else { of_16 }
}

/// A new tensor for a result of this one's shape, as it lies in memory: `[B, L, H, d]` for `[B, H, L, d]`.
pub(super) fn rows_first(like: &Tensor) -> Result<Tensor> {
    let s = like.shape();
    Tensor::empty(&[s[0], s[2], s[1], s[3]], like.dtype(), like.device())
}
pub(super) fn heads_first(t: &Tensor) -> Result<Tensor> {
    t.permute(&[0, 2, 1, 3])
}
fn zeros(like: &Tensor) -> Result<Tensor> {
    let s = like.shape();
    heads_first(&Tensor::zeros(&[s[0], s[2], s[1], s[3]], like.dtype(), like.device())?)
}

/// `(y, lse)`: y `[B, H, Lq, d]` over memory `[B, Lq, H, d]`, and the natural log-sum-exp of each row, f32 `[B, H, Lq]`.
pub(crate) fn forward(q: &Tensor, k: &Tensor, v: &Tensor, mask: Mask, scale: f64) -> Result<(Tensor, Tensor)> {
    if q.numel() == 0 || k.numel() == 0 {
        return Ok((zeros(q)?, Tensor::zeros(&q.shape()[..3], DType::F32, q.device())?));
    }
    let (q, k, v) = (&q.dense_rows()?, &k.dense_rows()?, &v.dense_rows()?);
    let mut y = rows_first(q)?;
    let mut lse = Tensor::empty(&q.shape()[..3], DType::F32, q.device())?;
    if let Some(hopper) = Hopper::new([q, k, v], None, mask, scale)? {
        let words = hopper.plan.words(q, k, v, q)?;
        hopper.forward(q.gpu()?, &mut y, &mut lse, words)?;
        return Ok((heads_first(&y)?, lse));
    }
    Plan::new(q, k, mask, scale)?.forward([q, k, v], &mut y, &mut lse)?;
    Ok((heads_first(&y)?, lse))
}

/// `[dq, dk, dv]`, each `[B, heads, L, d]` over memory `[B, L, heads, d]`.
#[allow(clippy::too_many_arguments)] // what backward needs is what forward had
pub(crate) fn backward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    y: &Tensor,
    lse: &Tensor,
    dy: &Tensor,
    mask: Mask,
    scale: f64,
) -> Result<[Tensor; 3]> {
    if q.numel() == 0 || k.numel() == 0 {
        return Ok([zeros(q)?, zeros(k)?, zeros(v)?]);
    }
    let (q, k, v, dy) = (&q.dense_rows()?, &k.dense_rows()?, &v.dense_rows()?, &dy.dense_rows()?);
    let (y, lse) = (heads_first(y)?.contiguous()?, lse.contiguous()?);
    let hopper = Hopper::new([q, k, v], Some(dy), mask, scale)?;
    let plain = Plan::new(q, k, mask, scale)?;
    let p = hopper.as_ref().map_or(plain, |h| h.plan);
    let (gpu, device, dtype) = (q.gpu()?, q.device(), q.dtype());
    let (mut dq, mut dk, mut dv) = (rows_first(q)?, rows_first(k)?, rows_first(v)?);
    let mut delta = Tensor::empty(&q.shape()[..3], DType::F32, device)?;
    let split = p.splits > 1 && p.key_tiles > 0;
    let partial = [2, p.splits, p.batch, p.slots, p.key_heads, p.d];
    let mut partial = split.then(|| Tensor::empty(&partial, DType::F32, device)).transpose()?;
    let to_partial = partial.as_mut().map_or(Ok(0u64.into()), Tensor::write)?;
    let inputs = [q.read()?, k.read()?, v.read()?];
    let (words, out) = (p.words(q, k, v, dy)?, [dk.write()?, dv.write()?]);

    let (saved, of_rows) = ([y.read()?, lse.read()?], [delta.write()?, dq.write()?, out[0], out[1]]);
    if let Some(hopper) = &hopper {
        hopper.backward_rows(gpu, saved, of_rows, words)?;
    } else {
        let symbol = either(dtype, full::attention_backward_rows, half_backward::attention_backward_rows);
        let args = [inputs.as_slice(), &[saved[0], dy.read()?, saved[1]], &of_rows, &[words]].concat();
        // SAFETY: the parameters are (q, k, v, y, dy, lse, delta, dq, dk, dv, Attention); the plan's sizes and strides are those
        // of q, k, v and dy, of one dtype and with dense rows; y lies as [B, Lq, H, d], lse as [B, H, Lq]; delta and dq, dk, dv
        // are new, [B, H, Lq] and [B, L, heads, d].
        unsafe { gpu.launch(symbol, p.variant, p.row_grid(p.tiles.backward), &args)? };
    }

    let stats = [lse.read()?, delta.read()?];
    if let Some(hopper) = &hopper {
        hopper.backward_keys(gpu, stats, [out[0], out[1], to_partial], words)?;
    }
    // slots, and local keys where the row pass left them out
    let symbol = either(dtype, full::attention_backward_keys, half_backward::attention_backward_keys);
    let blocks = matches!(p.kind, Kind::Cat | Kind::Joined);
    let slot_tiles = if hopper.is_none() { p.key_tiles * p.splits } else { 0 };
    let local_tiles = if blocks && !p.local_keys { plain.row_tiles } else { 0 };
    let words = plain.words(q, k, v, dy)?;
    for (local, tiles) in [(false, slot_tiles), (true, local_tiles)] {
        let args = [inputs.as_slice(), &[dy.read()?], &stats, &out, &[to_partial, words, local.into()]].concat();
        // SAFETY: the parameters are (q, k, v, dy, lse, delta, dk, dv, partial or null, Attention, local), as above; partial
        // is [2, splits, B, slots, Hkv, d] where there are several splits.
        unsafe { gpu.launch(symbol, plain.variant, plain.key_grid(tiles), &args)? };
    }
    if let Some(partial) = &partial {
        let n = p.batch * p.slots * p.key_heads * p.d;
        let blocks = n.div_ceil(256).min(4096);
        let grid = Grid { blocks: [blocks, 2, 1], ..Grid::new(blocks, 256) };
        let args = [partial.read()?, dk.write()?, dv.write()?, p.words(q, k, v, dy)?];
        // SAFETY: the parameters are (partial, dk, dv, Attention), as above.
        unsafe { gpu.launch(attention_sum::attention_backward_sum, q.variant()?, grid, &args)? };
    }
    Ok([heads_first(&dq)?, heads_first(&dk)?, heads_first(&dv)?])
}
