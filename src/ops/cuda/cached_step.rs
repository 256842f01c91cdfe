//! A step of decoding on CUDA, from the fused projection on, in one launch: kernels/cached_step.cu.

use super::packs::{in_packs, pack};
use crate::Result;
use crate::cuda::{Arg, Grid, Variant, kernels::cached_step as kernel};
use crate::ops::qk_norm_rope::{Heads, Weights};
use crate::ops::{CacheRows, RopeTable};
use crate::tensor::{Tensor, read_or_null};

const OP: &str = "cached_step";
/// The modules by the width of heads.
const CASES: [(usize, &str); 3] = [(64, "CASE=1"), (128, "CASE=3"), (256, "CASE=5")];
/// Keys that are summed up before they are joined to others, as in the kernel.
const CHUNK: usize = 1024;

/// joint `[1, R, (H + 2 Hkv) d]`: its keys, normed and turned, and its values are written into k and v `[Hkv, T, d]` at the rows'
/// places, and what each row then sees of them is attended to: `[1, R, H d]`. Rows stand in groups (`CacheRows::groups`).
///
/// None, and nothing done, where the ops one by one do better or no kernel fits.
#[allow(clippy::too_many_arguments)] // what the ops that it stands for have
pub(crate) fn forward(
    joint: &Tensor,
    (heads, weights): (Heads, Option<&Weights>),
    table: &RopeTable,
    [k, v]: [&mut Tensor; 2],
    rows: &CacheRows,
    scale: f64,
    settled: bool,
) -> Result<Option<Tensor>> {
    // what does not fit is told by the ops one by one
    let all = heads.kv.checked_mul(2).and_then(|kv| kv.checked_add(heads.q));
    let (&[1, r, width], &[kv, room, d]) = (joint.shape(), k.shape()) else { return Ok(None) };
    let beside: Vec<&Tensor> = [&*k, &*v].into_iter().chain(weights.into_iter().flat_map(|w| [&w.q, &w.k])).collect();
    let same = beside.iter().all(|t| t.dtype() == joint.dtype() && t.device() == joint.device());
    let weighed = weights.is_none_or(|w| w.q.shape() == [d] && w.k.shape() == [d]);
    let grouped = heads.kv > 0
        && heads.q.is_multiple_of(heads.kv)
        && kv == heads.kv
        && all.and_then(|all| all.checked_mul(d)) == Some(width);
    let placed = rows.len() == r && rows.least() <= room && table.len() == r && k.shape() == v.shape();
    if !(joint.dtype().is_float() && same && weighed && grouped && placed) || r * heads.q == 0 {
        return Ok(None);
    }
    let (n, p, half) = (table.width(), pack(joint), table.width() / 2);
    let Some((_, case)) = CASES.iter().find(|(wide, _)| d == *wide) else { return Ok(None) };
    if d / p > 32 || !half.is_multiple_of(p) || n > d || heads.q > 65_535 {
        return Ok(None);
    }
    let Some(groups) = rows.groups() else { return Ok(None) };
    let gpu = joint.gpu()?;
    let (group, pairs, most, many) = (heads.q / heads.kv, groups * heads.q, rows.most(), gpu.multiprocessors as usize);
    // the blocks of cached_attention read keys once for all heads of a group, or a long run a chunk each
    if (group > 1 && pairs > 2 * many) || (most > CHUNK && pairs <= 2 * many) {
        return Ok(None);
    }
    let joint = joint.dense_rows()?;
    k.make_owner()?;
    v.make_owner()?;
    let mut packed = true;
    for t in [&joint, &*k, &*v].into_iter().chain(weights.into_iter().flat_map(|w| [&w.q, &w.k])) {
        packed &= in_packs(OP, t)?;
    }
    if !packed {
        return Ok(None);
    }
    // keys of four teams: of no more, sixteen warps have nothing to do that four have not
    let short = 4 * 128 * p / d;
    let (symbols, blocks, threads) = if pairs <= many && most > short {
        ([kernel::cached_step_wide, kernel::cached_pairs_wide], heads.q, 512)
    } else if pairs <= 10 * many {
        ([kernel::cached_step_four, kernel::cached_pairs_four], heads.q, 128)
    } else {
        ([kernel::cached_step_one, kernel::cached_pairs_one], heads.q.div_ceil(4), 128)
    };
    let two = groups < r;
    let symbol = symbols[usize::from(two)];
    let grid = Grid { blocks: [groups, blocks, 1], ..Grid::new(groups, threads) };
    let mut y = Tensor::empty(&[1, r, heads.q * d], joint.dtype(), joint.device())?;
    let (wq, wk) = (read_or_null(weights.map(|w| &w.q))?, read_or_null(weights.map(|w| &w.k))?);
    let [index, angles] = table.on(joint.device())?;
    let seen = if two { rows.groups_on(joint.device())? } else { rows.on(joint.device())? };
    let mut args = vec![y.write()?, joint.read()?, wq, wk, angles.read()?, index.read()?];
    args.extend([k.write()?, v.write()?, seen.read()?]);
    let [scale, eps] = [scale as f32, weights.map_or(0.0, |w| w.eps as f32)].map(|x| u64::from(x.to_bits()));
    let [r, h, group, n, row, head] = [r, heads.q, group, n, joint.layout().strides()[1], room * d].map(|x| x as u64);
    args.push(Arg::from([r, h, group, n, row, head, scale, eps]));
    let variant = Variant { define: Some(case), ..joint.variant()? };
    // SAFETY: the parameters are (y, joint, weights of q and k or null, table, index, k, v, seen, words), the words being rows,
    // H, H / Hkv, n, joint's stride, elements of a head of k and v, scale and eps; y is new and holds H d elements a row; joint's
    // rows hold (H + 2 Hkv) d, densely; weights hold d; index has an element for each row, naming a row of the table, which is
    // n <= d wide; k and v are contiguous and their own; seen has for each row, or for each group where these have two, a run
    // inside k and v, not empty, and no group's run holds another's place. Rows of all begin and end on 16 bytes, and so do halves of pairs. The weights are all that is
    // read before earlier kernels are done, if those have nothing to do with them (`settled`).
    unsafe { gpu.launch(symbol, variant, grid.early(settled), &args)? };
    Ok(Some(y))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::DType;

    /// Results cannot show whether the step is one kernel, for they are the ops' in every bit: this does.
    #[test]
    fn steps_are_one_kernel() {
        let Some(cuda) = crate::devices::cuda() else { return };
        let (heads, d, keys) = (32, 64, 40);
        for dtype in [DType::BF16, DType::F16, DType::F32] {
            for (texts, each) in [(1, 1), (1, 2), (30, 1), (30, 2), (320, 1), (320, 2)] {
                let seen = (0..texts).flat_map(|t| (0..each).map(move |i| t * keys..(t + 1) * keys - each + i + 1));
                let rows = CacheRows::new(seen.collect()).unwrap();
                let shape = [1, texts * each, 3 * heads * d];
                // whatever it holds, the choice of kernels is the same
                let joint = Tensor::zeros(&shape, dtype, cuda).unwrap();
                let cache = || Tensor::zeros(&[heads, texts * keys, d], dtype, cuda).unwrap();
                let (mut k, mut v) = (cache(), cache());
                let table = RopeTable::new(&vec![3; texts * each], d, 1e4).unwrap();
                let of = Heads { q: heads, kv: heads };
                let y = forward(&joint, (of, None), &table, [&mut k, &mut v], &rows, 0.125, true).unwrap();
                assert!(y.is_some(), "{texts} texts of {each} rows in {dtype}");
            }
        }
    }
}
