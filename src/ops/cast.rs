//! Change of float dtype.

use crate::autograd::{Var, record_one};
use crate::tensor::{DType, Tensor};
use crate::{Error, Result};

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
    if !x.dtype().is_float() || !dtype.is_float() {
        return Err(Error::dtype("cast", format!("goes from float to float, not from {} to {dtype}", x.dtype())));
    }
    if x.dtype() == dtype {
        return Ok(x.clone());
    }
    on_device!(x.device(), cast::cast(x, dtype))
}
