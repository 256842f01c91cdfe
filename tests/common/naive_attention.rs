//! Attention by its definition, in float64, with any rounding in between; and an implementation's results and gradients
//! against it.
#![allow(dead_code)]

use crate::devices;
use felid::autograd::{Gradients, Var};
use felid::ops::{self, Mask, attention};
use felid::tensor::{DType, Device, Element, Float, Real, Tensor};
use half::{bf16, f16};

/// Shapes of a case: q `[b, h, lq, d]`, k and v `[b, hkv, lk, d]`.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub mask: Mask,
    pub b: usize,
    pub hkv: usize,
    pub group: usize,
    pub lq: usize,
    pub lk: usize,
    pub d: usize,
}

impl Case {
    pub fn h(self) -> usize {
        self.hkv * self.group
    }
    pub fn scale(self) -> f64 {
        1.0 / (self.d as f64).sqrt()
    }
    pub fn allows(self, i: usize, j: usize) -> bool {
        // queries are the last positions
        self.mask.allows(if self.mask == Mask::Bidirectional { i } else { i + self.lk - self.lq }, j)
    }
}

pub const fn square(mask: Mask, b: usize, hkv: usize, group: usize, l: usize, d: usize) -> Case {
    Case { mask, b, hkv, group, lq: l, lk: l, d }
}

/// Sums of three uniform values: bell-shaped, variance 1, the same for a seed.
pub fn random<T: Float>(seed: u64, n: usize) -> Vec<T> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1u64 << 53) as f64 * 2.0 - 1.0
    };
    (0..n).map(|_| T::from_acc(T::Acc::of(uniform() + uniform() + uniform()))).collect()
}

/// Rows of q, k, v and of the output's gradient as `[b, l, heads, d]`, the order that a projection writes.
pub struct Data<T> {
    pub q: Vec<T>,
    pub k: Vec<T>,
    pub v: Vec<T>,
    pub dy: Vec<T>,
}

impl<T: Float> Data<T> {
    pub fn of(c: Case, seed: u64) -> Self {
        let (q, k) = (c.b * c.lq * c.h() * c.d, c.b * c.lk * c.hkv * c.d);
        Self { q: random(seed, q), k: random(seed + 1, k), v: random(seed + 2, k), dy: random(seed + 3, q) }
    }
    pub fn to<A: Real>(&self) -> Data<A> {
        let all = |x: &[T]| x.iter().map(|x| A::of(x.to_acc().f64())).collect();
        Data { q: all(&self.q), k: all(&self.k), v: all(&self.v), dy: all(&self.dy) }
    }
}

/// `[y, dq, dk, dv]` as `[b, l, heads, d]`, term by term in `A`; y is rounded by `round`, and what a naive implementation
/// keeps in between (scores, probabilities, their gradients) by `between`.
pub fn naive<A: Real>(c: Case, x: &Data<A>, scale: f64, round: impl Fn(A) -> A, between: impl Fn(A) -> A) -> [Vec<A>; 4] {
    let mut out = [&x.q, &x.q, &x.k, &x.k].map(|x| vec![A::ZERO; x.len()]);
    let [y, dq, dk, dv] = &mut out;
    let dot = |a: &[A], b: &[A]| a.iter().zip(b).map(|(a, b)| *a * *b).sum::<A>();
    let add = |y: &mut [A], f: A, x: &[A]| y.iter_mut().zip(x).for_each(|(y, x)| *y += f * *x);
    for b in 0..c.b {
        for h in 0..c.h() {
            for i in 0..c.lq {
                let at = ((b * c.lq + i) * c.h() + h) * c.d;
                let row = at..at + c.d;
                let keys: Vec<_> = (0..c.lk)
                    .filter(|&j| c.allows(i, j))
                    .map(|j| ((b * c.lk + j) * c.hkv + h / c.group) * c.d)
                    .map(|at| at..at + c.d)
                    .collect();
                let score = |k: &std::ops::Range<usize>| between(dot(&x.q[row.clone()], &x.k[k.clone()]) * A::of(scale));
                let s: Vec<A> = keys.iter().map(score).collect();
                let max = s.iter().copied().fold(A::NEG_INFINITY, A::maximum);
                let e: Vec<A> = s.iter().map(|&s| (s - max).exp()).collect();
                let sum = e.iter().copied().sum::<A>();
                let p: Vec<A> = e.iter().map(|&e| between(e / sum)).collect();
                for (p, k) in p.iter().zip(&keys) {
                    add(&mut y[row.clone()], *p, &x.v[k.clone()]);
                }
                y[row.clone()].iter_mut().for_each(|y| *y = round(*y));
                let dy = &x.dy[row.clone()];
                // backwards, else a single key would cancel to exactly 0 as no other order of sums does
                let delta = dy.iter().zip(&y[row.clone()]).rev().map(|(a, b)| *a * *b).sum::<A>();
                for (p, k) in p.iter().zip(&keys) {
                    let ds = between(*p * (between(dot(dy, &x.v[k.clone()])) - delta) * A::of(scale));
                    add(&mut dv[k.clone()], *p, dy);
                    add(&mut dq[row.clone()], ds, &x.k[k.clone()]);
                    add(&mut dk[k.clone()], ds, &x.q[row.clone()]);
                }
            }
        }
    }
    out
}

/// What a naive implementation that keeps scores, probabilities and their gradients in `unit`'s dtype errs in the root mean
/// square, at the element where that is worst: `[y, dq, dk, dv]`. Every term of a sum is off by a rounding of its factors,
/// independently; each rounding is up to `unit` of its number, `unit / sqrt(3)` in the root mean square. Few elements may
/// be luckier than that in one run.
pub fn noise(c: Case, x: &Data<f64>, scale: f64, unit: f64) -> [f64; 4] {
    let mut squares = [&x.q, &x.q, &x.k, &x.k].map(|x| vec![0f64; x.len()]);
    let [y, dq, dk, dv] = &mut squares;
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let add = |s: &mut [f64], f: f64, x: &[f64]| s.iter_mut().zip(x).for_each(|(s, x)| *s += (f * x) * (f * x));
    for b in 0..c.b {
        for h in 0..c.h() {
            for i in 0..c.lq {
                let at = ((b * c.lq + i) * c.h() + h) * c.d;
                let (row, key) = (at..at + c.d, |j: usize| ((b * c.lk + j) * c.hkv + h / c.group) * c.d);
                let keys: Vec<_> = (0..c.lk).filter(|&j| c.allows(i, j)).map(|j| key(j)..key(j) + c.d).collect();
                let s: Vec<f64> = keys.iter().map(|k| dot(&x.q[row.clone()], &x.k[k.clone()]) * scale).collect();
                let max = s.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = s.iter().map(|s| (s - max).exp()).sum();
                let dy = &x.dy[row.clone()];
                let dp: Vec<f64> = keys.iter().map(|k| dot(dy, &x.v[k.clone()])).collect();
                let p: Vec<f64> = s.iter().map(|s| (s - max).exp() / sum).collect();
                let delta: f64 = p.iter().zip(&dp).map(|(p, dp)| p * dp).sum();
                for ((k, p), dp) in keys.iter().zip(&p).zip(&dp) {
                    let ds = p * (dp.abs() + delta.abs()) * scale;
                    add(&mut y[row.clone()], *p, &x.v[k.clone()]);
                    add(&mut dv[k.clone()], *p, dy);
                    add(&mut dq[row.clone()], ds, &x.k[k.clone()]);
                    add(&mut dk[k.clone()], ds, &x.q[row.clone()]);
                }
            }
        }
    }
    squares.map(|s| unit * (s.into_iter().fold(0.0, f64::max) / 3.0).sqrt())
}

pub fn heads<T: Element>(x: &[T], b: usize, l: usize, h: usize, d: usize, device: Device) -> Tensor {
    let rows = Tensor::from_slice(x, &[b, l, h, d]).unwrap().to_device(device).unwrap();
    rows.permute(&[0, 2, 1, 3]).unwrap()
}

pub fn back<T: Element>(x: &Tensor) -> Vec<T> {
    x.permute(&[0, 2, 1, 3]).unwrap().to_vec().unwrap()
}

/// `[y, dq, dk, dv]` of the op, in their own shapes.
pub fn run(inputs: [Tensor; 3], dy: &Tensor, mask: Mask, scale: f64) -> [Tensor; 4] {
    let [q, k, v] = inputs.map(Var::parameter);
    let mut grads = Gradients::default();
    let tape = ops::tape();
    let y = tape.record(|| attention(&q, &k, &v, mask, scale)).unwrap();
    tape.backward_from(&[(&y, dy.clone())], &mut grads).unwrap();
    [y.value().clone(), grads.take(&q).unwrap(), grads.take(&k).unwrap(), grads.take(&v).unwrap()]
}

pub fn tensors<T: Float>(c: Case, x: &Data<T>) -> ([Tensor; 3], Tensor) {
    tensors_on(c, x, Device::Cpu)
}
pub fn tensors_on<T: Float>(c: Case, x: &Data<T>, device: Device) -> ([Tensor; 3], Tensor) {
    let kv = |x: &[T]| heads(x, c.b, c.lk, c.hkv, c.d, device);
    let q = |x: &[T]| heads(x, c.b, c.lq, c.h(), c.d, device);
    ([q(&x.q), kv(&x.k), kv(&x.v)], q(&x.dy))
}

/// Largest difference to `want`.
pub fn error<T: Float>(got: &[T], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let diff = got.iter().zip(want).map(|(g, w)| (g.to_acc().f64() - w).abs());
    // a NaN must not pass as the smaller number
    diff.fold(0.0, |a, b| if b.is_nan() || b > a { b } else { a })
}

/// The op in T against the reference on the same rounded inputs.
///
/// The bound is what the naive sums in T's accumulator, with y and the gradients rounded to T, err on these very inputs,
/// times 4: the tiles add in another order (no longer chains than the naive sums), fold the scale into q and take the
/// softmax's quotient last, one more rounding each, and a maximum over few elements varies by about a factor of 2. Naive
/// sums in f64 err as those in f32 do, times 2^-29. Where naive happens to be exact, what remains is dS as the difference
/// of two dot products in different orders: numbers of size sqrt(d) that lose a few units in the last place, times scale
/// and elements of up to 3. So 8 units in the last place of the largest element, or of 4.
pub fn check<T: Float>(c: Case, seed: u64) {
    let x = Data::<T>::of(c, seed);
    let want = naive::<f64>(c, &x.to(), c.scale(), |y| y, |s| s);
    let (round, finer): (fn(f32) -> f32, f64) = match T::DTYPE {
        DType::F64 => (|y| y, f64::EPSILON / f32::EPSILON as f64),
        _ => (|y| T::from_acc(T::Acc::of(y as f64)).to_acc().f64() as f32, 1.0),
    };
    let rounded = |x: Vec<f32>| x.into_iter().map(round).collect::<Vec<_>>();
    // the worst share of its bound
    let compare = |got: [Tensor; 4], naive: &[Vec<f32>; 4], noise: [f64; 4]| {
        let shares = got.iter().enumerate().map(|(i, got)| {
            let largest = want[i].iter().fold(4.0, |a: f64, b| a.max(b.abs()));
            let bound = (4.0 * error(&naive[i], &want[i]).max(noise[i]) + 8.0 * f32::EPSILON as f64 * largest) * finer;
            let (err, what, on) = (error(&back::<T>(got), &want[i]), ["y", "dq", "dk", "dv"][i], got.device());
            assert!(err <= bound, "{what} of {c:?} in {} on {on}: {err:.3e} > {bound:.3e}", T::DTYPE);
            err / bound
        });
        shares.fold(0.0, f64::max)
    };
    if devices::cpu() {
        let (inputs, dy) = tensors(c, &x);
        let in_f32 = naive::<f32>(c, &x.to(), c.scale(), round, |s| s).map(rounded);
        compare(run(inputs, &dy, c.mask, c.scale()), &in_f32, [0.0; 4]);
    }
    if let Some(cuda) = devices::cuda().filter(|_| T::DTYPE != DType::F64) {
        // tensor cores take probabilities and their gradients in T, as a naive implementation in T would
        let (inputs, dy) = tensors_on(c, &x, cuda);
        let in_t = naive::<f32>(c, &x.to(), c.scale(), round, round).map(rounded);
        let unit = match T::DTYPE {
            DType::F32 => 0.0,
            DType::BF16 => 2f64.powi(-8),
            _ => 2f64.powi(-11),
        };
        let noise = noise(c, &x.to(), c.scale(), unit);
        let got = run(inputs.clone(), &dy, c.mask, c.scale());
        let bits = |t: &[Tensor; 4]| t.each_ref().map(|t| t.to_le_bytes().unwrap());
        assert!(bits(&run(inputs, &dy, c.mask, c.scale())) == bits(&got), "{c:?} in {} is not deterministic", T::DTYPE);
        for t in &got {
            assert!(t.transpose(1, 2).unwrap().is_contiguous(), "heads must join without a copy");
        }
        devices::report("attention", T::DTYPE, 1, compare(got, &in_t, noise));
        // views into one fused projection, off any alignment, and rows with gaps
        if c.lq == c.lk {
            let (inputs, dy) = fused_views(c, &x, cuda);
            devices::report("attention", T::DTYPE, 1, compare(run(inputs, &dy, c.mask, c.scale()), &in_t, noise));
        }
    }
}

/// q, k and v as parts of one `[b, l, (h + 2 hkv) d + 1]` tensor that begins at element 1, and dy with gaps in its rows.
pub fn fused_views<T: Float>(c: Case, x: &Data<T>, device: Device) -> ([Tensor; 3], Tensor) {
    let ([q, k, v], dy) = tensors_on(c, x, device);
    let flat = |t: &Tensor| {
        let rows = t.permute(&[0, 2, 1, 3]).unwrap();
        Var::constant(rows.reshape(&[c.b, c.lk, rows.shape()[2] * c.d]).unwrap())
    };
    let one = Var::constant(Tensor::zeros(&[c.b, c.lk, 1], T::DTYPE, device).unwrap());
    let joined = ops::concat(&[&one, &flat(&q), &flat(&k), &flat(&v)], 2).unwrap();
    let (h, kv) = (c.h() * c.d, c.hkv * c.d);
    let part = |at: usize, n: usize| {
        let t = joined.value().narrow(2, at, n).unwrap().reshape(&[c.b, c.lk, n / c.d, c.d]).unwrap();
        t.permute(&[0, 2, 1, 3]).unwrap()
    };
    let gaps = dy.transpose(2, 3).unwrap().copy().unwrap().transpose(2, 3).unwrap();
    ([part(1, h), part(1 + h, kv), part(1 + h + kv, kv)], gaps)
}

pub fn check_all(c: Case, seed: u64) {
    check::<f32>(c, seed);
    check::<bf16>(c, seed);
    check::<f16>(c, seed);
    check::<f64>(c, seed);
}
