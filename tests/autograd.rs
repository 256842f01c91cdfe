//! The tape: what it records, when it lets go, and what an error leaves behind.

use felid::autograd::{Gradients, Tape, Var, compute_again, is_recording, no_grad, recompute, record_one};
use felid::tensor::{DType, Device, Tensor, memory_stats};
use felid::{Error, Result, ops};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

fn parameter(values: &[f64]) -> Var {
    Var::parameter(Tensor::from_slice(values, &[values.len()]).unwrap())
}
fn grad(grads: &Gradients, v: &Var) -> Vec<f64> {
    grads.get(v).unwrap().to_f64_vec().unwrap()
}

#[test]
fn nothing_is_recorded_without_a_tape_or_under_no_grad() {
    let x = parameter(&[1.0, 2.0]);
    assert!(!ops::exp(&x).unwrap().has_gradient());
    let tape = ops::tape();
    tape.record(|| {
        assert!(is_recording());
        let y = no_grad(|| {
            assert!(!is_recording());
            ops::exp(&x).unwrap()
        });
        assert!(is_recording() && !y.has_gradient());
        assert!(!ops::exp(&x.detach()).unwrap().has_gradient());
    });
    assert!(tape.is_empty() && !is_recording());
    let y = tape.record(|| ops::exp(&x)).unwrap();
    assert!(y.has_gradient());
    // the tape grows from call to call
    tape.record(|| ops::neg(&y)).unwrap();
    assert_eq!((tape.len(), tape.trace()), (2, vec!["exp", "neg"]));
}

#[test]
fn a_value_used_twice_gets_both_gradients() {
    let x = parameter(&[3.0, -1.0]);
    let mut grads = Gradients::default();
    let tape = ops::tape();
    let y = tape.record(|| {
        let square = ops::mul(&x, &x)?;
        // x^3 + x^2 + 2x
        ops::add(&ops::add(&ops::mul(&square, &x)?, &square)?, &ops::add(&x, &x)?)
    });
    tape.backward(&y.unwrap(), 1.0, &mut grads).unwrap();
    assert_eq!(grad(&grads, &x), [35.0, 3.0]);
    // activations leave nothing behind
    assert_eq!(grads.len(), 1);
}

#[test]
fn parameters_that_play_no_part_are_listed() {
    let (used, unused, unreached) = (parameter(&[1.0]), parameter(&[2.0]), parameter(&[3.0]));
    let mut grads = Gradients::default();
    let tape = ops::tape();
    let y = tape.record(|| {
        ops::exp(&unreached).unwrap();
        ops::exp(&used).unwrap()
    });
    tape.backward(&y, 1.0, &mut grads).unwrap();
    let missing: Vec<_> = grads.missing([&used, &unused, &unreached]).iter().map(|v| v.id()).collect();
    assert_eq!(missing, [unused.id(), unreached.id()]);
    grads.clear();
    assert!(grads.is_empty());
}

#[test]
fn an_unused_piece_of_a_split_counts_as_zero() {
    let x = parameter(&[1.0, 2.0, 3.0]);
    let mut grads = Gradients::default();
    let tape = ops::tape();
    let y = tape.record(|| {
        let pieces = ops::split(&x, 0, &[1, 1, 1])?;
        ops::mul(&pieces[1], &pieces[1])
    });
    tape.backward(&y.unwrap(), 1.0, &mut grads).unwrap();
    assert_eq!(grad(&grads, &x), [0.0, 4.0, 0.0]);
}

/// A small block with parameters of its own.
fn block(x: &Var, w: &Var, scale: &Var) -> Result<Vec<Var>> {
    let h = ops::silu(&ops::linear(x, w, None)?)?;
    let (y, h) = ops::add_rms_norm(&h, x, scale, 1e-5)?;
    Ok(vec![ops::mul(&y, &y)?, h])
}

#[test]
fn recomputing_changes_no_bit_and_reaches_parameters() {
    let wave = |shape: &[usize], phase: f64| {
        let n: usize = shape.iter().product();
        let values = (0..n).map(|i| (i as f64 * 0.9 + phase).sin()).collect::<Vec<_>>();
        Var::parameter(Tensor::from_vec(values, shape).unwrap())
    };
    let (x, w, scale) = (wave(&[5, 4], 0.1), wave(&[4, 4], 0.2), wave(&[4], 0.3));
    let run = |again: bool| {
        let mut grads = Gradients::default();
        let tape = ops::tape();
        let y = tape.record(|| {
            let x = ops::exp(&x)?;
            let (w, scale) = (w.clone(), scale.clone());
            // parameters reach f as captured values; its second output stays unused
            let f = move |v: &[Var]| block(&v[0], &w, &scale);
            let out = if again { recompute(&[&x], f)? } else { f(std::slice::from_ref(&x))? };
            ops::sum_all(&ops::mul(&out[0], &out[0])?)
        });
        let (y, nodes) = (y.unwrap(), tape.len());
        tape.backward(&y, 1.0, &mut grads).unwrap();
        assert_eq!(grads.len(), 3);
        let bits: Vec<_> = [&x, &w, &scale].iter().map(|v| grads.get(v).unwrap().to_le_bytes().unwrap()).collect();
        (y.value().to_le_bytes().unwrap(), bits, nodes)
    };
    let (plain, again) = (run(false), run(true));
    assert_eq!((plain.0, plain.1), (again.0, again.1));
    // exp, linear, silu, add_rms_norm, mul, mul, sum, reshape; the block becomes one node
    assert_eq!((plain.2, again.2), (8, 5));
}

#[test]
fn recomputing_nests_and_only_runs_where_recorded() {
    let x = parameter(&[0.5, 2.0]);
    let inner = |v: &[Var]| recompute(&[&v[0]], |v| Ok(vec![ops::exp(&v[0])?]));
    assert!(!recompute(&[&x], inner).unwrap()[0].has_gradient());
    let mut grads = Gradients::default();
    let tape = ops::tape();
    let y = tape.record(|| recompute(&[&x], inner)).unwrap();
    tape.backward(&y[0], 2.0, &mut grads).unwrap();
    assert_eq!(grad(&grads, &x), [2.0 * 0.5f64.exp(), 2.0 * 2f64.exp()]);
}

#[test]
fn a_tape_inside_a_tape_keeps_to_itself() {
    let x = parameter(&[2.0]);
    let (outer, mut outer_grads) = (ops::tape(), Gradients::default());
    let y = outer.record(|| {
        let y = ops::mul(&x, &x)?;
        let (inner, mut inner_grads) = (ops::tape(), Gradients::default());
        let z = inner.record(|| ops::exp(&x))?;
        inner.backward(&z, 1.0, &mut inner_grads)?;
        assert_eq!(grad(&inner_grads, &x), [2f64.exp()]);
        ops::mul(&y, &x)
    });
    assert_eq!(outer.trace(), ["mul", "mul"]);
    outer.backward(&y.unwrap(), 1.0, &mut outer_grads).unwrap();
    assert_eq!(grad(&outer_grads, &x), [12.0]);
}

#[test]
fn backward_frees_what_it_has_passed() {
    // activations of 1 MB; what other tests hold meanwhile is nothing beside that
    const N: usize = 1 << 17;
    let x = Var::parameter(Tensor::zeros(&[N], DType::F64, Device::Cpu).unwrap());
    let weak = std::sync::Arc::new(());
    let mut grads = Gradients::default();
    let tape = ops::tape();
    let before = memory_stats().current;
    let y = tape.record(|| {
        let mut y = x.clone();
        for _ in 0..64 {
            y = ops::exp(&ops::scale(&y, 0.1)?)?;
        }
        Ok::<_, Error>(y)
    });
    let y = y.unwrap();
    assert!(memory_stats().current - before > 60 * 8 * N);
    // a node of its own whose backward holds a token
    let held = weak.clone();
    let z = tape.record(|| {
        record_one("token", &[&y], y.value().clone(), move |flow| {
            drop(held);
            let dy = flow.output()?;
            flow.give(0, dy)
        })
    });
    assert_eq!(std::sync::Arc::strong_count(&weak), 2);
    tape.backward(&z, 1.0, &mut grads).unwrap();
    assert_eq!(std::sync::Arc::strong_count(&weak), 1);
    drop((y, z));
    // what stays: the gradient of x
    assert!(memory_stats().current - before < 8 * 8 * N);
}

#[test]
fn an_error_in_backward_leaves_no_gradient_of_an_activation() {
    let x = parameter(&[1.0, 2.0]);
    let mut grads = Gradients::default();
    let tape = ops::tape();
    let y = tape.record(|| {
        let a = ops::exp(&x)?;
        let b = record_one("failing", &[&a], a.value().clone(), |flow| {
            let dy = flow.output()?;
            flow.give(0, dy)?;
            Err(Error::Gradient { op: "failing", detail: "on purpose".into() })
        });
        ops::add(&ops::mul(&b, &b)?, &x)
    });
    let e = tape.backward(&y.unwrap(), 1.0, &mut grads).unwrap_err();
    assert!(e.to_string().contains("on purpose"));
    // at most the parameter's own, that had arrived by then
    assert!(grads.missing([&x]).len() + grads.len() == 1);
    assert!(!is_recording());
}

#[test]
fn what_was_not_recorded_has_no_backward() {
    let x = parameter(&[1.0]);
    let outside = ops::exp(&x).unwrap();
    let mut grads = Gradients::default();
    assert!(matches!(ops::tape().backward(&outside, 1.0, &mut grads), Err(Error::Gradient { .. })));
    let tape = ops::tape();
    let y = tape.record(|| ops::exp(&x)).unwrap();
    let seed = Tensor::zeros(&[2], DType::F64, Device::Cpu).unwrap();
    assert!(matches!(tape.backward_from(&[(&y, seed)], &mut grads), Err(Error::Gradient { .. })));
    assert!(grads.is_empty());
}

#[test]
fn a_tape_survives_an_error_inside_record() {
    let x = parameter(&[1.0, 2.0]);
    let tape: Tape = ops::tape();
    let failed = tape.record(|| {
        let y = ops::exp(&x)?;
        ops::reshape(&y, &[3])
    });
    assert!(failed.is_err() && !is_recording());
    let y = tape.record(|| ops::mul(&x, &x)).unwrap();
    let mut grads = Gradients::default();
    tape.backward(&y, 1.0, &mut grads).unwrap();
    assert_eq!(grad(&grads, &x), [2.0, 4.0]);
}

#[test]
fn writing_a_parameter_leaves_recorded_values_alone() {
    let mut x = parameter(&[3.0]);
    let tape = ops::tape();
    let y = tape.record(|| ops::mul(&x, &x)).unwrap();
    x.value_mut().as_mut_slice::<f64>().unwrap()[0] = 100.0;
    let mut grads = Gradients::default();
    tape.backward(&y, 1.0, &mut grads).unwrap();
    assert_eq!(grad(&grads, &x), [6.0]);
    let taken = grads.take(&x).unwrap();
    assert_eq!((taken.shape(), grads.len()), (&[1usize][..], 0));
}

/// `2 x`, computed again in backward; counts how often, and fails where told to.
fn doubled(x: &Var, count: &Arc<AtomicUsize>, fail: bool) -> Result<Var> {
    let (value, count) = (x.value().clone(), count.clone());
    let make = move |x: &Tensor| ops::scale(&x.clone().into(), 2.0).map(Var::into_value);
    let y = record_one("doubled", &[x], make(&value)?, |flow| {
        let dy = flow.output()?;
        flow.give(0, ops::scale(&dy.into(), 2.0)?.into_value())
    });
    let mut outputs = [y];
    compute_again(&mut outputs, move || {
        count.fetch_add(1, Relaxed);
        if fail { Err(Error::Gradient { op: "doubled", detail: "on purpose".into() }) } else { Ok(vec![make(&value)?]) }
    });
    let [y] = outputs;
    Ok(y)
}

#[test]
fn what_is_cheap_is_computed_once_for_all_who_saved_it() {
    let wave = |n: usize| Tensor::from_vec((0..n).map(|i| (i as f64).sin()).collect(), &[n]).unwrap();
    let x = Var::parameter(wave(24).reshape(&[6, 4]).unwrap());
    let [w, v] = [20, 24].map(|n| Var::parameter(wave(n).reshape(&[n / 4, 4]).unwrap()));
    let run = |tape: Tape| {
        let (count, mut grads) = (Arc::new(AtomicUsize::new(0)), Gradients::default());
        let z = tape.record(|| {
            let y = doubled(&x, &count, false)?;
            // as it is, and as views of it: turned, and a copy of a part
            let a = ops::linear(&y, &w, None)?;
            let b = ops::matmul(&ops::transpose(&y, 0, 1)?, &v)?;
            let part = ops::reshape(&ops::narrow(&y, 1, 1, 2)?, &[3, 4])?;
            let c = ops::linear(&part, &w, None)?;
            ops::add(&ops::add(&ops::sum_all(&a)?, &ops::sum_all(&b)?)?, &ops::sum_all(&c)?)
        });
        // the recipe, in the tape alone
        let recipes = Arc::strong_count(&count) - 1;
        tape.backward(&z.unwrap(), 1.0, &mut grads).unwrap();
        assert_eq!(Arc::strong_count(&count), 1);
        let bits: Vec<_> = [&x, &w, &v].iter().map(|p| grads.get(p).unwrap().to_le_bytes().unwrap()).collect();
        (count.load(Relaxed), recipes, bits)
    };
    let (again, saved) = (run(ops::tape()), run(ops::tape().saving_all()));
    assert_eq!((again.0, again.1), (1, 1));
    assert_eq!((saved.0, saved.1), (0, 0));
    assert_eq!(again.2, saved.2);
}

#[test]
fn nothing_is_computed_again_that_nobody_waits_for() {
    let (x, count) = (parameter(&[1.0, 2.0]), Arc::new(AtomicUsize::new(0)));
    // a constant's weight alone has a gradient, and the output of `linear` is not used
    let w = Var::parameter(Tensor::from_slice(&[1.0f64, 2.0], &[1, 2]).unwrap());
    let tape = ops::tape();
    let y = tape.record(|| {
        let y = doubled(&x, &count, false)?;
        ops::linear(&y, &w, None)?;
        ops::linear(&y, &w.detach(), None)
    });
    let mut grads = Gradients::default();
    tape.backward(&y.unwrap(), 1.0, &mut grads).unwrap();
    assert_eq!((grad(&grads, &x), grads.missing([&w]).len()), (vec![2.0, 4.0], 1));
    assert_eq!(count.load(Relaxed), 0);
    // without a tape, or a gradient, there is no backward, and so no recipe
    no_grad(|| doubled(&x, &count, false)).unwrap();
    let tape = ops::tape();
    tape.record(|| doubled(&x.detach(), &count, false)).unwrap();
    assert_eq!(Arc::strong_count(&count), 1);
}

#[test]
fn an_error_in_computing_again_is_backwards_error() {
    let (x, count) = (parameter(&[1.0, 2.0]), Arc::new(AtomicUsize::new(0)));
    let w = Var::parameter(Tensor::from_slice(&[1.0f64, 2.0], &[1, 2]).unwrap());
    let tape = ops::tape();
    let y = tape.record(|| ops::linear(&ops::exp(&doubled(&x, &count, true)?)?, &w, None)).unwrap();
    let mut grads = Gradients::default();
    tape.backward(&y, 1.0, &mut grads).unwrap(); // exp keeps its own output
    grads.clear();
    let tape = ops::tape();
    let y = tape.record(|| ops::linear(&doubled(&x, &count, true)?, &w, None)).unwrap();
    let e = tape.backward(&y, 1.0, &mut grads).unwrap_err();
    assert!(e.to_string().contains("on purpose"));
    assert!(grads.is_empty() && !is_recording());
    drop(y);
    assert_eq!((Arc::strong_count(&count), count.load(Relaxed)), (1, 1));
}

#[test]
fn a_value_written_to_is_not_computed_again() {
    let (x, count) = (parameter(&[1.0, 2.0]), Arc::new(AtomicUsize::new(0)));
    let w = Var::parameter(Tensor::from_slice(&[1.0f64, 1.0], &[1, 2]).unwrap());
    let tape = ops::tape();
    let z = tape.record(|| {
        let mut y = doubled(&x, &count, false)?;
        y.value_mut().as_mut_slice::<f64>()?[0] = 10.0;
        ops::linear(&y, &w, None)
    });
    let mut grads = Gradients::default();
    tape.backward(&z.unwrap(), 1.0, &mut grads).unwrap();
    assert_eq!((grads.get(&w).unwrap().to_f64_vec().unwrap(), count.load(Relaxed)), (vec![10.0, 4.0], 0));
}

#[test]
fn recomputed_blocks_save_the_way_to_their_inputs() {
    let (x, count) = (parameter(&[0.5, 2.0]), Arc::new(AtomicUsize::new(0)));
    let tape = ops::tape();
    let y = tape.record(|| {
        let y = doubled(&x, &count, false)?;
        recompute(&[&y], |v| Ok(vec![ops::exp(&v[0])?]))
    });
    let mut grads = Gradients::default();
    tape.backward(&y.unwrap()[0], 1.0, &mut grads).unwrap();
    assert_eq!(grad(&grads, &x), [2.0 * 1f64.exp(), 2.0 * 4f64.exp()]);
    assert_eq!((count.load(Relaxed), Arc::strong_count(&count)), (1, 1));
}
