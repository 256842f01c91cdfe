//! Writing rows into a larger tensor in place: how a cache grows. Has no gradient.

use crate::tensor::Tensor;
use crate::{Error, Result};

/// `target[:, :, at..at+n, :] = rows`: target `[B, H, R, d]`, rows `[B, H, n, d]` of any strides.
///
/// Copies the target first if others share its storage; a cache is the only owner of its own.
pub fn write_rows(target: &mut Tensor, rows: &Tensor, at: usize) -> Result<()> {
    super::elementwise::same_dtype("write_rows", &[target, rows])?;
    let (t, r) = (target.shape(), rows.shape());
    let fits = t.len() == 4 && r.len() == 4 && t[..2] == r[..2] && t[3] == r[3];
    if !fits || at.checked_add(r[2]).is_none_or(|end| end > t[2]) {
        return Err(Error::shape("write_rows", format!("rows {r:?} at {at} do not fit into {t:?}")));
    }
    on_device!(target.device(), write_rows::write_rows(target, rows, at))
}
