//! Rows: views, joining, copies, and what moves elements without arithmetic.

use crate::harness::{Case, Draw};
use crate::num::Array;
use felid::autograd::Var;
use felid::tensor::{DType, Device};
use felid::{Result, ops};

/// An op whose element i of output `shape` is the element `from(i)` of its input.
fn moved(
    d: &mut Draw,
    shape: Vec<usize>,
    op: impl Fn(&Var) -> Result<Var> + Send + Sync + 'static,
    from: impl Fn(&[usize]) -> Vec<usize> + 'static,
) -> Case {
    let input = d.input(&d.dims.to_vec()[..3], -2.0, 2.0);
    Case::one(vec![input], move |v| op(&v[0]), move |x| Array::build(&shape, |i| x[0].at(&from(i))))
}

/// Spec sections 2 and 4: every chunk's tokens after a slot and maybe a separator, dead rows left out.
fn assembled(d: &mut Draw, separated: bool) -> Case {
    let [b, n, width, _] = d.dims;
    let chunk = 1 + d.below(n.min(9) + 1);
    let full = n / chunk;
    let mut inputs = vec![d.input(&[b, full + 1, width], -1.0, 1.0), d.input(&[b, n, width], -1.0, 1.0)];
    if separated {
        inputs.push(d.input(&[1, width], -1.0, 1.0));
    }
    // which input a row is of, and which of its rows
    let mut rows = Vec::new();
    for k in 0..=full {
        rows.push((0, k));
        rows.extend(separated.then_some((2, 0)));
        let end = if k < full { (k + 1) * chunk - 1 } else { n };
        rows.extend((k * chunk..end).map(|token| (1, token)));
    }
    let op = move |v: &[Var]| ops::assemble_blocks(&v[0], v.get(2), &v[1], chunk);
    Case::one(inputs, op, move |x| {
        Array::build(&[b, rows.len(), width], |i| match rows[i[1]] {
            (2, _) => x[2].at(&[0, i[2]]),
            (input, row) => x[input].at(&[i[0], row, i[2]]),
        })
    })
}

const LARGE: [usize; 4] = [3, 5, 2300, 1];

table! {
    reshape, large LARGE, |d| {
        let [a, b, c, _] = d.dims;
        let shape = [c, 1, a * b];
        moved(d, shape.to_vec(), move |x| ops::reshape(x, &shape), move |i| {
            let at = i[0] * a * b + i[2];
            vec![at / (b * c), at / c % b, at % c]
        })
    };
    permute, large LARGE, |d| {
        let [a, b, c, _] = d.dims;
        moved(d, vec![c, a, b], |x| ops::permute(x, &[2, 0, 1]), |i| vec![i[1], i[2], i[0]])
    };
    transpose, large LARGE, |d| {
        let [a, b, c, _] = d.dims;
        moved(d, vec![a, c, b], |x| ops::transpose(x, 2, 1), |i| vec![i[0], i[2], i[1]])
    };
    contiguous, large LARGE, |d| {
        let shape = d.dims.to_vec()[..3].to_vec();
        moved(d, shape, |x| ops::contiguous(&ops::transpose(&ops::contiguous(&ops::transpose(x, 0, 2)?)?, 0, 2)?), <[usize]>::to_vec)
    };
    narrow, large LARGE, |d| {
        let (mut shape, dim) = (d.dims.to_vec()[..3].to_vec(), d.below(3));
        let start = d.below(shape[dim]);
        let len = 1 + d.below(shape[dim] - start);
        shape[dim] = len;
        moved(d, shape, move |x| ops::narrow(x, dim, start, len), move |i| {
            let mut i = i.to_vec();
            i[dim] += start;
            i
        })
    };
    expand, large [30, 5, 33, 9], |d| {
        let [a, b, c, n] = d.dims;
        let sum_first = [n, a, 1, c];
        let op = move |v: &[Var]| ops::expand(&v[0], &[n, a, b, c]);
        let formula = move |x: &[Array]| Array::build(&[n, a, b, c], |i| x[0].broadcast(i));
        Case::one(vec![d.input(&sum_first[1..], -1.0, 1.0)], op, formula)
    };
    split, large LARGE, |d| {
        let (shape, dim) = (d.dims.to_vec()[..3].to_vec(), d.below(3));
        let first = d.below(shape[dim] + 1);
        let sizes = [first, shape[dim] - first];
        let formula = move |x: &[Array]| {
            let piece = |p: usize| {
                let mut shape = x[0].shape.clone();
                shape[dim] = sizes[p];
                Array::build(&shape, |i| {
                    let mut i = i.to_vec();
                    i[dim] += p * first;
                    x[0].at(&i)
                })
            };
            vec![piece(0), piece(1)]
        };
        Case::new(vec![d.input(&shape, -1.0, 1.0)], move |v| ops::split(&v[0], dim, &sizes), formula)
    };
    concat, large LARGE, |d| {
        let (shape, dim) = (d.dims.to_vec()[..3].to_vec(), d.below(3));
        let sizes = [shape[dim], 1 + d.below(9), 1];
        let part = |n: usize| {
            let mut shape = shape.clone();
            shape[dim] = n;
            shape
        };
        let inputs = sizes.map(|n| d.input(&part(n), -1.0, 1.0)).to_vec();
        let whole = part(sizes.iter().sum());
        let op = move |v: &[Var]| ops::concat(&v.iter().collect::<Vec<_>>(), dim);
        Case::one(inputs, op, move |x| Array::build(&whole, |i| {
            let (mut which, mut i) = (0, i.to_vec());
            while i[dim] >= sizes[which] {
                i[dim] -= sizes[which];
                which += 1;
            }
            x[which].at(&i)
        }))
    };
    // widening is exact, and so is the way back; `apart.rs` has the roundings
    cast, large LARGE, |d| {
        let [a, b, ..] = d.dims;
        // f64 exists on the CPU only
        let wide = |v: &Var| if v.value().device() == Device::Cpu { DType::F64 } else { DType::F32 };
        let there_and_back = move |v: &[Var]| ops::cast(&ops::cast(&v[0], wide(&v[0]))?, v[0].dtype());
        Case::one(vec![d.input(&[a, b], -2.0, 2.0)], there_and_back, |x| x[0].clone())
    };
    index_select, large [9, 61, 33, 9], |d| {
        let (mut shape, dim) = (d.dims.to_vec()[..3].to_vec(), d.below(3));
        let index = d.indices(3 * d.dims[3], shape[dim]);
        let input = d.input(&shape, -1.0, 1.0);
        shape[dim] = index.len();
        let also = index.clone();
        Case::one(vec![input], move |v| ops::index_select(&v[0], dim, &index), move |x| Array::build(&shape, |i| {
            let mut i = i.to_vec();
            i[dim] = also[i[dim]];
            x[0].at(&i)
        }))
    };
    assemble_blocks, large [7, 601, 33, 1], |d| assembled(d, false);
    assemble_blocks_with_separator, large [7, 601, 33, 1], |d| assembled(d, true);
}
