//! `y = x W^T (+ y)` for few rows of x, as decoding has them: weights are read once, as they lie, and nothing is packed.
//!
//! Every element is one dot product, summed in an order that depends on its length alone: rows have the same bits in a
//! batch as alone.

use crate::Result;
use crate::tensor::{Element, Float, Layout, Real, Tensor};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// With more rows than this, packing pays.
const ROWS: usize = 16;
/// Columns of the result that are computed together, for two rows at a time: eight sums hide the latency of adding.
const COLUMNS: usize = 4;
/// Multiplications of a task.
const WORK: usize = 1 << 17;

/// True where the product `a b` can be taken so: a `[m, k]` with dense rows, b the transpose of dense rows.
pub fn serves(a: &Layout, b: &Layout) -> bool {
    let dense = |l: &Layout, d: usize| l.strides()[d] == 1 || l.shape[d] == 1;
    (1..=ROWS).contains(&a.shape[0]) && a.shape[1] > 0 && b.shape[1] > 0 && dense(a, 1) && dense(b, 0)
}

/// `start + a b`, in the dtype of all of them.
pub fn product<T: Float<Acc: Dots>>(a: &Tensor, b: &Tensor, start: Option<Tensor>) -> Result<Tensor> {
    let (m, k, n) = (a.dim(0), a.dim(1), b.dim(1));
    let accumulate = start.is_some();
    let mut y = start.unwrap_or_else(|| Tensor::unspecified(&[m, n], a.dtype()));
    let (rows, weights) = (Rows::<T>::of(a, 0)?, Rows::<T>::of(b, 1)?);
    let x: Vec<T::Acc> = (0..m).flat_map(|r| rows.row(r, k).iter().map(|x| x.to_acc())).collect();
    // [n, m]: a task has a run of it
    let mut across = vec![T::Acc::ZERO; n * m];
    let columns = (WORK / (k * m)).next_multiple_of(COLUMNS).max(COLUMNS);
    across.par_chunks_mut(columns * m).enumerate().for_each(|(task, out)| {
        Arch::new().dispatch(Task { weights: &weights, from: task * columns, x: &x, m, k, out });
    });
    let store = |(r, y): (usize, &mut [T])| {
        for (y, sums) in y.iter_mut().zip(across.chunks_exact(m)) {
            *y = T::from_acc(if accumulate { y.to_acc() + sums[r] } else { sums[r] });
        }
    };
    y.as_mut_slice::<T>()?.par_chunks_mut(n).with_min_len(WORK.div_ceil(8 * n)).enumerate().for_each(store);
    Ok(y)
}

/// Dense rows inside a slice.
struct Rows<'a, T> {
    data: &'a [T],
    stride: usize,
}

impl<'a, T: Element> Rows<'a, T> {
    /// Rows along the other dimension than `dim`, which numbers them.
    fn of(t: &'a Tensor, dim: usize) -> Result<Self> {
        let l = t.layout();
        Ok(Self { data: t.storage_slice()?.get(l.offset()..).unwrap_or(&[]), stride: l.strides()[dim] })
    }
    #[inline(always)]
    fn row(&self, i: usize, k: usize) -> &'a [T] {
        &self.data[i * self.stride..][..k]
    }
}

/// Columns `from..` of the result, all rows: out `[columns, m]`, x `[m, k]`.
struct Task<'a, 'o, T: Float> {
    weights: &'a Rows<'a, T>,
    from: usize,
    x: &'a [T::Acc],
    m: usize,
    k: usize,
    out: &'o mut [T::Acc],
}

impl<T: Float<Acc: Dots>> WithSimd for Task<'_, '_, T> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (m, k) = (self.m, self.k);
        // rows of weights as numbers of the accumulator: where they lie, or widened here
        let mut wide = vec![T::Acc::ZERO; if T::DTYPE == <T::Acc as Element>::DTYPE { 0 } else { COLUMNS * k }];
        for (i, out) in self.out.chunks_mut(COLUMNS * m).enumerate() {
            let (at, some) = (self.from + i * COLUMNS, out.len() / m);
            let rows: [&[T]; COLUMNS] = std::array::from_fn(|j| self.weights.row(at + j.min(some - 1), k));
            for (wide, row) in wide.chunks_exact_mut(k).zip(rows) {
                for (y, x) in wide.iter_mut().zip(row) {
                    *y = x.to_acc();
                }
            }
            let w: [&[T::Acc]; COLUMNS] = match wide.is_empty() {
                true => rows.map(bytemuck::cast_slice),
                false => std::array::from_fn(|j| &wide[j * k..(j + 1) * k]),
            };
            let mut pairs = self.x.chunks_exact(2 * k);
            let mut put = |r: usize, sums: &[T::Acc]| {
                for (out, &sum) in out.chunks_exact_mut(m).zip(sums) {
                    out[r] = sum;
                }
            };
            for (pair, x) in pairs.by_ref().enumerate() {
                let [even, odd] = T::Acc::two_rows(simd, w, [&x[..k], &x[k..]]);
                put(2 * pair, &even);
                put(2 * pair + 1, &odd);
            }
            if !pairs.remainder().is_empty() {
                put(m - 1, &T::Acc::one_row(simd, w, pairs.remainder()));
            }
        }
    }
}

/// `sum_i w[j][i] x[i]`, each in the same order: in registers, for which each sum has to have a name.
pub trait Dots: Real {
    fn one_row<S: Simd>(simd: S, w: [&[Self]; COLUMNS], x: &[Self]) -> [Self; COLUMNS];
    fn two_rows<S: Simd>(simd: S, w: [&[Self]; COLUMNS], x: [&[Self]; 2]) -> [[Self; COLUMNS]; 2];
}

macro_rules! dots {
    ($($t:ty: $split:ident, $splat:ident, $mul_add:ident, $reduce:ident;)*) => { $(
        impl Dots for $t {
            #[inline(always)]
            fn one_row<S: Simd>(simd: S, w: [&[Self]; COLUMNS], x: &[Self]) -> [Self; COLUMNS] {
                let ((x, x_rest), w) = (S::$split(x), w.map(S::$split));
                let n = x.len();
                let [w0, w1, w2, w3] = w.map(|w| &w.0[..n]);
                let zero = simd.$splat(0.0);
                let (mut a0, mut a1, mut a2, mut a3) = (zero, zero, zero, zero);
                for i in 0..n {
                    a0 = simd.$mul_add(w0[i], x[i], a0);
                    a1 = simd.$mul_add(w1[i], x[i], a1);
                    a2 = simd.$mul_add(w2[i], x[i], a2);
                    a3 = simd.$mul_add(w3[i], x[i], a3);
                }
                let sums = [simd.$reduce(a0), simd.$reduce(a1), simd.$reduce(a2), simd.$reduce(a3)];
                std::array::from_fn(|j| rest(sums[j], w[j].1, x_rest))
            }
            #[inline(always)]
            fn two_rows<S: Simd>(simd: S, w: [&[Self]; COLUMNS], x: [&[Self]; 2]) -> [[Self; COLUMNS]; 2] {
                let (w, [(x, x_rest), (y, y_rest)]) = (w.map(S::$split), x.map(S::$split));
                let (n, y) = (x.len(), &y[..x.len()]);
                let [w0, w1, w2, w3] = w.map(|w| &w.0[..n]);
                let zero = simd.$splat(0.0);
                let (mut a0, mut a1, mut a2, mut a3) = (zero, zero, zero, zero);
                let (mut b0, mut b1, mut b2, mut b3) = (zero, zero, zero, zero);
                for i in 0..n {
                    a0 = simd.$mul_add(w0[i], x[i], a0);
                    b0 = simd.$mul_add(w0[i], y[i], b0);
                    a1 = simd.$mul_add(w1[i], x[i], a1);
                    b1 = simd.$mul_add(w1[i], y[i], b1);
                    a2 = simd.$mul_add(w2[i], x[i], a2);
                    b2 = simd.$mul_add(w2[i], y[i], b2);
                    a3 = simd.$mul_add(w3[i], x[i], a3);
                    b3 = simd.$mul_add(w3[i], y[i], b3);
                }
                let a = [simd.$reduce(a0), simd.$reduce(a1), simd.$reduce(a2), simd.$reduce(a3)];
                let b = [simd.$reduce(b0), simd.$reduce(b1), simd.$reduce(b2), simd.$reduce(b3)];
                let a = std::array::from_fn(|j| rest(a[j], w[j].1, x_rest));
                [a, std::array::from_fn(|j| rest(b[j], w[j].1, y_rest))]
            }
        }
    )* };
}
dots! {
    f32: as_simd_f32s, splat_f32s, mul_add_f32s, reduce_sum_f32s;
    f64: as_simd_f64s, splat_f64s, mul_add_f64s, reduce_sum_f64s;
}

/// What no register is full of.
#[inline(always)]
fn rest<A: Real>(sum: A, w: &[A], x: &[A]) -> A {
    w.iter().zip(x).fold(sum, |sum, (w, x)| w.fma(*x, sum))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::normal_at;
    use crate::tensor::DType;

    fn random<T: Float>(shape: [usize; 2], key: u64) -> Tensor {
        let n = shape[0] * shape[1];
        let values = (0..n as u64).map(|i| T::from_acc(T::Acc::of(normal_at(key, i)))).collect();
        Tensor::from_vec::<T>(values, &shape).unwrap()
    }

    /// All shapes against sums in f64, and every row against itself alone, in every bit.
    fn check<T: Float<Acc: Dots>>(unit: f64) {
        for (m, k, n) in [(1, 1, 1), (2, 7, 5), (3, 64, 9), (5, 100, 4), (16, 33, 1), (7, 1025, 131)] {
            let (x, w, start) = (random::<T>([m, k], 1), random::<T>([n, k], 2), random::<T>([m, n], 3));
            let b = w.transpose(0, 1).unwrap();
            assert!(serves(x.layout(), b.layout()) && !serves(b.layout(), b.layout()) || k == 1);
            let y = product::<T>(&x, &b, Some(start.clone())).unwrap();
            let [got, x64, w64, s64] = [&y, &x, &w, &start].map(|t| t.to_f64_vec().unwrap());
            for r in 0..m {
                for j in 0..n {
                    let terms = (0..k).map(|i| x64[r * k + i] * w64[j * k + i]);
                    let (want, size) = terms.fold((s64[r * n + j], s64[r * n + j].abs()), |(s, a), t| (s + t, a + t.abs()));
                    // first order: a rounding of f32 or f64 for each term, one of T at the end
                    let bound = if T::DTYPE == DType::F64 { 2f64.powi(-53) } else { 2f64.powi(-24) };
                    let bound = (k as f64 + 2.0) * bound * size + unit * want.abs();
                    assert!((got[r * n + j] - want).abs() <= bound, "{} {m} {k} {n}", T::DTYPE);
                }
                let (x, start) = (x.narrow(0, r, 1).unwrap(), start.narrow(0, r, 1).unwrap());
                let alone = product::<T>(&x, &b, Some(start.copy().unwrap())).unwrap();
                assert_eq!(alone.to_le_bytes().unwrap(), y.narrow(0, r, 1).unwrap().to_le_bytes().unwrap());
            }
        }
    }

    #[test]
    fn rows_are_the_same_in_a_batch_as_alone() {
        check::<f32>(2f64.powi(-24));
        check::<f64>(2f64.powi(-53));
        check::<half::bf16>(2f64.powi(-8));
        check::<half::f16>(2f64.powi(-11));
    }
}
