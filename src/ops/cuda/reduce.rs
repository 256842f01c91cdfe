//! Sums over any dimensions on CUDA. How they are cut follows from the shape alone (see kernels/reduce.cu).

use super::rows::{Teams, float_variant};
use crate::Result;
use crate::cuda::{Arg, Grid, Packs, View, kernels::reduce as kernel};
use crate::tensor::{DType, Tensor};

/// Blocks that keep a large device busy: sums of fewer are cut into runs.
const BLOCKS: usize = 1024;
/// Threads of a block.
const THREADS: usize = 256;

/// Sizes and strides of some dimensions.
type Dims = Vec<(usize, usize)>;

fn view(dims: &[(usize, usize)]) -> Result<View> {
    let (shape, strides): (Vec<usize>, Vec<usize>) = dims.iter().copied().unzip();
    View::new("sum", &shape, &strides)
}

fn count(dims: &[(usize, usize)]) -> usize {
    dims.iter().map(|d| d.0).product()
}

/// True where every stride is a multiple of 16 bytes.
fn aligned(dims: &[(usize, usize)], pack: usize) -> bool {
    dims.iter().all(|d| d.1 % pack == 0)
}

/// Sum over `dims` (kept as size 1), in f32.
pub(crate) fn sum(x: &Tensor, dims: &[usize]) -> Result<Tensor> {
    float_variant("sum", x)?;
    let shape: Vec<usize> = (0..x.rank()).map(|d| if dims.contains(&d) { 1 } else { x.dim(d) }).collect();
    if x.numel() == 0 {
        return Tensor::zeros(&shape, x.dtype(), x.device());
    }
    let mut y = Tensor::empty(&shape, x.dtype(), x.device())?;
    // dimensions of one element change nothing, whichever they are
    let real: Vec<usize> = (0..x.rank()).filter(|&d| x.dim(d) != 1).collect();
    let last = real.last().copied();
    let by_columns = last.is_some_and(|d| !dims.contains(&d));
    let stride = last.map_or(1, |d| x.layout().strides()[d]);
    // lanes read neighbours: where those lie apart, a copy (by tiles) costs less
    let x = if stride == 1 || (stride == 0 && !by_columns) { x.clone() } else { x.contiguous()? };
    let of = |summed: bool| -> Dims {
        let side = real.iter().filter(|d| dims.contains(d) == summed);
        side.map(|&d| (x.dim(d), x.layout().strides()[d])).collect()
    };
    let (mut kept, summed) = (of(false), of(true));
    match (by_columns, kept.pop()) {
        (true, Some((w, _))) => columns(&mut y, &x, &kept, &summed, w)?,
        (_, popped) => {
            kept.extend(popped);
            rows(&mut y, &x, &kept, &summed)?;
        }
    }
    Ok(y)
}

/// The last dimension is summed.
fn rows(y: &mut Tensor, x: &Tensor, kept: &[(usize, usize)], summed: &[(usize, usize)]) -> Result<()> {
    let (m, n) = (count(kept), count(summed));
    let pack = 16 / x.dtype().size();
    // enough runs for every block, each a multiple of what 256 threads take at a time
    let run = if n <= 16_384 || m >= BLOCKS { n } else { n.div_ceil(BLOCKS).next_multiple_of(2048).max(16_384) };
    let runs = n.div_ceil(run);
    let (kept_view, summed_view) = (view(kept)?, view(summed)?);
    let packed = aligned(kept, pack) && summed_view.packs(x.pointer()?, x.dtype().size()) == Packs::Dense;
    let launch = |symbol, y: Arg, x_arg: Arg, views: [View; 2], [n, run, runs]: [usize; 3], packed: bool| {
        let teams = Teams::new(m * runs, run);
        let sizes = [m.into(), n.into(), run.into(), runs.into(), teams.lanes.into(), packed.into()];
        let args: Vec<Arg> = [y, x_arg, views[0].into(), views[1].into()].into_iter().chain(sizes).collect();
        // SAFETY: the parameters are (y, x, kept view, summed view, m, n, run, runs, lanes, packed); the views lie inside
        // x, y is the caller's own and holds m elements, or partial sums m times runs.
        unsafe { x.gpu()?.launch(symbol, x.variant()?, teams.grid, &args) }
    };
    if runs == 1 {
        return launch(kernel::sum_rows, y.write()?, x.read()?, [kept_view, summed_view], [n, run, 1], packed);
    }
    let mut partial = Tensor::empty(&[m, runs], DType::F32, x.device())?;
    launch(kernel::sum_rows_partial, partial.write()?, x.read()?, [kept_view, summed_view], [n, run, runs], packed)?;
    let views = [view(&[(m, runs)])?, view(&[(runs, 1)])?];
    launch(kernel::sum_rows_finish, y.write()?, partial.read()?, views, [runs, runs, 1], runs.is_multiple_of(4))
}

/// The last dimension, of w elements, is kept, and dense.
fn columns(y: &mut Tensor, x: &Tensor, kept: &[(usize, usize)], summed: &[(usize, usize)], w: usize) -> Result<()> {
    let (m, n) = (count(kept), count(summed));
    let launch = |symbol, y: Arg, x_arg: Arg, views: [View; 2], [pack, n, run, runs]: [usize; 4], packed: bool| {
        let threads = threads(w, pack);
        let grid = Grid { blocks: [w.div_ceil(threads[0] * pack) * m, runs, 1], threads, ..Grid::new(0, 0) };
        let sizes = [w.into(), n.into(), run.into(), runs.into(), packed.into()];
        let args: Vec<Arg> = [y, x_arg, views[0].into(), views[1].into()].into_iter().chain(sizes).collect();
        // SAFETY: the parameters are (y, x, kept view, summed view, w, n, run, runs, packed); the views lie inside x, y is
        // the caller's own and holds m w elements, or partial sums m runs w.
        unsafe { x.gpu()?.launch(symbol, x.variant()?, grid, &args) }
    };
    let pack = 16 / x.dtype().size();
    let [across, down, _] = threads(w, pack);
    // enough blocks, but four rows a thread
    let wanted = BLOCKS.div_ceil(w.div_ceil(across * pack) * m).min(n.div_ceil(4 * down));
    let run = n.div_ceil(wanted);
    let runs = n.div_ceil(run);
    let views = [view(kept)?, view(summed)?];
    let packed = aligned(kept, pack) && aligned(summed, pack) && x.pointer()?.is_multiple_of(16);
    if runs == 1 {
        return launch(kernel::sum_columns, y.write()?, x.read()?, views, [pack, n, run, 1], packed);
    }
    let mut partial = Tensor::empty(&[m, runs, w], DType::F32, x.device())?;
    launch(kernel::sum_columns_partial, partial.write()?, x.read()?, views, [pack, n, run, runs], packed)?;
    let views = [view(&[(m, runs * w)])?, view(&[(runs, w)])?];
    launch(kernel::sum_columns_finish, y.write()?, partial.read()?, views, [4, runs, runs, 1], w.is_multiple_of(4))
}

/// Threads of a block over `w` columns, `pack` a thread: along columns, and along rows.
fn threads(w: usize, pack: usize) -> [usize; 3] {
    let across = w.div_ceil(pack).next_power_of_two().min(32);
    [across, THREADS / across, 1]
}
