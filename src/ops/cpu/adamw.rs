//! AdamW on the CPU: reads and writes everything once.

use super::cast::cast;
use super::{simd, sum_over};
use crate::ops::adamw::{AdamWParam, AdamWSettings};
use crate::tensor::{DType, Float, Real, Tensor};
use crate::{Result, with_float};
use rayon::prelude::*;

/// Elements of one task.
const RUN: usize = 16_384;

pub(crate) fn step(
    param: &mut Tensor,
    grad: &Tensor,
    m: &mut Tensor,
    v: &mut Tensor,
    step: u64,
    h: &AdamWSettings,
    grad_scale: f64,
) -> Result<()> {
    with_float!(param.dtype(), "adamw", T => {
        type A = <T as Float>::Acc;
        let grad = grad.contiguous()?;
        let (p, g) = (param.as_mut_slice::<T>()?, grad.as_slice::<T>()?);
        let (m, v) = (m.as_mut_slice::<f32>()?, v.as_mut_slice::<f32>()?);
        let t = step as f64;
        let (b1, b2, scale, eps) = (A::of(h.beta1), A::of(h.beta2), A::of(grad_scale), A::of(h.eps));
        let (c1, c2) = (A::of(1.0 - h.beta1), A::of(1.0 - h.beta2));
        let keep = A::of(1.0 - h.lr * h.weight_decay);
        let rate = A::of(h.lr / (1.0 - h.beta1.powf(t)));
        let root = A::of(1.0 / (1.0 - h.beta2.powf(t)).sqrt());
        let chunks = p.par_chunks_mut(RUN).zip(g.par_chunks(RUN)).zip(m.par_chunks_mut(RUN).zip(v.par_chunks_mut(RUN)));
        chunks.for_each(|((p, g), (m, v))| {
            simd(#[inline(always)] || {
                for ((p, g), (m, v)) in p.iter_mut().zip(g).zip(m.iter_mut().zip(v.iter_mut())) {
                    let g = g.to_acc() * scale;
                    let first = b1 * A::of(m.f64()) + c1 * g;
                    let second = b2 * A::of(v.f64()) + c2 * g * g;
                    (*m, *v) = (first.f64() as f32, second.f64() as f32);
                    *p = T::from_acc(p.to_acc() * keep - rate * first / (second.sqrt() * root + eps));
                }
            });
        });
        Ok(())
    })
}

/// A step over all parameters, clipped: the norm of the gradients. Nothing changes where that is not finite.
pub(crate) fn update(params: &mut [AdamWParam], count: u64, h: &AdamWSettings, clip: f64) -> Result<Tensor> {
    let squares: Vec<f64> = params.iter().map(|p| square_sum(p.grad)).collect::<Result<_>>()?;
    let norm = squares.into_iter().sum::<f64>().sqrt();
    if norm.is_finite() {
        let scale = if clip > 0.0 && norm > clip { clip / norm } else { 1.0 };
        for p in params {
            let h = AdamWSettings { weight_decay: p.weight_decay, ..*h };
            match &mut p.master {
                None if p.grad.dtype() == p.param.dtype() => step(p.param, p.grad, p.m, p.v, count, &h, scale)?,
                None => {
                    // the gradient is wider than the parameter: nothing of it is rounded away
                    let mut wide = cast(p.param, DType::F32)?;
                    step(&mut wide, p.grad, p.m, p.v, count, &h, scale)?;
                    *p.param = cast(&wide, p.param.dtype())?;
                }
                Some(master) => {
                    step(master, &cast(p.grad, DType::F32)?, p.m, p.v, count, &h, scale)?;
                    *p.param = cast(master, p.param.dtype())?;
                }
            }
        }
    }
    Ok(Tensor::scalar(norm))
}

/// The sum of squares: lanes of the accumulator type within a task, f64 over tasks, in order.
pub(crate) fn square_sum(x: &Tensor) -> Result<f64> {
    with_float!(x.dtype(), "global_norm", T => {
        let x = x.contiguous()?;
        let run = |x: &[T]| simd(#[inline(always)] || {
            sum_over(x.len(), #[inline(always)] |i| x[i].to_acc() * x[i].to_acc())
        });
        let partial: Vec<f64> = x.as_slice::<T>()?.par_chunks(RUN).map(|x| run(x).f64()).collect();
        Ok(partial.into_iter().sum())
    })
}
