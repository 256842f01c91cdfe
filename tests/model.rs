//! Whole models of every kind: against a naive reference, and against themselves in everything that must not matter.

mod common;

use common::naive::Naive;
use common::rough::{U32, U64, errs, share};
use common::{KINDS, Kind, cast, chunk_size, config, ids, model, model_of, relative};
use felid::autograd::{GradCheck, Gradients, Tape, Var, check_gradients, no_grad};
use felid::eval::parity::evaluate;
use felid::generate::{Request, generate};
use felid::model::{CacheFormat, Cat, ForwardOptions, IGNORE_INDEX, ModelType, Prompt, TransformerConfig};
use felid::ops::{self, argmax};
use felid::random::below_at;
use felid::tensor::{DType, Tensor};
use proptest::prelude::*;

fn options(chunk_size: Option<usize>) -> ForwardOptions {
    ForwardOptions { chunk_size, ..Default::default() }
}
fn logits(m: &Cat, ids: &Tensor, chunk: Option<usize>) -> Tensor {
    no_grad(|| m.logits(ids, options(chunk))).unwrap().into_value()
}
fn wide(t: &Tensor) -> Vec<f64> {
    t.to_f64_vec().unwrap()
}
/// Rows `from..from + n` of every sequence of `[B, N, V]`.
fn rows(t: &Tensor, from: usize, n: usize) -> Vec<f64> {
    wide(&t.narrow(1, from, n).unwrap())
}
/// The rows of the last dimension.
fn lines(t: &Tensor) -> Vec<Vec<f64>> {
    wide(t).chunks(t.shape()[t.rank() - 1]).map(<[f64]>::to_vec).collect()
}
fn with_id(ids: &Tensor, at: usize, id: i64) -> Tensor {
    let mut v = ids.to_vec::<i64>().unwrap();
    v[at] = id;
    Tensor::ids(&v, ids.shape()).unwrap()
}
/// Next tokens as labels, a few of them ignored.
fn labels(c: &felid::model::ModelConfig, b: usize, n: usize, seed: u64) -> Tensor {
    let mut l = ids(c, b, n, seed + 1).to_vec::<i64>().unwrap();
    (0..l.len()).step_by(5).skip(1).for_each(|i| l[i] = IGNORE_INDEX);
    Tensor::ids(&l, &[b, n]).unwrap()
}

/// What the naive formulas err at each position of one text, ids `[1, N]`.
fn errs_of(m: &Cat, text: &Tensor, chunk: Option<usize>, unit: f64) -> Vec<f64> {
    let (naive, plain) = (Naive::new(m), text.to_vec::<i64>().unwrap());
    errs(unit, || naive.logits(&plain, chunk))
}
/// Whether `a` and `b` are the same float64 logits `[B, n, V]` of positions `from..from + n` of texts `[B, N]`: within
/// `bound`, or in the rare model that amplifies roundings past it, within what both may err.
fn same(m: &Cat, text: &Tensor, chunk: Option<usize>, from: usize, a: &[f64], b: &[f64], bound: f64) -> bool {
    if relative(a, b) < bound {
        return true;
    }
    let (rows, v) = (text.shape()[0], m.config().vocab_rows());
    let n = a.len() / rows / v;
    (0..rows).all(|r| {
        let errs = errs_of(m, &text.narrow(0, r, 1).unwrap(), chunk, U64);
        (0..n).all(|t| {
            let at = (r * n + t) * v..(r * n + t + 1) * v;
            share(&a[at.clone()], &b[at], 2.0 * errs[from + t], 2.0 * U64) < 1.0
        })
    })
}

/// A kind, a seed, and numbers to draw sizes from.
fn any_model() -> impl Strategy<Value = (Kind, u64, u64)> {
    (prop::sample::select(&KINDS[..]), 0u64..100_000, any::<u32>().prop_map(u64::from))
}
/// 1..=n, drawn.
fn upto(n: usize, draw: u64, which: u64) -> usize {
    1 + below_at(draw, which, n as u64) as usize
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 120, failure_persistence: None, ..ProptestConfig::default() })]

    /// The model is the spec's (sections 1 to 4), whatever the sizes and options; its own shortcuts change nothing.
    #[test]
    fn agrees_with_the_naive_reference((kind, seed, draw) in any_model()) {
        let m = model(kind, seed);
        let (c, exact) = (m.config(), cast(&m, DType::F64));
        let (n, chunk) = (upto(c.block_size, draw, 0), chunk_size(c, draw));
        let ids = ids(c, 1, n, draw);
        let (naive, plain) = (Naive::new(&m), ids.to_vec::<i64>().unwrap());
        let (want, errs) = (naive.logits(&plain, chunk), errs(U32, || naive.logits(&plain, chunk)));
        let (wide64, wide32) = (wide(&logits(&exact, &ids, chunk)), wide(&logits(&m, &ids, chunk)));
        for (t, (want, err)) in want.iter().zip(errs).enumerate() {
            let at = t * c.vocab_rows()..(t + 1) * c.vocab_rows();
            let (got, err64) = (&wide64[at.clone()], err * U64 / U32);
            let off = relative(got, want);
            let exact = off < 1e-12 || share(got, want, err64, U64) < 1.0;
            prop_assert!(exact, "f64 {off:e} at {t} of {n}, chunk {chunk:?}, {c:?}");
            let off = share(&wide32[at], want, err, U32);
            prop_assert!(off < 1.0, "f32 {off} of its bound at {t} of {n}, chunk {chunk:?}, {c:?}");
        }
    }

    /// Spec section 5: prefill and steps give the logits of the whole model run on the text so far, for texts of different
    /// lengths and chunk sizes in one cache that is as small as can be.
    #[test]
    fn cached_logits_are_those_of_the_whole_model((kind, seed, draw) in any_model()) {
        let m = model(kind, seed);
        let (c, exact) = (m.config(), cast(&m, DType::F64));
        let b = upto(4, draw, 1);
        let chunks: Vec<_> = (0..b as u64).map(|r| chunk_size(c, draw + r * 7)).collect();
        let prompts: Vec<usize> = (0..b as u64).map(|r| upto(c.block_size, draw, 20 + r)).collect();
        for m in [&exact, &m] {
            let mut texts: Vec<Vec<i64>> =
                prompts.iter().zip(draw..).map(|(&p, s)| ids(c, 1, p, s).to_vec().unwrap()).collect();
            let sizes: Vec<_> =
                chunks.iter().zip(&prompts).map(|(&chunk, &p)| m.cache_size(chunk, p, c.block_size).unwrap()).collect();
            let mut cache = m.cache(sizes.iter().copied().sum(), CacheFormat::Plain).unwrap();
            prop_assert_eq!(cache.bytes() as u128, m.cache_bytes(sizes.iter().copied().sum(), CacheFormat::Plain));
            let kept: Vec<_> = sizes.iter().map(|s| cache.reserve(*s).unwrap()).collect();
            let prompt = |r: usize| Prompt { text: kept[r], ids: &texts[r], chunk_size: chunks[r] };
            let mut next = m.prefill(&mut cache, &(0..b).map(prompt).collect::<Vec<_>>()).unwrap();
            let (mut running, mut got) = ((0..b).collect::<Vec<_>>(), vec![vec![]; b]);
            while !running.is_empty() {
                for ((&r, logits), best) in running.iter().zip(lines(&next)).zip(argmax(&next).unwrap().to_vec().unwrap()) {
                    prop_assert_eq!(cache.tokens(kept[r]), texts[r].len());
                    got[r].push(logits);
                    texts[r].push(best);
                }
                running.retain(|&r| texts[r].len() <= c.block_size);
                let new: Vec<_> = running.iter().map(|&r| (kept[r], *texts[r].last().unwrap())).collect();
                next = m.step(&mut cache, &new).unwrap();
            }
            for r in 0..b {
                let read = Tensor::ids(&texts[r][..c.block_size], &[1, c.block_size]).unwrap();
                let (want, p) = (lines(&logits(&exact, &read, chunks[r])), prompts[r]);
                let here = |n: usize| format!("{n} of prompt {p}, row {r} of {b}, chunk {:?}, {c:?}", chunks[r]);
                if m.params()[0].dtype() == DType::F64 {
                    for (n, got) in (p..).zip(&got[r]) {
                        let off = relative(got, &want[n - 1]);
                        prop_assert!(same(m, &read, chunks[r], n - 1, got, &want[n - 1], 1e-12), "{off:e} at {}", here(n));
                    }
                } else {
                    // f32, which goes its own way where two tokens nearly tie, is as near to float64 as can be asked
                    let errs = errs_of(m, &read, chunks[r], U32);
                    for (n, got) in (p..).zip(&got[r]) {
                        let off = share(got, &want[n - 1], errs[n - 1], U32);
                        prop_assert!(off < 1.0, "{off} of its bound at {}", here(n));
                    }
                }
            }
        }
    }

    /// What comes later, or in other rows, or as padding, changes nothing.
    #[test]
    fn logits_depend_on_what_is_before_them_only((kind, seed, draw) in any_model()) {
        let m = cast(&model(kind, seed), DType::F64);
        let (c, chunk) = (m.config(), chunk_size(m.config(), draw));
        let (b, n) = (upto(3, draw, 3), upto(c.block_size, draw, 4));
        let text = ids(c, b, n, draw);
        let all = logits(&m, &text, chunk);

        // another token at t of the last row
        let t = upto(n, draw, 5) - 1;
        let id = (text.to_vec::<i64>().unwrap()[(b - 1) * n + t] + 1) % c.vocab_size as i64;
        let changed = logits(&m, &with_id(&text, (b - 1) * n + t, id), chunk);
        prop_assert!(t == 0 || same(&m, &text, chunk, 0, &rows(&changed, 0, t), &rows(&all, 0, t), 1e-13), "{c:?}");
        let part = |x: &Tensor| wide(&x.narrow(0, b - 1, 1).unwrap().narrow(1, t, 1).unwrap());
        prop_assert!(relative(&part(&changed), &part(&all)) > 1e-9, "token {t} has no effect: {c:?}");
        // every later position of its row may see it, other rows may not
        if b > 1 {
            let others = |x: &Tensor| wide(&x.narrow(0, 0, b - 1).unwrap());
            let texts = text.narrow(0, 0, b - 1).unwrap();
            prop_assert!(same(&m, &texts, chunk, 0, &others(&changed), &others(&all), 1e-13), "{c:?}");
        }
        for r in 0..b {
            let text = text.narrow(0, r, 1).unwrap();
            let alone = logits(&m, &text, chunk);
            prop_assert!(same(&m, &text, chunk, 0, &wide(&alone), &wide(&all.narrow(0, r, 1).unwrap()), 1e-13), "{c:?}");
        }
        // a prefix needs no padding to whole chunks
        let k = upto(n, draw, 6);
        let text = text.narrow(1, 0, k).unwrap();
        let prefix = logits(&m, &text, chunk);
        prop_assert!(same(&m, &text, chunk, 0, &wide(&prefix), &rows(&all, 0, k), 1e-13), "{c:?}");
    }

    /// Saving memory by computing blocks again, or not even what is cheap, changes no bit; the loss is that of the logits.
    #[test]
    fn recomputing_gives_the_same_bits((kind, seed, draw) in any_model()) {
        let m = model(kind, seed);
        let (c, chunk) = (m.config(), chunk_size(m.config(), draw));
        let (b, n) = (upto(2, draw, 7), upto(c.block_size, draw, 8));
        let (text, labels) = (ids(c, b, n, draw), labels(c, b, n, draw));
        let run = |tape: Tape, recompute: bool| {
            let mut grads = Gradients::default();
            let how = ForwardOptions { recompute, ..options(chunk) };
            let loss = tape.record(|| m.loss(&text, &labels, how)).unwrap();
            tape.backward(&loss, 0.25, &mut grads).unwrap();
            let grads: Vec<_> = m.params().iter().map(|p| grads.take(&p.var).map(|g| g.to_le_bytes().unwrap())).collect();
            (loss.value().to_le_bytes().unwrap(), grads)
        };
        let all_saved = run(ops::tape().saving_all(), false);
        prop_assert_eq!(&run(ops::tape(), false), &all_saved);
        prop_assert_eq!(&run(ops::tape(), true), &all_saved);
        let direct = no_grad(|| m.loss(&text, &labels, options(chunk))).unwrap();
        let whole = ops::cross_entropy(&logits(&m, &text, chunk).into(), &labels, IGNORE_INDEX).unwrap();
        let hidden = wide(no_grad(|| m.hidden(&text, options(chunk))).unwrap().value());
        let (naive, labels) = (Naive::new(&m), labels.to_vec::<i64>().unwrap());
        let exact = || vec![vec![naive.loss(&hidden, &labels)]];
        let (want, err) = (exact().concat(), errs(U32, exact)[0]);
        for got in [direct, whole] {
            let off = share(&wide(got.value()), &want, err, U32);
            prop_assert!(off < 1.0, "{off} of its bound, chunk {chunk:?}, {c:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 21, failure_persistence: None, ..ProptestConfig::default() })]

    /// Gradients of whole models are finite differences of their loss and logits, for every parameter.
    #[test]
    fn gradients_are_finite_differences(i in 0usize..KINDS.len(), seed in 0u64..100_000, draw in any::<u32>()) {
        let m = cast(&model(KINDS[i], seed), DType::F64);
        let (c, draw) = (m.config(), u64::from(draw));
        let chunk = c.allowed_chunk_sizes().into_iter().filter(|&s| s > 1).min_by_key(|&s| (s + draw as usize) % 3);
        prop_assume!(chunk.is_some() || c.model_type == ModelType::Transformer);
        let n = c.block_size.min(chunk.unwrap_or(1) + 5);
        let (text, labels) = (ids(c, 2, n, draw), labels(c, 2, n, draw));
        let values: Vec<Tensor> = m.params().into_iter().map(|p| p.var.into_value()).collect();
        // random models of few units bend within 1e-4: a step far below that
        let check = GradCheck { probes: 2, step: 2e-6, ..GradCheck::default() };
        let run = |vars: &[Var]| {
            let mut at = m.clone();
            at.params_mut().into_iter().zip(vars).for_each(|(p, v)| p.var = v.clone());
            Ok(vec![at.loss(&text, &labels, options(chunk))?, at.logits(&text, options(chunk))?])
        };
        let checked = check_gradients("model", ops::add_assign, &values, check, run);
        prop_assert!(checked.is_ok(), "{}: {n} tokens, chunk {chunk:?}, {c:?}", checked.unwrap_err());
    }
}

/// Parameters that no gradient reaches.
fn missing(m: &Cat, n: usize, chunk: Option<usize>) -> Vec<String> {
    let (text, labels) = (ids(m.config(), 1, n, 3), ids(m.config(), 1, n, 4));
    let (tape, mut grads) = (ops::tape(), Gradients::default());
    let loss = tape.record(|| m.loss(&text, &labels, options(chunk))).unwrap();
    tape.backward(&loss, 1.0, &mut grads).unwrap();
    let params = m.params();
    let vars: Vec<&Var> = params.iter().map(|p| &p.var).collect();
    let none: Vec<_> = grads.missing(vars).into_iter().map(Var::id).collect();
    params.iter().filter(|p| none.contains(&p.id())).map(|p| p.name.clone()).collect()
}

#[test]
fn gradients_reach_every_parameter_once_a_chunk_is_full() {
    for kind in KINDS {
        for seed in 0..8 {
            let m = model(kind, seed);
            let c = m.config();
            for chunk in c.allowed_chunk_sizes() {
                // with C 1 a chunk's only token is always replaced by its representation
                let unused = |n: &String| chunk == 1 && (n == "wte.weight" || n.ends_with("attention.expand.weight"));
                let full: Vec<_> = missing(&m, chunk, Some(chunk)).into_iter().filter(|n| !unused(n)).collect();
                assert_eq!(full, [""; 0], "{kind:?} {seed} chunk {chunk}");
                if chunk > 1 {
                    let of_compressor = |n: &str| n.starts_with("f.") || n.contains("attention.compressor.");
                    let want: Vec<String> = m.params().into_iter().map(|p| p.name).filter(|n| of_compressor(n)).collect();
                    assert_eq!(missing(&m, chunk - 1, Some(chunk)), want, "{kind:?} {seed} chunk {chunk}");
                }
            }
            if kind == Kind::Dense {
                assert_eq!(missing(&m, 1, None), [""; 0]);
            }
        }
    }
}

/// `evaluate` (the `logits` command) answers with zeros where no gradient flows, so that files are complete.
#[test]
fn evaluation_names_every_parameter() {
    let m = model(Kind::Adaptive, 5);
    let (text, labels) = (ids(m.config(), 2, 1, 0), ids(m.config(), 2, 1, 1));
    let chunk = m.config().chunk_size;
    let outcome = evaluate(&m, &text, Some(&labels), chunk).unwrap();
    let names: Vec<_> = outcome.gradients.iter().map(|(n, _)| n.clone()).collect();
    assert_eq!(names, m.params().into_iter().map(|p| p.name).collect::<Vec<_>>());
    let of = |name: &str| wide(&outcome.gradients.iter().find(|(n, _)| n == name).unwrap().1);
    assert!(of("f.wte.weight").iter().all(|&x| x == 0.0));
    assert!(of("dummy_fx.weight").iter().any(|&x| x != 0.0));
}

#[test]
fn sixteen_bit_models_run_and_train() {
    for kind in KINDS {
        for dtype in [DType::BF16, DType::F16] {
            let exact = model(kind, 11);
            let (m, c) = (cast(&exact, dtype), exact.config());
            let (text, chunk) = (ids(c, 2, c.block_size, 1), chunk_size(c, 2));
            // unit roundoff u: some 4 roundings a block in random directions, as in the bounds of golden files
            let u = if dtype == DType::BF16 { 2f64.powi(-9) } else { 2f64.powi(-11) };
            let off = relative(&wide(&logits(&m, &text, chunk)), &wide(&logits(&exact, &text, chunk)));
            assert!(off < 16.0 * u, "{kind:?} {dtype} {off}");
            let outcome = evaluate(&m, &text, Some(&text), chunk).unwrap();
            assert!(outcome.loss.unwrap().is_finite());
            let greedy = Request { max_new_tokens: 4, chunk_size: chunk, ..Default::default() };
            let prompt = text.narrow(1, 0, c.block_size - 3).unwrap();
            assert_eq!(generate(&m, &prompt, &greedy).unwrap().shape(), [2, 4]);
        }
    }
}

#[test]
fn the_cache_is_as_small_as_the_spec_says() {
    // at most K + C + 2 rows a layer: here 1024 tokens in chunks of 16
    let mut c = config(Kind::Adaptive, 3);
    (c.block_size, c.chunk_size) = (1024, Some(16));
    let m = model_of(c.clone(), 0);
    let size = m.cache_size(Some(16), 100, 1024).unwrap();
    assert!(size.rows <= 64 + 16 + 2, "{size:?}");
    let width = c.decoder.kv_heads() * c.decoder.head_dim() * 2 * 4;
    let bytes = |format| (m.cache(size, format).unwrap().bytes() as u128, m.cache_bytes(size, format));
    let plain = (c.decoder.n_layer * size.rows * width) as u128;
    assert_eq!(bytes(CacheFormat::Plain), (plain, plain));
    // a byte an element, and four a row and head
    let int8 = plain / 4 + (c.decoder.n_layer * size.rows * c.decoder.kv_heads() * 2 * 4) as u128;
    assert_eq!(bytes(CacheFormat::Int8), (int8, int8));
    // a text that never sees the end of its block needs no room for it
    assert_eq!(m.cache_size(Some(16), 64, 67).unwrap().rows, 4 + 2 + 3);
}

/// Errors, not panics; and what was asked wrongly leaves the cache as it was.
#[test]
fn wrong_calls_are_errors() {
    for kind in KINDS {
        let m = model(kind, 21);
        let (c, n) = (m.config().clone(), m.config().block_size);
        let text = ids(&c, 2, n, 0);
        let says = |r: felid::Result<Var>, what: &str| {
            let e = r.unwrap_err().to_string();
            assert!(e.contains(what) && !e.contains('\n'), "{kind:?}: {e}");
        };
        let long = ids(&c, 1, n + 1, 0);
        says(m.logits(&long, options(None)), "block_size");
        says(m.logits(&text.reshape(&[2 * n]).unwrap(), options(None)), "[batch, tokens]");
        says(m.logits(&text.narrow(1, 0, 0).unwrap(), options(None)), "empty");
        says(m.logits(&text.narrow(0, 0, 0).unwrap(), options(None)), "empty");
        says(m.logits(&with_id(&text, 1, -1), options(None)), "-1");
        says(m.logits(&with_id(&text, n, c.vocab_rows() as i64), options(None)), &c.vocab_rows().to_string());
        says(m.logits(&Tensor::from_vec(vec![0f32; 2], &[1, 2]).unwrap(), options(None)), "f32");
        says(m.loss(&text, &text.narrow(1, 0, 1).unwrap(), options(None)), "labels");
        says(m.loss(&text, &with_id(&text, 0, c.vocab_rows() as i64), options(None)), "label");
        says(m.loss(&text, &with_id(&text, 0, -1), options(None)), "-1");
        for size in [0, 3 * n, usize::MAX] {
            says(m.logits(&text, options(Some(size))), &size.to_string());
        }

        // room for one more token than the prompts'
        let size = (0..2).map(|_| m.cache_size(None, n - 2, n - 1).unwrap()).sum();
        let mut cache = m.cache(size, CacheFormat::Plain).unwrap();
        let kept = [0, 1].map(|_| cache.reserve(m.cache_size(None, n - 2, n - 1).unwrap()).unwrap());
        assert!(cache.reserve(m.cache_size(None, 1, 1).unwrap()).is_none());
        let short = text.narrow(1, 0, n - 2).unwrap().to_vec::<i64>().unwrap();
        let prompt = |r: usize, ids| Prompt { text: kept[r], ids, chunk_size: None };
        let prompts = [0, 1].map(|r| prompt(r, &short[r * (n - 2)..(r + 1) * (n - 2)]));
        assert!(m.step(&mut cache, &[(kept[0], 1)]).is_err(), "{kind:?}: no prompt yet");
        m.prefill(&mut cache, &prompts).unwrap();
        let next = [(kept[0], 1), (kept[1], 2)];
        let mut untouched = cache.clone();
        let vocab = c.vocab_rows() as i64;
        for bad in [vec![(kept[0], 1), (kept[1], vocab)], vec![(kept[0], -1)], vec![(kept[0], 1), (kept[0], 1)]] {
            assert!(m.step(&mut cache, &bad).is_err(), "{kind:?} {bad:?}");
        }
        let (long, outside) = (text.to_vec::<i64>().unwrap(), [1, vocab]);
        for bad in [prompt(0, &[]), prompt(0, &outside), prompt(0, &long), Prompt { chunk_size: Some(3 * n), ..prompts[0] }]
        {
            assert!(m.prefill(&mut cache, &[bad]).is_err(), "{kind:?} {bad:?}");
        }
        assert!(m.prefill(&mut cache, &[prompts[0], prompts[0]]).is_err(), "{kind:?}: one text twice");
        assert_eq!(wide(&m.step(&mut cache, &next).unwrap()), wide(&m.step(&mut untouched, &next).unwrap()), "{kind:?}");
        for (from, to) in [(n, n + 1), (n + 1, n), (usize::MAX, n), (0, usize::MAX)] {
            assert!(matches!(m.cache_size(None, from, to), Err(felid::Error::Length { .. })), "{kind:?} {from} {to}");
        }
        cache.free(kept[1]);
        assert!(m.step(&mut cache, &next[1..]).is_err() && m.step(&mut cache, &[]).unwrap().numel() == 0);
    }
}

/// A cache that another model has filled, or has made.
#[test]
fn caches_of_other_models_are_errors() {
    let like = |kind, layers: usize| {
        let mut c = config(kind, 3);
        (c.block_size, c.decoder) = (64, TransformerConfig::new(32, 2, layers, true));
        model_of(c, 0)
    };
    let (dense, adaptive) = (like(Kind::Dense, 2), like(Kind::Adaptive, 2));
    let mut cache = dense.cache(dense.cache_size(None, 1, 64).unwrap(), CacheFormat::Plain).unwrap();
    let text = cache.reserve(dense.cache_size(None, 1, 64).unwrap()).unwrap();
    let prompt = [Prompt { text, ids: &[1, 2, 3], chunk_size: None }];
    dense.prefill(&mut cache, &prompt).unwrap();
    assert!(matches!(adaptive.step(&mut cache, &[(text, 1)]), Err(felid::Error::ChunkSize { .. })));
    for other in [like(Kind::Dense, 1), like(Kind::Dense, 3)] {
        assert!(other.prefill(&mut cache, &prompt).unwrap_err().to_string().contains("layers"));
        assert!(other.step(&mut cache, &[(text, 1)]).is_err());
    }
}
