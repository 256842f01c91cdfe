//! Rows of a cache in 8 bits: what they are, and writing them in place. Has no gradient.

use super::CacheRows;
use super::cached_attention::check_rows;
use super::elementwise::{same_device, same_dtype};
use crate::tensor::{DType, Device, Tensor};
use crate::{Error, Result};

/// Rows `[H, T, d]` as 8-bit integers with one f32 scale each: element `[h, t, i]` is `numbers[h, t, i] * scales[h, t]`.
///
/// `1 + 4/d` bytes an element, whatever dtype the rows had.
#[derive(Clone, Debug)]
pub struct Int8Rows {
    pub(crate) numbers: Tensor,
    pub(crate) scales: Tensor,
}

impl Int8Rows {
    /// From integers, int8 `[H, T, d]`, and their scales, f32 `[H, T]`. Both may have any strides.
    pub fn new(numbers: Tensor, scales: Tensor) -> Result<Self> {
        const OP: &str = "Int8Rows::new";
        same_device(OP, &[&numbers, &scales])?;
        if numbers.dtype() != DType::I8 || scales.dtype() != DType::F32 {
            let detail = format!("{} numbers and {} scales: give i8 and f32", numbers.dtype(), scales.dtype());
            return Err(Error::dtype(OP, detail));
        }
        if numbers.rank() != 3 || numbers.shape()[..2] != *scales.shape() {
            let (n, s) = (numbers.shape(), scales.shape());
            return Err(Error::shape(OP, format!("numbers {n:?} and scales {s:?}: give [H, T, d] and [H, T]")));
        }
        Ok(Self { numbers, scales })
    }
    /// All zeros, shape `[H, T, d]`.
    pub fn zeros(shape: [usize; 3], device: Device) -> Result<Self> {
        let numbers = Tensor::zeros(&shape, DType::I8, device)?;
        Ok(Self { numbers, scales: Tensor::zeros(&shape[..2], DType::F32, device)? })
    }
    /// The integers, int8 `[H, T, d]`, from -127 to 127.
    pub fn numbers(&self) -> &Tensor {
        &self.numbers
    }
    /// What they are multiplied by, f32 `[H, T]`.
    pub fn scales(&self) -> &Tensor {
        &self.scales
    }
    /// As implementations take it: rows of numbers dense, scales without gaps.
    pub(super) fn dense(&self) -> Result<Self> {
        Ok(Self { numbers: self.numbers.dense_rows()?, scales: self.scales.contiguous()? })
    }
    /// Bytes of `rows` rows of width `d`.
    pub const fn bytes(rows: usize, d: usize) -> usize {
        rows * (d * DType::I8.size() + DType::F32.size())
    }
}

/// As [`write_row_pairs`](super::write_row_pairs) for 8-bit targets: of each row x of d elements
/// `scale = max |x| / 127` in f32 and `number = round(x / scale)` to the nearest, even where two are as near. So an element
/// errs by half a scale at most, where the scale is a normal number (smaller rows may vanish). A row of zeros has the scale
/// 0, and one that is not finite a scale that is not.
///
/// A row's numbers and scale depend on nothing but the row.
pub fn write_int8_rows(targets: [&mut Int8Rows; 2], xs: [&Tensor; 2], rows: &CacheRows) -> Result<()> {
    const OP: &str = "write_int8_rows";
    same_dtype(OP, &xs)?;
    if !xs[0].dtype().is_float() {
        return Err(Error::dtype(OP, format!("needs rows of a float dtype, got {}", xs[0].dtype())));
    }
    let (t, s) = (targets[0].numbers.shape(), xs[0].shape());
    let same = t == targets[1].numbers.shape() && s == xs[1].shape();
    if !same || s.len() != 4 || t[0] != s[1] || t[2] != s[3] {
        let (other_t, other_s) = (targets[1].numbers.shape(), xs[1].shape());
        let detail =
            format!("rows {s:?} and {other_s:?} do not fit into {t:?} and {other_t:?}: give [B, H, n, d] for [H, T, d]");
        return Err(Error::shape(OP, detail));
    }
    check_rows(OP, rows, s[0] * s[2], t[1])?;
    same_device(OP, &[xs[0], &targets[0].numbers, &targets[1].numbers])?;
    on_device!(xs[0].device(), write_int8_rows::write_int8_rows(targets, xs, rows))
}
