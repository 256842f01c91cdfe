//! Attention to a cache on CUDA: which kernel takes it. kernels/cached_attention.cu explains why that changes no bit.

use super::packs::in_packs_of;
use crate::cuda::{Arg, Grid, Variant, kernels::cached_attention as kernel};
use crate::ops::{CacheRows, Int8Rows};
use crate::tensor::{DType, Tensor, read_or_null};
use crate::{Error, Result};

const OP: &str = "cached_attention";
/// The kernels by the heads that they are for (without packs, with packs), and how wide those may be.
const CASES: [(usize, [&str; 2]); 3] =
    [(64, ["CASE=0", "CASE=1"]), (128, ["CASE=2", "CASE=3"]), (256, ["CASE=4", "CASE=5"])];
/// The same for keys and values of 8 bits.
const INT8_CASES: [(usize, [&str; 2]); 3] =
    [(64, ["CASE=6", "CASE=7"]), (128, ["CASE=8", "CASE=9"]), (256, ["CASE=10", "CASE=11"])];
/// Keys that are summed up before they are joined to others, as in the kernel.
const CHUNK: usize = 1024;

pub(crate) fn forward(q: &Tensor, k: &Tensor, v: &Tensor, rows: &CacheRows, scale: f64) -> Result<Tensor> {
    attend(q, [k, v], None, rows, scale)
}

pub(crate) fn forward_int8(q: &Tensor, k: &Int8Rows, v: &Int8Rows, rows: &CacheRows, scale: f64) -> Result<Tensor> {
    attend(q, [&k.numbers, &v.numbers], Some([&k.scales, &v.scales]), rows, scale)
}

/// Keys and values are of q's dtype, or int8 to be multiplied by the scales given.
fn attend(q: &Tensor, [k, v]: [&Tensor; 2], scales: Option<[&Tensor; 2]>, rows: &CacheRows, scale: f64) -> Result<Tensor> {
    let &[b, heads, n, d] = q.shape() else { return Err(Error::shape(OP, "q needs four dimensions")) };
    let (cases, kept_pack) = if scales.is_some() { (INT8_CASES, 8) } else { (CASES, 16) };
    let Some((_, cases)) = cases.iter().find(|(widest, _)| d <= *widest) else {
        let detail = format!("heads of width {d} have no kernel on {}: use at most 256", q.device());
        return Err(Error::shape(OP, detail));
    };
    let mut y = Tensor::empty(&[b, n, heads, d], q.dtype(), q.device())?;
    if y.numel() > 0 {
        let (gpu, seen) = (q.gpu()?, rows.on(q.device())?);
        let (group, pairs, chunks) = (heads / k.dim(0), b * n * heads, rows.most().div_ceil(CHUNK));
        // one warp of a wide block has a sixteenth of a chunk to read, of another a quarter of the run: with two pairs a
        // multiprocessor there are not warps enough otherwise
        let wide = pairs <= 2 * gpu.multiprocessors as usize;
        let packed = in_packs_of(16, OP, q)? && in_packs_of(kept_pack, OP, k)? && in_packs_of(kept_pack, OP, v)?;
        let variant = Variant { define: Some(cases[usize::from(packed)]), ..q.variant()? };
        let (qs, ks, vs) = (q.layout().strides(), k.layout().strides(), v.layout().strides());
        let [n, group_, heads_, d_, chunks_] = [n, group, heads, d, chunks].map(|x| x as u64);
        let strides = [qs[0], qs[1], qs[2], ks[0], ks[1], vs[0], vs[1]].map(|x| x as u64);
        let [q_batch, q_head, q_row, k_head, k_row, v_head, v_row] = strides;
        let scale = u64::from((scale as f32).to_bits());
        let [k_scales, v_scales] = match scales {
            Some([k, v]) => [k.pointer()?, v.pointer()?],
            None => [0, 0],
        };
        #[rustfmt::skip]
        let words = [
            b as u64 * n, n, heads_, group_, d_, q_batch, q_head, q_row, k_head, k_row, v_head, v_row, chunks_, scale,
            k_scales, v_scales, k.dim(1) as u64,
        ];
        let mut args = vec![y.write()?, q.read()?, k.read()?, v.read()?, seen.read()?];
        if !wide {
            let (symbol, share) = match group {
                1 => (kernel::cached_attention_one, 1),
                2 => (kernel::cached_attention_two, 2),
                _ => (kernel::cached_attention_four, 4),
            };
            args.push(words.into());
            // SAFETY: the parameters are (y, q, k, v, seen, words); rows of q, k and v are dense, and begin and end on 16 bytes
            // (of 8-bit keys and values on 8) where the variant says so; scales, where there are any, are dense, one a row of k
            // and v, and live as long as those; y is new; seen has a start and an end inside k and v for each row, as the op has
            // checked.
            unsafe {
                gpu.launch(symbol, variant, Grid::new(pairs / group * group.div_ceil(share), 128).early(true), &args)?
            };
        } else {
            let new = || Tensor::empty(&[pairs, chunks, d + 2], DType::F32, q.device());
            let partial = if chunks > 1 { Some(new()?) } else { None };
            args.extend([read_or_null(partial.as_ref())?, words.into()]);
            let grid = Grid { blocks: [pairs, chunks, 1], ..Grid::new(pairs, 512) };
            // SAFETY: as above; no run passes `chunks`, and `partial`, which is new, has room for all of them, or there is one
            // and it is not written.
            unsafe { gpu.launch(kernel::cached_attention_wide, variant, grid.early(true), &args)? };
            if let Some(partial) = partial {
                let mut args = vec![y.write()?, partial.read()?, seen.read()?];
                args.extend([rows.len(), heads, d, chunks].map(Arg::from));
                // SAFETY: the parameters are (y, partial, seen, rows, H, d, chunks) of the launch before.
                unsafe {
                    gpu.launch(kernel::cached_attention_join, variant, Grid::for_each(pairs * d, 128).early(true), &args)?
                };
            }
        }
    }
    y.permute(&[0, 2, 1, 3])
}
