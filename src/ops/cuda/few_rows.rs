//! Products of a few rows on CUDA, with the norm before and what follows them: kernels/few_rows.cu.

use super::packs;
use crate::Result;
use crate::cuda::{Grid, kernels::few_rows as kernel};
use crate::tensor::{Tensor, read_or_null};

const OP: &str = "fused_linear";
/// Threads of a block, rows that it has at most, and columns that it takes at a time, as in the kernel.
const THREADS: usize = 256;
const ROWS: usize = 8;
const COLUMNS: usize = 8;
/// Shared memory of a block beside the rows is at most this, and what the driver keeps of it.
const FIXED: usize = 8704 + 1024;

/// The result `[R, O]` for x `[R, I]` and what `FusedLinear` has, checked; `None` where R is not few, or rows are so long that a
/// block cannot hold one (some 50,000 elements).
pub(crate) fn product(
    x: &Tensor,
    norm: Option<(&Tensor, f64)>,
    (w, up): (&Tensor, Option<&Tensor>),
    bias: Option<&Tensor>,
    residual: Option<&Tensor>,
    settled: bool,
) -> Result<Option<Tensor>> {
    let (rows, k, columns) = (x.dim(0), x.dim(1), w.dim(0));
    if rows > ROWS || rows * k * columns == 0 || columns >= 1 << 30 {
        return Ok(None);
    }
    let gpu = x.gpu()?;
    let (size, shared) = (x.dtype().size(), gpu.shared_per_block as usize);
    let pitch = (k * size).div_ceil(2048) * 2048 + 64;
    // a 16-bit norm has two parts, and its weight lies beside them
    let bytes = (rows * if norm.is_some() && size == 2 { 2 } else { 1 } + usize::from(norm.is_some())) * pitch;
    if bytes + FIXED > shared {
        return Ok(None);
    }
    // what has to be copied first is not settled
    let lies = |t: &Tensor| t.dim(t.rank() - 1) < 2 || t.layout().strides()[t.rank() - 1] == 1;
    let dense_already = lies(w) && up.is_none_or(lies) && norm.is_none_or(|n| lies(n.0));
    let dense = |t: Option<&Tensor>| t.map(Tensor::dense_rows).transpose();
    let (x, w, up, g) = (x.dense_rows()?, w.dense_rows()?, dense(up)?, dense(norm.map(|n| n.0))?);
    let (bias, residual) = (dense(bias)?, dense(residual)?);
    let moved: Vec<&Tensor> = [Some(&x), Some(&w), up.as_ref(), g.as_ref()].into_iter().flatten().collect();
    let variant = packs::variant(OP, &moved)?;
    let mut y = Tensor::empty(&[rows, columns], x.dtype(), x.device())?;
    // All blocks run at once, by the kernels' registers and their shared memory, and have as many columns each: then they come
    // to an end together.
    let packed = variant.define == Some("PACKED=1");
    let by_registers = match (packed, size, up.is_some()) {
        (true, 2, false) => 4,
        (true, 2, true) | (true, _, false) => 3,
        _ => 2,
    };
    let resident = ((shared + 1024) / (bytes + FIXED)).clamp(1, by_registers);
    let (parcels, slots) = (columns.div_ceil(COLUMNS), gpu.multiprocessors as usize * resident);
    let blocks = parcels.div_ceil(parcels.div_ceil(slots));

    let row = |t: &Tensor| t.layout().strides()[0] as u64;
    let eps = u64::from((norm.map_or(0.0, |n| n.1) as f32).to_bits());
    let words = [
        rows as u64,
        k as u64,
        columns as u64,
        rows as u64,
        row(&x),
        row(&w),
        up.as_ref().map_or(0, row),
        residual.as_ref().map_or(0, row),
        columns as u64,
        eps,
    ];
    let mut args = vec![y.write()?, x.read()?, read_or_null(g.as_ref())?, w.read()?];
    for t in [&up, &bias, &residual] {
        args.push(read_or_null(t.as_ref())?);
    }
    args.push(words.into());
    let symbol = if up.is_some() { kernel::few_rows_gated } else { kernel::few_rows };
    let grid = Grid::new(blocks, THREADS).shared(bytes).early(settled && dense_already);
    // SAFETY: the parameters are (y, x, g, w, up, bias, residual, words), null where there is none; shapes and dtypes are checked
    // by the op; rows are dense, and begin and end on 16 bytes where the variant says so; y is new, [rows, columns] and
    // contiguous; `rows` rows of the pitch that the kernel computes fit the shared memory. Weights are all that is read before
    // earlier kernels are done, if those have nothing to do with them (`settled`).
    unsafe { gpu.launch(symbol, variant, grid, &args)? };
    Ok(Some(y))
}
