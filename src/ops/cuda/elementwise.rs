//! Elementwise arithmetic on CUDA: views of any strides; 16 bytes a thread where they allow it.

use super::rows::float_variant;
use crate::Result;
use crate::cuda::{Arg, Grid, Packs, View, kernels::elementwise as kernel};
use crate::ops::elementwise::{Binary, Unary};
use crate::tensor::{DType, Tensor};

/// Threads of a block.
const THREADS: usize = 256;

/// An input as kernels take it.
struct Input {
    pointer: Arg,
    view: View,
    packs: Packs,
}

impl Input {
    fn new(op: &'static str, x: &Tensor) -> Result<Self> {
        let view = x.elements(op)?;
        Ok(Self { pointer: x.read()?, packs: view.packs(x.pointer()?, x.dtype().size()), view })
    }
    fn repeats(&self) -> Arg {
        (self.packs == Packs::Repeated).into()
    }
}

/// A thread for each element, or for each 16 bytes of them.
fn grid(n: usize, dtype: DType, packed: bool) -> Grid {
    let each = if packed { 16 / dtype.size() } else { 1 };
    Grid::for_each(n.div_ceil(each), THREADS)
}

/// The kernel's function number `f` of two inputs of one shape and dtype.
fn binary_kernel(f: usize, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let mut y = Tensor::empty(a.shape(), a.dtype(), a.device())?;
    let n = y.numel();
    if n == 0 {
        return Ok(y);
    }
    let (gpu, variant) = (a.gpu()?, float_variant("elementwise", a)?);
    let (a, b) = (Input::new("elementwise", a)?, Input::new("elementwise", b)?);
    let packed = a.packs != Packs::None && b.packs != Packs::None;
    let mut args = vec![y.write()?, a.pointer, b.pointer, a.view.into(), b.view.into(), n.into(), f.into()];
    let symbol = if packed { kernel::binary_packed } else { kernel::binary };
    if packed {
        args.extend([a.repeats(), b.repeats()]);
    }
    // SAFETY: the parameters are (y, a, b, a's view, b's view, n, function), and whether each repeats for packs; the views
    // have n elements, y is new and has as many.
    unsafe { gpu.launch(symbol, variant, grid(n, y.dtype(), packed), &args)? };
    Ok(y)
}

/// The kernel's function number `f` of x.
fn unary_kernel(f: usize, c: f64, x: &Tensor) -> Result<Tensor> {
    let mut y = Tensor::empty(x.shape(), x.dtype(), x.device())?;
    let n = y.numel();
    if n == 0 {
        return Ok(y);
    }
    let (gpu, variant) = (x.gpu()?, float_variant("elementwise", x)?);
    let x = Input::new("elementwise", x)?;
    let packed = x.packs != Packs::None;
    let mut args = vec![y.write()?, x.pointer, x.view.into(), n.into(), f.into(), (c as f32).into()];
    let symbol = if packed { kernel::unary_packed } else { kernel::unary };
    if packed {
        args.push(x.repeats());
    }
    // SAFETY: the parameters are (y, x, x's view, n, function, c), and whether x repeats for packs; the view has n
    // elements, y is new and has as many.
    unsafe { gpu.launch(symbol, variant, grid(n, y.dtype(), packed), &args)? };
    Ok(y)
}

/// `f(a, b)`; both already broadcast to one shape.
pub(crate) fn binary(f: Binary, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let f = match f {
        Binary::Add => 0,
        Binary::Sub => 1,
        Binary::Mul => 2,
        Binary::Div => 3,
    };
    binary_kernel(f, a, b)
}

/// `sum += term`; f32 sums take terms of any dtype.
pub(crate) fn add_assign(sum: &mut Tensor, term: &Tensor) -> Result<()> {
    let n = term.numel();
    if n == 0 {
        return Ok(());
    }
    let (gpu, variant, wider) = (term.gpu()?, float_variant("add_assign", term)?, sum.dtype() != term.dtype());
    let (to, dtype) = (sum.write()?, term.dtype());
    let term = Input::new("add_assign", term)?;
    let packed = term.packs != Packs::None && sum.pointer()?.is_multiple_of(16);
    let symbol = match (wider, packed) {
        (false, false) => kernel::add_to_same,
        (true, false) => kernel::add_to_float,
        (false, true) => kernel::add_to_same_packed,
        (true, true) => kernel::add_to_float_packed,
    };
    let mut args = vec![to, term.pointer, term.view.into(), n.into()];
    if packed {
        args.push(term.repeats());
    }
    // SAFETY: the parameters are (sum, term, term's view, n), and whether the term repeats for packs; the view has n
    // elements, sum has as many, contiguous and its own, in the kernel's element type or f32.
    unsafe { gpu.launch(symbol, variant, grid(n, dtype, packed), &args) }
}

pub(crate) fn unary(f: Unary, x: &Tensor) -> Result<Tensor> {
    match f {
        Unary::Neg => unary_kernel(0, 0.0, x),
        Unary::Exp => unary_kernel(1, 0.0, x),
        Unary::Ln => unary_kernel(2, 0.0, x),
        Unary::Sqrt => unary_kernel(3, 0.0, x),
        Unary::Silu => unary_kernel(4, 0.0, x),
        Unary::Scale(c) => unary_kernel(5, c, x),
    }
}

/// `dx = dy * f'(x)`, with f' from x or y, whichever is cheaper.
pub(crate) fn unary_backward(f: Unary, x: &Tensor, y: &Tensor, dy: &Tensor) -> Result<Tensor> {
    match f {
        Unary::Neg | Unary::Scale(_) => unary(f, dy),
        Unary::Exp => binary(Binary::Mul, dy, y),
        Unary::Ln => binary(Binary::Div, dy, x),
        Unary::Sqrt => binary_kernel(4, dy, y),
        Unary::Silu => binary_kernel(5, dy, x),
    }
}
