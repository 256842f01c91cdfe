//! Differentiable views: no element moves forward, and only where strides force it backward.

use crate::Result;
use crate::autograd::{Var, record, record_one};
use crate::tensor::Tensor;

/// `form` of x; `back` turns the gradient back. Where x can be computed again, so can this.
fn view(
    op: &'static str,
    x: &Var,
    form: impl Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static,
    back: impl FnOnce(Tensor) -> Result<Tensor> + Send + 'static,
) -> Result<Var> {
    let y = record_one(op, &[x], form(x.value())?, move |flow| {
        let dy = flow.output()?;
        flow.give(0, back(dy)?)
    });
    Ok(y.viewing(x, form))
}

/// Another shape with as many elements.
pub fn reshape(x: &Var, shape: &[usize]) -> Result<Var> {
    let (old, new) = (x.shape().to_vec(), shape.to_vec());
    view("reshape", x, move |x| x.reshape(&new), move |dy| dy.reshape(&old))
}

/// Dimensions in another order: output dimension i is input dimension `dims[i]`.
pub fn permute(x: &Var, dims: &[usize]) -> Result<Var> {
    let dims = dims.to_vec();
    let mut inverse = vec![0; dims.len()];
    for (i, &d) in dims.iter().enumerate() {
        if let Some(to) = inverse.get_mut(d) {
            *to = i;
        }
    }
    view("permute", x, move |x| x.permute(&dims), move |dy| dy.permute(&inverse))
}

/// Swap two dimensions.
pub fn transpose(x: &Var, a: usize, b: usize) -> Result<Var> {
    view("transpose", x, move |x| x.transpose(a, b), move |dy| dy.transpose(a, b))
}

/// Broadcast to `shape`; backward sums over the repeated dimensions.
pub fn expand(x: &Var, shape: &[usize]) -> Result<Var> {
    let (old, new) = (x.shape().to_vec(), shape.to_vec());
    view("expand", x, move |x| x.expand(&new), move |dy| super::reduce::sum_to(&dy, &old))
}

/// Elements `start..start+len` along `dim`; backward pads with zeros.
pub fn narrow(x: &Var, dim: usize, start: usize, len: usize) -> Result<Var> {
    let shape = x.shape().to_vec();
    let back = move |dy: Tensor| {
        let zeros = |n: usize| {
            let mut s = shape.clone();
            s[dim] = n;
            Tensor::full(0.0, &s, dy.dtype(), dy.device())
        };
        super::concat::concat_tensors(&[&zeros(start)?, &dy, &zeros(shape[dim] - start - len)?], dim)
    };
    view("narrow", x, move |x| x.narrow(dim, start, len), back)
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
    view("contiguous", x, Tensor::contiguous, Ok)
}
