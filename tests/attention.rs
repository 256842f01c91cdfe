//! Attention under structured masks against a naive float64 reference that asks `Mask::allows` for every pair.

#[path = "common/devices.rs"]
mod devices;
#[path = "common/naive_attention.rs"]
mod naive_attention;

use felid::autograd::{GradCheck, Var, check_gradients, no_grad};
use felid::ops::{self, Mask, attention};
use felid::tensor::Tensor;
use half::{bf16, f16};
use naive_attention::*;
use proptest::prelude::*;

fn masks() -> impl Strategy<Value = Mask> {
    prop_oneof![
        Just(Mask::Causal),
        Just(Mask::Bidirectional),
        (1usize..=20).prop_map(|stride| Mask::Cat { stride }),
        (1usize..=20).prop_map(|stride| Mask::Cat { stride })
    ]
}

prop_compose! {
    fn cases(longest: usize)(
        mask in masks(),
        l in 1..=longest,
        other in 1..=longest,
        b in 1usize..=3,
        hkv in 1usize..=3,
        group in 1usize..=3,
        d in prop::sample::select(vec![1usize, 3, 8, 16, 32, 48, 64, 96, 128]),
    ) -> Case {
        let (lq, lk) = match mask {
            Mask::Causal => (l.min(other), l.max(other)),
            Mask::Bidirectional => (l, other),
            Mask::Cat { .. } => (l, l),
        };
        Case { mask, b, hkv, group, lq, lk, d }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..Default::default() })]

    #[test]
    fn agrees_with_the_reference(c in cases(80), seed in any::<u32>()) {
        check_all(c, seed as u64);
    }

    #[test]
    fn few_queries_agree_with_the_reference(c in cases(80), lq in 1usize..=5, seed in any::<u32>()) {
        let lq = lq.min(c.lk);
        let lk = if matches!(c.mask, Mask::Cat { .. }) { lq } else { c.lk };
        check_all(Case { lq, lk, ..c }, seed as u64);
    }

    #[test]
    fn pairs_counts_what_allows_says(c in cases(80)) {
        let count = (0..c.lq).flat_map(|i| (0..c.lk).map(move |j| (i, j))).filter(|&(i, j)| c.allows(i, j)).count();
        prop_assert_eq!(c.mask.pairs(c.lq, c.lk), count);
    }

    /// Views into one fused projection `[B, L, (H + 2 Hkv) d]`, and views with gaps in the rows.
    #[test]
    fn strides_do_not_matter(c in cases(40), seed in any::<u32>()) {
        let c = Case { lq: c.lk, ..c };
        let (h, kv) = (c.h() * c.d, c.hkv * c.d);
        let fused = Tensor::from_vec(random::<f32>(seed as u64, c.b * c.lk * (h + 2 * kv)), &[c.b, c.lk, h + 2 * kv]).unwrap();
        let views: Vec<Tensor> = fused
            .split(2, &[h, kv, kv])
            .unwrap()
            .iter()
            .zip([c.h(), c.hkv, c.hkv])
            .map(|(t, heads)| t.reshape(&[c.b, c.lk, heads, c.d]).unwrap().permute(&[0, 2, 1, 3]).unwrap())
            .collect();
        let views: [Tensor; 3] = views.try_into().unwrap();
        let dy = Tensor::from_vec(random::<f32>(seed as u64 + 1, c.b * c.lk * h), &[c.b, c.h(), c.lk, c.d]).unwrap();
        let gaps = |t: &Tensor| t.transpose(2, 3).unwrap().copy().unwrap().transpose(2, 3).unwrap();
        let want = run(views.each_ref().map(|t| t.copy().unwrap()), &dy, c.mask, c.scale());
        for got in [run(views.clone(), &gaps(&dy), c.mask, c.scale()), run(views.each_ref().map(gaps), &dy, c.mask, c.scale())] {
            for (got, want) in got.iter().zip(&want) {
                prop_assert_eq!(got.to_vec::<f32>().unwrap(), want.to_vec::<f32>().unwrap());
                prop_assert!(got.transpose(1, 2).unwrap().is_contiguous(), "heads must join without a copy");
            }
        }
    }
}

/// Lengths that cross every tile: 8, 16 and 128 keys, 6 and 48 rows, 64 keys in decoding, and split query rows.
const LONG: [Case; 10] = [
    square(Mask::Cat { stride: 17 }, 1, 2, 1, 290, 64),
    square(Mask::Cat { stride: 6 }, 1, 1, 2, 386, 32),
    square(Mask::Cat { stride: 2 }, 1, 1, 1, 401, 16),
    square(Mask::Cat { stride: 1 }, 1, 1, 1, 150, 16),
    square(Mask::Cat { stride: 130 }, 1, 1, 1, 400, 16),
    square(Mask::Cat { stride: 1000 }, 1, 1, 1, 300, 16),
    square(Mask::Causal, 1, 1, 2, 300, 48),
    square(Mask::Bidirectional, 2, 1, 1, 270, 24),
    Case { mask: Mask::Causal, b: 1, hkv: 2, group: 2, lq: 2, lk: 700, d: 40 },
    Case { mask: Mask::Causal, b: 1, hkv: 1, group: 1, lq: 130, lk: 300, d: 8 },
];

#[test]
fn long_sequences_agree_with_the_reference() {
    for (i, c) in LONG.into_iter().enumerate() {
        check::<f32>(c, 100 + i as u64);
        check::<f64>(c, 100 + i as u64);
    }
    check_all(LONG[0], 7);
}

/// What kernels tile: strides around and above tile heights, head widths on and off the compiled ones, ragged tails, many
/// small blocks (the compressor), long keys for few queries (decoding). In quarters, for tools under which a launch takes long.
fn long_sequences_on_cuda(quarter: usize) {
    if devices::cuda().is_none() {
        return;
    }
    let cat = |stride, l, d| square(Mask::Cat { stride }, 1, 2, 1, l, d);
    let cases = [
        cat(5, 1027, 64),
        cat(9, 700, 64),
        cat(17, 1100, 64),
        cat(33, 901, 64),
        cat(17, 600, 128),
        cat(17, 300, 256),
        cat(65, 515, 96),
        cat(127, 520, 64),
        cat(128, 520, 64),
        cat(129, 520, 64),
        cat(300, 1000, 32),
        cat(1, 260, 64),
        cat(3, 333, 80),
        cat(18, 640, 40),
        cat(34, 1190, 128),
        cat(66, 700, 72),
        cat(6, 1538, 64),
        cat(3, 1300, 64),
        cat(2, 807, 48),
        square(Mask::Cat { stride: 17 }, 2, 2, 3, 200, 64),
        square(Mask::Causal, 1, 2, 2, 1025, 64),
        square(Mask::Causal, 1, 1, 1, 513, 128),
        square(Mask::Bidirectional, 300, 4, 1, 6, 64),
        square(Mask::Bidirectional, 130, 2, 1, 18, 32),
        square(Mask::Bidirectional, 40, 3, 1, 34, 64),
        square(Mask::Bidirectional, 1, 2, 1, 300, 64),
        square(Mask::Bidirectional, 21, 2, 1, 33, 128),
        square(Mask::Bidirectional, 7, 2, 2, 17, 64),
        Case { mask: Mask::Bidirectional, b: 2, hkv: 2, group: 2, lq: 70, lk: 333, d: 64 },
        Case { mask: Mask::Causal, b: 3, hkv: 2, group: 4, lq: 1, lk: 1500, d: 64 },
        Case { mask: Mask::Causal, b: 1, hkv: 2, group: 1, lq: 2, lk: 300, d: 128 },
        Case { mask: Mask::Causal, b: 1, hkv: 2, group: 1, lq: 65, lk: 700, d: 64 },
    ];
    for (i, c) in cases.into_iter().enumerate().skip(quarter).step_by(4) {
        // each by one of the dtypes, in turn, where a launch takes long
        let asked = |n: usize| !devices::light() || (i / 4 + n).is_multiple_of(3);
        if asked(0) {
            check::<f32>(c, 300 + i as u64);
        }
        if asked(1) {
            check::<bf16>(c, 300 + i as u64);
        }
        if asked(2) {
            check::<f16>(c, 300 + i as u64);
        }
    }
}
#[test]
fn long_sequences_agree_on_cuda_1() {
    long_sequences_on_cuda(0);
}
#[test]
fn long_sequences_agree_on_cuda_2() {
    long_sequences_on_cuda(1);
}
#[test]
fn long_sequences_agree_on_cuda_3() {
    long_sequences_on_cuda(2);
}
#[test]
fn long_sequences_agree_on_cuda_4() {
    long_sequences_on_cuda(3);
}

#[test]
fn gradients_match_finite_differences() {
    let cases = [
        square(Mask::Cat { stride: 5 }, 2, 2, 2, 13, 6),
        square(Mask::Bidirectional, 2, 1, 3, 6, 4),
        Case { mask: Mask::Causal, b: 1, hkv: 2, group: 1, lq: 3, lk: 8, d: 5 },
        Case { mask: Mask::Causal, b: 1, hkv: 1, group: 2, lq: 9, lk: 140, d: 3 },
    ];
    for c in cases {
        let (inputs, _) = tensors(c, &Data::<f64>::of(c, 3));
        check_gradients("attention", ops::add_assign, &inputs, GradCheck::default(), |x| {
            Ok(vec![attention(&x[0], &x[1], &x[2], c.mask, c.scale())?])
        })
        .unwrap();
    }
}

#[test]
fn threads_do_not_matter() {
    let more = [square(Mask::Bidirectional, 100, 2, 1, 6, 16), square(Mask::Cat { stride: 6 }, 40, 1, 2, 25, 8)];
    for c in LONG.into_iter().chain(more) {
        let (inputs, dy) = tensors(c, &Data::<f32>::of(c, 5));
        let with = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let out = pool.install(|| run(inputs.clone(), &dy, c.mask, c.scale()));
            out.map(|t| t.to_vec::<f32>().unwrap().iter().map(|x| x.to_bits()).collect::<Vec<_>>())
        };
        assert_eq!(with(1), with(3), "{c:?}");
    }
}

/// A row's result depends on its own sequence alone, wherever tasks and tiles are cut.
#[test]
fn batch_rows_do_not_matter() {
    for c in [square(Mask::Cat { stride: 7 }, 3, 2, 2, 100, 16), square(Mask::Bidirectional, 70, 2, 1, 6, 16)] {
        let (inputs, dy) = tensors(c, &Data::<f32>::of(c, 6));
        let all = run(inputs.clone(), &dy, c.mask, c.scale());
        let last = |t: &Tensor| t.narrow(0, c.b - 1, 1).unwrap();
        let one = run(inputs.each_ref().map(last), &last(&dy), c.mask, c.scale());
        for (all, one) in all.iter().zip(&one) {
            assert_eq!(last(all).to_vec::<f32>().unwrap(), one.to_vec::<f32>().unwrap());
        }
    }
}

#[test]
fn extreme_scores_stay_finite() {
    let cases = [
        square(Mask::Cat { stride: 5 }, 1, 1, 1, 33, 4),
        square(Mask::Causal, 1, 1, 1, 200, 4),
        square(Mask::Bidirectional, 1, 1, 1, 10, 4),
        Case { mask: Mask::Causal, b: 1, hkv: 1, group: 1, lq: 1, lk: 200, d: 4 },
    ];
    for c in cases {
        let mut x = Data::<f32>::of(c, 8);
        // q and k of +-50 in 4 elements: scores of up to 4 * 50 * 50 = 1e4 either way
        x.q.iter_mut().chain(&mut x.k).for_each(|x| *x = 50f32.copysign(*x));
        let (inputs, dy) = tensors(c, &x);
        let got = run(inputs, &dy, c.mask, 1.0);
        for t in &got {
            assert!(t.to_vec::<f32>().unwrap().iter().all(|x| x.is_finite()), "{c:?}");
        }
        // the scores are whole numbers, exact in f32; only the softmax rounds, and averages of v lie within its range
        let want = naive::<f64>(c, &x.to(), 1.0, |y| y, |s| s);
        assert!(error(&back::<f32>(&got[0]), &want[0]) < 1e-5, "{c:?}");
    }
}

#[test]
fn wrong_shapes_are_errors() {
    let zeros = |shape: [usize; 4]| Var::constant(Tensor::from_vec(vec![0f32; shape.iter().product()], &shape).unwrap());
    let fails = |q, k, v, mask| attention(&zeros(q), &zeros(k), &zeros(v), mask, 1.0).unwrap_err().to_string();
    let ok = [1, 2, 3, 4];
    let cat = Mask::Cat { stride: 2 };
    for bad in [[2, 2, 3, 4], [1, 2, 3, 5], [1, 3, 3, 4], [1, 0, 3, 4]] {
        assert!(fails(ok, bad, bad, Mask::Bidirectional).starts_with("attention: "));
    }
    assert!(fails(ok, ok, [1, 2, 4, 4], Mask::Bidirectional).contains("[B, Hkv, Lk, d]"));
    assert!(fails(ok, [1, 2, 2, 4], [1, 2, 2, 4], Mask::Causal).contains("2 for 3"));
    assert!(fails(ok, [1, 2, 5, 4], [1, 2, 5, 4], cat).contains("5 for 3"));
    assert!(fails(ok, ok, ok, Mask::Cat { stride: 0 }).contains("stride"));
    assert!(fails(ok, [1, 2, 0, 4], [1, 2, 0, 4], Mask::Bidirectional).contains("key"));
    let (flat, half) =
        (Tensor::from_vec(vec![0f32; 4], &[4]).unwrap(), Tensor::from_vec(vec![bf16::ZERO; 24], &ok).unwrap());
    assert!(attention(&flat.into(), &zeros(ok), &zeros(ok), cat, 1.0).is_err());
    assert!(attention(&half.into(), &zeros(ok), &zeros(ok), cat, 1.0).unwrap_err().to_string().contains("bf16"));
    let ids = Var::constant(Tensor::from_vec(vec![0i64; 24], &ok).unwrap());
    assert!(attention(&ids, &ids, &ids, cat, 1.0).unwrap_err().to_string().contains("float"));
}

#[test]
fn nothing_in_gives_nothing_out() {
    let empty = |shape: [usize; 4]| Tensor::from_vec(vec![0f32; shape.iter().product()], &shape).unwrap();
    for (q, k) in [
        ([0, 2, 3, 4], [0, 2, 3, 4]),
        ([2, 0, 3, 4], [2, 0, 3, 4]),
        ([2, 2, 0, 4], [2, 1, 3, 4]),
        ([2, 2, 0, 4], [2, 2, 0, 4]),
        ([2, 2, 3, 0], [2, 2, 3, 0]),
    ] {
        for mask in [Mask::Causal, Mask::Bidirectional, Mask::Cat { stride: 2 }] {
            if matches!(mask, Mask::Cat { .. }) && q[2] != k[2] {
                continue;
            }
            let [y, dq, dk, dv] = run([empty(q), empty(k), empty(k)], &empty(q), mask, 1.0);
            assert_eq!((y.shape(), dq.shape(), dk.shape(), dv.shape()), (&q[..], &q[..], &k[..], &k[..]));
            assert!(dk.to_vec::<f32>().unwrap().iter().all(|&x| x == 0.0));
        }
    }
}

/// Decoding over a cache gives the last rows of the whole sequence.
#[test]
fn causal_is_aligned_to_the_end() {
    let c = square(Mask::Causal, 2, 2, 2, 90, 16);
    let (inputs, _) = tensors(c, &Data::<f64>::of(c, 9));
    let [q, k, v] = inputs.map(Var::constant);
    let all = no_grad(|| attention(&q, &k, &v, c.mask, c.scale())).unwrap();
    for n in [1, 2, 3, 4, 7, 60] {
        let q = ops::narrow(&q, 2, 90 - n, n).unwrap();
        let some = attention(&q, &k, &v, c.mask, c.scale()).unwrap();
        let want = all.value().narrow(2, 90 - n, n).unwrap().to_f64_vec().unwrap();
        assert!(error(&some.value().to_f64_vec().unwrap(), &want) < 1e-14);
    }
}
