//! Arguments that ops cannot take: an error of the right kind that names the op, never a panic.

use felid::autograd::Var;
use felid::tensor::{DType, Device, Tensor};
use felid::{Error, Result, ops};

fn f32s(shape: &[usize]) -> Var {
    Tensor::zeros(shape, DType::F32, Device::Cpu).unwrap().into()
}
fn f64s(shape: &[usize]) -> Var {
    Tensor::zeros(shape, DType::F64, Device::Cpu).unwrap().into()
}
fn ids(values: &[i64]) -> Tensor {
    Tensor::ids(values, &[values.len()]).unwrap()
}
fn rope(x: &Var, positions: usize, n: usize) -> Result<Var> {
    ops::rope(x, &ops::RopeTable::new(&(0..positions).collect::<Vec<_>>(), n, 1e4)?)
}
fn qk_norm_rope(x: &Var, heads: [usize; 2], weights: Option<[&Var; 2]>) -> Result<Var> {
    let table = ops::RopeTable::new(&[0, 1], 2, 1e4)?;
    let norm = weights.map(|[q, k]| ops::QkNorm { q, k, eps: 1e-5 });
    ops::qk_norm_rope(x, heads[0], heads[1], norm, &table).map(|[q, ..]| q)
}

fn kind(e: &Error) -> &'static str {
    match e {
        Error::Shape { .. } => "shape",
        Error::DType { .. } => "dtype",
        Error::Index { .. } => "index",
        Error::Empty { .. } => "empty",
        Error::Config(_) => "config",
        _ => "other",
    }
}

type Attempt = (&'static str, &'static str, Box<dyn Fn() -> Result<()>>);

/// Rows of `expected kind, op, what is tried`.
macro_rules! attempts {
    ($($kind:ident $op:ident: $try:expr;)*) => {
        vec![$((stringify!($kind), stringify!($op), Box::new(|| $try.map(drop)) as Box<dyn Fn() -> Result<()>>)),*]
    };
}

fn wrong() -> Vec<Attempt> {
    attempts! {
        shape add: ops::add(&f32s(&[2, 3]), &f32s(&[2]));
        dtype add: ops::add(&f32s(&[2]), &f64s(&[2]));
        dtype elementwise: ops::mul(&ids(&[1]).into(), &ids(&[2]).into());
        dtype elementwise: ops::exp(&ids(&[1]).into());
        shape linear: ops::linear(&f32s(&[2, 3]), &f32s(&[4, 5]), None);
        shape linear: ops::linear(&f32s(&[2, 3]), &f32s(&[3]), None);
        shape linear: ops::linear(&f32s(&[]), &f32s(&[4, 1]), None);
        shape linear: ops::linear(&f32s(&[2, 3]), &f32s(&[4, 3]), Some(&f32s(&[3])));
        dtype linear: ops::linear(&f32s(&[2, 3]), &f64s(&[4, 3]), None);
        dtype matmul: ops::linear(&ids(&[1]).into(), &ids(&[1]).reshape(&[1, 1])?.into(), None);
        shape matmul: ops::matmul(&f32s(&[2, 3]), &f32s(&[2, 3]));
        shape matmul: ops::matmul(&f32s(&[3]), &f32s(&[3, 1]));
        shape matmul: ops::matmul(&f32s(&[2, 4, 3]), &f32s(&[3, 3, 4]));
        dtype matmul: ops::matmul(&f32s(&[3, 3]), &f64s(&[3, 3]));
        shape rms_norm: ops::rms_norm(&f32s(&[2, 3]), &f32s(&[2]), 1e-5);
        shape rms_norm: ops::rms_norm(&f32s(&[]), &f32s(&[1]), 1e-5);
        dtype rms_norm: ops::rms_norm(&f32s(&[2, 3]), &f64s(&[3]), 1e-5);
        shape add_rms_norm: ops::add_rms_norm(&f32s(&[2, 3]), &f32s(&[1, 3]), &f32s(&[3]), 1e-5);
        shape sum: ops::sum(&f32s(&[2, 3]), &[2]);
        dtype sum: ops::sum(&ids(&[1]).into(), &[0]);
        shape mean: ops::mean(&f32s(&[2, 3]), &[5]);
        shape mean: ops::mean(&f32s(&[2, 0]), &[1]);
        shape max: ops::max(&f32s(&[2, 3]), &[2]);
        shape max: ops::max(&f32s(&[2, 0]), &[1]);
        dtype max: ops::max(&ids(&[1]).into(), &[0]);
        shape argmax: ops::argmax(f32s(&[2, 0]).value());
        shape argmax: ops::argmax(f32s(&[]).value());
        shape reshape: ops::reshape(&f32s(&[2, 3]), &[7]);
        shape reshape: ops::reshape(&f32s(&[2, 3]), &[usize::MAX, 2]);
        shape permute: ops::permute(&f32s(&[2, 3]), &[0, 0]);
        shape permute: ops::permute(&f32s(&[2, 3]), &[0]);
        shape transpose: ops::transpose(&f32s(&[2, 3]), 0, 2);
        shape expand: ops::expand(&f32s(&[2, 3]), &[2, 4]);
        shape expand: ops::expand(&f32s(&[2, 3]), &[3]);
        shape narrow: ops::narrow(&f32s(&[2, 3]), 1, 2, 2);
        shape narrow: ops::narrow(&f32s(&[2, 3]), 2, 0, 1);
        shape narrow: ops::narrow(&f32s(&[2, 3]), 1, usize::MAX, 2);
        shape split: ops::split(&f32s(&[2, 3]), 1, &[1, 1]);
        shape split: ops::split(&f32s(&[2, 3]), 1, &[usize::MAX, 4]);
        shape split: ops::split(&f32s(&[2, 3]), 4, &[3]);
        shape concat: ops::concat(&[], 0);
        shape concat: ops::concat(&[&f32s(&[2, 3]), &f32s(&[3, 3])], 1);
        shape concat: ops::concat(&[&f32s(&[2, 3])], 2);
        dtype concat: ops::concat(&[&f32s(&[2, 3]), &f64s(&[2, 3])], 0);
        index embedding: ops::embedding(&ids(&[0, 4]), &f32s(&[4, 2]));
        index embedding: ops::embedding(&ids(&[-1]), &f32s(&[4, 2]));
        index embedding: ops::embedding(&ids(&[0]), &f32s(&[0, 2]));
        dtype embedding: ops::embedding(f32s(&[2]).value(), &f32s(&[4, 2]));
        shape embedding: ops::embedding(&ids(&[0]), &f32s(&[4]));
        index index_select: ops::index_select(&f32s(&[4, 2]), 1, &[0, 2]);
        shape index_select: ops::index_select(&f32s(&[4, 2]), 2, &[0]);
        shape rope: rope(&f32s(&[1, 2, 3, 4]), 4, 4);
        shape rope: rope(&f32s(&[1, 2, 3, 4]), 3, 6);
        shape rope: rope(&f32s(&[4]), 4, 4);
        shape rope: rope(&f32s(&[1, 2, 3, 4]), 3, 3);
        config rope: ops::RopeTable::new(&[0], 2, 0.0);
        shape qk_norm_rope: qk_norm_rope(&f32s(&[2, 16]), [2, 1], None);
        shape qk_norm_rope: qk_norm_rope(&f32s(&[1, 2, 16]), [0, 0], None);
        shape qk_norm_rope: qk_norm_rope(&f32s(&[1, 2, 16]), [1, usize::MAX], None);
        shape qk_norm_rope: qk_norm_rope(&f32s(&[1, 2, 15]), [2, 1], None);
        shape qk_norm_rope: qk_norm_rope(&f32s(&[1, 3, 16]), [2, 1], None);
        shape qk_norm_rope: qk_norm_rope(&f32s(&[1, 2, 4]), [2, 1], None);
        shape qk_norm_rope: qk_norm_rope(&f32s(&[1, 2, 16]), [2, 1], Some([&f32s(&[4]), &f32s(&[3])]));
        dtype qk_norm_rope: qk_norm_rope(&f32s(&[1, 2, 16]), [2, 1], Some([&f64s(&[4]), &f64s(&[4])]));
        dtype qk_norm_rope: qk_norm_rope(&ids(&[0; 32]).reshape(&[1, 2, 16])?.into(), [2, 1], None);
        config rope: ops::RopeTable::new(&[0], 2, f64::NAN);
        dtype rope: rope(&ids(&[1, 2]).reshape(&[1, 2])?.into(), 1, 2);
        shape swiglu: ops::swiglu(&f32s(&[2, 3]), &f32s(&[2, 1]));
        dtype swiglu: ops::swiglu(&f32s(&[2]), &f64s(&[2]));
        dtype swiglu: ops::swiglu(&ids(&[1]).into(), &ids(&[1]).into());
        shape softmax: ops::softmax(&f32s(&[]));
        dtype softmax: ops::softmax(&ids(&[1]).into());
        shape log_softmax: ops::log_softmax(&f32s(&[]));
        index cross_entropy: ops::cross_entropy(&f32s(&[1, 3]), &ids(&[3]), -100);
        index cross_entropy: ops::cross_entropy(&f32s(&[1, 3]), &ids(&[-1]), -100);
        index cross_entropy: ops::cross_entropy(&f32s(&[1, 0]), &ids(&[0]), -100);
        shape cross_entropy: ops::cross_entropy(&f32s(&[2, 3]), &ids(&[1]), -100);
        shape cross_entropy: ops::cross_entropy(&f32s(&[]), &ids(&[1]), -100);
        dtype cross_entropy: ops::cross_entropy(&f32s(&[2, 3]), f32s(&[2]).value(), -100);
        empty cross_entropy: ops::cross_entropy(&f32s(&[2, 3]), &ids(&[-100, -100]), -100);
        empty cross_entropy: ops::cross_entropy(&f32s(&[0, 3]), &ids(&[]), -100);
        dtype cross_entropy: ops::cross_entropy(&ids(&[1]).reshape(&[1, 1])?.into(), &ids(&[0]), -100);
        index linear_cross_entropy: ops::linear_cross_entropy(&f32s(&[1, 3]), &f32s(&[4, 3]), &ids(&[4]), -100);
        empty linear_cross_entropy: ops::linear_cross_entropy(&f32s(&[1, 3]), &f32s(&[4, 3]), &ids(&[-100]), -100);
        shape linear_cross_entropy: ops::linear_cross_entropy(&f32s(&[1, 3]), &f32s(&[4, 2]), &ids(&[0]), -100);
        shape linear_cross_entropy: ops::linear_cross_entropy(&f32s(&[1, 3]), &f32s(&[3]), &ids(&[0]), -100);
        shape linear_cross_entropy: ops::linear_cross_entropy(&f32s(&[2, 3]), &f32s(&[4, 3]), &ids(&[0]), -100);
        dtype linear_cross_entropy: ops::linear_cross_entropy(&f32s(&[1, 3]), &f64s(&[4, 3]), &ids(&[0]), -100);
        shape interpolate: ops::interpolate(&f32s(&[2, 3]), 2, 2);
        shape interpolate: ops::interpolate(&f32s(&[2, 3]), 1, 0);
        shape interpolate: ops::interpolate(&f32s(&[2, 0]), 1, 2);
        dtype interpolate: ops::interpolate(&ids(&[1]).into(), 0, 2);
        dtype cast: ops::cast(&f32s(&[2]), DType::I64);
        dtype cast: ops::cast(&ids(&[2]).into(), DType::F32);
        dtype cast: ops::cast(&ids(&[2]).into(), DType::I64);
        shape add_assign: ops::add_assign(&mut f32s(&[2]).into_value(), f32s(&[1]).value());
        dtype add_assign: ops::add_assign(&mut f32s(&[2]).into_value(), f64s(&[2]).value());
    }
}

#[test]
fn wrong_arguments_are_errors_that_name_the_op() {
    for (i, (expected, op, attempt)) in wrong().into_iter().enumerate() {
        let Err(e) = attempt() else { panic!("attempt {i}, {op}: no error") };
        assert_eq!(kind(&e), expected, "attempt {i}, {op}: {e}");
        assert!(e.to_string().contains(op) && !e.to_string().contains('\n'), "attempt {i}, {op}: {e}");
    }
}

#[test]
fn ids_out_of_range_are_named_with_their_place() {
    let e = ops::embedding(&ids(&[0, 9]), &f32s(&[4, 2])).unwrap_err().to_string();
    assert!(["9", "position 1", "4"].iter().all(|s| e.contains(s)), "{e}");
    let e = ops::cross_entropy(&f32s(&[2, 3]), &ids(&[-100, 7]), -100).unwrap_err().to_string();
    assert!(["7", "position 1", "3"].iter().all(|s| e.contains(s)), "{e}");
}

/// Forward, and backward where there is one.
fn there_and_back(op: impl Fn(&[Var]) -> Result<Vec<Var>>, shapes: &[&[usize]]) -> Result<()> {
    let vars: Vec<Var> = shapes.iter().map(|s| Var::parameter(f32s(s).into_value())).collect();
    let tape = ops::tape();
    let ys = tape.record(|| op(&vars))?;
    let seeds: Vec<_> = ys.iter().map(|y| (y, y.value().clone())).collect();
    let mut grads = Default::default();
    tape.backward_from(&seeds, &mut grads)?;
    for v in &vars {
        let shape = grads.get(v).map(|g| g.shape().to_vec());
        assert_eq!(shape.as_deref(), Some(v.shape()));
    }
    Ok(())
}

#[test]
fn nothing_in_gives_nothing_or_an_error() {
    type Op = fn(&[Var]) -> Result<Vec<Var>>;
    let one: [(&str, Op); 18] = [
        ("neg", |v| Ok(vec![ops::neg(&v[0])?])),
        ("silu", |v| Ok(vec![ops::silu(&v[0])?])),
        ("sum", |v| Ok(vec![ops::sum(&v[0], &[0])?])),
        ("sum last", |v| Ok(vec![ops::sum(&v[0], &[1])?])),
        ("sum_all", |v| Ok(vec![ops::sum_all(&v[0])?])),
        ("max", |v| Ok(vec![ops::max(&v[0], &[1])?])),
        ("softmax", |v| Ok(vec![ops::softmax(&v[0])?])),
        ("log_softmax", |v| Ok(vec![ops::log_softmax(&v[0])?])),
        ("transpose", |v| Ok(vec![ops::contiguous(&ops::transpose(&v[0], 0, 1)?)?])),
        ("concat", |v| Ok(vec![ops::concat(&[&v[0], &v[0]], 1)?])),
        ("split", |v| ops::split(&v[0], 1, &[0, v[0].shape()[1]])),
        ("narrow", |v| Ok(vec![ops::narrow(&v[0], 0, v[0].shape()[0], 0)?])),
        ("expand", |v| Ok(vec![ops::expand(&v[0], &[0, v[0].shape()[0], v[0].shape()[1]])?])),
        ("index_select", |v| Ok(vec![ops::index_select(&v[0], 0, &[])?])),
        ("interpolate", |v| Ok(vec![ops::interpolate(&v[0], 1, 5)?])),
        ("cast", |v| Ok(vec![ops::cast(&v[0], DType::BF16)?])),
        ("rope", |v| Ok(vec![rope(&v[0], v[0].shape()[0], 0)?])),
        ("embedding", |v| Ok(vec![ops::embedding(&ids(&[]), &v[0])?])),
    ];
    for shape in [[0, 3], [3, 0], [0, 0], [2, 3]] {
        for (name, op) in one {
            match there_and_back(op, &[&shape]) {
                Ok(()) | Err(Error::Shape { .. }) => {}
                Err(e) => panic!("{name} of {shape:?}: {e}"),
            }
        }
    }
    // m, k, n
    for [m, k, n] in [[0, 2, 3], [2, 0, 3], [2, 3, 0], [0, 0, 0]] {
        there_and_back(|v| Ok(vec![ops::matmul(&v[0], &v[1])?]), &[&[m, k], &[k, n]]).unwrap();
        there_and_back(|v| Ok(vec![ops::matmul(&v[0], &v[1])?]), &[&[2, m, k], &[2, k, n]]).unwrap();
        there_and_back(|v| Ok(vec![ops::linear(&v[0], &v[1], Some(&v[2]))?]), &[&[m, k], &[n, k], &[n]]).unwrap();
    }
    for shape in [[0, 3], [3, 0]] {
        there_and_back(|v| Ok(vec![ops::add(&v[0], &v[1])?]), &[&shape, &[1]]).unwrap();
        there_and_back(|v| Ok(vec![ops::swiglu(&v[0], &v[1])?]), &[&shape, &shape]).unwrap();
        let norm: Op = |v| Ok(vec![ops::rms_norm(&v[0], &v[1], 1e-5)?]);
        there_and_back(norm, &[&shape, &shape[1..]]).unwrap();
        let norm: Op = |v| ops::add_rms_norm(&v[0], &v[1], &v[2], 1e-5).map(|(y, h)| vec![y, h]);
        there_and_back(norm, &[&shape, &shape, &shape[1..]]).unwrap();
    }
    for [b, l, d] in [[0, 2, 4], [2, 0, 4], [2, 3, 0]] {
        let turned: Op = |v| {
            let table = ops::RopeTable::new(&vec![0; v[0].shape()[1]], 0, 1e4)?;
            let norm = v.get(1).zip(v.get(2)).map(|(q, k)| ops::QkNorm { q, k, eps: 1e-5 });
            ops::qk_norm_rope(&v[0], 2, 1, norm, &table).map(Vec::from)
        };
        there_and_back(turned, &[&[b, l, 4 * d]]).unwrap();
        there_and_back(turned, &[&[b, l, 4 * d], &[d], &[d]]).unwrap();
    }
}
