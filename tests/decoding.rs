//! What steps of decoding are made of: `fused_linear` and `cached_step` against the ops that they stand for, in every
//! combination, on the CPU and where there is one on a CUDA device.

#[path = "common/agree.rs"]
mod agree;
#[path = "common/devices.rs"]
mod devices;

use agree::{FLOATS, agrees_with, one, wave};
use felid::Result;
use felid::autograd::Var;
use felid::ops::{self, CacheRows, FusedLinear, QkNorm, RopeTable, fused_linear};
use felid::random::Philox;
use felid::tensor::{DType, Device, Tensor};
use proptest::prelude::*;
use std::ops::Range;

const EPS: f64 = 1e-5;

/// What stands around a product: norm, gate, bias, residual.
const FORMS: [[bool; 4]; 9] = [
    [false, false, false, false],
    [true, false, false, false],
    [false, true, false, false],
    [true, true, false, false],
    [false, false, true, false],
    [true, false, true, false],
    [false, false, false, true],
    [true, false, true, true],
    [true, false, false, true],
];

/// Inputs of a form: x `[R, I]`, W `[O, I]`, and what else there is.
fn shapes([r, i, o]: [usize; 3], [norm, gate, bias, residual]: [bool; 4]) -> Vec<Vec<usize>> {
    let mut all = vec![vec![r, i], vec![o, i]];
    all.extend(norm.then(|| vec![i]));
    all.extend(gate.then(|| vec![o, i]));
    all.extend(bias.then(|| vec![o]));
    all.extend(residual.then(|| vec![r, o]));
    all
}
fn map<'a>(v: &[&'a Tensor], [norm, gate, bias, residual]: [bool; 4]) -> FusedLinear<'a> {
    let mut more = v[2..].iter().copied();
    let mut map = FusedLinear::new(v[1]);
    if norm {
        map = map.after_norm(more.next().unwrap(), EPS);
    }
    if gate {
        map = map.gate_of(more.next().unwrap());
    }
    map = map.bias(if bias { more.next() } else { None });
    if residual { map.onto(more.next().unwrap().clone()) } else { map }
}
fn fused(v: &[Var], form: [bool; 4]) -> Result<Vec<Var>> {
    let v: Vec<&Tensor> = v.iter().map(Var::value).collect();
    one(fused_linear(v[0], map(&v, form)).map(Var::constant))
}
/// The ops one after the other, each of which rounds.
fn apart(v: &[Var], [norm, gate, bias, residual]: [bool; 4]) -> Result<Vec<Var>> {
    let mut more = v[2..].iter();
    let n = if norm { ops::rms_norm(&v[0], more.next().unwrap(), EPS)? } else { v[0].clone() };
    let mut y = ops::linear(&n, &v[1], None)?;
    if gate {
        y = ops::swiglu(&y, &ops::linear(&n, more.next().unwrap(), None)?)?;
    }
    if bias {
        y = ops::add(&y, more.next().unwrap())?;
    }
    one(if residual { ops::add(more.next().unwrap(), &y) } else { Ok(y) }.map(|y| Var::constant(y.into_value())))
}

#[test]
fn fused_linear_is_the_ops_it_stands_for() {
    for form in FORMS {
        for sizes in [[1, 7, 5], [3, 64, 33], [20, 40, 9]] {
            let inputs: Vec<Var> =
                shapes(sizes, form).iter().enumerate().map(|(i, s)| Var::constant(wave(s, i as u64))).collect();
            let (y, want) = (fused(&inputs, form).unwrap(), apart(&inputs, form).unwrap());
            let (y, want) = (y[0].value().to_f64_vec().unwrap(), want[0].value().to_f64_vec().unwrap());
            // sums of at most 64 terms of size 6, in f64
            assert!(y.iter().zip(&want).all(|(a, b)| (a - b).abs() < 64.0 * 6.0 * f64::EPSILON), "{form:?} {sizes:?}");
        }
    }
}

#[test]
fn fused_linear_refuses_what_does_not_fit() {
    let [x, w, b] = [wave(&[2, 6], 0), wave(&[4, 6], 1), wave(&[4], 2)];
    let plain = || FusedLinear::new(&w);
    assert!(fused_linear(&x, plain().bias(Some(&b))).is_ok());
    assert!(fused_linear(&x, FusedLinear::new(&b)).is_err());
    assert!(fused_linear(&x, plain().bias(Some(&x))).is_err());
    assert!(fused_linear(&x, plain().after_norm(&b, EPS)).is_err());
    assert!(fused_linear(&x, plain().gate_of(&x)).is_err());
    assert!(fused_linear(&x, plain().onto(x.clone())).is_err());
    assert!(fused_linear(&x, plain().gate_of(&w).bias(Some(&b))).is_err(), "a gate leaves no place for a bias");
    assert!(fused_linear(&ops::cast_tensor(&x, DType::F32).unwrap(), plain()).is_err());
    assert_eq!(fused_linear(&x.narrow(0, 0, 0).unwrap(), plain()).unwrap().shape(), [0, 4]);
}

/// A residual that nobody else holds may be written over; one that is held may not.
#[test]
fn residuals_of_others_stay() {
    let [x, w, r] = [wave(&[2, 6], 0), wave(&[4, 6], 1), wave(&[2, 4], 2)];
    let before = r.to_f64_vec().unwrap();
    let y = fused_linear(&x, FusedLinear::new(&w).onto(r.clone())).unwrap();
    assert_eq!(r.to_f64_vec().unwrap(), before);
    assert_eq!(fused_linear(&x, FusedLinear::new(&w).onto(r)).unwrap().to_f64_vec().unwrap(), y.to_f64_vec().unwrap());
}

/// Few rows, which one kernel takes, and more; widths in packs and not; matrices larger than a grid of one wave.
#[test]
fn fused_linear_agrees_on_cuda() {
    let sizes =
        [[1, 2048, 300], [2, 96, 64], [3, 77, 31], [4, 5632, 40], [5, 64, 1], [8, 1000, 520], [9, 64, 70], [1, 8, 9000]];
    for (i, form) in FORMS.into_iter().enumerate() {
        for (j, size) in sizes.into_iter().enumerate() {
            if devices::light() && (i + j) % 4 > 0 {
                continue;
            }
            let shapes = shapes(size, form);
            let shapes: Vec<&[usize]> = shapes.iter().map(Vec::as_slice).collect();
            let terms = size[1];
            agrees_with("fused_linear", &shapes, terms, &|v| fused(v, form), &|v| apart(v, form));
        }
    }
}

/// Gated products of a step of many texts, which a kernel of their own takes where its blocks are as many as multiprocessors.
#[test]
fn gated_products_of_many_rows_agree_on_cuda() {
    for size in [[320, 512, 5632], [257, 1000, 5000], [300, 72, 4804]] {
        let shapes = shapes(size, FORMS[3]);
        let shapes: Vec<&[usize]> = shapes.iter().map(Vec::as_slice).collect();
        agrees_with("fused_linear of many rows", &shapes, size[1], &|v| fused(v, FORMS[3]), &|v| apart(v, FORMS[3]));
    }
}

/// On a device a row of few is, in every bit, the row alone, and does not depend on how its operands lie.
#[test]
fn few_rows_are_each_alone() {
    let Some(cuda) = devices::cuda() else { return };
    for form in FORMS {
        for dtype in FLOATS {
            let there = |x: &Tensor| ops::cast_tensor(x, dtype).unwrap().to_device(cuda).unwrap();
            let shapes = shapes([8, 520, 70], form);
            let all: Vec<Tensor> = shapes.iter().enumerate().map(|(i, s)| there(&wave(s, i as u64))).collect();
            // the same with rows that do not begin on 16 bytes
            let moved = |t: &Tensor| {
                let (rank, last) = (t.rank(), t.shape()[t.rank() - 1]);
                let mut shape = t.shape().to_vec();
                shape[rank - 1] = 1;
                let zeros = Tensor::zeros(&shape, dtype, cuda).unwrap();
                let wide = ops::concat(&[&Var::constant(zeros), &Var::constant(t.clone())], rank - 1).unwrap();
                wide.value().narrow(rank - 1, 1, last).unwrap()
            };
            let bits = |v: &[Tensor], form: [bool; 4]| {
                let v: Vec<&Tensor> = v.iter().collect();
                let y = fused_linear(v[0], map(&v, form)).unwrap();
                (0..y.shape()[0]).map(|r| y.narrow(0, r, 1).unwrap().to_le_bytes().unwrap()).collect::<Vec<_>>()
            };
            let want = bits(&all, form);
            assert!(bits(&all.iter().map(moved).collect::<Vec<_>>(), form) == want, "{form:?} {dtype} off 16 bytes");
            for (from, rows) in [(0, 1), (5, 1), (3, 2), (1, 3), (2, 6)] {
                let mut some = all.clone();
                some[0] = some[0].narrow(0, from, rows).unwrap();
                if form[3] {
                    let last = some.len() - 1;
                    some[last] = some[last].narrow(0, from, rows).unwrap();
                }
                assert!(bits(&some, form) == want[from..from + rows], "{form:?} {dtype} rows {from} to {}", from + rows);
            }
        }
    }
}

/// Texts of `keys` keys each in a cache of `room` rows, one behind the other with a row between them.
fn texts(keys: &[usize]) -> (CacheRows, usize) {
    let mut start = 2;
    let seen = keys.iter().map(|n| {
        let run = start..start + n;
        start = run.end + 1;
        run
    });
    let seen: Vec<_> = seen.collect();
    (CacheRows::new(seen).unwrap(), start + 1)
}

/// Texts in a cache, one behind the other with a row between them: of each what its first row sees, and how many rows it has, one
/// behind the other, 1 or 2. Returns what each row sees, and the rows of the cache.
fn texts_of_rows(texts: &[(usize, usize)]) -> (Vec<Range<usize>>, usize) {
    let (mut start, mut seen) = (2, vec![]);
    for &(keys, rows) in texts {
        seen.extend((0..rows).map(|i| start..start + keys + i));
        start += keys + rows;
    }
    (seen, start + 1)
}

fn norm(v: &[Var]) -> Option<QkNorm<'_>> {
    (v.len() > 3).then(|| QkNorm { q: &v[3], k: &v[4], eps: EPS })
}
/// v: joint, the caches k and v, and with norms their weights. Returns the result and both caches.
fn step(v: &[Var], heads: (usize, usize), table: &RopeTable, rows: &CacheRows) -> Result<Vec<Var>> {
    let (mut caches, norm) = ([v[1].value().copy()?, v[2].value().copy()?], norm(v));
    let [k, c] = &mut caches;
    let y = ops::cached_step(v[0].value(), heads, norm, table, [k, c], rows, 0.3)?;
    Ok([y].into_iter().chain(caches).map(Var::constant).collect())
}

/// The ops that it stands for.
fn one_by_one(v: &[Var], heads: (usize, usize), table: &RopeTable, rows: &CacheRows) -> Result<Vec<Var>> {
    let mut caches = [v[1].value().copy()?, v[2].value().copy()?];
    let [q, new_k, new_v] = ops::qk_norm_rope(&v[0], heads.0, heads.1, norm(v), table)?;
    let [k, c] = &mut caches;
    ops::write_row_pairs([k, c], [new_k.value(), new_v.value()], rows)?;
    let y = ops::cached_attention(q.value(), &caches[0], &caches[1], rows, 0.3)?.permute(&[0, 2, 1, 3])?;
    let y = y.reshape(v[0].value().narrow(2, 0, y.shape()[2] * y.shape()[3])?.shape())?;
    Ok([y].into_iter().chain(caches).map(Var::constant).collect())
}

/// Some of a step's sizes, and what it is given.
#[derive(Clone, Debug)]
struct Step {
    heads: (usize, usize),
    d: usize,
    /// n of the table: d or less.
    turned: usize,
    normed: bool,
    /// What the first row of a text sees, and how many rows it has.
    texts: Vec<(usize, usize)>,
}

impl Step {
    fn rows(&self) -> (CacheRows, RopeTable, usize) {
        let (seen, room) = texts_of_rows(&self.texts);
        let positions: Vec<usize> = (0..seen.len()).map(|i| i * 5 % 23).collect();
        let table = RopeTable::new(&positions, self.turned, 1e4).unwrap();
        (CacheRows::new(seen).unwrap(), table, room)
    }
    fn shapes(&self) -> Vec<Vec<usize>> {
        let ((heads, kv), (rows, _, room)) = (self.heads, self.rows());
        let mut shapes = vec![vec![1, rows.len(), (heads + 2 * kv) * self.d]];
        shapes.extend(vec![vec![kv, room, self.d]; 2]);
        shapes.extend(vec![vec![self.d]; if self.normed { 2 } else { 0 }]);
        shapes
    }
    /// One kernel and the ops apart differ in no bit.
    fn check_bits(&self, cuda: Device, seed: u64) {
        let (rows, table, _) = self.rows();
        for dtype in FLOATS {
            let there = |(i, s): (usize, &Vec<usize>)| {
                let x = ops::cast_tensor(&wave(s, seed + i as u64), dtype).unwrap().to_device(cuda).unwrap();
                Var::constant(x)
            };
            let v: Vec<Var> = self.shapes().iter().enumerate().map(there).collect();
            let (got, want) = (step(&v, self.heads, &table, &rows), one_by_one(&v, self.heads, &table, &rows));
            for (i, (got, want)) in got.unwrap().iter().zip(want.unwrap()).enumerate() {
                let (got, want) = (got.value().to_le_bytes().unwrap(), want.value().to_le_bytes().unwrap());
                let at = got.iter().zip(&want).position(|(a, b)| a != b).map(|b| b / dtype.size());
                assert!(at.is_none(), "{dtype} result {i}: element {} of {self:?}", at.unwrap());
            }
        }
    }
}

/// Runs next to where a step of a warp, those of its teams, or a chunk begin and end (cached_attention.cuh), and others.
fn some_keys(most: usize, draw: &mut Philox) -> usize {
    let mut upto = |n: usize| 1 + (draw.next_u64() % n as u64) as usize;
    let keys = match upto(4) {
        1 => 4 * upto(12),
        2 => 64 * upto(9),
        3 => 1024 * upto(2),
        _ => upto(60) + 2,
    };
    (keys + upto(5)).saturating_sub(3).clamp(1, most)
}

/// Few texts, which sixteen warps take or four, and so many that one warp does, of which few are long.
fn some_step(draw: &mut Philox) -> Step {
    let mut upto = |n: usize| 1 + (draw.next_u64() % n as u64) as usize;
    let d = [64, 128, 256][upto(3) - 1];
    let (heads, texts) = match upto(4) {
        1 => (4, upto(4)),
        2 => (8, upto(30)),
        3 => (16, 20 + upto(20)),
        _ => (16, 100),
    };
    let kv = [heads, heads, heads, heads / 2, 1][upto(5) - 1];
    let (turned, normed, mixed) = ([d, d / 2][upto(2) - 1], upto(4) > 1, upto(3));
    // past a chunk one kernel takes many texts alone
    let most = if texts * heads > 300 { 2050 } else { 1023 };
    let texts = (0..texts).map(|i| {
        let rows = if mixed == 1 { 2 } else { 1 + (draw.next_u64() % mixed as u64) as usize };
        (some_keys(if i < 6 { most } else { 40 }, draw), rows)
    });
    Step { heads: (heads, kv), d, turned, normed, texts: texts.collect() }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_step_in_one_kernel_is_its_ops_in_every_bit(seed in any::<u32>()) {
        if let Some(cuda) = devices::cuda() {
            some_step(&mut Philox::new(seed as u64)).check_bits(cuda, seed as u64);
        }
    }
}

/// One text, and two of which one has a row: every run about the ends of steps and chunks.
#[test]
fn pairs_of_rows_are_their_ops_in_every_bit() {
    let Some(cuda) = devices::cuda() else { return };
    let ends = [4, 8, 16, 32, 64, 128, 256, 512, 1022];
    for (i, end) in ends.into_iter().enumerate() {
        for (j, d) in [64, 128, 256].into_iter().enumerate() {
            for keys in end - 2..=end + 1 {
                if devices::light() && (i + j + keys) % 4 > 0 {
                    continue;
                }
                let step =
                    |heads, texts: &[(usize, usize)]| Step { heads, d, turned: d, normed: true, texts: texts.to_vec() };
                step((2, 1), &[(keys, 2)]).check_bits(cuda, 1);
                step((2, 2), &[(3, 1), (keys, 2)]).check_bits(cuda, 2);
            }
        }
    }
    // past a chunk: so many heads that one kernel takes them
    for keys in [1023, 1024, 1025, 2047, 2048] {
        for (d, texts) in [(64, 20), (128, 20), (64, 90)] {
            let texts = (0..texts).map(|i| (if i == 1 { keys } else { 1 + i % 20 }, 1 + (i + keys) % 2)).collect();
            Step { heads: (16, 16), d, turned: d, normed: true, texts }.check_bits(cuda, 3);
        }
    }
}

/// Texts of one row and of two together, against the CPU.
#[test]
fn steps_of_pairs_agree_on_cuda() {
    for (heads, kv, d) in [(4, 4, 64), (4, 2, 64), (2, 1, 128), (2, 2, 256), (3, 3, 30)] {
        let many: Vec<(usize, usize)> = (0..150).map(|i| (1 + i * 7 % 90, 1 + i % 2)).collect();
        for texts in [&[(1, 2)][..], &[(40, 2)], &[(3000, 2)], &[(1, 1), (17, 2), (145, 2), (16, 1)], &many] {
            if devices::light() && texts.len() > 4 {
                continue;
            }
            for normed in [true, false] {
                let turned = d / 2 * 2 / if d % 4 == 0 { 2 } else { 1 };
                let case = Step { heads: (heads, kv), d, turned, normed, texts: texts.to_vec() };
                let (rows, table, _) = case.rows();
                let shapes = case.shapes();
                let op = |v: &[Var]| step(v, case.heads, &table, &rows);
                agrees_with("cached_step", &shapes.iter().map(Vec::as_slice).collect::<Vec<_>>(), 1, &op, &op);
            }
        }
    }
}

#[test]
fn cached_steps_agree_on_cuda() {
    let many: Vec<usize> = (0..300).map(|i| 1 + i * 7 % 90).collect();
    for (heads, kv, d) in [(4, 4, 64), (4, 2, 64), (8, 1, 64), (3, 3, 30), (2, 1, 128), (1, 1, 256), (2, 2, 10), (6, 2, 24)]
    {
        for keys in [&[1][..], &[40], &[3000, 2], &[1, 17, 145, 16], &many] {
            if devices::light() && keys.len() > 4 {
                continue;
            }
            let ((rows, room), r) = (texts(keys), keys.len());
            let positions: Vec<usize> = (0..r).map(|i| i * 5 % 23).collect();
            let table = RopeTable::new(&positions, d / 2 * 2 / if d % 4 == 0 { 2 } else { 1 }, 1e4).unwrap();
            let (joint, cache) = ([1, r, (heads + 2 * kv) * d], [kv, room, d]);
            for normed in [true, false] {
                let mut shapes: Vec<&[usize]> = vec![&joint, &cache, &cache];
                let weight = [d];
                shapes.extend([&weight[..]; 2].iter().take(if normed { 2 } else { 0 }));
                let op = |v: &[Var]| step(v, (heads, kv), &table, &rows);
                agrees_with("cached_step", &shapes, 1, &op, &op);
            }
        }
    }
}

/// Rows of one text that see one another, and rows that see what others leave alone.
#[test]
fn rows_of_one_text_step_together() {
    let (heads, d) = (2, 8);
    let seen = [3..5, 3..6, 8..9];
    let table = RopeTable::new(&[4, 5, 0], d, 1e4).unwrap();
    let inputs = [wave(&[1, 3, 6 * d], 0), wave(&[heads, 10, d], 1), wave(&[heads, 10, d], 2)].map(Var::constant);
    let all = step(&inputs, (heads, heads), &table, &CacheRows::new(seen.to_vec()).unwrap()).unwrap();
    // one after the other
    let mut v = inputs.clone();
    for (i, run) in seen.into_iter().enumerate() {
        v[0] = Var::constant(inputs[0].value().narrow(1, i, 1).unwrap());
        let rows = CacheRows::new(vec![run]).unwrap();
        let got = step(&v, (heads, heads), &table.select(&[i]).unwrap(), &rows).unwrap();
        let want = all[0].value().narrow(1, i, 1).unwrap().to_f64_vec().unwrap();
        let got_y = got[0].value().to_f64_vec().unwrap();
        assert!(got_y.iter().zip(&want).all(|(a, b)| (a - b).abs() < 1e-14), "row {i}");
        (v[1], v[2]) = (got[1].clone(), got[2].clone());
    }
    for i in [1, 2] {
        assert_eq!(v[i].value().to_f64_vec().unwrap(), all[i].value().to_f64_vec().unwrap());
    }
}
