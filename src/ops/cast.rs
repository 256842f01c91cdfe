//! Change of float dtype.

use crate::Result;
use crate::autograd::{Var, record_one};
use crate::tensor::{DType, Tensor};

/// The same elements in another float dtype, rounded to nearest even (f64 to 16 bits by way of f32). Backward casts the
/// gradient back.
pub fn cast(x: &Var, dtype: DType) -> Result<Var> {
    let (y, from) = (cast_tensor(x.value(), dtype)?, x.dtype());
    Ok(record_one("cast", &[x], y, move |flow| {
        let dy = flow.output()?;
        flow.give(0, cast_tensor(&dy, from)?)
    }))
}

/// [`cast`] of a tensor, without gradient.
pub fn cast_tensor(x: &Tensor, dtype: DType) -> Result<Tensor> {
    if x.dtype() == dtype && dtype.is_float() {
        return Ok(x.clone());
    }
    on_device!(x.device(), cast::cast(x, dtype))
}
