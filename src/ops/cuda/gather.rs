//! Gathering slices along a dimension and scattering their gradients back, on CUDA.

use super::rows::{Slices, float_variant};
use crate::cuda::{Grid, kernels};
use crate::ops::cpu::gather::group;
use crate::tensor::{DType, Tensor};
use crate::{Error, Result};

/// Positions of one index from which on they are cut among the threads of a block.
const MANY: usize = 64;

/// `y[o, j, ..] = x[o, index[j], ..]`, o over the dimensions before `dim`.
pub(crate) fn gather(x: &Tensor, dim: usize, index: &[usize]) -> Result<Tensor> {
    if index.is_empty() {
        let mut shape = x.shape().to_vec();
        shape[dim] = 0;
        return Tensor::empty(&shape, x.dtype(), x.device());
    }
    match regular(index, x.dim(dim)) {
        Some((first, step)) => every(x, dim, first, step, index.len()),
        None => gather_at(x, dim, &upload(index.iter().map(|&i| i as i64).collect(), x)?),
    }
}

/// The first index and the step between them, if `index` is a run, or takes one of each `step` elements of all n.
fn regular(index: &[usize], n: usize) -> Option<(usize, usize)> {
    let (&first, second) = (index.first()?, index.get(1).or(index.first())?);
    let step = second.checked_sub(first)?.max(1);
    let whole = step == 1 || step * index.len() == n && first < step;
    (whole && index.windows(2).all(|w| w[1].checked_sub(w[0]) == Some(step))).then_some((first, step))
}

/// As [`gather`] by `first + i step`, i < m: no list travels to the device.
fn every(x: &Tensor, dim: usize, first: usize, step: usize, m: usize) -> Result<Tensor> {
    if step == 1 {
        return x.narrow(dim, first, m)?.copy();
    }
    let mut apart = x.shape().to_vec();
    apart.splice(dim..=dim, [m, step]);
    let mut shape = x.shape().to_vec();
    shape[dim] = m;
    x.reshape(&apart)?.narrow(dim + 1, first, 1)?.copy()?.reshape(&shape)
}

/// As [`gather`], by a list on the device, i64 `[m]`, whose indices the caller knows to lie inside the dimension.
pub(crate) fn gather_at(x: &Tensor, dim: usize, list: &Tensor) -> Result<Tensor> {
    let (mut shape, m) = (x.shape().to_vec(), list.numel());
    shape[dim] = m;
    let mut y = Tensor::empty(&shape, x.dtype(), x.device())?;
    let n = y.numel();
    if n == 0 {
        return Ok(y);
    }
    let s = Slices::new("index_select", x, dim)?;
    let (symbol, each) = if s.packed { (kernels::gather::gather_packed, s.pack) } else { (kernels::gather::gather, 1) };
    let sizes = [s.stride.into(), m.into(), s.width.into(), n.into()];
    let args = [&[y.write()?, x.read()?, s.lead.into(), s.inner.into(), list.read()?][..], &sizes].concat();
    // SAFETY: the parameters are (y, x, lead view, inner view, index, stride, m, w, n); indices lie inside the dimension, as
    // the caller has checked, and y is new and holds n elements.
    unsafe { x.gpu()?.launch(symbol, x.variant()?, Grid::for_each(n / each, 256), &args)? };
    Ok(y)
}

fn upload(list: Vec<i64>, beside: &Tensor) -> Result<Tensor> {
    let n = list.len();
    Tensor::from_vec(list, &[n])?.to_device(beside.device())
}

/// Positions grouped by index, for the kernel: those of group g are of index `target[g]`, `order[starts[g]..starts[g + 1]]`.
/// The groups of few positions come first.
#[derive(Debug, PartialEq)]
struct Groups {
    target: Vec<i64>,
    starts: Vec<i64>,
    order: Vec<i64>,
    /// How many groups have few positions.
    short: usize,
}

impl Groups {
    fn new(index: &[usize], n: usize) -> Self {
        if index.windows(2).all(|w| w[0] < w[1]) {
            let count = |n: usize| (0..n as i64).collect();
            let target: Vec<i64> = index.iter().map(|&i| i as i64).collect();
            return Self { short: target.len(), target, starts: count(index.len() + 1), order: count(index.len()) };
        }
        let (starts, order) = group(index, n);
        let mut groups = Self { target: vec![], starts: vec![0], order: Vec::with_capacity(index.len()), short: 0 };
        for many in [false, true] {
            for i in 0..n {
                let run = &order[starts[i]..starts[i + 1]];
                if !run.is_empty() && (run.len() >= MANY) == many {
                    groups.target.push(i as i64);
                    groups.order.extend(run.iter().map(|&j| j as i64));
                    groups.starts.push(groups.order.len() as i64);
                }
            }
            if !many {
                groups.short = groups.target.len();
            }
        }
        groups
    }
}

/// `sum[o, i, ..] += sum of dy[o, j, ..] over j with index[j] = i`, j ascending; `shape` is that of `sum`, `dtype` its dtype.
pub(crate) fn scatter_add(
    dy: &Tensor,
    dim: usize,
    index: &[usize],
    shape: &[usize],
    sum: Option<Tensor>,
    dtype: DType,
) -> Result<Tensor> {
    use kernels::scatter as kernel;
    let variant = float_variant("index_select", dy)?;
    if dtype != dy.dtype() && dtype != DType::F32 {
        return Err(Error::dtype("index_select", format!("no sum of {} in {dtype} on {}", dy.dtype(), dy.device())));
    }
    let mut dx = match sum {
        Some(sum) => sum,
        None => Tensor::zeros(shape, dtype, dy.device())?,
    };
    if dy.numel() == 0 {
        return Ok(dx);
    }
    let s = Slices::new("index_select", dy, dim)?;
    let groups = Groups::new(index, shape[dim]);
    let (short, all) = (groups.short, groups.target.len());
    let lists = upload([groups.target, groups.starts, groups.order].concat(), dy)?;
    let to = dx.write()?;
    let packed = s.packed && dx.pointer()?.is_multiple_of(16);
    let symbol = match (packed, dtype == dy.dtype()) {
        (false, true) => kernel::scatter_add,
        (false, false) => kernel::scatter_add_float,
        (true, true) => kernel::scatter_add_packed,
        (true, false) => kernel::scatter_add_float_packed,
    };
    let each = if packed { s.pack } else { 1 };
    // few positions: a thread adds them all; many: eight threads share them
    for (first, count, [across, down]) in [(0, short, [256, 1]), (short, all - short, [32, 8])] {
        let at = |n: usize| lists.pointer().map(|p| p + (n * size_of::<i64>()) as u64);
        let (target, starts, order) = (at(first)?, at(all + first)?, at(2 * all + 1)?);
        let items = count * s.leads * (s.width / each);
        let shared = if down > 1 { across * down * each * size_of::<f32>() } else { 0 };
        let grid =
            Grid { blocks: [items.div_ceil(across), 1, 1], threads: [across, down, 1], ..Grid::new(0, 0).shared(shared) };
        let views = [s.lead.into(), s.inner.into(), s.stride.into(), target.into(), starts.into(), order.into()];
        let sizes = [count.into(), s.leads.into(), shape[dim].into(), s.width.into()];
        let args = [&[to, dy.read()?][..], &views, &sizes].concat();
        // SAFETY: the parameters are (sum, dy, lead view, inner view, stride, target, starts, order, groups, leads, n, w);
        // positions lie inside dy and targets inside the dimension of `shape`, which dx has, contiguous and its own.
        unsafe { dy.gpu()?.launch(symbol, variant, grid, &args)? };
    }
    Ok(dx)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regular_lists_are_known() {
        assert_eq!(regular(&[3], 5), Some((3, 1)));
        assert_eq!(regular(&[2, 3, 4], 5), Some((2, 1)));
        assert_eq!(regular(&[1, 3, 5], 6), Some((1, 2)));
        for (index, n) in [(&[1, 3, 5][..], 8), (&[2, 4], 4), (&[3, 2], 5), (&[0, 0], 3), (&[0, 1, 3], 4), (&[], 4)] {
            assert_eq!(regular(index, n), None, "{index:?} {n}");
        }
    }
    #[test]
    fn groups_hold_every_position_once_in_order() {
        let index: Vec<usize> = (0..500).map(|j| if j % 3 == 0 { 4 } else { j * 7 % 11 }).collect();
        let g = Groups::new(&index, 12);
        assert_eq!(g.target[g.short..], [4]);
        assert_eq!(g.starts.len(), g.target.len() + 1);
        let mut seen = vec![0; 500];
        for (w, &i) in g.starts.windows(2).zip(&g.target) {
            let run = &g.order[w[0] as usize..w[1] as usize];
            assert!(!run.is_empty() && run.windows(2).all(|p| p[0] < p[1]));
            run.iter().for_each(|&j| {
                assert_eq!(index[j as usize], i as usize);
                seen[j as usize] += 1;
            });
        }
        assert!(seen.iter().all(|&n| n == 1));
        let ascending = Groups::new(&[1, 3, 4], 6);
        assert_eq!(ascending, Groups { target: vec![1, 3, 4], starts: vec![0, 1, 2, 3], order: vec![0, 1, 2], short: 3 });
    }
}
