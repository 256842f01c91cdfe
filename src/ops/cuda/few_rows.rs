//! Linear maps of a few rows on CUDA, with what stands around them (`fused_linear`).

use super::packs::variant;
use crate::Result;
use crate::cuda::{Grid, Symbol, kernels::few_rows as kernel};
use crate::tensor::{Tensor, read_or_null};

const OP: &str = "fused_linear";

/// Kernels by the rows that they are for: plain and gated.
const KERNELS: [(usize, [Symbol; 2]); 4] = [
    (1, [kernel::few_rows_1, kernel::few_rows_gated_1]),
    (2, [kernel::few_rows_2, kernel::few_rows_gated_2]),
    (4, [kernel::few_rows_4, kernel::few_rows_gated_4]),
    (8, [kernel::few_rows_8, kernel::few_rows_gated_8]),
];
/// Warps of a block.
const WARPS: usize = 4;

/// The result `[R, O]` for x `[R, I]`, or `None` where R is not few or a weight's rows have gaps: arguments as `FusedLinear`
/// has them, checked.
pub(crate) fn product(
    x: &Tensor,
    norm: Option<(&Tensor, f64)>,
    (w, up): (&Tensor, Option<&Tensor>),
    bias: Option<&Tensor>,
    residual: Option<&Tensor>,
    settled: bool,
) -> Result<Option<Tensor>> {
    let (rows, k, cols) = (x.dim(0), x.dim(1), w.dim(0));
    let Some(&(most, symbols)) = KERNELS.iter().find(|(most, _)| rows <= *most).filter(|_| rows * k * cols > 0) else {
        return Ok(None);
    };
    let dense = |t: &Tensor| k == 1 || t.layout().strides()[1] == 1;
    if !dense(w) || !up.is_none_or(dense) {
        return Ok(None);
    }
    let (x, g) = (x.dense_rows()?, norm.map(|(g, _)| g.contiguous()).transpose()?);
    let (bias, residual) = (bias.map(Tensor::contiguous).transpose()?, residual.map(Tensor::dense_rows).transpose()?);
    let mut y = Tensor::empty(&[rows, cols], x.dtype(), x.device())?;
    let variant = variant(OP, &[&x, w].into_iter().chain(up).chain(&g).collect::<Vec<_>>())?;
    let row = |t: Option<&Tensor>| t.map_or(0, |t| t.layout().strides()[0] as u64);
    let words = [
        rows as u64,
        k as u64,
        cols as u64,
        row(Some(&x)),
        row(Some(w)),
        row(up),
        row(residual.as_ref()),
        cols as u64,
        u64::from((norm.map_or(0.0, |n| n.1) as f32).to_bits()),
    ];
    let mut args = vec![y.write()?, x.read()?, read_or_null(g.as_ref())?, w.read()?, read_or_null(up)?];
    args.extend([read_or_null(bias.as_ref())?, read_or_null(residual.as_ref())?, words.into()]);
    // a warp takes two columns where there are many rows, else one, and one of each weight where there are two
    let warps = if up.is_none() && most > 2 { cols.div_ceil(2) } else { cols };
    let grid = Grid::new(warps.div_ceil(WARPS), 32 * WARPS).early(settled);
    // SAFETY: the parameters are (y, x, g or null, w, up or null, bias or null, residual or null, words): rows of x, w, up and
    // residual are dense, and begin and end on 16 bytes where the variant says so; all are as large as the op has checked; y is
    // new. Weights are all that is read before earlier kernels are done, if those have nothing to do with them (`settled`).
    unsafe { x.gpu()?.launch(symbols[usize::from(up.is_some())], variant, grid, &args)? };
    Ok(Some(y))
}
