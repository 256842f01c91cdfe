//! Choosing tokens: by the distribution that settings ask for, the same for the same seed; and attention to a cache, row by row.

mod common;

use common::rough::{U32, share};
use common::{Kind, model};
use felid::generate::{Generator, Request, generate};
use felid::ops::{self, CacheRows, Draw, Sampling};
use felid::random::{Philox, subkey, uniform_at};
use felid::tensor::Tensor;
use proptest::prelude::*;

fn upto(n: usize, draw: &mut Philox) -> usize {
    1 + draw.below(n as u64) as usize
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Rows that attend to a cache: the definition, whatever else is in the call, in every bit.
    #[test]
    fn attention_to_a_cache(draw in any::<u64>()) {
        let draw = &mut Philox::new(draw);
        let (hkv, group, d, t, n) = (upto(3, draw), upto(3, draw), 2 * upto(20, draw), upto(200, draw), upto(9, draw));
        let random = |shape: &[usize], draw: &mut Philox| {
            let x: Vec<f32> = (0..shape.iter().product()).map(|_| draw.normal_pair()[0] as f32).collect();
            Tensor::from_vec(x, shape).unwrap()
        };
        let (q, k, v) =
            (random(&[1, n, hkv * group, d], draw), random(&[hkv, t, d], draw), random(&[hkv, t, d], draw));
        let q = q.permute(&[0, 2, 1, 3]).unwrap();
        let spans: Vec<_> = (0..n).map(|_| { let end = upto(t, draw); draw.below(end as u64) as usize..end }).collect();
        let rows = CacheRows::new(spans.clone()).unwrap();
        let all = ops::cached_attention(&q, &k, &v, &rows, 0.4).unwrap();
        let (q64, k64, v64) = (q.to_f64_vec().unwrap(), k.to_f64_vec().unwrap(), v.to_f64_vec().unwrap());
        for (r, span) in spans.iter().enumerate() {
            let alone = q.narrow(2, r, 1).unwrap();
            let one = ops::cached_attention(&alone, &k, &v, &CacheRows::new(vec![span.clone()]).unwrap(), 0.4).unwrap();
            prop_assert_eq!(one.to_le_bytes().unwrap(), all.narrow(2, r, 1).unwrap().to_le_bytes().unwrap());
            for h in 0..hkv * group {
                let query = &q64[(h * n + r) * d..][..d];
                let row = |x: &[f64], j: usize| x[(h / group * t + j) * d..][..d].to_vec();
                let scores: Vec<f64> =
                    span.clone().map(|j| 0.4 * query.iter().zip(row(&k64, j)).map(|(a, b)| a * b).sum::<f64>()).collect();
                let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let p: Vec<f64> = scores.iter().map(|s| (s - most).exp()).collect();
                let (sum, size) = (p.iter().sum::<f64>(), p.len() as f64);
                let mut want = vec![0.0; d];
                for (p, j) in p.iter().zip(span.clone()) {
                    want.iter_mut().zip(row(&v64, j)).for_each(|(w, v)| *w += p / sum * v);
                }
                // first order: a score errs by d roundings of its terms, a probability as much, the sums by as many as there
                // are keys; of values of size 4 at most
                let terms = query.iter().map(|x| x.abs()).sum::<f64>() * 0.4 * 5.0;
                let err = U32 * (d as f64).sqrt() * 5.0 * (d as f64 * terms + size + 3.0);
                let got = one.narrow(1, h, 1).unwrap().to_f64_vec().unwrap();
                prop_assert!(share(&got, &want, err, U32) < 1.0, "{got:?} {want:?}");
            }
        }
        prop_assert!(ops::cached_attention(&q, &k.narrow(1, 0, t - 1).unwrap(), &v, &rows, 0.4).is_err());
    }
}

/// Every setting draws from the distribution that its definition gives: chi-square over 20,000 draws.
#[test]
fn samples_follow_their_distribution() {
    let logits: Vec<f32> = vec![1.0, -0.5, 2.0, 0.3, 1.9, -3.0, 0.0, 1.0, -1.0, 5.0];
    let (v, draws) = (logits.len() - 1, 20_000usize); // the last id is past the limit
    let seen = [1u64 << 2 | 1 << 3 | 1 << 5];
    let plain = Sampling { temperature: 1.0, ..Default::default() };
    for (i, how) in [
        plain,
        Sampling { temperature: 0.5, ..plain },
        Sampling { temperature: 3.0, ..plain },
        Sampling { top_k: 3, ..plain },
        Sampling { top_p: 0.7, ..plain },
        Sampling { min_p: 0.2, ..plain },
        Sampling { repetition_penalty: 1.7, ..plain },
        Sampling { temperature: 1.4, top_k: 6, top_p: 0.9, min_p: 0.05, repetition_penalty: 0.8 },
    ]
    .into_iter()
    .enumerate()
    {
        // the definition, a step at a time
        let penalty = how.repetition_penalty as f32;
        let penalized = |i: usize| match (seen[0] >> i & 1, logits[i]) {
            (1, x) if x > 0.0 => x / penalty,
            (1, x) => x * penalty,
            (_, x) => x,
        };
        let weight = |i: usize| (f64::from(penalized(i)) / how.temperature).exp();
        let mut order: Vec<usize> = (0..v).collect();
        order.sort_by(|&a, &b| weight(b).total_cmp(&weight(a)).then(a.cmp(&b)));
        order.truncate(if how.top_k == 0 { v } else { how.top_k });
        order.retain(|&i| weight(i) >= how.min_p * weight(order_first(&logits, &weight, v)));
        let total: f64 = order.iter().map(|&i| weight(i)).sum();
        let mut held = 0.0;
        let kept: Vec<usize> = order
            .into_iter()
            .take_while(|&i| {
                let more = held < how.top_p * total;
                held += weight(i);
                more
            })
            .collect();
        let total: f64 = kept.iter().map(|&i| weight(i)).sum();

        let batch = Tensor::from_vec(logits.repeat(draws), &[draws, v + 1]).unwrap();
        let rows: Vec<Draw> =
            (0..draws).map(|n| Draw { how, uniform: uniform_at(subkey(i as u64, 0), n as u64), seen: &seen }).collect();
        let ids = ops::sample(&batch, v, &rows).unwrap();
        let mut counts = vec![0usize; v];
        ids.iter().for_each(|&id| counts[id as usize] += 1);
        let chi: f64 = kept
            .iter()
            .map(|&i| {
                let want = draws as f64 * weight(i) / total;
                (counts[i] as f64 - want).powi(2) / want
            })
            .sum();
        let freedom = kept.len() as f64 - 1.0;
        assert!(chi <= freedom + 4.5 * (2.0 * freedom.max(1.0)).sqrt(), "{how:?}: chi-square {chi}, {freedom} free");
        let outside: usize = (0..v).filter(|i| !kept.contains(i)).map(|i| counts[i]).sum();
        assert_eq!(outside, 0, "{how:?} {counts:?} {kept:?}");
        // a row alone, or in another order, draws the same
        let one = ops::sample(&batch.narrow(0, 5, 1).unwrap(), v, &rows[5..6]).unwrap();
        assert_eq!(one[0], ids[5]);
    }
}

fn order_first(logits: &[f32], weight: &dyn Fn(usize) -> f64, v: usize) -> usize {
    (0..v.min(logits.len())).max_by(|&a, &b| weight(a).total_cmp(&weight(b))).unwrap()
}

#[test]
fn seeds_reproduce_and_differ() {
    let m = model(Kind::Adaptive, 4);
    let request = |seed| Request {
        sampling: Sampling { temperature: 2.0, ..Default::default() },
        seed,
        ..Request::new(vec![1, 2, 3], m.config().block_size - 2)
    };
    let generator = Generator::new(&m);
    let tokens = |seeds: &[u64]| -> Vec<Vec<i64>> {
        generator.run(seeds.iter().map(|&s| request(s)).collect()).unwrap().into_iter().map(|o| o.tokens).collect()
    };
    let all = tokens(&[0, 1, 2, 1, u64::MAX]);
    assert_eq!(all[1], all[3]);
    assert!(all[0] != all[1] && all[1] != all[2] && all[2] != all[4]);
    assert_eq!(tokens(&[2])[0], all[2]);
    // a batch of one prompt: row r draws by the seed plus r
    let prompts = Tensor::ids(&[1, 2, 3].repeat(3), &[3, 3]).unwrap();
    let batch = generate(&m, &prompts, &request(0)).unwrap().to_vec::<i64>().unwrap();
    assert_eq!(batch, all[..3].concat());
}
