//! Rows: matrix products.

use crate::harness::{Case, Draw};
use crate::num::{Array, Num};
use felid::autograd::Var;
use felid::ops;

fn dot(a: &[Num], b: &[Num]) -> Num {
    a.iter().zip(b).map(|(&a, &b)| a * b).sum()
}

/// x `[a, b, i]`, weight `[o, i]`, bias `[o]`.
fn linear(d: &mut Draw, bias: bool) -> Case {
    let [a, b, i, o] = d.dims;
    let mut inputs = vec![d.input(&[a, b, i], -1.0, 1.0), d.input(&[o, i], -1.0, 1.0)];
    if bias {
        inputs.push(d.input(&[o], -1.0, 1.0));
    }
    let formula = |x: &[Array]| {
        let bias = x.get(2).map(|b| &b.data);
        x[0].map_rows(|row| {
            let product = |(o, w): (usize, &[Num])| match bias {
                Some(b) => b[o] + dot(row, w),
                None => dot(row, w),
            };
            x[1].rows().enumerate().map(product).collect()
        })
    };
    Case::one(inputs, |v| ops::linear(&v[0], &v[1], v.get(2)), formula).sums_as_stored()
}

/// a `[.., m, k]` times b `[.., k, n]`; where leading dimensions are repeated, the gradients of each repetition are kept in
/// the dtype before they are summed.
fn matmul(d: &mut Draw, lead: [(usize, usize); 2]) -> Case {
    let [_, m, k, n] = d.dims;
    let a = [lead[0].0, lead[1].0, m, k];
    let b = [lead[0].1, lead[1].1, k, n];
    let formula = |x: &[Array]| {
        let [m, k, n] = [x[0].shape[2], x[0].shape[3], x[1].shape[3]];
        let lead: Vec<usize> = (0..2).map(|i| x[0].shape[i].max(x[1].shape[i])).collect();
        let kept = |x: &Array, rows: usize, columns: usize| {
            let shape = [lead[0], lead[1], rows, columns];
            Array::build(&shape, |i| if x.shape[..2] == lead { x.at(i) } else { x.broadcast(i).stored() })
        };
        let (a, b) = (kept(&x[0], m, k), kept(&x[1], k, n));
        Array::build(&[lead[0], lead[1], m, n], |i| {
            (0..k).map(|l| a.at(&[i[0], i[1], i[2], l]) * b.at(&[i[0], i[1], l, i[3]])).sum()
        })
    };
    let inputs = vec![d.input(&a, -1.0, 1.0), d.input(&b, -1.0, 1.0)];
    Case::one(inputs, |v| ops::matmul(&v[0], &v[1]), formula).sums_as_stored()
}

/// x `[a, b, i]` and two weights `[o, i]`. Of x's gradient the first weight's part is kept in the dtype before the second's is
/// added.
fn linear_pair(d: &mut Draw) -> Case {
    let [a, b, i, o] = d.dims;
    let inputs = vec![d.input(&[a, b, i], -1.0, 1.0), d.input(&[o, i], -1.0, 1.0), d.input(&[o, i], -1.0, 1.0)];
    let op = |v: &[Var]| ops::linear_pair(&v[0], [&v[1], &v[2]]).map(Vec::from);
    let formula = |x: &[Array]| {
        let product = |w: usize| {
            let row = |row: &[Num]| {
                let row: Vec<Num> = row.iter().map(|&n| if w == 1 { n.stored() } else { n }).collect();
                x[w].rows().map(|w| dot(&row, w)).collect()
            };
            x[0].map_rows(row)
        };
        vec![product(1), product(2)]
    };
    Case::new(inputs, op, formula).sums_as_stored()
}

table! {
    linear_with_bias, large [3, 101, 120, 9], |d| linear(d, true);
    linear_without_bias, large [2, 33, 515, 5], |d| linear(d, false);
    linear_of_two_weights, large [2, 33, 130, 72], |d| linear_pair(d);
    matmul_batched, large [3, 67, 130, 9], |d| {
        let (a, b) = (d.dims[0].min(7), 1 + d.below(3));
        matmul(d, [(a, a), (b, b)])
    };
    matmul_broadcast, large [3, 67, 130, 5], |d| {
        let (a, b) = (d.dims[0].min(7), 1 + d.below(3));
        let side = |d: &mut Draw, n: usize| if d.below(2) == 0 { (1, n) } else { (n, 1) };
        let lead = [side(d, a), side(d, b)];
        matmul(d, lead)
    };
}
