//! Writing rows into a larger tensor in place: how a cache grows. Has no gradient.

use super::CacheRows;
use super::cached_attention::check_rows;
use crate::tensor::Tensor;
use crate::{Error, Result};

/// `target[h, end - 1, :] = x[b, h, i, :]`, where row `r = b n + i` sees the target's rows up to `end`: target
/// `[H, T, d]`, x `[B, H, n, d]` of any strides. No two rows may have one place.
///
/// Copies the target first if others share its storage; a cache is the only owner of its own.
pub fn write_rows(target: &mut Tensor, x: &Tensor, rows: &CacheRows) -> Result<()> {
    check(target, x, rows)?;
    on_device!(target.device(), write_rows::write_rows(&mut [target], &[x], rows))
}

/// As [`write_rows`] for two targets of one shape, each from its own x.
pub fn write_row_pairs(targets: [&mut Tensor; 2], xs: [&Tensor; 2], rows: &CacheRows) -> Result<()> {
    let [a, b] = targets;
    check(a, xs[0], rows)?;
    check(b, xs[1], rows)?;
    super::elementwise::same_dtype("write_rows", &[a, b])?;
    if a.shape() != b.shape() || xs[0].shape() != xs[1].shape() {
        return Err(Error::shape(
            "write_rows",
            format!("two targets of one shape, got {:?} and {:?}", a.shape(), b.shape()),
        ));
    }
    on_device!(a.device(), write_rows::write_rows(&mut [a, b], &xs, rows))
}

fn check(target: &Tensor, x: &Tensor, rows: &CacheRows) -> Result<()> {
    super::elementwise::same_dtype("write_rows", &[target, x])?;
    let (t, s) = (target.shape(), x.shape());
    if t.len() != 3 || s.len() != 4 || t[0] != s[1] || t[2] != s[3] {
        return Err(Error::shape(
            "write_rows",
            format!("rows {s:?} do not fit into {t:?}: give [B, H, n, d] for [H, T, d]"),
        ));
    }
    check_rows("write_rows", rows, s[0] * s[2], t[1])
}
