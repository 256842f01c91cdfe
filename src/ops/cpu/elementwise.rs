//! Elementwise arithmetic on the CPU: one parallel pass over rows, any strides.

use super::{rows_per_task, simd};
use crate::ops::elementwise::{Binary, Unary};
use crate::tensor::{Element, Float, Real, Tensor};
use crate::{Result, with_float};
use rayon::prelude::*;

/// Call `f(row, out)` for each row of an output seen as rows of its last dimension.
pub(crate) fn for_rows<T: Element>(out: &mut [T], width: usize, f: impl Fn(usize, &mut [T]) + Sync) {
    if out.is_empty() {
        return;
    }
    let rows = rows_per_task(width);
    out.par_chunks_mut(rows * width).enumerate().for_each(|(task, chunk)| {
        for (r, row) in chunk.chunks_exact_mut(width).enumerate() {
            f(task * rows + r, row);
        }
    });
}

/// Views of one shape, as rows that all inputs hold densely or with one stride: contiguous inputs become long rows.
struct Rows<T: 'static, const N: usize> {
    inputs: [Tensor; N],
    width: usize,
    _element: std::marker::PhantomData<T>,
}

impl<T: Element, const N: usize> Rows<T, N> {
    /// Rows are at most this long where all inputs are contiguous, so that threads have something to share.
    const LONGEST: usize = 4096;

    fn new(inputs: [&Tensor; N]) -> Result<Self> {
        let numel = inputs[0].numel();
        let flat = inputs.iter().all(|t| t.is_contiguous());
        // a flat run is cut where its length divides, else kept as the rows that it has
        let width = if flat && numel.is_multiple_of(Self::LONGEST) { Self::LONGEST } else { inputs[0].last_dim() };
        let mut views = inputs.map(Tensor::clone);
        if flat && width > 0 {
            for v in &mut views {
                *v = v.reshape(&[numel / width, width])?;
            }
        }
        Ok(Self { inputs: views, width, _element: std::marker::PhantomData })
    }

    /// Fill `out` by `f(rows of the inputs with their strides, row of the output)`.
    fn fill(&self, out: &mut [T], f: impl Fn([(&[T], usize); N], &mut [T]) + Sync) -> Result<()> {
        let mut data: [&[T]; N] = [&[]; N];
        for (d, t) in data.iter_mut().zip(&self.inputs) {
            *d = t.storage_slice::<T>()?;
        }
        for_rows(out, self.width.max(1), |r, row| {
            let views = std::array::from_fn(|i| {
                let l = self.inputs[i].layout();
                let stride = l.strides().last().copied().unwrap_or(1);
                (&data[i][l.row_offset(r)..], stride)
            });
            f(views, row);
        });
        Ok(())
    }
}

/// `out[i] = f(a[i])` in the accumulator type, with a fast loop where the row is dense.
#[inline(always)]
fn map1<T: Float>(out: &mut [T], (a, sa): (&[T], usize), f: impl Fn(T::Acc) -> T::Acc) {
    if sa == 1 {
        for (y, a) in out.iter_mut().zip(a) {
            *y = T::from_acc(f(a.to_acc()));
        }
    } else {
        for (i, y) in out.iter_mut().enumerate() {
            *y = T::from_acc(f(a[i * sa].to_acc()));
        }
    }
}

#[inline(always)]
fn map2<T: Float>(out: &mut [T], (a, sa): (&[T], usize), (b, sb): (&[T], usize), f: impl Fn(T::Acc, T::Acc) -> T::Acc) {
    if sa == 1 && sb == 1 {
        for ((y, a), b) in out.iter_mut().zip(a).zip(b) {
            *y = T::from_acc(f(a.to_acc(), b.to_acc()));
        }
    } else {
        for (i, y) in out.iter_mut().enumerate() {
            *y = T::from_acc(f(a[i * sa].to_acc(), b[i * sb].to_acc()));
        }
    }
}

/// `f(a, b)`; both already broadcast to one shape.
pub(crate) fn binary(f: Binary, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    with_float!(a.dtype(), "elementwise", T => {
        let mut y = Tensor::unspecified(a.shape(), a.dtype());
        Rows::<T, 2>::new([a, b])?.fill(y.as_mut_slice::<T>()?, |[a, b], y| {
            simd(#[inline(always)] || match f {
                Binary::Add => map2(y, a, b, |a, b| a + b),
                Binary::Sub => map2(y, a, b, |a, b| a - b),
                Binary::Mul => map2(y, a, b, |a, b| a * b),
                Binary::Div => map2(y, a, b, |a, b| a / b),
            })
        })?;
        Ok(y)
    })
}

/// `sum += term`; f32 sums take terms of any dtype.
pub(crate) fn add_assign(sum: &mut Tensor, term: &Tensor) -> Result<()> {
    let term = super::cast::cast(term, sum.dtype())?;
    with_float!(sum.dtype(), "add_assign", T => {
        let rows = Rows::<T, 1>::new([&term.contiguous()?])?;
        rows.fill(sum.as_mut_slice::<T>()?, |[(term, _)], sum| {
            simd(#[inline(always)] || {
                for (s, t) in sum.iter_mut().zip(term) {
                    *s = T::from_acc(s.to_acc() + t.to_acc());
                }
            })
        })
    })
}

/// `sigmoid(x) = 1 / (1 + e^-x)`.
#[inline(always)]
pub(crate) fn sigmoid<A: Real>(x: A) -> A {
    A::ONE / (A::ONE + (-x).exp())
}

pub(crate) fn unary(f: Unary, x: &Tensor) -> Result<Tensor> {
    with_float!(x.dtype(), "elementwise", T => {
        type A = <T as Float>::Acc;
        let mut y = Tensor::unspecified(x.shape(), x.dtype());
        Rows::<T, 1>::new([x])?.fill(y.as_mut_slice::<T>()?, |[x], y| {
            simd(#[inline(always)] || match f {
                Unary::Neg => map1(y, x, |x| -x),
                Unary::Exp => map1(y, x, |x: A| Real::exp(x)),
                Unary::Ln => map1(y, x, |x: A| Real::ln(x)),
                Unary::Sqrt => map1(y, x, |x: A| Real::sqrt(x)),
                Unary::Silu => map1(y, x, |x| x * sigmoid(x)),
                Unary::Scale(c) => {
                    let c = A::of(c);
                    map1(y, x, |x| c * x)
                }
            })
        })?;
        Ok(y)
    })
}

/// `dx = dy * f'(x)`, with f' from x or y, whichever is cheaper.
pub(crate) fn unary_backward(f: Unary, x: &Tensor, y: &Tensor, dy: &Tensor) -> Result<Tensor> {
    with_float!(x.dtype(), "elementwise", T => {
        type A = <T as Float>::Acc;
        let mut dx = Tensor::unspecified(x.shape(), x.dtype());
        Rows::<T, 3>::new([x, y, dy])?.fill(dx.as_mut_slice::<T>()?, |[x, y, dy], dx| {
            simd(#[inline(always)] || match f {
                Unary::Neg => map1(dx, dy, |g| -g),
                Unary::Exp => map2(dx, dy, y, |g, y| g * y),
                Unary::Ln => map2(dx, dy, x, |g, x| g / x),
                Unary::Sqrt => map2(dx, dy, y, |g, y| g / (y + y)),
                Unary::Silu => map2(dx, dy, x, |g, x| {
                    let s = sigmoid(x);
                    g * (s + x * s * (A::ONE - s))
                }),
                Unary::Scale(c) => {
                    let c = A::of(c);
                    map1(dx, dy, |g| c * g)
                }
            })
        })?;
        Ok(dx)
    })
}
