//! Differentiable views: no element moves forward, and only where strides force it backward.

use crate::Result;
use crate::autograd::{Var, record, record_one};
use crate::tensor::Tensor;

fn view(op: &'static str, x: &Var, y: Tensor, back: impl FnOnce(Tensor) -> Result<Tensor> + Send + 'static) -> Var {
    record_one(op, &[x], y, move |flow| {
        let dy = flow.output()?;
        flow.give(0, back(dy)?)
    })
}

/// Another shape with as many elements.
pub fn reshape(x: &Var, shape: &[usize]) -> Result<Var> {
    let old = x.shape().to_vec();
    Ok(view("reshape", x, x.value().reshape(shape)?, move |dy| dy.reshape(&old)))
}

/// Dimensions in another order: output dimension i is input dimension `dims[i]`.
pub fn permute(x: &Var, dims: &[usize]) -> Result<Var> {
    let y = x.value().permute(dims)?;
    let mut inverse = vec![0; dims.len()];
    for (i, &d) in dims.iter().enumerate() {
        inverse[d] = i;
    }
    Ok(view("permute", x, y, move |dy| dy.permute(&inverse)))
}

/// Swap two dimensions.
pub fn transpose(x: &Var, a: usize, b: usize) -> Result<Var> {
    Ok(view("transpose", x, x.value().transpose(a, b)?, move |dy| dy.transpose(a, b)))
}

/// Broadcast to `shape`; backward sums over the repeated dimensions.
pub fn expand(x: &Var, shape: &[usize]) -> Result<Var> {
    let old = x.shape().to_vec();
    Ok(view("expand", x, x.value().expand(shape)?, move |dy| super::reduce::sum_to(&dy, &old)))
}

/// Elements `start..start+len` along `dim`; backward pads with zeros.
pub fn narrow(x: &Var, dim: usize, start: usize, len: usize) -> Result<Var> {
    let y = x.value().narrow(dim, start, len)?;
    let shape = x.shape().to_vec();
    Ok(view("narrow", x, y, move |dy| {
        let zeros = |n: usize| {
            let mut s = shape.clone();
            s[dim] = n;
            Tensor::full(0.0, &s, dy.dtype(), dy.device())
        };
        super::concat::concat_tensors(&[&zeros(start)?, &dy, &zeros(shape[dim] - start - len)?], dim)
    }))
}

/// Pieces of the given sizes along `dim`. Backward joins the pieces' gradients in one copy, where narrowing each would
/// pad and add them.
pub fn split(x: &Var, dim: usize, sizes: &[usize]) -> Result<Vec<Var>> {
    let pieces = x.value().split(dim, sizes)?;
    let shapes: Vec<Vec<usize>> = pieces.iter().map(|p| p.shape().to_vec()).collect();
    let (dtype, device) = (x.dtype(), x.value().device());
    Ok(record("split", &[x], pieces, move |flow| {
        let grads: Vec<Tensor> = shapes
            .iter()
            .enumerate()
            .map(|(i, s)| flow.output_at(i).map_or_else(|| Tensor::full(0.0, s, dtype, device), Ok))
            .collect::<Result<_>>()?;
        flow.give(0, super::concat::concat_tensors(&grads.iter().collect::<Vec<_>>(), dim)?)
    }))
}

/// A copy in row-major order where x is not in it already; the gradient passes unchanged.
pub fn contiguous(x: &Var) -> Result<Var> {
    Ok(view("contiguous", x, x.value().contiguous()?, Ok))
}
