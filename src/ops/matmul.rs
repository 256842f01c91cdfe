//! Matrix products: `linear` (the layout of weights in checkpoints) and batched `matmul`.

use super::elementwise::{broadcast_shape, same_dtype};
use crate::autograd::{Saved, Var, record, record_one};
use crate::tensor::{DType, Tensor};
use crate::{Error, Result};

/// `y = x W^T + bias`: x `[.., I]`, weight `[O, I]`, bias `[O]`, y `[.., O]`.
///
/// Backward: `dx = dy W`, `dW = dy^T x` (accumulated by the product itself), `dbias = sum of dy over rows`.
pub fn linear(x: &Var, weight: &Var, bias: Option<&Var>) -> Result<Var> {
    let (xv, w) = (x.value(), weight.value());
    same_dtype("linear", &[xv, w])?;
    if xv.rank() == 0 || w.rank() != 2 || w.dim(1) != xv.last_dim() {
        return Err(Error::shape("linear", format!("x {:?} does not fit weight {:?} [out, in]", xv.shape(), w.shape())));
    }
    if let Some(b) = bias {
        same_dtype("linear", &[xv, b.value()])?;
        if b.shape() != [w.dim(0)] {
            return Err(Error::shape("linear", format!("bias {:?} does not fit weight {:?}", b.shape(), w.shape())));
        }
    }
    let mut shape = xv.shape().to_vec();
    let (o, i) = (w.dim(0), w.dim(1));
    let rows = shape[..shape.len() - 1].iter().product();
    shape[xv.rank() - 1] = o;
    let x2 = xv.reshape(&[rows, i])?;
    let start = match bias {
        Some(b) => Some(b.value().expand(&[rows, o])?.copy()?),
        None => None,
    };
    let y = gemm(&x2, &w.transpose(0, 1)?, start, w.dtype())?.reshape(&shape)?;
    let (w, x_shape) = (w.clone(), xv.shape().to_vec());
    let saved = weight.has_gradient().then(|| x.save_as(x2));
    let mut inputs = vec![x, weight];
    inputs.extend(bias);
    Ok(record_one("linear", &inputs, y, move |flow| {
        let dy = flow.output()?.reshape(&[rows, o])?;
        if let (Some(dtype), Some(saved)) = (flow.gradient_dtype(1), saved) {
            let x2 = saved.take()?.reshape(&[rows, i])?;
            let sum = flow.take_sum(1);
            flow.put(1, gemm(&dy.transpose(0, 1)?, &x2, sum, dtype)?);
        }
        if flow.wants(2) {
            flow.give(2, super::reduce::sum_to(&dy, &[o])?)?;
        }
        if flow.wants(0) {
            flow.give(0, gemm(&dy, &w, None, w.dtype())?.reshape(&x_shape)?)?;
        }
        Ok(())
    }))
}

/// `[x W1^T, x W2^T]`: x `[.., I]`, both weights `[O, I]`, results `[.., O]`. On CUDA one product where memory lies so.
///
/// Backward: `dx = dy1 W1 + dy2 W2`, `dW1 = dy1^T x`, `dW2 = dy2^T x`, accumulated by the products themselves.
pub fn linear_pair(x: &Var, weights: [&Var; 2]) -> Result<[Var; 2]> {
    const OP: &str = "linear_pair";
    let (xv, [w1, w2]) = (x.value(), weights.map(Var::value));
    same_dtype(OP, &[xv, w1, w2])?;
    if xv.rank() == 0 || w1.rank() != 2 || w1.dim(1) != xv.last_dim() || w1.shape() != w2.shape() {
        let detail = format!("x {:?} does not fit weights {:?} and {:?} [out, in]", xv.shape(), w1.shape(), w2.shape());
        return Err(Error::shape(OP, detail));
    }
    let (mut shape, [o, i]) = (xv.shape().to_vec(), [w1.dim(0), w1.dim(1)]);
    let rows = shape[..shape.len() - 1].iter().product();
    shape[xv.rank() - 1] = o;
    let (x2, dtype) = (xv.reshape(&[rows, i])?, w1.dtype());
    let [w1t, w2t] = [w1.transpose(0, 1)?, w2.transpose(0, 1)?];
    let [y1, y2] = gemm_pair([&x2, &x2], [&w1t, &w2t], [None, None], dtype)?;
    let (ws, x_shape, device) = ([w1.clone(), w2.clone()], xv.shape().to_vec(), xv.device());
    // of one weight twice, gradients are added one after the other
    let one = weights[0].id() == weights[1].id();
    let saved = weights.iter().any(|w| w.has_gradient()).then(|| x.save_as(x2));
    let outputs = vec![y1.reshape(&shape)?, y2.reshape(&shape)?];
    let ys = record(OP, &[x, weights[0], weights[1]], outputs, move |flow| {
        let mut dy = |n: usize| match flow.output_at(n) {
            Some(dy) => dy.reshape(&[rows, o]),
            None => Tensor::zeros(&[rows, o], dtype, device),
        };
        let [dy1, dy2] = [dy(0)?, dy(1)?];
        let kept = [flow.gradient_dtype(1), flow.gradient_dtype(2)];
        if let Some(x2) = saved.map(|s| s.take()).transpose()? {
            let x2 = x2.reshape(&[rows, i])?;
            let turned = [dy1.transpose(0, 1)?, dy2.transpose(0, 1)?];
            match kept {
                [Some(a), Some(b)] if a == b && !one => {
                    let sums = [flow.take_sum(1), flow.take_sum(2)];
                    let [dw1, dw2] = gemm_pair([&turned[0], &turned[1]], [&x2, &x2], sums, a)?;
                    flow.put(1, dw1);
                    flow.put(2, dw2);
                }
                _ => {
                    for (n, kept) in kept.into_iter().enumerate() {
                        let Some(kept) = kept else { continue };
                        let sum = flow.take_sum(n + 1);
                        flow.put(n + 1, gemm(&turned[n], &x2, sum, kept)?);
                    }
                }
            }
        }
        if flow.wants(0) {
            let dx = gemm(&dy1, &ws[0], None, dtype)?;
            flow.give(0, gemm(&dy2, &ws[1], Some(dx), dtype)?.reshape(&x_shape)?)?;
        }
        Ok(())
    });
    <[Var; 2]>::try_from(ys).map_err(|_| Error::shape(OP, "two outputs"))
}

/// `a b` over the last two dimensions: a `[.., m, k]`, b `[.., k, n]`, result `[.., m, n]`; leading ones broadcast.
///
/// Backward: `da = dy b^T`, `db = a^T dy`, summed over broadcast dimensions.
pub fn matmul(a: &Var, b: &Var) -> Result<Var> {
    let y = matmul_tensor(a.value(), b.value())?;
    let shapes = [a.shape().to_vec(), b.shape().to_vec()];
    let (for_b, for_a) = (b.has_gradient().then(|| a.save()), a.has_gradient().then(|| b.save()));
    let turned = |saved: Saved| {
        let t = saved.take()?;
        t.transpose(t.rank() - 2, t.rank() - 1)
    };
    Ok(record_one("matmul", &[a, b], y, move |flow| {
        let dy = flow.output()?;
        if let Some(b) = for_a {
            flow.give(0, super::reduce::sum_to(&matmul_tensor(&dy, &turned(b)?)?, &shapes[0])?)?;
        }
        if let Some(a) = for_b {
            flow.give(1, super::reduce::sum_to(&matmul_tensor(&turned(a)?, &dy)?, &shapes[1])?)?;
        }
        Ok(())
    }))
}

fn matmul_tensor(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    same_dtype("matmul", &[a, b])?;
    if a.rank() < 2 || b.rank() < 2 || a.dim(a.rank() - 1) != b.dim(b.rank() - 2) {
        return Err(Error::shape("matmul", format!("{:?} times {:?} does not fit", a.shape(), b.shape())));
    }
    let (m, k, n) = (a.dim(a.rank() - 2), a.last_dim(), b.last_dim());
    let lead = broadcast_shape("matmul", &a.shape()[..a.rank() - 2], &b.shape()[..b.rank() - 2])?;
    let with = |last: [usize; 2]| lead.iter().copied().chain(last).collect::<Vec<_>>();
    if lead.iter().product::<usize>() == 1 {
        // one product: its rows are shared among the threads, where several would each have one
        return gemm(&a.reshape(&[m, k])?, &b.reshape(&[k, n])?, None, a.dtype())?.reshape(&with([m, n]));
    }
    let (a, b) = (a.expand(&with([m, k]))?, b.expand(&with([k, n]))?);
    on_device!(a.device(), matmul::batched(&a, &b))
}

/// `start + a b` for two matrices of any strides: a `[m, k]`, b `[k, n]`; `start` `[m, n]` is written in place. The result
/// is kept in `dtype`: that of a and b, or f32, which is also that of `start`.
pub(crate) fn gemm(a: &Tensor, b: &Tensor, start: Option<Tensor>, dtype: DType) -> Result<Tensor> {
    if let Some(s) = start.as_ref().filter(|s| s.dtype() != dtype) {
        return Err(Error::dtype("gemm", format!("cannot add a product in {dtype} to {}", s.dtype())));
    }
    if let Some(s) = &start {
        super::elementwise::same_device("gemm", &[s, a])?;
    }
    on_device!(a.device(), matmul::gemm(a, b, start, dtype))
}

/// Two products of the same sizes, each as [`gemm`]'s, which may be computed as one.
fn gemm_pair(a: [&Tensor; 2], b: [&Tensor; 2], start: [Option<Tensor>; 2], dtype: DType) -> Result<[Tensor; 2]> {
    #[cfg(feature = "cuda")]
    if let crate::tensor::Device::Cuda(_) = a[0].device() {
        let _op = crate::profile::enter("matmul :: gemm");
        return super::cuda::matmul::gemm_pair(a, b, start, dtype);
    }
    let [first, second] = start;
    Ok([gemm(a[0], b[0], first, dtype)?, gemm(a[1], b[1], second, dtype)?])
}
