//! Numbers that know how far off they may be, and how they came about.
//!
//! The reference formulas of the table run on [`Num`]. Each carries a value in f64 and a bound on the error of a naive
//! implementation in the dtype under test: every operation adds one rounding, `unit * |result|`, to the errors that its
//! operands bring along (running error analysis to first order: Wilkinson, "Rounding Errors in Algebraic Processes"). A scalar tape
//! yields gradients the same way, with bounds. So every tolerance is derived from the formula, element by element.

use std::cell::{Cell, RefCell};
use std::ops::{Add, Div, Mul, Neg, Sub};

/// Unit roundoffs of a naive implementation: of its arithmetic, and of the dtype that tensors are kept in.
#[derive(Clone, Copy)]
pub struct Units {
    pub arithmetic: f64,
    pub stored: f64,
    /// Half the spacing of the dtype's subnormals.
    pub tiny: f64,
}

thread_local! {
    static UNITS: Cell<Units> = const { Cell::new(Units { arithmetic: 0.0, stored: 0.0, tiny: 0.0 }) };
    static TAPE: RefCell<Vec<[(u32, Bounded); 2]>> = const { RefCell::new(Vec::new()) };
}

fn unit() -> f64 {
    UNITS.get().arithmetic
}

/// A value, and a bound on its error.
#[derive(Clone, Copy, Debug, Default)]
pub struct Bounded {
    pub value: f64,
    pub error: f64,
}

impl Bounded {
    const ONE: Self = Self { value: 1.0, error: 0.0 };

    fn new(value: f64, brought: f64) -> Self {
        Self { value, error: brought + unit() * value.abs() }
    }
    /// The error once kept in a tensor.
    pub fn kept(self, units: Units) -> f64 {
        self.error + units.stored * self.value.abs() + units.tiny
    }
}

impl Add for Bounded {
    type Output = Self;
    fn add(self, o: Self) -> Self {
        // a zero adds exactly; else the rounding is counted at the operands' size where they cancel, since another
        // order of a longer sum would meet them elsewhere
        let exact = self.value == 0.0 || o.value == 0.0;
        let value = self.value + o.value;
        let size = if exact { 0.0 } else { value.abs().max(self.value.abs()).max(o.value.abs()) };
        Self { value, error: self.error + o.error + unit() * size }
    }
}
impl Mul for Bounded {
    type Output = Self;
    fn mul(self, o: Self) -> Self {
        let (value, brought) = (self.value * o.value, self.value.abs() * o.error + o.value.abs() * self.error);
        let exact = self.value.abs() == 1.0 || o.value.abs() == 1.0;
        if exact { Self { value, error: brought } } else { Self::new(value, brought) }
    }
}
impl Neg for Bounded {
    type Output = Self;
    fn neg(self) -> Self {
        Self { value: -self.value, ..self }
    }
}

/// A number of a reference formula.
#[derive(Clone, Copy, Debug)]
pub struct Num {
    x: Bounded,
    /// Its place on the tape; `NOWHERE` for constants.
    at: u32,
}

const NOWHERE: u32 = u32::MAX;
const NO_PARENT: (u32, Bounded) = (NOWHERE, Bounded { value: 0.0, error: 0.0 });

impl Num {
    /// A constant of the formula, rounded to the arithmetic's type.
    pub fn of(value: f64) -> Self {
        Self { x: Bounded::new(value, 0.0), at: NOWHERE }
    }
    pub fn value(self) -> f64 {
        self.x.value
    }
    fn node(x: Bounded, parents: [(u32, Bounded); 2]) -> Self {
        if parents.iter().all(|p| p.0 == NOWHERE) {
            return Self { x, at: NOWHERE };
        }
        let at = TAPE.with_borrow_mut(|t| {
            t.push(parents);
            t.len() - 1
        });
        Self { x, at: at as u32 }
    }
    /// `y = f(x)` with its derivative, where f errs by `ulps` roundings.
    fn unary(self, value: f64, derivative: f64, ulps: f64) -> Self {
        let x = Bounded { value, error: derivative.abs() * self.x.error + ulps * unit() * value.abs() };
        // first order: the derivative errs as the value does
        let relative = ulps * unit() + self.x.error / self.x.value.abs().max(1.0);
        Self::node(x, [(self.at, Bounded { value: derivative, error: relative * derivative.abs() }), NO_PARENT])
    }
    /// This number kept in a tensor on its way: one rounding to the dtype, and one of the gradient coming back.
    pub fn stored(self) -> Self {
        let units = UNITS.get();
        let x = Bounded { value: self.x.value, error: self.x.kept(units) };
        Self::node(x, [(self.at, Bounded { value: 1.0, error: units.stored }), NO_PARENT])
    }
    /// e^x. Fast polynomials err by 2 ulp (4 roundings).
    pub fn exp(self) -> Self {
        let y = self.x.value.exp();
        self.unary(y, y, 4.0)
    }
    pub fn ln(self) -> Self {
        self.unary(self.x.value.ln(), 1.0 / self.x.value, 2.0)
    }
    pub fn sqrt(self) -> Self {
        let y = self.x.value.sqrt();
        self.unary(y, 0.5 / y, 1.0)
    }
    pub fn sigmoid(self) -> Self {
        Self::of(1.0) / (Self::of(1.0) + (-self).exp())
    }
    /// The same value, without a gradient.
    pub fn detach(self) -> Self {
        Self { at: NOWHERE, ..self }
    }
}

impl Add for Num {
    type Output = Self;
    fn add(self, o: Self) -> Self {
        Self::node(self.x + o.x, [(self.at, Bounded::ONE), (o.at, Bounded::ONE)])
    }
}
impl Sub for Num {
    type Output = Self;
    fn sub(self, o: Self) -> Self {
        self + -o
    }
}
impl Mul for Num {
    type Output = Self;
    fn mul(self, o: Self) -> Self {
        Self::node(self.x * o.x, [(self.at, o.x), (o.at, self.x)])
    }
}
impl Div for Num {
    type Output = Self;
    fn div(self, o: Self) -> Self {
        let inverse = 1.0 / o.x.value;
        let r = Bounded::new(inverse, o.x.error * inverse * inverse);
        let y = Bounded::new(self.x.value / o.x.value, (self.x * r).error);
        Self::node(y, [(self.at, r), (o.at, -(y * r))])
    }
}
impl Neg for Num {
    type Output = Self;
    fn neg(self) -> Self {
        Self::node(-self.x, [(self.at, -Bounded::ONE), NO_PARENT])
    }
}
impl std::iter::Sum for Num {
    /// A plain running sum.
    fn sum<I: Iterator<Item = Self>>(it: I) -> Self {
        it.reduce(|a, b| a + b).unwrap_or(Self::of(0.0))
    }
}

/// An array of numbers in row-major order.
#[derive(Clone, Debug)]
pub struct Array {
    pub shape: Vec<usize>,
    pub data: Vec<Num>,
}

impl Array {
    pub fn build(shape: &[usize], mut f: impl FnMut(&[usize]) -> Num) -> Self {
        let n: usize = shape.iter().product();
        let mut index = vec![0; shape.len()];
        let mut data = Vec::with_capacity(n);
        for _ in 0..n {
            data.push(f(&index));
            for d in (0..shape.len()).rev() {
                index[d] += 1;
                if index[d] < shape[d] {
                    break;
                }
                index[d] = 0;
            }
        }
        Self { shape: shape.to_vec(), data }
    }
    pub fn at(&self, index: &[usize]) -> Num {
        assert_eq!(index.len(), self.shape.len());
        self.data[index.iter().zip(&self.shape).fold(0, |at, (i, d)| at * d + i)]
    }
    /// The element that an index of a larger shape broadcasts from.
    pub fn broadcast(&self, index: &[usize]) -> Num {
        let tail = &index[index.len() - self.shape.len()..];
        let own: Vec<usize> = tail.iter().zip(&self.shape).map(|(&i, &d)| if d == 1 { 0 } else { i }).collect();
        self.at(&own)
    }
    pub fn last(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }
    pub fn rows(&self) -> impl Iterator<Item = &[Num]> {
        self.data.chunks(self.last())
    }
    pub fn map(&self, f: impl FnMut(Num) -> Num) -> Self {
        Self { shape: self.shape.clone(), data: self.data.iter().copied().map(f).collect() }
    }
    /// Every row turned into another (of any one length).
    pub fn map_rows(&self, f: impl Fn(&[Num]) -> Vec<Num>) -> Self {
        let data: Vec<Num> = self.rows().flat_map(f).collect();
        let mut shape = self.shape.clone();
        let rows: usize = shape[..shape.len() - 1].iter().product();
        shape[self.shape.len() - 1] = data.len() / rows;
        Self { shape, data }
    }
    fn bounded(&self) -> Vec<Bounded> {
        self.data.iter().map(|n| n.x).collect()
    }
}

/// What a formula gives: outputs with their shapes, and gradients of the inputs.
pub struct Evaluated {
    pub shapes: Vec<Vec<usize>>,
    pub outputs: Vec<Vec<Bounded>>,
    pub grads: Vec<Vec<Bounded>>,
}

/// Evaluate a formula on exact inputs, and its gradients for outputs weighted by `seed(output, element)`.
pub fn evaluate(
    units: Units,
    inputs: &[(Vec<usize>, Vec<f64>)],
    seed: impl Fn(usize, usize) -> f64,
    formula: impl Fn(&[Array]) -> Vec<Array>,
) -> Evaluated {
    UNITS.set(units);
    TAPE.with_borrow_mut(Vec::clear);
    let leaf = |&value: &f64| {
        let at = TAPE.with_borrow_mut(|t| {
            t.push([NO_PARENT; 2]);
            t.len() - 1
        });
        Num { x: Bounded { value, error: 0.0 }, at: at as u32 }
    };
    let arrays: Vec<Array> =
        inputs.iter().map(|(s, v)| Array { shape: s.clone(), data: v.iter().map(leaf).collect() }).collect();
    let outputs = formula(&arrays);
    let tape = TAPE.take();
    let mut adjoint = vec![Bounded::default(); tape.len()];
    for (i, y) in outputs.iter().enumerate() {
        for (j, n) in y.data.iter().enumerate().filter(|(_, n)| n.at != NOWHERE) {
            let a = &mut adjoint[n.at as usize];
            *a = *a + Bounded { value: seed(i, j), error: 0.0 };
        }
    }
    for (i, parents) in tape.iter().enumerate().rev() {
        let g = adjoint[i];
        if g.value == 0.0 && g.error == 0.0 {
            continue;
        }
        for &(parent, derivative) in parents.iter().filter(|p| p.0 != NOWHERE) {
            let a = &mut adjoint[parent as usize];
            *a = *a + g * derivative;
        }
    }
    let grads = arrays.iter().map(|a| a.data.iter().map(|n| adjoint[n.at as usize]).collect()).collect();
    Evaluated {
        shapes: outputs.iter().map(|y| y.shape.clone()).collect(),
        outputs: outputs.iter().map(Array::bounded).collect(),
        grads,
    }
}
