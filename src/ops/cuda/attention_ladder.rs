//! The ladder of forward attention kernels, from the definition to what ships: `kernels/lab/attention/`. For study and
//! benchmarks; bf16, heads of width 64, the mask `cat`.

use super::attention::{Plan, Tiles, heads_first, rows_first};
use super::attention_sm90::Hopper;
use crate::cuda::kernels::{lab_1_definition, lab_2_indices, lab_3_tiles, lab_4_tensor_cores};
use crate::cuda::{Grid, Symbol, Variant};
use crate::ops::attention::Mask;
use crate::tensor::{DType, Tensor};
use crate::{Error, Result};

/// A kernel of the ladder.
enum Rung {
    /// Rows of a block's tile, threads, bytes of shared memory.
    Lab(Symbol, usize, usize, usize),
    /// `kernels/attention.cu`
    Shipped,
    /// `kernels/attention_sm90.cu`
    Hopper,
}

const RUNGS: [(&str, Rung); 6] = [
    ("the definition", Rung::Lab(lab_1_definition::lab_1_definition, 4, 128, 0)),
    ("the mask as indices", Rung::Lab(lab_2_indices::lab_2_indices, 4, 128, 0)),
    ("tiles in shared memory", Rung::Lab(lab_3_tiles::lab_3_tiles, 64, 256, (4 * 64 * 65 + 64) * 4)),
    ("tensor cores", Rung::Lab(lab_4_tensor_cores::lab_4_tensor_cores, 128, 256, (128 + 2 * 64) * 72 * 2)),
    ("copies beside products", Rung::Shipped),
    ("warpgroups and bulk copies", Rung::Hopper),
];

/// What each rung adds, from the first.
pub(crate) fn rungs() -> impl Iterator<Item = &'static str> {
    RUNGS.iter().map(|(name, _)| *name)
}

/// `y` of attention by rung `n` (from 0), q, k, v bf16 `[B, H, L, 64]` with as many key heads as query heads; `None` where this
/// device has no such kernel.
pub(crate) fn rung(n: usize, q: &Tensor, k: &Tensor, v: &Tensor, stride: usize, scale: f64) -> Result<Option<Tensor>> {
    let (op, mask) = ("attention ladder", Mask::Cat { stride });
    if q.dtype() != DType::BF16 || q.rank() != 4 || q.dim(3) != 64 || q.shape() != k.shape() || k.shape() != v.shape() {
        let detail = format!("q {:?} of {}: give q, k, v [B, H, L, 64] in bf16", q.shape(), q.dtype());
        return Err(Error::shape(op, detail));
    }
    let Some((_, rung)) = RUNGS.get(n) else {
        return Err(Error::shape(op, format!("rung {n} of {}", RUNGS.len())));
    };
    let (q, k, v) = (&q.dense_rows()?, &k.dense_rows()?, &v.dense_rows()?);
    let mut y = rows_first(q)?;
    let mut lse = Tensor::empty(&q.shape()[..3], DType::F32, q.device())?;
    let plan = Plan::new(q, k, mask, scale)?;
    match rung {
        Rung::Shipped => plan.forward([q, k, v], &mut y, &mut lse)?,
        Rung::Hopper => match Hopper::new([q, k, v], None, mask, scale)? {
            Some(hopper) => hopper.forward(q.gpu()?, &mut y, &mut lse, hopper.plan.words(q, k, v, q)?)?,
            None => return Ok(None),
        },
        &Rung::Lab(symbol, rows, threads, shared) => {
            let plan = Plan::with(Tiles { rows, threads, ..plan.tiles }, "", q, k, mask, scale)?;
            let args = [q.read()?, k.read()?, v.read()?, y.write()?, lse.write()?, plan.words(q, k, v, q)?];
            // rungs of one row a warp count their rows in fours, others in the plan's tiles
            let tiles = if rows == 4 { plan.lq.div_ceil(rows) } else { plan.row_tiles };
            let grid = Grid::new(tiles * plan.heads * plan.batch, threads).shared(shared);
            let variant = Variant { define: None, ..plan.variant };
            // SAFETY: the parameters are (q, k, v, y, lse, Attention), as `Plan::forward` says.
            unsafe { q.gpu()?.launch(symbol, variant, grid, &args)? };
        }
    }
    heads_first(&y).map(Some)
}
