//! Joining tensors along a dimension.

use super::elementwise::same_dtype;
use crate::autograd::{Var, record_one};
use crate::tensor::Tensor;
use crate::{Error, Result};

/// Join along `dim`: all other dimensions and the dtypes must agree. Views of any strides (expanded ones too) are read
/// where they lie. Backward hands each input its slice of the gradient, as a view.
pub fn concat(xs: &[&Var], dim: usize) -> Result<Var> {
    let tensors: Vec<&Tensor> = xs.iter().map(|v| v.value()).collect();
    let y = concat_tensors(&tensors, dim)?;
    let sizes: Vec<usize> = tensors.iter().map(|t| t.dim(dim)).collect();
    Ok(record_one("concat", xs, y, move |flow| {
        for (i, dx) in flow.output()?.split(dim, &sizes)?.into_iter().enumerate() {
            flow.give(i, dx)?;
        }
        Ok(())
    }))
}

pub(crate) fn concat_tensors(xs: &[&Tensor], dim: usize) -> Result<Tensor> {
    let Some(first) = xs.first() else {
        return Err(Error::shape("concat", "needs at least one tensor"));
    };
    same_dtype("concat", xs)?;
    let mut shape = first.shape().to_vec();
    let agree = |t: &&Tensor| t.rank() == first.rank() && (0..t.rank()).all(|d| d == dim || t.dim(d) == first.dim(d));
    if dim >= shape.len() || !xs.iter().all(agree) {
        let shapes: Vec<_> = xs.iter().map(|t| t.shape()).collect();
        return Err(Error::shape("concat", format!("shapes {shapes:?} do not join along dimension {dim}")));
    }
    shape[dim] = xs.iter().map(|t| t.dim(dim)).sum();
    on_device!(first.device(), concat::concat(xs, dim, &shape))
}
