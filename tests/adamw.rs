//! The optimizer's arithmetic against its formula, and the norm that gradients are clipped by.

use felid::ops::{self, AdamWSettings, adamw_step, global_norm};
use felid::tensor::{DType, Device, Tensor};
use felid::{Error, Result};

const H: AdamWSettings = AdamWSettings { lr: 1e-2, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };

fn wave(n: usize, phase: f64, dtype: DType) -> Tensor {
    let t = Tensor::from_vec((0..n).map(|i| (i as f64 * 0.7 + phase).sin()).collect::<Vec<f64>>(), &[n]).unwrap();
    ops::cast(&t.into(), dtype).unwrap().into_value()
}

fn zeros(n: usize) -> Tensor {
    Tensor::zeros(&[n], DType::F32, Device::Cpu).unwrap()
}

/// Loshchilov & Hutter's algorithm 2, one element.
fn reference(p: &mut f64, g: f64, m: &mut f64, v: &mut f64, t: i32) {
    *p *= 1.0 - H.lr * H.weight_decay;
    *m = H.beta1 * *m + (1.0 - H.beta1) * g;
    *v = H.beta2 * *v + (1.0 - H.beta2) * g * g;
    let (m_hat, v_hat) = (*m / (1.0 - H.beta1.powi(t)), *v / (1.0 - H.beta2.powi(t)));
    *p -= H.lr * m_hat / (v_hat.sqrt() + H.eps);
}

#[test]
fn three_steps_follow_the_formula_in_every_dtype() {
    // several tasks, and a rest
    let n = 2 * 16_384 + 77;
    let clip = 0.37;
    // half a spacing of the dtype, for parameters of size one
    for (dtype, unit) in
        [(DType::F64, 0.0), (DType::F32, 2f64.powi(-24)), (DType::BF16, 2f64.powi(-8)), (DType::F16, 2f64.powi(-11))]
    {
        let mut param = wave(n, 0.3, dtype);
        let (mut m, mut v) = (zeros(n), zeros(n));
        let mut want = param.to_f64_vec().unwrap();
        let (mut wm, mut wv) = (vec![0.0; n], vec![0.0; n]);
        for t in 1..=3 {
            let grad = wave(n, f64::from(t), dtype);
            adamw_step(&mut param, &grad, &mut m, &mut v, t as u64, &H, clip).unwrap();
            let g = grad.to_f64_vec().unwrap();
            for i in 0..n {
                reference(&mut want[i], clip * g[i], &mut wm[i], &mut wv[i], t);
            }
        }
        // Of the parameter's size, a step rounds the factor 1 - lr wd, its product with p, and the result. It moves p by at
        // most 1.3 lr (|m_hat| <= sqrt(v_hat) up to the betas' ratio), known to some 10 roundings of f32.
        let f32_unit = 2f64.powi(-24);
        let arithmetic = if dtype == DType::F64 { 0.0 } else { 2.0 * f32_unit };
        let tiny = if dtype == DType::F16 { 2f64.powi(-25) } else { 0.0 };
        assert_eq!(param.dtype(), dtype);
        for (i, (got, want)) in param.to_f64_vec().unwrap().iter().zip(&want).enumerate() {
            let allowed = 3.0 * ((unit + arithmetic) * (want.abs() + 2.0 * H.lr) + 13.0 * f32_unit * H.lr + tiny);
            assert!((got - want).abs() <= allowed, "{dtype} element {i}: {got}, expected {want}, over {allowed:.2e}");
        }
        for (got, want) in [(&m, &wm), (&v, &wv)] {
            assert!(got.to_f64_vec().unwrap().iter().zip(want).all(|(g, w)| (g - w).abs() <= 12.0 * 2f64.powi(-24)));
        }
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    let n = 5 * 16_384 + 3;
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let (mut p, mut m, mut v) = (wave(n, 0.3, DType::F32), zeros(n), zeros(n));
            let grad = wave(n, 1.0, DType::F32);
            let norm = global_norm([&grad, &p]).unwrap();
            adamw_step(&mut p, &grad, &mut m, &mut v, 1, &H, 1.0 / norm).unwrap();
            (norm.to_bits(), p.to_le_bytes().unwrap())
        })
    };
    assert_eq!(run(1), run(3));
}

#[test]
fn the_norm_is_over_all_elements_of_all_gradients() {
    let n = 40_000;
    for dtype in [DType::F64, DType::F32, DType::BF16, DType::F16] {
        let (a, b) = (wave(n, 0.3, dtype), wave(77, 1.0, dtype));
        let all = [a.to_f64_vec().unwrap(), b.to_f64_vec().unwrap()].concat();
        let want = all.iter().map(|x| x * x).sum::<f64>().sqrt();
        let got = global_norm([&a, &b]).unwrap();
        // 16384 squares in 32 lanes: 512 additions of f32 a lane, halved by the root
        assert!((got - want).abs() <= 256.0 * 2f64.powi(-24) * want, "{dtype}: {got} {want}");
        let view = global_norm([&b.reshape(&[7, 11]).unwrap().transpose(0, 1).unwrap()]).unwrap();
        assert!((view - global_norm([&b]).unwrap()).abs() < 1e-5);
    }
    assert_eq!(global_norm([]).unwrap(), 0.0);
    assert_eq!(global_norm([&Tensor::full(f64::INFINITY, &[3], DType::F32, Device::Cpu).unwrap()]).unwrap(), f64::INFINITY);
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_written() {
    let step = |p: Tensor, g: Tensor, mut m: Tensor, mut v: Tensor, t: u64| -> (Result<()>, Vec<u8>) {
        let mut p = p;
        let r = adamw_step(&mut p, &g, &mut m, &mut v, t, &H, 1.0);
        (r, p.to_le_bytes().unwrap())
    };
    let p = || wave(4, 0.1, DType::F32);
    let before = p().to_le_bytes().unwrap();
    let wide = || Tensor::zeros(&[4], DType::F64, Device::Cpu).unwrap();
    for (r, after) in [
        step(p(), wave(5, 0.0, DType::F32), zeros(4), zeros(4), 1),
        step(p(), p(), zeros(4), zeros(3), 1),
        step(p(), wave(4, 0.0, DType::BF16), zeros(4), zeros(4), 1),
        step(p(), p(), wide(), zeros(4), 1),
        step(p(), p(), zeros(4), wide(), 1),
        step(p(), p(), zeros(4), zeros(4), 0),
    ] {
        assert!(matches!(r, Err(Error::Shape { .. } | Error::DType { .. } | Error::Config(_))));
        assert_eq!(after, before);
    }
    let ids = Tensor::ids(&[1], &[1]).unwrap();
    assert!(matches!(step(ids.clone(), ids.clone(), zeros(1), zeros(1), 1).0, Err(Error::DType { .. })));
    assert!(matches!(global_norm([&ids]), Err(Error::DType { .. })));
}
