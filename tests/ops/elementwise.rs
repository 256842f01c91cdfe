//! Rows: elementwise arithmetic and reductions.

use crate::harness::{Case, Draw};
use crate::num::{Array, Num};
use felid::autograd::Var;
use felid::{Result, ops};

fn unary(
    d: &mut Draw,
    (low, high): (f64, f64),
    op: fn(&Var) -> Result<Var>,
    f: impl Fn(Num) -> Num + Copy + 'static,
) -> Case {
    let [a, b, c, _] = d.dims;
    Case::one(vec![d.input(&[a, b, c], low, high)], move |v| op(&v[0]), move |x| x[0].map(f))
}

/// Operands broadcast: each dimension of either may be 1, and leading ones of the second missing. Gradients are kept in
/// the dtype before they are summed over what was repeated.
fn binary(d: &mut Draw, low: f64, op: fn(&Var, &Var) -> Result<Var>, f: impl Fn(Num, Num) -> Num + Copy + 'static) -> Case {
    let full = &d.dims.to_vec()[..3];
    let mut one_of = |n: usize| if d.below(4) == 0 { 1 } else { n };
    let a: Vec<usize> = full.iter().map(|&n| one_of(n)).collect();
    let b: Vec<usize> = full.iter().map(|&n| one_of(n)).collect();
    let b = &b[d.below(3)..];
    let inputs = vec![d.input(&a, -2.0, 2.0), d.input(b, low, 2.0)];
    Case::one(
        inputs,
        move |v| op(&v[0], &v[1]),
        move |x| {
            let tail = [vec![1; 3 - x[1].shape.len()], x[1].shape.clone()].concat();
            let shape: Vec<usize> = x[0].shape.iter().zip(tail).map(|(&a, b)| a.max(b)).collect();
            Array::build(&shape, |i| f(x[0].broadcast(i).stored(), x[1].broadcast(i).stored()))
        },
    )
}

/// Any dimensions to reduce, in any order.
fn reduced(d: &mut Draw) -> Vec<usize> {
    (0..3).filter(|_| d.below(2) == 0).collect()
}

/// The elements of x that come together when `dims` are reduced, for each element of the result, row-major.
fn gathered(x: &Array, dims: &[usize]) -> (Vec<usize>, Vec<Vec<Num>>) {
    let shape: Vec<usize> = x.shape.iter().enumerate().map(|(i, &n)| if dims.contains(&i) { 1 } else { n }).collect();
    let mut groups = vec![Vec::new(); shape.iter().product()];
    Array::build(&x.shape, |i| {
        let at = i.iter().zip(&shape).fold(0, |at, (&i, &n)| at * n + if n == 1 { 0 } else { i });
        groups[at].push(x.at(i));
        x.at(i)
    });
    (shape, groups)
}

const LARGE: [usize; 4] = [3, 5, 2300, 1];

table! {
    add, large LARGE, |d| binary(d, -2.0, ops::add, |a, b| a + b);
    sub, large LARGE, |d| binary(d, -2.0, ops::sub, |a, b| a - b);
    mul, large LARGE, |d| binary(d, -2.0, ops::mul, |a, b| a * b);
    div, large LARGE, |d| binary(d, 0.5, ops::div, |a, b| a / b);
    neg, large LARGE, |d| unary(d, (-2.0, 2.0), ops::neg, |x| -x);
    exp, large LARGE, |d| unary(d, (-3.0, 3.0), ops::exp, |x| x.stored().exp());
    ln, large LARGE, |d| unary(d, (0.1, 5.0), ops::ln, Num::ln);
    sqrt, large LARGE, |d| unary(d, (0.1, 5.0), ops::sqrt, |x| x.stored().sqrt());
    silu, large LARGE, |d| unary(d, (-8.0, 8.0), ops::silu, |x| x * x.sigmoid());
    // 4096 divides the number of elements: rows are cut anew
    flat, large [4, 4096, 3, 1], |d| unary(d, (-2.0, 2.0), ops::neg, |x| -x);
    scale, large LARGE, |d| {
        let c = d.uniform(-3.0, 3.0);
        let [a, b, ..] = d.dims;
        Case::one(vec![d.input(&[a, b], -2.0, 2.0)], move |v| ops::scale(&v[0], c), move |x| x[0].map(|x| Num::of(c) * x))
    };
    sum, large [2, 700, 33, 1], |d| {
        let ([a, b, c, _], dims) = (d.dims, reduced(d));
        let also = dims.clone();
        let formula = move |x: &[Array]| {
            let (shape, groups) = gathered(&x[0], &also);
            Array { shape, data: groups.into_iter().map(|g| g.into_iter().sum()).collect() }
        };
        Case::one(vec![d.input(&[a, b, c], -1.0, 2.0)], move |v| ops::sum(&v[0], &dims), formula)
    };
    mean, large [40, 30, 33, 1], |d| {
        let ([a, b, c, _], dims) = (d.dims, reduced(d));
        let also = dims.clone();
        let formula = move |x: &[Array]| {
            let (shape, groups) = gathered(&x[0], &also);
            let mean = |g: Vec<Num>| {
                let n = g.len() as f64;
                g.into_iter().sum::<Num>().stored() * Num::of(1.0 / n)
            };
            Array { shape, data: groups.into_iter().map(mean).collect() }
        };
        Case::one(vec![d.input(&[a, b, c], -1.0, 2.0)], move |v| ops::mean(&v[0], &dims), formula)
    };
    sum_all, large LARGE, |d| {
        let [a, b, c, _] = d.dims;
        let formula = |x: &[Array]| Array { shape: vec![], data: vec![x[0].data.iter().copied().sum()] };
        Case::one(vec![d.input(&[a, b, c], -1.0, 1.0)], |v| ops::sum_all(&v[0]), formula)
    };
    max, large [20, 300, 7, 1], |d| {
        let ([a, b, c, _], dims) = (d.dims, reduced(d));
        let also = dims.clone();
        // of equals (16-bit inputs have many), the first
        let largest = |g: Vec<Num>| g.into_iter().reduce(|best, x| if x.value() > best.value() { x } else { best }).unwrap();
        let formula = move |x: &[Array]| {
            let (shape, groups) = gathered(&x[0], &also);
            Array { shape, data: groups.into_iter().map(largest).collect() }
        };
        Case::one(vec![d.input(&[a, b, c], -1.0, 1.0)], move |v| ops::max(&v[0], &dims), formula)
    };
}
