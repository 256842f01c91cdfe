//! Change of float dtype on the CPU.

use super::simd;
use crate::tensor::{DType, Float, Real, Tensor};
use crate::{Result, with_float};
use rayon::prelude::*;

/// The same elements in another float dtype; x itself where it has that dtype.
pub(crate) fn cast(x: &Tensor, dtype: DType) -> Result<Tensor> {
    if x.dtype() == dtype {
        return Ok(x.clone());
    }
    with_float!(x.dtype(), "cast", S => with_float!(dtype, "cast", D => cast_rows::<S, D>(x)))
}

/// The same elements in another float dtype, rounded to nearest.
pub(crate) fn cast_rows<S: Float, D: Float>(x: &Tensor) -> Result<Tensor> {
    let x = x.contiguous()?;
    let src = x.as_slice::<S>()?;
    let mut y = Tensor::unspecified(x.shape(), D::DTYPE);
    let out = y.as_mut_slice::<D>()?;
    out.par_chunks_mut(16_384).zip(src.par_chunks(16_384)).for_each(|(out, src)| {
        simd(
            #[inline(always)]
            || {
                for (y, x) in out.iter_mut().zip(src) {
                    *y = convert(*x);
                }
            },
        )
    });
    Ok(y)
}

/// Through f32 where the wider side is f32, else through f64; both are exact for the narrower types.
#[inline(always)]
fn convert<S: Float, D: Float>(x: S) -> D {
    D::from_acc(<D::Acc as Real>::of(x.to_acc().f64()))
}
