//! Change of float dtype on CUDA.

use crate::cuda::{Grid, kernels::cast as kernel};
use crate::tensor::{DType, Tensor};
use crate::{Error, Result};

/// Elements that one thread of the kernel moves.
const PER_THREAD: usize = 8;

/// The same elements in another float dtype; x itself where it has that dtype.
pub(crate) fn cast(x: &Tensor, dtype: DType) -> Result<Tensor> {
    if x.dtype() == dtype {
        return Ok(x.clone());
    }
    let symbol = match dtype {
        DType::F32 => kernel::cast_to_float,
        DType::BF16 => kernel::cast_to_bf16,
        DType::F16 => kernel::cast_to_f16,
        other => return Err(Error::dtype("cast", format!("cannot cast to {other} on {}", x.device()))),
    };
    let x = x.contiguous()?;
    let mut y = Tensor::empty(x.shape(), dtype, x.device())?;
    let n = x.numel();
    // one thread for every PER_THREAD elements: the kernel does not loop
    let grid = Grid::new(n.div_ceil(PER_THREAD).div_ceil(256), 256);
    // SAFETY: the parameters are (y, x, n); both are contiguous and hold n elements, y is new.
    unsafe { x.gpu()?.launch(symbol, x.variant()?, grid, &[y.write()?, x.read()?, n.into()])? };
    Ok(y)
}
