//! Attention on Hopper: the launches of `kernels/attention_sm90*.cu`, where tensors lie so that the copy engine can fetch
//! them. What it cannot fetch, and other devices, take the kernels of `attention.rs`.

use super::attention::{Kind, Plan, Tiles};
use crate::cuda::kernels::{attention_sm90, attention_sm90_keys, attention_sm90_rows};
use crate::cuda::{self, Arg, Gpu, Grid, Variant, boxes};
use crate::ops::attention::Mask;
use crate::tensor::{DType, Tensor};
use crate::{Error, Result};

/// Fewer query rows than this fill too little of a tile of 64.
const FEWEST_ROWS: usize = 16;

/// How blocks of a kernel are made, as its header says.
#[derive(Clone, Copy)]
struct Block {
    threads: usize,
    shared: usize,
}

/// Of the forward kernel, the row pass and the key pass.
struct Blocks {
    forward: Block,
    /// Forward blocks that a multiprocessor holds; they walk the tiles.
    resident: usize,
    rows: Block,
    keys: Block,
}

/// Tiles of 192 slots instead of 128, for heads of at most 64: q and dy pass by fewer times. On an H200 with 1,025 slots (a CAT
/// of C 4 at 4,096 tokens) the key pass takes 0.43 ms instead of 0.46, with 513 0.20 instead of 0.24; with 257, or dense, as
/// many or fewer are better.
const MANY_SLOTS: usize = 3 * 128;
const WIDE_KEYS: &str = "WARPGROUPS=3";

fn sizes(width: usize, wide_keys: bool) -> (Tiles, Blocks) {
    let tile = 64 * width * 2;
    let groups = if wide_keys { 3 } else { 2 };
    let blocks = Blocks {
        forward: Block { threads: 384, shared: 14 * tile + 256 },
        resident: if width <= 64 { 2 } else { 1 },
        rows: Block { threads: 256, shared: 12 * tile + 3712 },
        keys: Block { threads: 128 * (groups + 1), shared: (2 * groups + 8) * tile + 4 * 512 + 128 },
    };
    let (forward, backward) = (blocks.forward.shared, blocks.rows.shared);
    (Tiles { rows: 128, slots: 64 * groups, keys: 64, threads: 256, parts: 1, forward, backward }, blocks)
}

/// A call that the Hopper kernels take, with the tensor maps that they want.
pub(super) struct Hopper {
    pub plan: Plan,
    blocks: Blocks,
    keys_variant: Variant,
    /// All rows of q, k and v.
    rows: [Arg; 3],
    /// The slots of k and v; none under [`Kind::Joined`], where the rows stand in.
    slots: [Arg; 2],
    dy: Option<Arg>,
}

impl Hopper {
    /// `None` where the kernels are not for this call. q, k, v and (backward has it) dy have dense rows.
    pub(super) fn new([q, k, v]: [&Tensor; 3], dy: Option<&Tensor>, mask: Mask, scale: f64) -> Result<Option<Self>> {
        let d = q.dim(3);
        let half = matches!(q.dtype(), DType::BF16 | DType::F16);
        let here = q.gpu()?.capability == (9, 0);
        if !here || !half || !(33..=128).contains(&d) || !d.is_multiple_of(8) || q.dim(2) < FEWEST_ROWS.min(k.dim(2)) {
            return Ok(None);
        }
        let (width, define) = if d <= 64 { (64, "HEAD_DIM=64") } else { (128, "HEAD_DIM=128") };
        let wide_keys = match mask {
            Mask::Cat { stride } if stride > 1 => width == 64 && k.dim(2).div_ceil(stride) > MANY_SLOTS,
            _ => false,
        };
        let (tiles, blocks) = sizes(width, wide_keys);
        let plan = Plan::with(tiles, define, q, k, mask, scale)?;
        if plan.kind == Kind::Joined && !plan.local_keys {
            return Ok(None); // grouped queries: their keys need a pass whose tiles may be too small to join sequences
        }
        let [Some(q), Some(all_k), Some(all_v)] = [rows(q, &plan)?, rows(k, &plan)?, rows(v, &plan)?] else {
            return Ok(None);
        };
        let slots = match plan.kind {
            Kind::Joined => [all_k, all_v],
            _ => match [every(k, plan.stride)?, every(v, plan.stride)?] {
                [Some(k), Some(v)] => [k, v],
                _ => return Ok(None),
            },
        };
        let dy = dy.map(|dy| rows(dy, &plan)).transpose()?;
        if dy.is_some_and(|map| map.is_none()) {
            return Ok(None);
        }
        let keys_variant = Variant { define: Some(if wide_keys { WIDE_KEYS } else { define }), ..plan.variant };
        Ok(Some(Self { plan, blocks, keys_variant, rows: [q, all_k, all_v], slots, dy: dy.flatten() }))
    }

    /// `words` are the plan's; y and lse are overwritten.
    pub(super) fn forward(&self, gpu: &'static Gpu, y: &mut Tensor, lse: &mut Tensor, words: Arg) -> Result<()> {
        let p = &self.plan;
        let ([q, k, v], [k_slots, v_slots]) = (self.rows, self.slots);
        let args = [q, k, v, k_slots, v_slots, y.write()?, lse.write()?, words];
        let tiles = p.row_tiles * p.heads * p.batches();
        let grid = grid(tiles.min(self.blocks.resident * gpu.multiprocessors as usize), self.blocks.forward);
        // SAFETY: the parameters are (q, k, v, k_slots, v_slots, y, lse, Attention); the maps reach what those tensors hold, the
        // plan's sizes are theirs; y and lse are new, [B, Lq, H, d] and [B, H, Lq].
        unsafe { gpu.launch(attention_sm90::attention_forward_sm90, p.variant, grid, &args) }
    }

    /// delta and dq, and dk and dv of local keys where the plan says so: `saved` is y and lse, `out` delta, dq, dk, dv.
    pub(super) fn backward_rows(&self, gpu: &'static Gpu, saved: [Arg; 2], out: [Arg; 4], words: Arg) -> Result<()> {
        let p = &self.plan;
        let args: Vec<Arg> = [self.rows.as_slice(), &self.slots, &self.dy()?, &saved, &out, &[words]].concat();
        let grid = grid(p.row_tiles * p.heads * p.batches(), self.blocks.rows);
        // SAFETY: the parameters are (q, k, v, k_slots, v_slots, dy, y, lse, delta, dq, dk, dv, Attention); the maps reach what
        // those tensors hold, the plan's sizes are theirs; the rest is the caller's, y, dq, dk, dv as [B, L, heads, d].
        unsafe { gpu.launch(attention_sm90_rows::attention_backward_rows_sm90, p.variant, grid, &args) }
    }

    /// dk and dv of slots: `saved` is lse and delta, `out` dk, dv and partial (null without splits).
    pub(super) fn backward_keys(&self, gpu: &'static Gpu, saved: [Arg; 2], out: [Arg; 3], words: Arg) -> Result<()> {
        let p = &self.plan;
        let args: Vec<Arg> = [&self.rows[..1], &self.dy()?, &self.slots, &saved, &out, &[words]].concat();
        let grid = grid(p.key_tiles * p.splits * p.key_heads * p.batches(), self.blocks.keys);
        // SAFETY: the parameters are (q, dy, k_slots, v_slots, lse, delta, dk, dv, partial, Attention), as above; partial is
        // [2, splits, B, slots, Hkv, d] where there are several splits.
        unsafe { gpu.launch(attention_sm90_keys::attention_backward_keys_sm90, self.keys_variant, grid, &args) }
    }

    fn dy(&self) -> Result<[Arg; 1]> {
        let missing = || Error::Kernel { kernel: "attention".into(), detail: "planned without dy".into() };
        self.dy.map(|dy| [dy]).ok_or_else(missing)
    }
}

fn grid(blocks: usize, of: Block) -> Grid {
    Grid::new(blocks, of.threads).shared(of.shared)
}

/// All rows of a `[B, H, L, d]` view: dimensions (d, L, H, B), or under [`Kind::Joined`] (d, B L, H, 1).
fn rows(t: &Tensor, plan: &Plan) -> Result<Option<Arg>> {
    let [batch, heads, length, d] = [t.dim(0), t.dim(1), t.dim(2), t.dim(3)];
    let [of_batch, of_head, of_row, _] = [0, 1, 2, 3].map(|i| t.layout().strides()[i]);
    if plan.kind != Kind::Joined {
        return map(t, [d, length, heads, batch], [1, of_row, of_head, of_batch]);
    }
    // one run of rows: where a sequence is one row, its batch stride is the step
    let step = if length == 1 { of_batch } else { of_row };
    if batch > 1 && of_batch != length * step {
        return Ok(None);
    }
    map(t, [d, batch * length, heads, 1], [1, step, of_head, 0])
}

/// Rows 0, step, 2 step, ...
fn every(t: &Tensor, step: usize) -> Result<Option<Arg>> {
    let [batch, heads, length, d] = [t.dim(0), t.dim(1), t.dim(2), t.dim(3)];
    let [of_batch, of_head, of_row, _] = [0, 1, 2, 3].map(|i| t.layout().strides()[i]);
    map(t, [d, length.div_ceil(step), heads, batch], [1, of_row * step, of_head, of_batch])
}

fn map(t: &Tensor, sizes: [usize; 4], strides: [usize; 4]) -> Result<Option<Arg>> {
    let kind = if t.dtype() == DType::BF16 { cuda::Kind::BF16 } else { cuda::Kind::F16 };
    boxes(t.gpu()?, t.pointer()?, kind, sizes, strides, 64)
}
