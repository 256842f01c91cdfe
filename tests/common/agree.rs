//! An op on CUDA against the CPU, at sizes that formulas in f64 would take too long for.
#![allow(dead_code)]

use crate::devices;
use felid::autograd::{Gradients, Var};
use felid::eval::parity::relative_l2;
use felid::tensor::{DType, Tensor};
use felid::{Result, ops};

pub const FLOATS: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

pub fn wave(shape: &[usize], seed: u64) -> Tensor {
    let n: usize = shape.iter().product();
    let at = |i: usize| {
        let h = (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ seed.wrapping_mul(0xbf58_476d_1ce4_e5b9);
        ((h ^ (h >> 29)).wrapping_mul(0x94d0_49bb_1331_11eb) >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    };
    Tensor::from_vec((0..n).map(at).collect::<Vec<f64>>(), shape).unwrap()
}

/// Outputs and gradients of an op; output i is seeded with a wave.
fn run(inputs: &[Tensor], op: &dyn Fn(&[Var]) -> Result<Vec<Var>>) -> Result<Vec<Tensor>> {
    let vars: Vec<Var> = inputs.iter().map(|t| Var::parameter(t.clone())).collect();
    let (tape, mut grads) = (ops::tape(), Gradients::default());
    let ys = tape.record(|| op(&vars))?;
    let seeds: Vec<_> = ys
        .iter()
        .enumerate()
        .map(|(i, y)| {
            // 16-bit values in every dtype, so that all see the same
            let seed = ops::cast_tensor(&ops::cast_tensor(&wave(y.shape(), 77 + i as u64), DType::BF16)?, y.dtype())?;
            Ok((y, seed.to_device(y.value().device())?))
        })
        .collect::<Result<_>>()?;
    if ys.iter().any(Var::has_gradient) {
        tape.backward_from(&seeds, &mut grads)?;
    }
    let grads = vars.iter().filter_map(|v| grads.take(v));
    Ok(ys.iter().map(|y| y.value().clone()).collect::<Vec<_>>().into_iter().chain(grads).collect())
}

/// An op on CUDA against the CPU in f64, in every dtype. The bound: twice what the CPU errs in that dtype on the same
/// inputs (for f32 with the same number of roundings in another order), or two roundings of the result where that is
/// luckier.
pub fn agrees(name: &str, shapes: &[&[usize]], op: impl Fn(&[Var]) -> Result<Vec<Var>>) {
    agrees_with(name, shapes, 1, &op, &op);
}

/// As [`agrees`], for products with sums of up to `terms` terms. Added one after the other, each partial sum is rounded:
/// with 0.42 u for a rounding in the root mean square, and partial sums that grow as a random walk, the result errs by
/// 0.42 u sqrt(terms / 2) of itself. The CPU's sums are shorter, in lanes.
pub fn agrees_summing(terms: usize, name: &str, shapes: &[&[usize]], op: impl Fn(&[Var]) -> Result<Vec<Var>>) {
    agrees_with(name, shapes, terms, &op, &op);
}

/// As [`agrees`], where a naive implementation is not the op itself but `naive`, which keeps what the op fuses away.
pub fn agrees_with(
    name: &str,
    shapes: &[&[usize]],
    terms: usize,
    op: &dyn Fn(&[Var]) -> Result<Vec<Var>>,
    naive: &dyn Fn(&[Var]) -> Result<Vec<Var>>,
) {
    let Some(cuda) = devices::cuda() else { return };
    let dtypes = if devices::light() { &FLOATS[..2] } else { &FLOATS[..] };
    for &dtype in dtypes {
        let inputs: Vec<Tensor> =
            shapes.iter().enumerate().map(|(i, s)| ops::cast_tensor(&wave(s, i as u64), dtype).unwrap()).collect();
        let exact: Vec<Tensor> = inputs.iter().map(|t| ops::cast_tensor(t, DType::F64).unwrap()).collect();
        let there: Vec<Tensor> = inputs.iter().map(|t| t.to_device(cuda).unwrap()).collect();
        let (want, here) = (run(&exact, op).unwrap(), run(&inputs, naive).unwrap());
        let got = run(&there, op).unwrap_or_else(|e| panic!("{name} {dtype}: {e}"));
        let again = (!devices::light()).then(|| run(&there, op).unwrap());
        // what one rounding errs in the root mean square, nearly
        let unit = match dtype {
            DType::F32 => 2f64.powi(-24) * (0.42 * (terms as f64 / 2.0).sqrt()).max(1.0),
            DType::BF16 => 2f64.powi(-9),
            _ => 2f64.powi(-12),
        };
        let mut worst = 0f64;
        assert_eq!(got.len(), want.len());
        for (i, ((got, here), want)) in got.iter().zip(&here).zip(&want).enumerate() {
            assert_eq!((got.shape(), got.dtype()), (here.shape(), here.dtype()), "{name} {dtype} {i}");
            if let Some(again) = &again {
                assert_eq!(
                    got.to_le_bytes().unwrap(),
                    again[i].to_le_bytes().unwrap(),
                    "{name} {dtype} {i}: not deterministic"
                );
            }
            let (err, naive) = (relative_l2(got, want).unwrap(), relative_l2(here, want).unwrap());
            let bound = 2.0 * naive.max(unit);
            assert!(err <= bound, "{name} {dtype} result {i}: {err:.2e} over {bound:.2e}");
            worst = worst.max(err / bound);
        }
        devices::report(name, dtype, want.len(), worst);
    }
}

pub fn one(y: Result<Var>) -> Result<Vec<Var>> {
    Ok(vec![y?])
}
