//! Attention to a cache on CUDA.

use super::packs::{in_packs, pack};
use crate::cuda::{Arg, Grid, kernels::cached_attention as kernel};
use crate::ops::CacheRows;
use crate::tensor::Tensor;
use crate::{Error, Result};

const OP: &str = "cached_attention";
/// The widest head that the kernel has registers for.
const WIDEST: usize = 256;

pub(crate) fn forward(q: &Tensor, k: &Tensor, v: &Tensor, rows: &CacheRows, scale: f64) -> Result<Tensor> {
    let &[b, heads, n, d] = q.shape() else { return Err(Error::shape(OP, "q needs four dimensions")) };
    if d > WIDEST {
        let detail = format!("heads of width {d} have no kernel on {}: use at most {WIDEST}", q.device());
        return Err(Error::shape(OP, detail));
    }
    let mut y = Tensor::empty(&[b, n, heads, d], q.dtype(), q.device())?;
    if y.numel() > 0 {
        let seen = rows.on(q.device())?;
        let packed = d.is_multiple_of(pack(k)) && in_packs(OP, k)?;
        let (qs, ks, vs) = (q.layout().strides(), k.layout().strides(), v.layout().strides());
        let mut args = vec![y.write()?, q.read()?, k.read()?, v.read()?, seen.read()?];
        args.extend([b * n, n, heads, heads / k.dim(0), d].map(Arg::from));
        args.extend([qs[0], qs[1], qs[2], ks[0], ks[1], vs[0], vs[1]].map(Arg::from));
        args.extend::<[Arg; 2]>([(scale as f32).into(), packed.into()]);
        // SAFETY: the parameters are (y, q, k, v, seen, rows, n, H, group, d, q's strides of batch, head and row, k's and v's of
        // head and row, scale, whether k's rows are read in packs); rows of q, k and v are dense, y is new; seen has a start
        // and an end inside k and v for each row, as the op has checked.
        unsafe { q.gpu()?.launch(kernel::cached_attention, q.variant()?, Grid::new(b * n * heads, 128), &args)? };
    }
    y.permute(&[0, 2, 1, 3])
}
