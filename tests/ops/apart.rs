//! What the table cannot ask of an op: exact values, extremes, layouts, and paths that only large sizes take.

use felid::autograd::{Gradients, Var};
use felid::ops;
use felid::tensor::{DType, Tensor};
use half::{bf16, f16};

fn wave(shape: &[usize], phase: f64) -> Tensor {
    let n: usize = shape.iter().product();
    Tensor::from_vec((0..n).map(|i| (i as f64 * 0.7 + phase).sin()).collect::<Vec<f64>>(), shape).unwrap()
}

fn constant(values: &[f32]) -> Var {
    Tensor::from_slice(values, &[values.len()]).unwrap().into()
}

/// The loss, and the gradients of both inputs, of seed times the loss.
fn losses(x: &Tensor, w: &Tensor, seed: f64, loss: impl Fn(&Var, &Var) -> felid::Result<Var>) -> (f64, Vec<f64>, Vec<f64>) {
    let (x, w) = (Var::parameter(x.clone()), Var::parameter(w.clone()));
    let tape = ops::tape();
    let mut grads = Gradients::default();
    let y = tape.record(|| loss(&x, &w)).unwrap();
    tape.backward(&y, seed, &mut grads).unwrap();
    let grad = |v| grads.get(v).unwrap().to_f64_vec().unwrap();
    (y.value().item().unwrap(), grad(&x), grad(&w))
}

#[test]
fn blocks_of_logits_add_up_to_the_whole() {
    // 8200 classes in f64 fill 4 MB with 64 rows: three blocks, with and without rows left out
    let (rows, classes, d) = (150, 8200, 3);
    let (x, w) = (wave(&[rows, d], 0.1), wave(&[classes, d], 0.5));
    for every in [1, 4] {
        let label = |r: usize| if r % every == every - 1 { (r * 53 % classes) as i64 } else { -100 };
        let labels = Tensor::ids(&(0..rows).map(label).collect::<Vec<_>>(), &[rows]).unwrap();
        for seed in [1.0, -2.5] {
            let got = losses(&x, &w, seed, |x, w| ops::linear_cross_entropy(x, w, &labels, -100));
            let want = losses(&x, &w, seed, |x, w| ops::cross_entropy(&ops::linear(x, w, None)?, &labels, -100));
            // sums of at most 8200 terms of at most 1 in f64, in another order
            let close = |a: &f64, b: &f64| (a - b).abs() <= 8200.0 * f64::EPSILON;
            assert!(close(&got.0, &want.0));
            assert!(got.1.iter().zip(&want.1).all(|(a, b)| close(a, b)));
            assert!(got.2.iter().zip(&want.2).all(|(a, b)| close(a, b)));
        }
        // not recorded: the same loss, in every bit
        let recorded = losses(&x, &w, 1.0, |x, w| ops::linear_cross_entropy(x, w, &labels, -100)).0;
        let plain = ops::linear_cross_entropy(&x.clone().into(), &w.clone().into(), &labels, -100).unwrap();
        assert_eq!(plain.value().item().unwrap(), recorded);
    }
}

#[test]
fn a_constant_weight_gets_no_gradient_from_the_loss() {
    let labels = Tensor::ids(&[1, 0], &[2]).unwrap();
    let (x, w) = (Var::parameter(wave(&[2, 3], 0.1)), Var::constant(wave(&[4, 3], 0.5)));
    let tape = ops::tape();
    let mut grads = Gradients::default();
    let y = tape.record(|| ops::linear_cross_entropy(&x, &w, &labels, -100)).unwrap();
    tape.backward(&y, 1.0, &mut grads).unwrap();
    assert_eq!((grads.len(), grads.get(&x).is_some()), (1, true));
}

#[test]
fn cast_rounds_to_nearest_even_and_casts_gradients_back() {
    // ties, subnormals, overflow, zeros
    let mut values =
        vec![0.0f32, -0.0, 1.0, 1.001_953_1, 1.003_906_3, 1.011_718_8, 65_519.0, 65_520.0, 1e-7, 6e-8, 1e-40, 3e38];
    values.extend((0..999).map(|i| (i as f32 * 1.37).sin() * (i as f32 * 0.03 - 15.0).exp()));
    let x = constant(&values);
    let to = |d| ops::cast(&x, d).unwrap().into_value();
    assert_eq!(to(DType::BF16).to_vec::<bf16>().unwrap(), values.iter().map(|&v| bf16::from_f32(v)).collect::<Vec<_>>());
    assert_eq!(to(DType::F16).to_vec::<f16>().unwrap(), values.iter().map(|&v| f16::from_f32(v)).collect::<Vec<_>>());
    assert_eq!(to(DType::F64).to_vec::<f64>().unwrap(), values.iter().map(|&v| f64::from(v)).collect::<Vec<_>>());

    for from in [DType::F32, DType::BF16, DType::F16, DType::F64] {
        for into in [DType::F32, DType::BF16, DType::F16, DType::F64] {
            let x = Var::parameter(ops::cast(&x, from).unwrap().into_value());
            let tape = ops::tape();
            let mut grads = Gradients::default();
            let y = tape.record(|| ops::cast(&x, into)).unwrap();
            tape.backward(&y, 0.5, &mut grads).unwrap();
            let g = grads.get(&x).unwrap();
            assert_eq!((y.dtype(), g.dtype()), (into, from));
            assert!(g.to_f64_vec().unwrap().iter().all(|&g| g == 0.5));
        }
    }
}

#[test]
fn the_first_of_equals_is_the_largest() {
    let nan = f32::NAN;
    let x = Tensor::from_slice(&[1f32, 5.0, 5.0, 0.0, -1.0, -3.0, -1.0, -1.0, 2.0, nan, 9.0, nan], &[3, 4]).unwrap();
    assert_eq!(ops::argmax(&x).unwrap().to_vec::<i64>().unwrap(), [1, 0, 1]);
    let columns = ops::argmax(&x.transpose(0, 1).unwrap()).unwrap();
    assert_eq!(columns.shape(), [4]);
    assert_eq!(columns.to_vec::<i64>().unwrap(), [2, 2, 2, 2]);
    let largest = ops::max(&x.into(), &[1]).unwrap().into_value().to_vec::<f32>().unwrap();
    assert!(largest[..2] == [5.0, -1.0] && largest[2].is_nan());
    assert_eq!(ops::argmax(&Tensor::from_slice(&[2f32, 3.0], &[2]).unwrap()).unwrap().shape(), [0usize; 0]);
}

#[test]
fn large_logits_do_not_overflow() {
    let z = constant(&[1e4, 1e4 - 1.0, -1e4]);
    let p = ops::softmax(&z).unwrap().into_value().to_vec::<f32>().unwrap();
    // e^-1 / (1 + e^-1)
    assert!((p[1] - 0.268_941_43).abs() < 1e-4 && p[2] == 0.0);
    // -2e4 - ln(1 + e^-1), in f32
    let l = ops::log_softmax(&z).unwrap().into_value().to_vec::<f32>().unwrap();
    assert!((l[2] + 20_000.313).abs() < 0.01);
    let loss = |label| {
        let z = ops::reshape(&z, &[1, 3]).unwrap();
        let labels = Tensor::ids(&[label], &[1]).unwrap();
        ops::cross_entropy(&z, &labels, -100).unwrap().value().item().unwrap()
    };
    assert!((loss(2) - 2e4).abs() < 1.0 && loss(0).abs() < 0.4);
}

#[test]
fn a_small_loss_gradient_survives_half_precision() {
    // a count of 4096 makes single gradients near f16's smallest: a seed that scales the loss must come in before rounding
    let rows = 4096;
    let half = |t: Tensor| ops::cast(&t.into(), DType::F16).unwrap().into_value();
    let (x, w) = (half(wave(&[rows, 2], 0.1)), half(wave(&[40, 2], 0.5)));
    let labels = Tensor::ids(&vec![3; rows], &[rows]).unwrap();
    let loss = |x: &Var, w: &Var| ops::linear_cross_entropy(x, w, &labels, -100);
    let (_, dx, _) = losses(&x, &w, 1024.0, loss);
    let wide = |t: &Tensor| ops::cast(&t.clone().into(), DType::F64).unwrap().into_value();
    let (_, want, _) = losses(&wide(&x), &wide(&w), 1024.0, loss);
    // one rounding to f16, relative 2^-11, and sums in f32 that are small beside it
    assert!(dx.iter().zip(&want).all(|(a, b)| (a - b).abs() <= 2.0 * (b.abs() * 2f64.powi(-11) + 2f64.powi(-25))));
}

#[test]
fn rope_keeps_the_order_in_memory() {
    // heads as a joint projection leaves them: [B, L, H, d] seen as [B, H, L, d]
    let x = wave(&[2, 5, 3, 8], 0.0).transpose(1, 2).unwrap();
    let table = ops::RopeTable::new(&[0, 1, 2, 0, 1], 6, 1e4).unwrap();
    let y = ops::rope(&x.clone().into(), &table).unwrap().into_value();
    assert_eq!(y.layout().strides(), x.layout().strides());
    assert!(y.transpose(1, 2).unwrap().is_contiguous());
    assert_eq!((table.len(), table.is_empty()), (5, false));
}

#[test]
fn interpolation_by_hand() {
    // r = 4: each output averages the middle two of its four; r = 1/2: quarters, held at both ends
    let x = constant(&[0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]);
    let at = |x: &Var, size| ops::interpolate(x, 0, size).unwrap().into_value().to_vec::<f32>().unwrap();
    assert_eq!(at(&x, 2), [1.5, 24.0]);
    assert_eq!(at(&constant(&[4.0, 8.0]), 4), [4.0, 5.0, 7.0, 8.0]);
    // r = 8/3, not whole: p = 5/6, 3.5, 37/6
    let third = at(&x, 3);
    assert!((third[0] - 5.0 / 6.0).abs() < 1e-6 && third[1] == 6.0 && (third[2] - (32.0 + 32.0 / 6.0)).abs() < 1e-5);
    assert_eq!(at(&x, 8), x.value().to_vec::<f32>().unwrap());
}
