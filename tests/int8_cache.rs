//! Caches in 8 bits: rows and attention against their definitions, and generation from them.

#[path = "common/agree.rs"]
mod agree;
mod common;
#[path = "common/devices.rs"]
mod devices;

use agree::{FLOATS, agrees_with, one, wave};
use common::rough::{U32, share};
use common::{KINDS, Kind, cast, chunk_size, config, ids, model, model_of};
use felid::autograd::{Gradients, Var};
use felid::data::Batch;
use felid::eval::{cache_cost, quality};
use felid::generate::{CacheFormat, Generator, GeneratorOptions, Output, Request};
use felid::model::Cat;
use felid::model::formats::{read_safetensors, write_safetensors};
use felid::ops::{self, CacheRows, Int8Rows, Mask, Sampling, cast_tensor};
use felid::random::Philox;
use felid::tensor::{DType, Device, Tensor};
use felid::{Error, Result};
use proptest::prelude::*;

fn upto(n: usize, draw: &mut Philox) -> usize {
    1 + draw.below(n as u64) as usize
}
fn random(shape: &[usize], draw: &mut Philox) -> Tensor {
    let x: Vec<f64> = (0..shape.iter().product()).map(|_| draw.normal_pair()[0]).collect();
    Tensor::from_vec(x, shape).unwrap()
}
fn empty(shape: [usize; 3], device: Device) -> [Int8Rows; 2] {
    [0, 1].map(|_| Int8Rows::zeros(shape, device).unwrap())
}
/// Rows x `[H, T, d]`, all of them.
fn in_8_bits(x: &Tensor) -> Result<Int8Rows> {
    let &[h, t, d] = x.shape() else { unreachable!() };
    let [mut kept, mut other] = empty([h, t, d], x.device());
    let x = x.reshape(&[1, h, t, d])?;
    ops::write_int8_rows([&mut kept, &mut other], [&x, &x], &CacheRows::new((0..t).map(|i| 0..i + 1).collect())?)?;
    Ok(kept)
}
/// What they stand for, f64.
fn meant(rows: &Int8Rows) -> Tensor {
    let (numbers, scales) = (rows.numbers().to_vec::<i8>().unwrap(), rows.scales().to_vec::<f32>().unwrap());
    let d = rows.numbers().shape()[2];
    let x = numbers.iter().enumerate().map(|(i, &n)| f64::from(n) * f64::from(scales[i / d]));
    Tensor::from_vec(x.collect::<Vec<f64>>(), rows.numbers().shape()).unwrap()
}
fn bits(rows: &Int8Rows) -> [Vec<u8>; 2] {
    [rows.numbers(), rows.scales()].map(|t| t.to_le_bytes().unwrap())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// A row is the nearest that its scale allows, in every dtype and however it lies; others stay as they were.
    #[test]
    fn rows_err_by_half_a_step(draw in any::<u64>()) {
        let draw = &mut Philox::new(draw);
        let (b, h, n, d) = (upto(3, draw), upto(3, draw), upto(4, draw), upto(70, draw));
        let all = b * n + upto(5, draw);
        let size = 2f64.powi(upto(24, draw) as i32 - 12); // f16 reaches no further
        let sized = random(&[n, b, d + 1, h], draw).to_f64_vec().unwrap().iter().map(|x| x * size).collect::<Vec<_>>();
        let x64 = Tensor::from_vec(sized, &[n, b, d + 1, h]).unwrap().permute(&[1, 3, 0, 2]).unwrap().narrow(3, 1, d).unwrap();
        let dtype = [DType::F32, DType::BF16, DType::F16, DType::F64][draw.below(4) as usize];
        let x = cast_tensor(&x64, dtype).unwrap();
        let other = cast_tensor(&x64.copy().unwrap().reshape(&[b, h, n, d]).unwrap(), dtype).unwrap();
        let places: Vec<usize> = (0..b * n).map(|r| all - 1 - r).collect();
        let [mut first, mut second] = empty([h, all, d], Device::Cpu);
        let rows = CacheRows::new(places.iter().map(|p| 0..p + 1).collect()).unwrap();
        ops::write_int8_rows([&mut first, &mut second], [&x, &other], &rows).unwrap();
        prop_assert_eq!(bits(&first), bits(&second));
        let (scales, got, x) = (first.scales().to_vec::<f32>().unwrap(), meant(&first), x.to_f64_vec().unwrap());
        let (got, numbers) = (got.to_f64_vec().unwrap(), first.numbers().to_vec::<i8>().unwrap());
        for (r, place) in places.iter().enumerate() {
            for head in 0..h {
                let at = head * all + place;
                let row = &x[((r / n * h + head) * n + r % n) * d..][..d];
                let scale = f64::from(scales[at]);
                let most = row.iter().fold(0f64, |m, x| m.max(x.abs()));
                // two roundings of f32
                prop_assert!((scale - most / 127.0).abs() <= 2.0 * U32 * scale);
                prop_assert!(numbers[at * d..][..d].iter().any(|n| n.abs() == 127) || most == 0.0);
                for (x, y) in row.iter().zip(&got[at * d..][..d]) {
                    // half a step; and a quotient of at most 127 rounds, as does the scale that 127 steps reach the largest by
                    prop_assert!((x - y).abs() <= scale * (0.5 + 3.0 * 127.0 * U32), "{x} {y} {scale}");
                }
            }
        }
        for free in (0..all).filter(|p| !places.contains(p)) {
            prop_assert!((0..h).all(|head| scales[head * all + free] == 0.0));
        }
    }

    /// Attention is the definition over what the rows stand for, each row alone in every bit.
    #[test]
    fn attention_to_8_bits(draw in any::<u64>()) {
        let draw = &mut Philox::new(draw);
        let (hkv, group, d, t, n) = (upto(3, draw), upto(3, draw), 2 * upto(20, draw), upto(200, draw), upto(9, draw));
        let q = cast_tensor(&random(&[1, n, hkv * group, d], draw), DType::F32).unwrap().permute(&[0, 2, 1, 3]).unwrap();
        let [k, v] = [0, 1].map(|_| in_8_bits(&random(&[hkv, t, d], draw)).unwrap());
        let spans: Vec<_> = (0..n).map(|_| { let end = upto(t, draw); draw.below(end as u64) as usize..end }).collect();
        let rows = CacheRows::new(spans.clone()).unwrap();
        let all = ops::cached_attention_int8(&q, &k, &v, &rows, 0.4).unwrap();
        // tests/sampling.rs holds this to its formula
        let want = ops::cached_attention(&cast_tensor(&q, DType::F64).unwrap(), &meant(&k), &meant(&v), &rows, 0.4).unwrap();
        for (r, span) in spans.iter().enumerate() {
            let alone = CacheRows::new(vec![span.clone()]).unwrap();
            let one = ops::cached_attention_int8(&q.narrow(2, r, 1).unwrap(), &k, &v, &alone, 0.4).unwrap();
            prop_assert_eq!(one.to_le_bytes().unwrap(), all.narrow(2, r, 1).unwrap().to_le_bytes().unwrap());
            for h in 0..hkv * group {
                // as there, and one rounding more where a scale comes in
                let query = q.narrow(2, r, 1).unwrap().narrow(1, h, 1).unwrap().to_f64_vec().unwrap();
                let terms = query.iter().map(|x| x.abs()).sum::<f64>() * 0.4 * 5.0;
                let err = U32 * (d as f64).sqrt() * 5.0 * ((d + 1) as f64 * terms + span.len() as f64 + 4.0);
                let of = |t: &Tensor, r: usize| t.narrow(2, r, 1).unwrap().narrow(1, h, 1).unwrap().to_f64_vec().unwrap();
                prop_assert!(share(&of(&one, 0), &of(&want, r), err, U32) < 1.0);
            }
        }
        prop_assert!(ops::cached_attention_int8(&q, &k, &in_8_bits(&random(&[hkv, t + 1, d], draw)).unwrap(), &rows, 0.4).is_err());
    }

    /// Texts of any lengths, chunk sizes and sampling, together as alone, for every kind of model; in float64, where products
    /// of more rows cannot move a number across the middle between two steps but by a rounding.
    #[test]
    fn together_as_alone(i in 0..KINDS.len(), seed in 0u64..100_000, draw in any::<u64>()) {
        let draw = &mut Philox::new(draw);
        let m = cast(&model(KINDS[i], seed), DType::F64);
        let requests: Vec<Request> = (0..upto(5, draw)).map(|_| any_request(&m, draw)).collect();
        let generator = int8(&m);
        let alone: Vec<Output> = requests.iter().map(|r| generator.run(vec![r.clone()]).unwrap().remove(0)).collect();
        prop_assert_eq!(generator.run(requests.clone()).unwrap(), alone);
        // what is planned is what is held, and less than a plain cache
        let bytes: usize = generator.plan(&requests).unwrap().cache_bytes;
        let sizes = requests.iter().map(|r| m.cache_size(r.chunk_size, r.prompt.len(), r.prompt.len() + r.max_new_tokens - 1));
        let size = sizes.map(Result::unwrap).sum();
        prop_assert_eq!(m.cache(size, CacheFormat::Int8).unwrap().bytes(), bytes);
        prop_assert!(bytes < Generator::new(&m).plan(&requests).unwrap().cache_bytes);
    }

    /// After a change of chunk sizes a text goes on as one that begins there, at that size, with all that is written so far.
    #[test]
    fn another_chunk_size_midway(i in 1..KINDS.len(), seed in 0u64..100_000, draw in any::<u64>()) {
        let draw = &mut Philox::new(draw);
        let m = cast(&model(KINDS[i], seed), DType::F64);
        let mut first = Request { sampling: Sampling::default(), ..any_request(&m, draw) };
        let chunk = chunk_size(m.config(), draw.next_u64() >> 8).unwrap();
        if first.max_new_tokens == 1 || first.chunk_size == Some(chunk) {
            return Ok(()); // nothing is read again
        }
        let after = upto(first.max_new_tokens - 1, draw);
        first.chunk_changes = vec![(after, chunk)];
        let (generator, other) = (int8(&m), any_request(&m, draw));
        let got = generator.run(vec![first.clone(), other]).unwrap().remove(0).tokens;
        let prompt = [&first.prompt[..], &got[..after]].concat();
        let rest = Request { chunk_size: Some(chunk), ..Request::new(prompt, first.max_new_tokens - after) };
        prop_assert_eq!(&generator.run(vec![rest]).unwrap()[0].tokens, &got[after..]);
    }
}

fn int8(m: &Cat) -> Generator {
    Generator::new(m).with_options(GeneratorOptions { cache: CacheFormat::Int8, ..Default::default() })
}
fn any_request(m: &Cat, draw: &mut Philox) -> Request {
    let c = m.config();
    let n = upto(c.block_size, draw);
    Request {
        chunk_size: chunk_size(c, draw.next_u64() >> 8),
        sampling: Sampling { temperature: draw.below(2) as f64, ..Default::default() },
        seed: draw.below(1000),
        ..Request::new(ids(c, 1, n, draw.next_u64()).to_vec().unwrap(), upto(c.block_size + 1 - n, draw))
    }
}

/// Rows without a scale, and those of which something is not a number: nothing becomes of them but what is in them.
#[test]
fn zeros_and_what_is_no_number() {
    let (nan, inf, tiny) = (f32::NAN, f32::INFINITY, f32::from_bits(1));
    let x =
        [[0.0, 0.0, -0.0], [1.0, nan, 3.0], [1.0, -inf, 0.0], [tiny, -tiny, 0.0], [3.0, -6.0, 1e-30], [127.0, 2.5, -3.5]];
    let x = Tensor::from_vec(x.as_flattened().to_vec(), &[1, 6, 3]).unwrap();
    for device in devices::cuda().into_iter().chain([Device::Cpu]) {
        let rows = in_8_bits(&x.to_device(device).unwrap()).unwrap();
        let scales = rows.scales().to_vec::<f32>().unwrap();
        assert!(scales[0] == 0.0 && scales[1].is_nan() && scales[2] == inf && scales[3] == 0.0, "{scales:?}");
        let numbers = rows.numbers().to_vec::<i8>().unwrap();
        assert_eq!(numbers[..9], [0; 9]);
        assert_eq!(numbers[9..], [127, -127, 0, 64, -127, 0, 127, 2, -4], "halves to the even one");
        // a query sees what is not finite, and nothing else of it
        let q = Tensor::from_vec(vec![1f32; 3], &[1, 1, 1, 3]).unwrap().to_device(device).unwrap();
        let see = |span| {
            let y = ops::cached_attention_int8(&q, &rows, &rows, &CacheRows::new(vec![span]).unwrap(), 1.0).unwrap();
            y.to_f32_vec().unwrap()
        };
        assert!(see(0..2).iter().all(|y| y.is_nan()) && see(2..3).iter().all(|y| y.is_nan()));
        assert!(see(0..1) == [0.0; 3] && see(3..6).iter().all(|y| y.is_finite()));
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let rows = |n: usize| CacheRows::new((0..n).map(|i| 0..i + 1).collect()).unwrap();
    let (x, q) = (wave(&[1, 2, 3, 4], 0), wave(&[1, 2, 3, 4], 1));
    let write = |shape: [usize; 3], x: &Tensor, y: &Tensor, rows: &CacheRows| {
        let [mut a, mut b] = empty(shape, Device::Cpu);
        ops::write_int8_rows([&mut a, &mut b], [x, y], rows)
    };
    assert!(write([2, 3, 4], &x, &x, &rows(3)).is_ok());
    assert!(write([2, 2, 4], &x, &x, &rows(3)).is_err(), "no room");
    assert!(write([2, 3, 4], &x, &x, &rows(2)).is_err(), "a row without a place");
    assert!(write([1, 3, 4], &x, &x, &rows(3)).is_err() && write([2, 3, 5], &x, &x, &rows(3)).is_err());
    assert!(write([2, 3, 4], &x, &cast_tensor(&x, DType::F32).unwrap(), &rows(3)).is_err());
    assert!(write([2, 3, 4], &x, &wave(&[1, 2, 3, 5], 0), &rows(3)).is_err());
    let kept = in_8_bits(&wave(&[2, 3, 4], 2)).unwrap();
    let (numbers, scales) = (kept.numbers().clone(), kept.scales().clone());
    assert!(ops::cached_attention_int8(&q, &kept, &kept, &rows(3), 0.5).is_ok());
    assert!(ops::cached_attention_int8(&numbers.reshape(&[1, 2, 3, 4]).unwrap(), &kept, &kept, &rows(3), 0.5).is_err());
    assert!(ops::cached_attention_int8(&q.narrow(3, 0, 2).unwrap(), &kept, &kept, &rows(3), 0.5).is_err());
    assert!(Int8Rows::new(scales.clone(), numbers.clone()).is_err());
    assert!(Int8Rows::new(numbers.clone(), scales.narrow(1, 0, 2).unwrap()).is_err());
    assert!(Int8Rows::new(numbers.clone(), scales.clone()).is_ok());
}

/// Nothing computes in 8 bits. They are moved, but no gradient comes back of them.
#[test]
fn numbers_are_only_kept() {
    for device in devices::cuda().into_iter().chain([Device::Cpu]) {
        let x = Tensor::from_vec((-12..12).map(|i| 10 * i).collect::<Vec<i8>>(), &[1, 2, 3, 4]).unwrap();
        let x = Var::constant(x.to_device(device).unwrap());
        let (t, rows) = (x.value(), CacheRows::new((0..3).map(|i| 0..i + 1).collect()).unwrap());
        let kept = t.reshape(&[2, 3, 4]).unwrap();
        let floats = Tensor::zeros(&[1, 2, 3, 4], DType::F32, device).unwrap();
        let weights = |shape: &[usize]| Var::constant(Tensor::zeros(shape, DType::I8, device).unwrap());
        let refused: [(&str, Result<Var>); 12] = [
            ("add", ops::add(&x, &x)),
            ("silu", ops::silu(&x)),
            ("softmax", ops::softmax(&x)),
            ("sum", ops::sum(&x, &[3])),
            ("max", ops::max(&x, &[3])),
            ("linear", ops::linear(&x, &weights(&[4, 4]), None)),
            ("rms_norm", ops::rms_norm(&x, &weights(&[4]), 1e-5)),
            ("attention", ops::attention(&x, &x, &x, Mask::Causal, 0.5)),
            ("cast", ops::cast(&x, DType::F32)),
            ("cast to", ops::cast(&Var::constant(floats.clone()), DType::I8)),
            ("interpolate", ops::interpolate(&x, 2, 5)),
            ("cached_attention", ops::cached_attention(t, &kept, &kept, &rows, 0.5).map(Var::constant)),
        ];
        for (op, y) in refused {
            assert!(matches!(y, Err(Error::DType { .. })), "{op} on {device}: {y:?}");
        }
        assert!(ops::argmax(t).is_err() && t.to_f32_vec().is_err() && Tensor::full(1.0, &[2], DType::I8, device).is_err());
        let (tape, leaf, mut gradients) = (ops::tape(), Var::parameter(kept.clone()), Gradients::default());
        let moved = tape.record(|| ops::concat(&[&leaf, &leaf], 2)).unwrap();
        assert_eq!(moved.value().narrow(2, 4, 4).unwrap().to_vec::<i8>().unwrap(), t.to_vec::<i8>().unwrap());
        assert!(tape.backward(&moved, 1.0, &mut gradients).is_err() && gradients.is_empty());
    }
}

/// A file keeps them as they are; read again, they are i64 as every integer is.
#[test]
fn files_hold_8_bits() {
    let folder = tempfile::tempdir().unwrap();
    let (path, x) = (folder.path().join("x.safetensors"), Tensor::from_vec(vec![-128i8, -1, 0, 127], &[2, 2]).unwrap());
    write_safetensors(&path, &[("x", &x)], &Default::default()).unwrap();
    assert!(std::fs::read(&path).unwrap().ends_with(&[0x80, 0xff, 0, 0x7f]));
    assert_eq!(read_safetensors(&path).unwrap().tensors["x"].to_vec::<i64>().unwrap(), [-128, -1, 0, 127]);
}

/// The first token comes of a prompt that nothing has rounded; those after it from what is kept.
#[test]
fn sixteen_bits_generate() {
    for kind in KINDS {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let m = cast(&model(kind, 5), dtype);
            let mut draw = Philox::new(8);
            let requests: Vec<Request> = (0..4).map(|_| any_request(&m, &mut draw)).collect();
            let (a, b) = (int8(&m).run(requests.clone()).unwrap(), int8(&m).run(requests.clone()).unwrap());
            assert_eq!(a, b, "{kind:?} {dtype}");
            let plain = Generator::new(&m).run(requests).unwrap();
            assert!(a.iter().zip(&plain).all(|(a, b)| a.tokens[0] == b.tokens[0]), "{kind:?} {dtype}");
        }
    }
}

/// A plain cache costs nothing; one in 8 bits less than a hundredth of a nat where weights are random.
#[test]
fn what_8_bits_cost() {
    let mut c = config(Kind::Adaptive, 3);
    (c.block_size, c.chunk_size) = (48, Some(8));
    let m = model_of(c.clone(), 0);
    let batch = || {
        let text = ids(&c, 3, 49, 5);
        Ok(Batch { input_ids: text.narrow(1, 0, 48)?.copy()?, labels: text.narrow(1, 1, 48)?.copy()? })
    };
    for chunk in [4, 8] {
        let cost = cache_cost(&m, [batch(), batch()].into_iter(), Some(chunk)).unwrap();
        let whole = quality(&m, [batch()].into_iter(), Some(chunk)).unwrap();
        assert_eq!((cost.plain.tokens, cost.int8.tokens), (2 * 3 * 48, 2 * 3 * 48));
        assert!((cost.plain.loss - whole.loss).abs() < 1e-5 && (cost.plain.accuracy - whole.accuracy).abs() < 0.02);
        assert!(cost.int8.loss != cost.plain.loss && (cost.int8.loss - cost.plain.loss).abs() < 0.01, "{cost:?}");
        assert!(cost.same_choice > 0.9 && cost.int8_bytes < cost.plain_bytes);
    }
    assert!(cache_cost(&m, [batch()].into_iter(), Some(3)).is_err());
    // of every kind, wherever keys and values are kept
    for kind in KINDS {
        let m = model(kind, 4);
        let n = m.config().block_size;
        let text = ids(m.config(), 4, n + 1, 6);
        let batch = Batch {
            input_ids: text.narrow(1, 0, n).unwrap().copy().unwrap(),
            labels: text.narrow(1, 1, n).unwrap().copy().unwrap(),
        };
        let cost = cache_cost(&m, [Ok(batch)].into_iter(), chunk_size(m.config(), 1)).unwrap();
        assert!((cost.int8.loss - cost.plain.loss).abs() < 0.01 && cost.same_choice > 0.9, "{kind:?} {cost:?}");
    }
}

// ---- on CUDA ----

/// Numbers and scales are those of the CPU, in every bit, of rows that lie anywhere.
#[test]
fn rows_on_cuda_are_those_of_the_cpu() {
    let Some(cuda) = devices::cuda() else { return };
    for dtype in FLOATS {
        for (b, h, n, d) in
            [(1, 2, 3, 64), (40, 3, 1, 64), (2, 1, 5, 128), (3, 2, 2, 1), (1, 2, 7, 30), (1, 1, 2, 300), (2, 2, 3, 8)]
        {
            let wide = cast_tensor(&wave(&[b, n, h, d + 8], 3), dtype).unwrap();
            let rows = CacheRows::new((0..b * n).map(|r| r..2 * r + 2).collect()).unwrap();
            for from in [0, 1, 8] {
                let written = |device| {
                    let x = wide.to_device(device).unwrap().permute(&[0, 2, 1, 3]).unwrap().narrow(3, from, d).unwrap();
                    let [mut a, mut c] = empty([h, 2 * b * n + 1, d], device);
                    ops::write_int8_rows([&mut a, &mut c], [&x, &x], &rows).unwrap();
                    [bits(&a), bits(&c)]
                };
                assert!(written(cuda) == written(Device::Cpu), "{dtype} {b} {h} {n} {d} from {from}");
            }
        }
    }
}

/// What rows may see of a cache of 2600: from one key on, and past 1024 and 2048, where sums are joined.
fn runs(n: usize) -> Vec<std::ops::Range<usize>> {
    let some = [0..1, 250..700, 0..33, 0..257, 5..64, 249..699, 1..2, 3..2600, 100..1124, 99..1124, 77..2126];
    (0..n).map(|i| some.get(i).cloned().unwrap_or(i..i + 1 + 7 * i % 290)).collect()
}
const MANY: usize = 400;

/// Every dtype sees one cache, which the CPU has rounded.
fn kept_on(key_heads: usize, d: usize, device: Device) -> [Int8Rows; 2] {
    [7, 8].map(|seed| {
        let rows = in_8_bits(&wave(&[key_heads, 2600, d], seed)).unwrap();
        Int8Rows::new(rows.numbers().to_device(device).unwrap(), rows.scales().to_device(device).unwrap()).unwrap()
    })
}

#[test]
fn attention_to_8_bits_agrees_on_cuda() {
    let Some(_) = devices::cuda() else { return };
    for (heads, key_heads, d) in [(4, 2, 64), (3, 3, 30), (2, 1, 128), (1, 1, 256), (2, 2, 5), (8, 2, 64), (5, 1, 24)] {
        for n in [11, MANY] {
            if devices::light() && n > 11 && d != 64 {
                continue;
            }
            let rows = CacheRows::new(runs(n)).unwrap();
            let op = |v: &[Var]| {
                let [k, c] = kept_on(key_heads, d, v[0].value().device());
                one(Ok(Var::constant(ops::cached_attention_int8(v[0].value(), &k, &c, &rows, 0.3)?)))
            };
            agrees_with("cached_attention_int8", &[&[1, heads, n, d]], 1, &op, &op);
        }
    }
}

/// In every bit, however many rows there are, however long runs might be, and wherever keys lie.
#[test]
fn attention_to_8_bits_is_of_each_row_alone() {
    let Some(cuda) = devices::cuda() else { return };
    let seen = runs(MANY);
    for (heads, key_heads, d) in [(2, 2, 64), (2, 1, 64), (4, 1, 128), (3, 1, 256), (1, 1, 40)] {
        if devices::light() && d > 64 {
            continue;
        }
        let [k, v] = kept_on(key_heads, d, cuda);
        // rows that begin on no whole eight bytes
        let moved = |rows: &Int8Rows| {
            let zeros = Tensor::zeros(&[key_heads, 2600, 1], DType::I8, cuda).unwrap();
            let wide = ops::concat(&[&Var::constant(zeros), &Var::constant(rows.numbers().clone())], 2).unwrap();
            Int8Rows::new(wide.value().narrow(2, 1, d).unwrap(), rows.scales().clone()).unwrap()
        };
        let (moved_k, moved_v) = (moved(&k), moved(&v));
        for dtype in FLOATS {
            let q = cast_tensor(&wave(&[1, heads, MANY, d], 1), dtype).unwrap().to_device(cuda).unwrap();
            let bits = |q: &Tensor, k: &Int8Rows, v: &Int8Rows, rows: Result<CacheRows>| {
                ops::cached_attention_int8(q, k, v, &rows.unwrap(), 0.3).unwrap().to_le_bytes().unwrap()
            };
            let all = ops::cached_attention_int8(&q, &k, &v, &CacheRows::new(seen.clone()).unwrap(), 0.3).unwrap();
            let what = format!("{heads} {key_heads} {d} {dtype}");
            for r in (0..12).chain([50, MANY - 1]) {
                let (row, one) = (q.narrow(2, r, 1).unwrap(), all.narrow(2, r, 1).unwrap().to_le_bytes().unwrap());
                assert!(bits(&row, &k, &v, CacheRows::new(vec![seen[r].clone()])) == one, "{what} row {r} alone");
                let within = CacheRows::within(5000, vec![seen[r].clone()]);
                assert!(bits(&row, &k, &v, within) == one, "{what} row {r} of a run that may grow");
            }
            let strided = bits(&q, &moved_k, &moved_v, CacheRows::new(seen.clone()));
            assert!(strided == all.to_le_bytes().unwrap(), "{what} rows off 8 bytes");
        }
    }
}
