//! Elementwise arithmetic with broadcasting (NumPy's rules), and unary functions.

use crate::autograd::{Var, record_one};
use crate::tensor::{DType, Tensor};
use crate::{Error, Result};

/// The binary functions; each knows its derivatives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Binary {
    Add,
    Sub,
    Mul,
    Div,
}

/// The unary functions `y = f(x)`; each knows `f'(x)` in terms of x and y.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Unary {
    Neg,
    Exp,
    Ln,
    Sqrt,
    Silu,
    Scale(f64),
}

impl Binary {
    fn name(self) -> &'static str {
        match self {
            Self::Add => "add",
            Self::Sub => "sub",
            Self::Mul => "mul",
            Self::Div => "div",
        }
    }
}

impl Unary {
    fn name(self) -> &'static str {
        match self {
            Self::Neg => "neg",
            Self::Exp => "exp",
            Self::Ln => "ln",
            Self::Sqrt => "sqrt",
            Self::Silu => "silu",
            Self::Scale(_) => "scale",
        }
    }
}

/// The shape that two shapes broadcast to.
pub(crate) fn broadcast_shape(op: &'static str, a: &[usize], b: &[usize]) -> Result<Vec<usize>> {
    let rank = a.len().max(b.len());
    let at = |s: &[usize], i: usize| if i + s.len() < rank { 1 } else { s[i + s.len() - rank] };
    (0..rank)
        .map(|i| match (at(a, i), at(b, i)) {
            (x, y) if x == y => Ok(x),
            (1, y) => Ok(y),
            (x, 1) => Ok(x),
            _ => Err(Error::shape(op, format!("shapes {a:?} and {b:?} do not broadcast"))),
        })
        .collect()
}

/// Errors where a gradient's shape, dtype or device is not what an op takes it to be: `Gradients` can be written from outside.
pub(crate) fn check_sum(op: &'static str, sum: &Tensor, shape: &[usize], dtype: DType, like: &Tensor) -> Result<()> {
    if sum.shape() != shape || sum.dtype() != dtype {
        let (got, dt) = (sum.shape(), sum.dtype());
        return Err(Error::gradient(op, format!("a gradient {dt} {got:?} where {dtype} {shape:?} is kept")));
    }
    same_device(op, &[sum, like])
}

/// Errors where dtypes or devices differ.
pub(crate) fn same_dtype(op: &'static str, tensors: &[&Tensor]) -> Result<()> {
    same_device(op, tensors)?;
    match tensors.windows(2).find(|w| w[0].dtype() != w[1].dtype()) {
        Some(w) => Err(Error::dtype(op, format!("dtypes {} and {} differ: cast one", w[0].dtype(), w[1].dtype()))),
        None => Ok(()),
    }
}

/// Errors where devices differ.
pub(crate) fn same_device(op: &'static str, tensors: &[&Tensor]) -> Result<()> {
    match tensors.windows(2).find(|w| w[0].device() != w[1].device()) {
        Some(w) => {
            let (device, other) = (w[0].device().to_string(), w[1].device());
            Err(Error::Device { device, detail: format!("{op}: another tensor is on {other}: move one with to_device") })
        }
        None => Ok(()),
    }
}

/// Elementwise function of two tensors of one dtype, without gradients.
pub(crate) fn binary_tensor(f: Binary, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    same_dtype(f.name(), &[a, b])?;
    let shape = broadcast_shape(f.name(), a.shape(), b.shape())?;
    let (a, b) = (a.expand(&shape)?, b.expand(&shape)?);
    on_device!(a.device(), elementwise::binary(f, &a, &b))
}

pub(crate) fn unary_tensor(f: Unary, x: &Tensor) -> Result<Tensor> {
    on_device!(x.device(), elementwise::unary(f, x))
}

/// `dy * f'(x)` in one pass.
fn unary_backward(f: Unary, x: &Tensor, y: &Tensor, dy: &Tensor) -> Result<Tensor> {
    same_dtype(f.name(), &[x, dy])?;
    on_device!(x.device(), elementwise::unary_backward(f, x, y, dy))
}

/// `sum += term`, in place; shapes must be equal, and dtypes, save that an f32 sum takes 16-bit terms.
pub fn add_assign(sum: &mut Tensor, term: &Tensor) -> Result<()> {
    if sum.dtype() != DType::F32 || !matches!(term.dtype(), DType::BF16 | DType::F16) {
        same_dtype("add_assign", &[sum, term])?;
    }
    same_device("add_assign", &[sum, term])?;
    if sum.shape() != term.shape() {
        return Err(Error::shape("add_assign", format!("shapes {:?} and {:?} differ", sum.shape(), term.shape())));
    }
    on_device!(sum.device(), elementwise::add_assign(sum, term))
}

fn binary(f: Binary, a: &Var, b: &Var) -> Result<Var> {
    let y = binary_tensor(f, a.value(), b.value())?;
    let (av, bv) = (a.value().clone(), b.value().clone());
    Ok(record_one(f.name(), &[a, b], y, move |flow| {
        let dy = flow.output()?;
        if flow.wants(0) {
            let da = match f {
                Binary::Add | Binary::Sub => dy.clone(),
                Binary::Mul => binary_tensor(Binary::Mul, &dy, &bv)?,
                Binary::Div => binary_tensor(Binary::Div, &dy, &bv)?,
            };
            flow.give(0, super::reduce::sum_to(&da, av.shape())?)?;
        }
        if flow.wants(1) {
            let db = match f {
                Binary::Add => dy,
                Binary::Sub => unary_tensor(Unary::Neg, &dy)?,
                Binary::Mul => binary_tensor(Binary::Mul, &dy, &av)?,
                // d(a/b)/db = -a / b^2
                Binary::Div => {
                    let g = binary_tensor(Binary::Mul, &dy, &av)?;
                    let g = binary_tensor(Binary::Div, &g, &bv)?;
                    unary_tensor(Unary::Neg, &binary_tensor(Binary::Div, &g, &bv)?)?
                }
            };
            flow.give(1, super::reduce::sum_to(&db, bv.shape())?)?;
        }
        Ok(())
    }))
}

fn unary(f: Unary, x: &Var) -> Result<Var> {
    let y = unary_tensor(f, x.value())?;
    let (xv, yv) = (x.value().clone(), y.clone());
    Ok(record_one(f.name(), &[x], y, move |flow| {
        let dy = flow.output()?;
        flow.give(0, unary_backward(f, &xv, &yv, &dy)?)
    }))
}

/// `a + b`, broadcast.
pub fn add(a: &Var, b: &Var) -> Result<Var> {
    binary(Binary::Add, a, b)
}
/// `a - b`, broadcast.
pub fn sub(a: &Var, b: &Var) -> Result<Var> {
    binary(Binary::Sub, a, b)
}
/// `a * b`, broadcast.
pub fn mul(a: &Var, b: &Var) -> Result<Var> {
    binary(Binary::Mul, a, b)
}
/// `a / b`, broadcast.
pub fn div(a: &Var, b: &Var) -> Result<Var> {
    binary(Binary::Div, a, b)
}
/// `-x`.
pub fn neg(x: &Var) -> Result<Var> {
    unary(Unary::Neg, x)
}
/// `e^x`.
pub fn exp(x: &Var) -> Result<Var> {
    unary(Unary::Exp, x)
}
/// Natural logarithm.
pub fn ln(x: &Var) -> Result<Var> {
    unary(Unary::Ln, x)
}
/// Square root.
pub fn sqrt(x: &Var) -> Result<Var> {
    unary(Unary::Sqrt, x)
}
/// `x * sigmoid(x)`.
pub fn silu(x: &Var) -> Result<Var> {
    unary(Unary::Silu, x)
}
/// `c * x`.
pub fn scale(x: &Var, c: f64) -> Result<Var> {
    unary(Unary::Scale(c), x)
}
