//! Rows: the layers that transformers are built of, and their losses.

use crate::harness::{Case, Draw};
use crate::num::{Array, Num};
use felid::autograd::Var;
use felid::ops;
use felid::tensor::Tensor;

/// Large, so that rows of one small element stay smooth enough for finite differences.
const EPS: f64 = 0.05;

/// `x / sqrt(mean(x^2) + eps) * w`.
fn normed(row: &[Num], w: &[Num]) -> Vec<Num> {
    let square: Num = row.iter().map(|&x| x * x).sum();
    let rms = (square / Num::of(row.len() as f64) + Num::of(EPS)).sqrt();
    row.iter().zip(w).map(|(&x, &w)| x * (Num::of(1.0) / rms) * w).collect()
}

/// `x - max(x)`; the maximum is the same for all, so its gradient cancels.
fn shifted(row: &[Num]) -> Vec<Num> {
    let max = row.iter().copied().reduce(|a, b| if b.value() > a.value() { b } else { a }).unwrap().detach();
    row.iter().map(|&x| x - max).collect()
}

fn probabilities(row: &[Num]) -> Vec<Num> {
    let e: Vec<Num> = shifted(row).into_iter().map(Num::exp).collect();
    let sum: Num = e.iter().copied().sum();
    e.into_iter().map(|e| e / sum).collect()
}

fn log_probabilities(row: &[Num]) -> Vec<Num> {
    let z = shifted(row);
    let lse = z.iter().map(|z| z.exp()).sum::<Num>().ln();
    z.into_iter().map(|z| z - lse).collect()
}

const IGNORE: i64 = -100;

/// Labels below `classes`, some of them ignored, not all.
fn labels(d: &mut Draw, n: usize, classes: usize) -> Vec<i64> {
    let mut labels: Vec<i64> = (0..n).map(|_| if d.below(3) == 0 { IGNORE } else { d.below(classes) as i64 }).collect();
    labels[d.below(n)] = d.below(classes) as i64;
    labels
}

fn mean_loss(logits: &Array, labels: &[i64]) -> Array {
    let counted = labels.iter().filter(|&&l| l != IGNORE).count();
    let loss = |(row, &l): (&[Num], &i64)| (l != IGNORE).then(|| -log_probabilities(row)[l as usize]);
    let sum: Num = logits.rows().zip(labels).filter_map(loss).sum();
    Array { shape: vec![], data: vec![sum / Num::of(counted as f64)] }
}

/// Positions as the decoder has them: from 0 in every block.
fn positions(len: usize, block: usize) -> Vec<usize> {
    (0..len).map(|i| i % block).collect()
}

/// x `[b, h, l, 2 k]`; the first n elements of each head turn.
fn turned(x: &Array, positions: &[usize], n: usize, base: f64) -> Array {
    Array::build(&x.shape, |i| {
        let (at, j) = (positions[i[2]] as f64, i[3]);
        if j >= n {
            return x.at(i);
        }
        let half = n / 2;
        let theta = base.powf(-2.0 * (j % half) as f64 / n as f64);
        let (cos, sin) = (Num::of((at * theta).cos()), Num::of((at * theta).sin()));
        let other = |j: usize| x.at(&[i[0], i[1], i[2], j]);
        if j < half { x.at(i) * cos + -other(j + half) * sin } else { x.at(i) * cos + other(j - half) * sin }
    })
}

/// A fused projection `[b, l, (h + 2 kv) d]`, its query and key heads normed by two weights or not at all, and turned.
fn projected(d: &mut Draw, normed_heads: bool) -> Case {
    let [b, l, k, kv] = d.dims;
    // heads of 16 bytes' multiples too, and some that turn in part
    let k = if k < 6 && d.below(2) == 0 { 8 * k } else { k };
    let (heads, width) = (kv * (1 + d.below(3)), 2 * k + [0, 1, 8][d.below(3)]);
    let positions = positions(l, 1 + d.below(5));
    let table = ops::RopeTable::new(&positions, 2 * k, 1000.0).unwrap();
    let mut inputs = vec![d.input(&[b, l, (heads + 2 * kv) * width], -2.0, 2.0)];
    if normed_heads {
        inputs.extend([d.input(&[width], 0.5, 1.5), d.input(&[width], 0.5, 1.5)]);
    }
    let op = move |v: &[Var]| {
        let norm = normed_heads.then(|| ops::QkNorm { q: &v[1], k: &v[2], eps: EPS });
        ops::qk_norm_rope(&v[0], heads, kv, norm, &table).map(Vec::from)
    };
    Case::new(inputs, op, move |x| {
        let part = |from: usize, heads: usize| {
            Array::build(&[b, heads, l, width], |i| x[0].at(&[i[0], i[2], (from + i[1]) * width + i[3]]))
        };
        let head = |from: usize, heads: usize, w: usize| {
            let y = part(from, heads);
            let z = if normed_heads { y.map_rows(|row| normed(row, &x[w].data)) } else { y };
            turned(&z, &positions, 2 * k, 1000.0)
        };
        vec![head(0, heads, 1), head(heads, kv, 2), part(heads + kv, kv)]
    })
}

/// Spec section 3: what element j of `new` reads, where the input has `old`.
fn interpolated(row: &[Num], new: usize) -> Vec<Num> {
    let (old, r) = (row.len(), row.len() as f64 / new as f64);
    let read = |j: usize| {
        let x = ((j as f64 + 0.5) * r - 0.5).max(0.0);
        let (i, t) = (x.floor() as usize, x.fract());
        Num::of(1.0 - t) * row[i] + Num::of(t) * row[(i + 1).min(old - 1)]
    };
    (0..new).map(read).collect()
}

table! {
    rms_norm, large [2, 60, 301, 1], |d| {
        let [a, b, c, _] = d.dims;
        let inputs = vec![d.input(&[a, b, c], -2.0, 2.0), d.input(&[c], 0.5, 1.5)];
        Case::one(inputs, |v| ops::rms_norm(&v[0], &v[1], EPS), |x| x[0].map_rows(|row| normed(row, &x[1].data)))
    };
    add_rms_norm, large [2, 60, 301, 1], |d| {
        let [a, b, c, _] = d.dims;
        let inputs = vec![d.input(&[a, b, c], -2.0, 2.0), d.input(&[a, b, c], -2.0, 2.0), d.input(&[c], 0.5, 1.5)];
        let op = |v: &[Var]| ops::add_rms_norm(&v[0], &v[1], &v[2], EPS).map(|(y, h)| vec![y, h]);
        Case::new(inputs, op, |x| {
            let h: Vec<Num> = x[0].data.iter().zip(&x[1].data).map(|(&a, &b)| (a + b).stored()).collect();
            let h = Array { shape: x[0].shape.clone(), data: h };
            vec![h.map_rows(|row| normed(row, &x[2].data)), h]
        })
    };
    swiglu, large [3, 43, 301, 1], |d| {
        let [a, b, c, _] = d.dims;
        let inputs = vec![d.input(&[a, b, c], -6.0, 6.0), d.input(&[a, b, c], -2.0, 2.0)];
        Case::one(inputs, |v| ops::swiglu(&v[0], &v[1]), |x| {
            let y = x[0].data.iter().zip(&x[1].data).map(|(&g, &u)| g * g.sigmoid() * u);
            Array { shape: x[0].shape.clone(), data: y.collect() }
        })
    };
    swiglu_linear, large [3, 43, 70, 65], |d| {
        let [a, b, i, o] = d.dims;
        let inputs = vec![d.input(&[a, b, i], -6.0, 6.0), d.input(&[a, b, i], -2.0, 2.0), d.input(&[o, i], -1.0, 1.0)];
        let formula = |x: &[Array]| {
            let gated = x[0].data.iter().zip(&x[1].data).map(|(&g, &u)| (g * g.sigmoid() * u).stored());
            let gated = Array { shape: x[0].shape.clone(), data: gated.collect() };
            gated.map_rows(|row| x[2].rows().map(|w| row.iter().zip(w).map(|(&a, &b)| a * b).sum()).collect())
        };
        Case::one(inputs, |v| ops::swiglu_linear(v[0].clone(), v[1].clone(), &v[2]), formula).sums_as_stored()
    };
    embedding, large [67, 131, 9, 40], |d| {
        let [v, width, a, b] = d.dims;
        let index = d.indices(a * b, v);
        let ids = Tensor::ids(&index.iter().map(|&i| i as i64).collect::<Vec<_>>(), &[a, b]).unwrap();
        let formula = move |x: &[Array]| Array::build(&[a, b, width], |i| x[0].at(&[index[i[0] * b + i[1]], i[2]]));
        Case::one(vec![d.input(&[v, width], -1.0, 1.0)], move |t| ops::embedding(&ids, &t[0]), formula)
    };
    rope, large [3, 4, 70, 21], |d| {
        let [b, h, l, k] = d.dims;
        let width = 2 * k + d.below(3);
        let positions = positions(l, 1 + d.below(5));
        let table = ops::RopeTable::new(&positions, 2 * k, 1000.0).unwrap();
        let formula = move |x: &[Array]| turned(&x[0], &positions, 2 * k, 1000.0);
        Case::one(vec![d.input(&[b, h, l, width], -2.0, 2.0)], move |v| ops::rope(&v[0], &table), formula)
    };
    qk_norm_rope, large [3, 40, 10, 3], |d| projected(d, true);
    qk_rope, large [3, 40, 10, 3], |d| projected(d, false);
    softmax, large [5, 23, 301, 1], |d| {
        let [a, b, c, _] = d.dims;
        Case::one(vec![d.input(&[a, b, c], -4.0, 4.0)], |v| ops::softmax(&v[0]), |x| x[0].map_rows(probabilities))
    };
    log_softmax, large [5, 23, 301, 1], |d| {
        let [a, b, c, _] = d.dims;
        Case::one(vec![d.input(&[a, b, c], -4.0, 4.0)], |v| ops::log_softmax(&v[0]), |x| x[0].map_rows(log_probabilities))
    };
    cross_entropy, large [3, 41, 301, 1], |d| {
        let [a, b, classes, _] = d.dims;
        let labels = labels(d, a * b, classes);
        let ids = Tensor::ids(&labels, &[a, b]).unwrap();
        let op = move |v: &[Var]| ops::cross_entropy(&v[0], &ids, IGNORE);
        Case::one(vec![d.input(&[a, b, classes], -4.0, 4.0)], op, move |x| mean_loss(&x[0], &labels)).loss()
    };
    linear_cross_entropy, large [3, 31, 9, 201], |d| {
        let [a, b, width, classes] = d.dims;
        let labels = labels(d, a * b, classes);
        let ids = Tensor::ids(&labels, &[a, b]).unwrap();
        let inputs = vec![d.input(&[a, b, width], -1.0, 1.0), d.input(&[classes, width], -1.0, 1.0)];
        let op = move |v: &[Var]| ops::linear_cross_entropy(&v[0], &v[1], &ids, IGNORE);
        let formula = move |x: &[Array]| {
            // kept in the dtype on CUDA, as are their gradients; the CPU keeps both in the accumulator type
            let logit = |x: &[Num], w: &[Num]| x.iter().zip(w).map(|(&a, &b)| a * b).sum::<Num>().stored();
            mean_loss(&x[0].map_rows(|row| x[1].rows().map(|w| logit(row, w)).collect()), &labels)
        };
        Case::one(inputs, op, formula).loss().sums_as_stored()
    };
    interpolate_last, large [7, 9, 601, 77], |d| {
        let [a, b, c, new] = d.dims;
        let op = move |v: &[Var]| ops::interpolate(&v[0], 2, new);
        Case::one(vec![d.input(&[a, b, c], -1.0, 1.0)], op, move |x| x[0].map_rows(|row| interpolated(row, new)))
    };
    interpolate_other, large [7, 33, 160, 80], |d| {
        let [a, b, c, new] = d.dims;
        let op = move |v: &[Var]| ops::interpolate(&v[0], 1, new);
        Case::one(vec![d.input(&[a, b, c], -1.0, 1.0)], op, move |x| {
            let columns = Array::build(&[a, c, b], |i| x[0].at(&[i[0], i[2], i[1]]));
            let y = columns.map_rows(|row| interpolated(row, new));
            Array::build(&[a, new, c], |i| y.at(&[i[0], i[2], i[1]]))
        })
    };
}
