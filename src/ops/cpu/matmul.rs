//! Matrix products on the CPU: of few rows by dot products (`few_rows`), of more through the `gemm` crate, in f32 or f64.
//! 16-bit operands are widened to f32, so products of them accumulate in f32 and round once.

use super::cast::cast_rows as cast;
use super::few_rows;
use crate::tensor::{DType, Element, Layout, Tensor};
use crate::{Error, Result, with_float};
use gemm::Parallelism;
use half::{bf16, f16};
use rayon::prelude::*;

/// `start + a b` in `dtype`: a `[m, k]`, b `[k, n]`, any strides.
pub(crate) fn gemm(a: &Tensor, b: &Tensor, start: Option<Tensor>, dtype: DType) -> Result<Tensor> {
    if few_rows::serves(a.layout(), b.layout()) && a.dim(1) == b.dim(0) && a.dtype() == dtype {
        return with_float!(dtype, "matmul", T => few_rows::product::<T>(a, b, start));
    }
    match a.dtype() {
        DType::F32 => product::<f32>(a, b, start),
        DType::F64 => product::<f64>(a, b, start),
        _ => {
            let start = start.map(|s| if s.dtype() == DType::F32 { Ok(s) } else { widen(&s) }).transpose()?;
            narrow(product::<f32>(&widen(a)?, &widen(b)?, start)?, dtype)
        }
    }
}

/// `a b` over leading dimensions that already agree: a `[.., m, k]`, b `[.., k, n]`.
pub(crate) fn batched(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let d = a.dtype();
    match d {
        DType::F32 => batched_product::<f32>(a, b),
        DType::F64 => batched_product::<f64>(a, b),
        _ => narrow(batched_product::<f32>(&widen(a)?, &widen(b)?)?, d),
    }
}

fn widen(x: &Tensor) -> Result<Tensor> {
    match x.dtype() {
        DType::BF16 => cast::<bf16, f32>(x),
        DType::F16 => cast::<f16, f32>(x),
        DType::F32 => Ok(x.clone()),
        other => Err(Error::dtype("matmul", format!("needs a float dtype, got {other}"))),
    }
}

fn narrow(y: Tensor, d: DType) -> Result<Tensor> {
    if d == DType::F32 {
        return Ok(y);
    }
    with_float!(d, "matmul", T => cast::<f32, T>(&y))
}

fn product<T: Scalar>(a: &Tensor, b: &Tensor, start: Option<Tensor>) -> Result<Tensor> {
    let shape = [a.dim(0), b.dim(1)];
    let accumulate = start.is_some();
    let mut y = start.unwrap_or_else(|| Tensor::unspecified(&shape, a.dtype()));
    if y.shape() != shape || a.dim(1) != b.dim(0) {
        return Err(Error::shape("gemm", format!("{:?} + {:?} times {:?} does not fit", y.shape(), a.shape(), b.shape())));
    }
    let (av, bv) = (Mat::of(a)?, Mat::of(b)?);
    let (m, n) = (shape[0], shape[1]);
    let block = if m < 512 { 64 } else { 128 };
    if m <= block || n == 0 {
        T::gemm(y.as_mut_slice::<T>()?, accumulate, av, bv, Parallelism::Rayon(rayon::current_num_threads()));
        return Ok(y);
    }
    // Runs of rows, each a product of its own: no thread waits for another, and each run stays in its core's cache.
    // On an AVX2 machine with two cores 128 rows (64 where there are few) reach 100 to 160 GFLOP/s over the shapes of
    // training, where the crate's own threads reach 90 to 145.
    y.as_mut_slice::<T>()?.par_chunks_mut(block * n).enumerate().for_each(|(i, y)| {
        let rows = Mat { rows: block.min(m - i * block), ..av.at(i * block * av.row_stride) };
        T::gemm(y, accumulate, rows, bv, Parallelism::None);
    });
    Ok(y)
}

fn batched_product<T: Scalar>(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let r = a.rank();
    let (m, n) = (a.dim(r - 2), b.dim(r - 1));
    let mut shape = a.shape().to_vec();
    shape[r - 1] = n;
    let mut y = Tensor::unspecified(&shape, a.dtype());
    if y.numel() == 0 {
        return Ok(y);
    }
    // where the leading dimensions point to, as rows of a layout without the last dimension
    let lead = |t: &Tensor| {
        let l = t.layout().narrow(r - 2, 0, 1).narrow(r - 1, 0, 1);
        Layout { shape: [&l.shape[..r - 2], &[1]].concat(), strides: [&l.strides[..r - 2], &[1]].concat(), offset: l.offset }
    };
    let (la, lb) = (lead(a), lead(b));
    let (am, bm) = (Mat::<T>::last_two(a)?, Mat::<T>::last_two(b)?);
    y.as_mut_slice::<T>()?.par_chunks_mut(m * n).enumerate().for_each(|(i, y)| {
        T::gemm(y, false, am.at(la.row_offset(i)), bm.at(lb.row_offset(i)), Parallelism::None);
    });
    Ok(y)
}

/// A strided matrix inside a slice.
#[derive(Clone, Copy)]
pub(crate) struct Mat<'a, T> {
    pub data: &'a [T],
    pub rows: usize,
    pub cols: usize,
    pub row_stride: usize,
    pub col_stride: usize,
}

impl<'a, T: Element> Mat<'a, T> {
    pub fn of(t: &'a Tensor) -> Result<Self> {
        Ok(Self::last_two(t)?.at(t.layout().offset()))
    }
    /// The last two dimensions, beginning at element 0 of the storage.
    fn last_two(t: &'a Tensor) -> Result<Self> {
        let (l, r) = (t.layout(), t.rank());
        Ok(Self {
            data: t.storage_slice()?,
            rows: t.dim(r - 2),
            cols: t.dim(r - 1),
            row_stride: l.strides()[r - 2],
            col_stride: l.strides()[r - 1],
        })
    }
    fn at(self, offset: usize) -> Self {
        Self { data: self.data.get(offset..).unwrap_or(&[]), ..self }
    }
    /// True when every element lies inside `data`.
    fn fits(&self) -> bool {
        self.rows == 0
            || self.cols == 0
            || (self.rows - 1) * self.row_stride + (self.cols - 1) * self.col_stride < self.data.len()
    }
}

/// The types that the `gemm` crate multiplies.
pub(crate) trait Scalar: Element {
    /// `y = (accumulate ? y : 0) + a b`, y row-major and dense.
    fn gemm(y: &mut [Self], accumulate: bool, a: Mat<Self>, b: Mat<Self>, parallelism: Parallelism);
}

macro_rules! scalar {
    ($($t:ty),*) => { $(
        impl Scalar for $t {
            fn gemm(y: &mut [$t], accumulate: bool, a: Mat<$t>, b: Mat<$t>, parallelism: Parallelism) {
                let (m, n, k) = (a.rows, b.cols, a.cols);
                assert!(y.len() == m * n && b.rows == k && a.fits() && b.fits(), "gemm: callers check shapes");
                if k == 0 {
                    if !accumulate {
                        y.fill(0.0);
                    }
                    return;
                }
                let alpha = if accumulate { 1.0 } else { 0.0 };
                // SAFETY: y holds m x n elements row-major; a and b were checked to lie inside their slices for
                // m x k and k x n elements at their strides; y is borrowed mutably, so it overlaps neither.
                unsafe {
                    gemm::gemm(
                        m, n, k,
                        y.as_mut_ptr(), 1, n as isize, accumulate,
                        a.data.as_ptr(), a.col_stride as isize, a.row_stride as isize,
                        b.data.as_ptr(), b.col_stride as isize, b.row_stride as isize,
                        alpha, 1.0, false, false, false, parallelism,
                    );
                }
            }
        }
    )* };
}
scalar!(f32, f64);
