//! Models, golden files and training on a CUDA device, against the CPU. Skipped, with a word, where there is none.
#![cfg(feature = "cuda")]

#[path = "common/agree.rs"]
mod agree;
mod common;
#[path = "common/devices.rs"]
mod devices;
#[path = "common/small_run.rs"]
mod small_run;

use agree::{FLOATS, wave};
use common::{KINDS, model};
use felid::autograd::{Gradients, Tape, Var};
use felid::eval::parity::{evaluate, parity, relative_l2};
use felid::generate::{Request, generate};
use felid::model::{Cat, ForwardOptions, ModelConfig};
use felid::ops;
use felid::tensor::{DType, Device, Tensor};
use felid::train::{TrainConfig, Trainer};
use small_run::small;
use std::path::Path;

/// The same model with every weight off by up to a rounding of f32: how far its results move says how far any sequence of
/// roundings may move them.
fn jolted(m: &Cat, seed: u64) -> Cat {
    let mut m = m.clone();
    for (i, p) in m.params_mut().into_iter().enumerate() {
        let n = p.value().numel();
        let noise = wave(&[n], 1000 * seed + i as u64).to_f64_vec().unwrap();
        let values = p.value().to_f64_vec().unwrap().into_iter().zip(noise);
        let moved = values.map(|(x, e)| x * (1.0 + e * 2f64.powi(-24))).collect::<Vec<f64>>();
        let shape = p.shape().to_vec();
        *p.value_mut() = Tensor::from_vec(moved, &shape).unwrap();
    }
    m
}

/// f32 on CUDA errs no more than 8 times what the worst does of the CPU in f32 and of models in f64 whose weights are off by
/// a rounding.
#[test]
fn random_models_agree() {
    let Some(cuda) = devices::cuda() else { return };
    for kind in KINDS {
        for seed in 0..6 {
            let m = model(kind, seed);
            let c = m.config().clone();
            let there = m.clone().to_device(cuda).unwrap();
            let chunk = c.allowed_chunk_sizes().into_iter().nth(seed as usize % 3);
            let n = c.block_size - seed as usize % 4;
            let text: Vec<i64> = (0..2 * n).map(|i| (i * 7 + seed as usize) as i64 % c.vocab_size as i64).collect();
            let text = Tensor::ids(&text, &[2, n]).unwrap();
            let results = |m: &Cat| {
                let o = evaluate(m, &text, Some(&text), chunk).unwrap();
                let logits = ("logits".to_string(), o.logits);
                [logits].into_iter().chain(o.gradients).collect::<Vec<_>>()
            };
            let exact = common::cast(&m, DType::F64);
            let want = results(&exact);
            let rough: Vec<_> = [results(&m)].into_iter().chain((0..4).map(|i| results(&jolted(&exact, i)))).collect();
            for (i, (name, got)) in results(&there).iter().enumerate() {
                let off = |r: &Tensor| relative_l2(r, &want[i].1).unwrap();
                let naive = rough.iter().map(|r| off(&r[i].1)).fold(2f64.powi(-24), f64::max);
                assert!(off(got) <= 8.0 * naive, "{kind:?} {seed} {name}: {:.2e}, others {naive:.2e}", off(got));
            }
            let like = Request { max_new_tokens: n / 2, chunk_size: chunk, ..Default::default() };
            let prompt = text.narrow(1, 0, n - n / 2).unwrap();
            let (got, want) = (generate(&there, &prompt, &like).unwrap(), generate(&m, &prompt, &like).unwrap());
            assert_eq!(got.to_vec::<i64>().unwrap(), want.to_vec::<i64>().unwrap(), "{kind:?} {seed}");
        }
    }
}

#[test]
fn golden_files_pass() {
    let Some(cuda) = devices::cuda() else { return };
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/golden");
    let dir = if dir.exists() { dir } else { "tests/fixtures/golden".into() };
    for name in
        ["transformer.safetensors", "cat_fixed.safetensors", "cat_adaptive.safetensors", "cat_layer.safetensors", "hf_cat"]
    {
        for dtype in FLOATS {
            for c in parity(&dir.join(name), dtype, cuda).unwrap() {
                assert!(c.pass, "{name} {dtype}: {c:?}");
                devices::report(name, dtype, 1, c.logits / c.logits_bound);
            }
        }
    }
}

#[test]
fn training_agrees_with_the_cpu_and_with_itself() {
    let Some(cuda) = devices::cuda() else { return };
    let dir = tempfile::tempdir().unwrap();
    let losses = |config: TrainConfig, device: Device| -> Vec<f64> {
        let mut t = Trainer::on(config, device).unwrap();
        (0..12).map(|_| t.step().unwrap().loss).collect()
    };
    let here = losses(small(dir.path(), ""), Device::Cpu);
    let there = losses(small(dir.path(), ""), cuda);
    for (a, b) in here.iter().zip(&there) {
        assert!((a - b).abs() <= 1e-4 * a, "{here:?} {there:?}");
    }
    // the same bits again, with accumulation and recomputation
    let more = "grad_accum = 2\nrecompute = true\ndtype = 'bf16'";
    let bits = |l: Vec<f64>| l.into_iter().map(f64::to_bits).collect::<Vec<_>>();
    let first = losses(small(dir.path(), more), cuda);
    assert_eq!(bits(first.clone()), bits(losses(small(dir.path(), more), cuda)));
    let wide = losses(small(dir.path(), "grad_accum = 2"), cuda);
    for (a, b) in wide.iter().zip(&first) {
        // bf16 keeps 8 bits: the mean over hundreds of tokens, after some ten roundings each
        assert!((a - b).abs() <= 10.0 * 2f64.powi(-9) * a, "{wide:?} {first:?}");
    }
}

/// Values computed again in backward, and gradients written over what they are of, change no bit.
#[test]
fn saving_less_changes_no_bit() {
    let Some(cuda) = devices::cuda() else { return };
    let presets = ["nano", "cpu-small"].map(|name| Cat::new(ModelConfig::preset(name).unwrap(), 3).unwrap());
    for m in KINDS.iter().map(|&kind| model(kind, 2)).chain(presets) {
        let c = m.config();
        let n = c.block_size;
        let text: Vec<i64> = (0..2 * n).map(|i| (i * 7) as i64 % c.vocab_size as i64).collect();
        let text = Tensor::ids(&text, &[2, n]).unwrap();
        for dtype in FLOATS {
            let m = common::cast(&m, dtype).to_device(cuda).unwrap();
            let bits = |tape: Tape, recompute: bool| {
                let mut grads = Gradients::default();
                let options = ForwardOptions { recompute, ..Default::default() };
                let loss = tape.record(|| m.loss(&text, &text, options)).unwrap();
                tape.backward(&loss, 1.0, &mut grads).unwrap();
                m.params().iter().map(|p| grads.take(&p.var).map(|g| g.to_le_bytes().unwrap())).collect::<Vec<_>>()
            };
            let all_saved = bits(ops::tape().saving_all(), false);
            assert!(bits(ops::tape(), false) == all_saved, "{dtype} {c:?}");
            assert!(bits(ops::tape(), true) == all_saved, "{dtype} {c:?}");
        }
    }
}

#[test]
fn swiglu_in_place_gives_the_same_bits() {
    let Some(cuda) = devices::cuda() else { return };
    for (dtype, width) in FLOATS.into_iter().flat_map(|d| [(d, 1), (d, 37), (d, 512)]) {
        let x = Var::parameter(ops::cast_tensor(&wave(&[33, width], 5), dtype).unwrap().to_device(cuda).unwrap());
        let bits = |held: bool| {
            let (tape, mut grads, mut holder) = (ops::tape(), Gradients::default(), None);
            let y = tape.record(|| {
                let (gate, up) = (ops::scale(&x, 3.0)?, ops::scale(&x, -0.5)?);
                let y = ops::swiglu(&gate, &up)?;
                holder = held.then_some((gate, up));
                ops::sum_all(&ops::mul(&y, &y)?)
            });
            tape.backward(&y.unwrap(), 1.0, &mut grads).unwrap();
            grads.take(&x).unwrap().to_le_bytes().unwrap()
        };
        assert!(bits(true) == bits(false), "{dtype}, {width} wide");
    }
}

/// The preset that the CPU is measured with: its first 50 losses on real text.
#[test]
fn the_first_losses_of_cpu_small_agree() {
    let Some(cuda) = devices::cuda() else { return };
    let dir = tempfile::tempdir().unwrap();
    let losses = |dtype: DType, device: Device| -> Vec<f64> {
        let preset = TrainConfig::preset("cpu-small").unwrap();
        let mut t = Trainer::on(TrainConfig { dtype, out: dir.path().into(), ..preset }, device).unwrap();
        (0..50).map(|_| t.step().unwrap().loss).collect()
    };
    let (here, there) = (losses(DType::F32, Device::Cpu), losses(DType::F32, cuda));
    let apart = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - b).abs() / a).fold(0.0, f64::max);
    let (f32_apart, bf16_apart) = (apart(&here, &there), apart(&here, &losses(DType::BF16, cuda)));
    println!("first 50 losses of cpu-small: f32 {f32_apart:.1e} apart, bf16 {bf16_apart:.1e}");
    assert!(f32_apart <= 1e-4, "{here:?} {there:?}");
    assert!(bf16_apart <= 10.0 * 2f64.powi(-9), "{bf16_apart}");
    devices::report("cpu-small, 50 losses", DType::F32, 50, f32_apart / 1e-4);
    devices::report("cpu-small, 50 losses", DType::BF16, 50, bf16_apart / (10.0 * 2f64.powi(-9)));
}

#[test]
fn checkpoints_move_between_devices() {
    let Some(cuda) = devices::cuda() else { return };
    let dir = tempfile::tempdir().unwrap();
    for dtype in ["f32", "bf16"] {
        let config = small(dir.path(), &format!("dtype = '{dtype}'"));
        let mut t = Trainer::on(config.clone(), cuda).unwrap();
        (0..3).for_each(|_| drop(t.step().unwrap()));
        t.save().unwrap();
        let straight: Vec<f64> = (0..3).map(|_| t.step().unwrap().loss).collect();
        let mut again = Trainer::resume_on(&config.out, cuda, Ok).unwrap();
        let resumed: Vec<f64> = (0..3).map(|_| again.step().unwrap().loss).collect();
        assert_eq!(straight, resumed);
        let mut here = Trainer::resume(&config.out, Ok).unwrap();
        let moved = here.step().unwrap().loss;
        let unit = if dtype == "f32" { 1e-4 } else { 10.0 * 2f64.powi(-9) };
        assert!((moved - straight[0]).abs() <= unit * moved, "{dtype}: {moved} {straight:?}");
    }
}
