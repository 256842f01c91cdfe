//! What only a CUDA device can be asked: every kernel loads, large sizes agree with the CPU, models and training agree,
//! memory is counted and given back, running out is an error. Skipped, with a word, where there is no device.
#![cfg(feature = "cuda")]

#[path = "common/agree.rs"]
mod agree;
#[path = "common/devices.rs"]
mod devices;

use agree::{FLOATS, agrees, agrees_with, one, wave};
use felid::autograd::Var;
use felid::bench::profile;
use felid::cuda::gpu;
use felid::ops;
use felid::tensor::{DType, Device, Tensor};
use felid::{Error, Result};

#[test]
fn every_symbol_loads() {
    let Some(Device::Cuda(n)) = devices::cuda() else { return };
    let (modules, symbols) = gpu(n).unwrap().warm_up().unwrap();
    assert!(modules > 20 && symbols > modules, "{modules} modules, {symbols} symbols");
}

#[test]
fn products_agree() {
    let linear = |v: &[Var]| one(ops::linear(&v[0], &v[1], None));
    agrees("linear", &[&[300, 517], &[260, 517]], linear);
    agrees("linear aligned", &[&[2, 256, 512], &[384, 512]], linear);
    agrees("linear of one row", &[&[1, 1000], &[600, 1000]], linear);
    agrees("linear, long sums", &[&[5000, 24], &[40, 24]], linear);
    agrees("linear with bias", &[&[129, 100], &[65, 100], &[65]], |v| one(ops::linear(&v[0], &v[1], Some(&v[2]))));
    agrees("matmul batched", &[&[3, 4, 65, 33], &[3, 4, 33, 130]], |v| one(ops::matmul(&v[0], &v[1])));
    agrees("matmul broadcast", &[&[5, 65, 34], &[34, 70]], |v| one(ops::matmul(&v[0], &v[1])));
    agrees("matmul of views", &[&[7, 65, 32], &[7, 66, 32]], |v| one(ops::matmul(&v[0], &ops::transpose(&v[1], 1, 2)?)));
    agrees("matmul of permuted batches", &[&[65, 7, 32], &[32, 66, 7]], |v| {
        one(ops::matmul(&ops::transpose(&v[0], 0, 1)?, &ops::permute(&v[1], &[2, 0, 1])?))
    });
}

#[test]
fn layers_agree() {
    agrees("rms_norm wide", &[&[700, 2048], &[2048]], |v| one(ops::rms_norm(&v[0], &v[1], 1e-5)));
    agrees("rms_norm heads", &[&[9, 70, 6, 64], &[64]], |v| one(ops::rms_norm(&v[0], &v[1], 1e-5)));
    agrees("rms_norm of more than a block's width", &[&[5, 9001], &[9001]], |v| one(ops::rms_norm(&v[0], &v[1], 1e-5)));
    agrees("add_rms_norm wide", &[&[700, 1024], &[700, 1024], &[1024]], |v| {
        ops::add_rms_norm(&v[0], &v[1], &v[2], 1e-5).map(|(y, h)| vec![y, h])
    });
    agrees("swiglu halves", &[&[300, 2 * 704]], |v| {
        let halves = ops::split(&v[0], 1, &[704, 704])?;
        one(ops::swiglu(&halves[0], &halves[1]))
    });
}

#[test]
fn rotations_agree() {
    let positions: Vec<usize> = (0..333).map(|i| i % 18).collect();
    let table = ops::RopeTable::new(&positions, 64, 1e4).unwrap();
    agrees("rope of transposed heads", &[&[2, 333, 4, 64]], |v| one(ops::rope(&ops::transpose(&v[0], 1, 2)?, &table)));
    // heads in whole packs, some turning in part, some in more than a warp's packs; heads that are not
    for (d, n) in [(64, 64), (64, 32), (96, 96), (128, 128), (512, 64), (50, 50), (64, 20)] {
        let table = ops::RopeTable::new(&positions, n, 1e4).unwrap();
        for (heads, kv) in [(5, 5), (32, 4)] {
            let name = format!("{heads} and {kv} heads of {d}, {n} turning");
            let joint = [2, 333, (heads + 2 * kv) * d];
            agrees(&format!("qk_norm_rope, {name}"), &[&joint, &[d], &[d]], |v| {
                let norm = ops::QkNorm { q: &v[1], k: &v[2], eps: 1e-5 };
                ops::qk_norm_rope(&v[0], heads, kv, Some(norm), &table).map(Vec::from)
            });
            agrees(&format!("qk_rope, {name}"), &[&joint], |v| {
                ops::qk_norm_rope(&v[0], heads, kv, None, &table).map(Vec::from)
            });
        }
    }
}

#[test]
fn blocks_agree() {
    for width in [264, 67] {
        for chunk in [1, 4, 16] {
            let slots = [3, 1000 / chunk + 1, width];
            agrees(&format!("blocks of {chunk}, {width} wide"), &[&slots, &[3, 1000, width]], |v| {
                one(ops::assemble_blocks(&v[0], None, &v[1], chunk))
            });
            agrees(&format!("separated blocks of {chunk}, {width} wide"), &[&slots, &[3, 1000, width], &[1, width]], |v| {
                one(ops::assemble_blocks(&v[0], Some(&v[2]), &v[1], chunk))
            });
        }
    }
}

#[test]
fn rows_agree() {
    let ids = |n: usize, below: usize| (0..n).map(|i| ((i * i * 31 + i * 7) % below) as i64).collect::<Vec<_>>();
    let tokens = Tensor::ids(&ids(4000, 301), &[4, 1000]).unwrap();
    agrees("embedding", &[&[301, 520]], |v| one(ops::embedding(&tokens, &v[0])));
    let frequent =
        Tensor::ids(&(0..4000).map(|i| if i % 3 == 0 { i % 50 } else { 7 }).collect::<Vec<_>>(), &[4000]).unwrap();
    agrees("embedding of a frequent token", &[&[50, 65]], |v| one(ops::embedding(&frequent, &v[0])));
    let rows: Vec<usize> = (0..900).filter(|i| i % 17 != 3).collect();
    agrees("index_select rows", &[&[3, 900, 136]], |v| one(ops::index_select(&v[0], 1, &rows)));
    agrees("interpolate", &[&[130, 4096]], |v| one(ops::interpolate(&v[0], 1, 1024)));
    agrees("interpolate up", &[&[33, 300]], |v| one(ops::interpolate(&v[0], 1, 777)));
    agrees("concat", &[&[3, 40, 1, 72], &[1, 72], &[3, 40, 7, 72]], |v| {
        let row = ops::expand(&ops::reshape(&v[1], &[1, 1, 1, 72])?, &[3, 40, 1, 72])?;
        one(ops::concat(&[&v[0], &row, &v[2]], 2))
    });
    agrees("sum of columns", &[&[5000, 130]], |v| one(ops::sum(&v[0], &[0])));
    agrees("sum of rows", &[&[130, 5000]], |v| one(ops::sum(&v[0], &[1])));
    agrees("softmax", &[&[40, 5000]], |v| one(ops::softmax(&v[0])));
}

#[test]
fn losses_agree() {
    let (rows, classes) = (700, 5003);
    let labels: Vec<i64> = (0..rows).map(|i| if i % 5 == 4 { -100 } else { (i * 977 % classes) as i64 }).collect();
    let some = Tensor::ids(&labels, &[rows]).unwrap();
    let all = Tensor::ids(&(0..rows).map(|i| (i * 977 % classes) as i64).collect::<Vec<_>>(), &[rows]).unwrap();
    for (name, labels) in [("some rows", some), ("all rows", all)] {
        agrees(&format!("cross_entropy of {name}"), &[&[rows, classes]], |v| one(ops::cross_entropy(&v[0], &labels, -100)));
        let fused = |v: &[Var]| one(ops::linear_cross_entropy(&v[0], &v[1], &labels, -100));
        let naive = |v: &[Var]| one(ops::cross_entropy(&ops::linear(&v[0], &v[1], None)?, &labels, -100));
        agrees_with(&format!("linear_cross_entropy of {name}"), &[&[rows, 96], &[classes, 96]], classes, &fused, &naive);
    }
}

#[test]
fn samples_are_those_of_the_cpu() {
    let Some(cuda) = devices::cuda() else { return };
    let logits = ops::cast_tensor(&wave(&[9, 5000], 3), DType::F32).unwrap();
    let logits = ops::scale(&logits.into(), 6.0).unwrap().into_value();
    let uniforms: Vec<f64> = (0..9).map(|i| (i as f64 * 0.618).fract()).collect();
    let seen: Vec<u64> = (0..79).map(|i| 0x9e37_79b9_7f4a_7c15u64.rotate_left(i)).collect();
    for (temperature, top_k, top_p, min_p, repetition_penalty) in [
        (0.0, 0, 1.0, 0.0, 1.0),
        (1.0, 0, 1.0, 0.0, 1.0),
        (0.7, 40, 1.0, 0.0, 1.3),
        (1.3, 0, 0.9, 0.0, 1.0),
        (0.8, 100, 0.5, 0.1, 0.7),
        (1.0, 1, 1.0, 0.0, 2.0),
        (1.5, 0, 1.0, 0.05, 1.0),
        (0.0, 0, 1.0, 0.0, 1.5),
    ] {
        for limit in [5000, 300] {
            let how = ops::Sampling { temperature, top_k, top_p, min_p, repetition_penalty };
            // every other row by other settings
            let draw = |(i, &uniform): (usize, &f64)| {
                let how = if i % 2 == 0 { how } else { ops::Sampling { temperature: 1.1, ..Default::default() } };
                ops::Draw { how, uniform, seen: &seen }
            };
            let draws: Vec<_> = uniforms.iter().enumerate().map(draw).collect();
            for dtype in FLOATS {
                let here = ops::cast_tensor(&logits, dtype).unwrap();
                let (want, there) = (ops::sample(&here, limit, &draws).unwrap(), here.to_device(cuda).unwrap());
                assert_eq!(ops::sample(&there, limit, &draws).unwrap(), want, "{dtype} {how:?} {limit}");
                let (want, got) =
                    (ops::log_probs(&here, limit, &want, 7).unwrap(), ops::log_probs(&there, limit, &want, 7).unwrap());
                for (want, got) in want.iter().zip(&got) {
                    assert!((want.logprob - got.logprob).abs() < 1e-9, "{want:?} {got:?}");
                    for (want, got) in want.top.iter().zip(&got.top) {
                        assert!(want.0 == got.0 && (want.1 - got.1).abs() < 1e-9, "{want:?} {got:?}");
                    }
                }
            }
        }
    }
}

/// Ties, in 16 bits too, and rows that leave no choice.
#[test]
fn samples_among_equals_are_those_of_the_cpu() {
    let Some(cuda) = devices::cuda() else { return };
    let (rows, v) = (24, 1501);
    let mut logits: Vec<f32> =
        wave(&[rows, v], 5).to_f64_vec().unwrap().iter().map(|x| (x * 8.0).round() as f32 / 2.0).collect();
    logits[..v].fill(f32::NEG_INFINITY);
    logits[v + 700] = f32::INFINITY;
    logits[2 * v..3 * v].fill(1.5);
    for i in 0..v {
        (logits[3 * v + i], logits[4 * v + i]) = (if i % 2 == 0 { f32::NAN } else { 0.0 }, [0.0, -0.0][i % 2]);
    }
    logits[5 * v..6 * v].fill(f32::NAN);
    let logits = Tensor::from_vec(logits, &[rows, v]).unwrap();
    let uniforms: Vec<f64> = (0..rows).map(|i| (i as f64 * 0.618).fract()).collect();
    for dtype in FLOATS {
        let here = ops::cast_tensor(&logits, dtype).unwrap();
        let there = here.to_device(cuda).unwrap();
        let temperatures: &[f64] = if devices::light() { &[0.3] } else { &[0.0, 0.3, 1.0, 40.0] };
        for &temperature in temperatures {
            for (top_k, top_p) in [(0, 1.0), (1, 1.0), (7, 1.0), (200, 1.0), (0, 0.2), (0, 0.95), (50, 0.6), (v, 1e-9)] {
                for limit in [v, 1000, 33, 1] {
                    let how = ops::Sampling { temperature, top_k, top_p, ..Default::default() };
                    let draws: Vec<_> = uniforms.iter().map(|&uniform| ops::Draw { how, uniform, seen: &[] }).collect();
                    let want = ops::sample(&here, limit, &draws).unwrap();
                    assert_eq!(ops::sample(&there, limit, &draws).unwrap(), want, "{dtype} {how:?} {limit}");
                }
            }
        }
    }
}

type Lay = fn(&Tensor) -> Result<Tensor>;

/// Views of a tensor [6, 33, 40].
const VIEWS: [Lay; 9] = [
    |t| Ok(t.clone()),
    |t| t.permute(&[2, 1, 0]),
    |t| t.permute(&[1, 0, 2]),
    |t| t.transpose(1, 2),
    |t| t.narrow(2, 3, 17)?.transpose(0, 2),
    |t| t.narrow(2, 8, 16),
    |t| t.narrow(1, 1, 31)?.narrow(0, 5, 1)?.transpose(0, 2),
    |t| t.narrow(1, 4, 1)?.expand(&[6, 9, 40]),
    |t| t.narrow(2, 4, 1)?.expand(&[6, 33, 24]),
];

/// Copies, joins, selections and rows written in place: the same elements as on the CPU, in every bit.
#[test]
fn moves_are_exact() {
    let Some(cuda) = devices::cuda() else { return };
    let ids: Vec<i64> = (0..6 * 33 * 40).collect();
    let ids = Tensor::ids(&ids, &[6, 33, 40]).unwrap();
    let floats = FLOATS.map(|d| ops::cast_tensor(&wave(&[6, 33, 40], 9), d).unwrap());
    let eights = Tensor::from_vec((0..6 * 33 * 40).map(|i| (i % 251) as i8).collect(), &[6, 33, 40]).unwrap();
    let bytes = |t: &Tensor| (t.shape().to_vec(), t.to_le_bytes().unwrap());
    for whole in floats.iter().chain([&ids, &eights]) {
        let there = whole.to_device(cuda).unwrap();
        for (n, lay) in VIEWS.iter().enumerate() {
            let (a, b) = (lay(whole).unwrap(), lay(&there).unwrap());
            let same = |what: &str, f: &dyn Fn(&Tensor) -> Result<Tensor>| {
                let (here, there) = (f(&a).unwrap(), f(&b).unwrap());
                assert_eq!(bytes(&here), bytes(&there), "{what} of view {n}, {}", a.dtype());
            };
            same("copy", &Tensor::copy);
            for dim in 0..3 {
                same("concat", &|t| {
                    let (t, one) = (Var::constant(t.clone()), Var::constant(t.narrow(dim, 0, 1)?));
                    Ok(ops::concat(&[&one, &t, &t, &one], dim)?.into_value())
                });
                same("index_select", &|t| {
                    let index: Vec<usize> = (0..50).map(|i| i * i % t.shape()[dim]).collect();
                    Ok(ops::index_select(&Var::constant(t.clone()), dim, &index)?.into_value())
                });
            }
            same("write_rows", &|t| {
                let &[h, r, d] = t.shape() else { unreachable!() };
                let rows = t.reshape(&[1, h, r, d])?;
                let (n, shape) = (h * (r + 5) * d, [h, r + 5, d]);
                let cache = match t.dtype() {
                    DType::I64 => Tensor::from_vec(vec![7i64; n], &shape)?,
                    DType::I8 => Tensor::from_vec(vec![7i8; n], &shape)?,
                    float => Tensor::full(7.0, &shape, float, Device::Cpu)?,
                };
                let mut cache = cache.to_device(t.device())?.copy()?;
                // here and there, as rows and as batches
                let places = |of: &dyn Fn(usize) -> usize| ops::CacheRows::new((0..r).map(|i| 0..of(i) + 1).collect());
                ops::write_rows(&mut cache, &rows, &places(&|i| r + 4 - i)?)?;
                let batches = t.permute(&[1, 0, 2])?.reshape(&[r, h, 1, d])?;
                ops::write_rows(&mut cache, &batches, &places(&|i| i)?)?;
                let mut second = cache.copy()?;
                let reversed = places(&|i| r + 2 - i)?;
                ops::write_row_pairs([&mut cache, &mut second], [&batches, &batches], &reversed)?;
                assert_eq!(cache.to_le_bytes()?, second.to_le_bytes()?);
                Ok(cache)
            });
        }
    }
}

/// Rows that fill a device.
const MANY: usize = 400;

/// What rows of texts may see of one cache of 2600 rows: from one key on, and past 1024 and 2048, where sums are joined.
fn runs(n: usize) -> Vec<std::ops::Range<usize>> {
    let some = [0..1, 250..700, 0..33, 0..257, 5..64, 249..699, 1..2, 3..2600, 100..1124, 99..1124, 77..2126];
    (0..n).map(|i| some.get(i).cloned().unwrap_or(i..i + 1 + 7 * i % 290)).collect()
}

/// Few rows, whose keys many warps share, and so many that each has a block or less.
#[test]
fn attention_to_a_cache_agrees() {
    let Some(_) = devices::cuda() else { return };
    for (heads, key_heads, d) in [(4, 2, 64), (3, 3, 30), (2, 1, 128), (1, 1, 256), (2, 2, 5), (8, 2, 64), (5, 1, 24)] {
        for n in [11, MANY] {
            let rows = ops::CacheRows::new(runs(n)).unwrap();
            for shape in [[1, heads, n, d], [n, heads, 1, d]].iter().take(if n > 11 { 1 } else { 2 }) {
                agrees("cached_attention", &[shape, &[key_heads, 2600, d], &[key_heads, 2600, d]], |v| {
                    let y = ops::cached_attention(v[0].value(), v[1].value(), v[2].value(), &rows, 0.3)?;
                    one(Ok(Var::constant(y)))
                });
            }
        }
    }
}

/// A row of many, whatever reads it, is in every bit the row alone, however long runs might be, and wherever keys lie.
#[test]
fn attention_to_a_cache_is_of_each_row_alone() {
    let Some(cuda) = devices::cuda() else { return };
    let seen = runs(MANY);
    for (heads, key_heads, d) in [(2, 2, 64), (2, 1, 64), (4, 1, 128), (3, 1, 256), (1, 1, 40)] {
        for dtype in FLOATS {
            let there = |x: &Tensor| ops::cast_tensor(x, dtype).unwrap().to_device(cuda).unwrap();
            let q = there(&wave(&[1, heads, MANY, d], 1));
            let wide = [2, 3].map(|seed| there(&wave(&[key_heads, 2600, d + 1], seed)).narrow(2, 1, d).unwrap());
            let [k, v] = [wide[0].copy().unwrap(), wide[1].copy().unwrap()];
            let bits = |q: &Tensor, k: &Tensor, v: &Tensor, rows: felid::Result<ops::CacheRows>| {
                ops::cached_attention(q, k, v, &rows.unwrap(), 0.3).unwrap().to_le_bytes().unwrap()
            };
            let all = ops::cached_attention(&q, &k, &v, &ops::CacheRows::new(seen.clone()).unwrap(), 0.3).unwrap();
            let what = format!("{heads} {key_heads} {d} {dtype}");
            for r in (0..12).chain([50, MANY - 1]) {
                let (row, one) = (q.narrow(2, r, 1).unwrap(), all.narrow(2, r, 1).unwrap().to_le_bytes().unwrap());
                assert!(bits(&row, &k, &v, ops::CacheRows::new(vec![seen[r].clone()])) == one, "{what} row {r} alone");
                let within = ops::CacheRows::within(5000, vec![seen[r].clone()]);
                assert!(bits(&row, &k, &v, within) == one, "{what} row {r} of a run that may grow");
            }
            let strided = bits(&q, &wide[0], &wide[1], ops::CacheRows::new(seen.clone()));
            assert!(strided == all.to_le_bytes().unwrap(), "{what} rows off 16 bytes");
        }
    }
}

/// The first of equals, and of NaNs, in rows that a warp takes and rows that a block takes.
#[test]
fn maxima_are_those_of_the_cpu() {
    let Some(cuda) = devices::cuda() else { return };
    for n in [1, 5, 700, 5000] {
        let mut values: Vec<f32> =
            wave(&[9, n], 4).to_f64_vec().unwrap().iter().map(|x| (x * 20.0).round() as f32 / 8.0).collect();
        values[n / 2..n].fill(f32::NEG_INFINITY);
        values[n..2 * n].fill(f32::NEG_INFINITY);
        (values[2 * n + n / 3], values[3 * n - 1]) = (f32::NAN, f32::NAN);
        let x = Tensor::from_vec(values, &[9, n]).unwrap();
        for dtype in FLOATS {
            for transposed in [false, true] {
                let lay = |t: &Tensor| if transposed { t.transpose(0, 1) } else { Ok(t.clone()) };
                let here = lay(&ops::cast_tensor(&x, dtype).unwrap()).unwrap();
                let there = lay(&ops::cast_tensor(&x, dtype).unwrap().to_device(cuda).unwrap()).unwrap();
                let (want, got) = (ops::argmax(&here).unwrap(), ops::argmax(&there).unwrap());
                assert_eq!(got.to_vec::<i64>().unwrap(), want.to_vec::<i64>().unwrap(), "{dtype} {n} {transposed}");
                let largest = |t: &Tensor| ops::max(&t.clone().into(), &[1]).unwrap().into_value().to_f64_vec().unwrap();
                // any NaN is as good as another
                let bits = |v: Vec<f64>| v.iter().map(|x| (!x.is_nan()).then(|| x.to_bits())).collect::<Vec<_>>();
                assert_eq!(bits(largest(&there)), bits(largest(&here)), "{dtype} {n} {transposed}");
            }
        }
    }
}

/// Sums of every pair of dimensions of a large view, and gradients of repeated rows summed into f32.
#[test]
fn reductions_agree() {
    for dims in [vec![0], vec![1], vec![2], vec![0, 1], vec![0, 2], vec![1, 2], vec![0, 1, 2], vec![]] {
        agrees(&format!("sum over {dims:?}"), &[&[37, 90, 65]], |v| one(ops::sum(&v[0], &dims)));
        agrees(&format!("sum over {dims:?} of a permuted view"), &[&[65, 37, 90]], |v| {
            one(ops::sum(&ops::permute(&v[0], &[1, 2, 0])?, &dims))
        });
    }
    agrees("sum of everything", &[&[300, 2048]], |v| one(ops::sum_all(&v[0])));
    agrees("sum of narrow columns", &[&[20_000, 3]], |v| one(ops::sum(&v[0], &[0])));
    agrees("log_softmax", &[&[40, 5003]], |v| one(ops::log_softmax(&v[0])));
    agrees("silu of a broadcast product", &[&[40, 1, 72], &[33, 1]], |v| one(ops::silu(&ops::mul(&v[0], &v[1])?)));
}

/// Tensors of more than 2^31 elements.
#[test]
fn indices_pass_32_bits() {
    let Some(cuda) = devices::cuda() else { return };
    let (rows, d) = ((1usize << 20) + 3, 2056);
    let ones = || Tensor::full(1.0, &[rows, d], DType::BF16, cuda).unwrap();
    let last = |t: &Var| t.value().narrow(0, rows - 1, 1).unwrap().to_f64_vec().unwrap();
    let check = |what: &str, t: felid::Result<Var>, want: f64| {
        let t = t.unwrap();
        assert!(last(&t).iter().all(|&x| (x - want).abs() <= 0.01 * want), "{what}: {:?}", &last(&t)[..4]);
    };
    let x: Var = ones().copy().unwrap().into();
    check("copy", Ok(x.clone()), 1.0);
    check("scale", ops::scale(&x, 3.0), 3.0);
    let weight: Var = Tensor::full(2.0, &[d], DType::BF16, cuda).unwrap().copy().unwrap().into();
    check("rms_norm", ops::rms_norm(&x, &weight, 1e-5), 2.0);
    check("swiglu", ops::swiglu(&x, &x), 0.7311);
    check("cast", ops::cast(&x, DType::F16), 1.0);
    check("index_select", ops::index_select(&x, 0, &(0..rows).collect::<Vec<_>>()), 1.0);
    check("sum", ops::sum(&x, &[1]), d as f64);
}

#[test]
fn a_profile_names_products_and_kernels() {
    let Some(cuda) = devices::cuda() else { return };
    let of =
        |shape: &[usize]| -> Var { ops::cast_tensor(&wave(shape, 1), DType::BF16).unwrap().to_device(cuda).unwrap().into() };
    let (x, w, norm) = (of(&[64, 32]), of(&[48, 32]), of(&[32]));
    let p = profile(cuda, || {
        let y = ops::linear(&ops::rms_norm(&x, &norm, 1e-5)?, &w, None)?;
        Tensor::zeros(&[100], DType::F32, cuda)?;
        y.value().to_vec::<half::bf16>().map(drop)
    })
    .unwrap();
    let op = |name: &str| p.ops.iter().find(|op| op.op == name).unwrap_or_else(|| panic!("{name}: {p:?}"));
    let product = &op("matmul::gemm").kernels[0];
    assert_eq!((product.kernel.as_str(), product.count), ("64 x 48 x 32, A B^T, bf16 -> bf16", 1));
    assert_eq!((product.flops, product.bytes), (2.0 * 64.0 * 48.0 * 32.0, 2.0 * (64.0 * 32.0 + 48.0 * 32.0 + 64.0 * 48.0)));
    let norm = op("rms_norm::forward");
    assert_eq!((norm.bytes, norm.kernels.len()), (2.0 * 2.0 * 64.0 * 32.0, 1));
    let names: Vec<&str> = op("(outside of ops)").kernels.iter().map(|k| k.kernel.as_str()).collect();
    assert!(names.contains(&"memset") && names.contains(&"copy to main memory"), "{names:?}");
    assert!(p.busy_ms > 0.0 && p.busy_ms <= p.total_ms * 1.0001 && p.launches == 4, "{p:?}");
    // an error leaves no profile under way
    assert!(profile(cuda, || Err(Error::Usage("on purpose".into()))).is_err());
    assert_eq!(profile(cuda, || Ok(())).unwrap().launches, 0);
}

#[test]
fn mixing_devices_is_an_error() {
    let Some(cuda) = devices::cuda() else { return };
    let here: Var = Tensor::zeros(&[2, 2], DType::F32, Device::Cpu).unwrap().into();
    let there: Var = Tensor::zeros(&[2, 2], DType::F32, cuda).unwrap().into();
    for r in [ops::add(&here, &there), ops::linear(&here, &there, None), ops::matmul(&there, &here)] {
        let e = r.unwrap_err();
        assert!(matches!(e, Error::Device { .. }) && e.to_string().contains("to_device"), "{e}");
    }
}

/// Without a device the answer is an error that says what was tried, in one line.
#[test]
fn a_missing_device_is_an_error() {
    if devices::cuda().is_some() {
        let e = Device::Cuda(999).check().unwrap_err().to_string();
        assert!(e.contains("numbered from 0"), "{e}");
        return;
    }
    let e = Device::Cuda(0).check().unwrap_err().to_string();
    assert!(!e.contains('\n') && (e.contains("--device cpu") || e.contains("cuda:0")), "{e}");
    assert!(Tensor::zeros(&[2], DType::F32, Device::Cuda(0)).is_err());
}
