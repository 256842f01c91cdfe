//! What every row of the table is put through. See `main.rs` for how to add a row.

use crate::devices;
use crate::num::{Array, Bounded, Evaluated, Units, evaluate};
use felid::autograd::{GradCheck, Gradients, Var, check_gradients};
use felid::tensor::{DType, Device, Tensor};
use felid::{Result, ops};
use half::{bf16, f16};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner};
use std::sync::OnceLock;

type Op = Box<dyn Fn(&[Var]) -> Result<Vec<Var>> + Send + Sync>;
type Formula = Box<dyn Fn(&[Array]) -> Vec<Array>>;

/// One draw of an op: inputs in f64, the op, and its formula written plainly.
pub struct Case {
    inputs: Vec<Input>,
    op: Op,
    formula: Formula,
    sums_as_stored: bool,
    loss: bool,
}

#[derive(Clone, Debug)]
pub struct Input {
    pub shape: Vec<usize>,
    pub values: Vec<f64>,
}

impl Case {
    pub fn new(
        inputs: Vec<Input>,
        op: impl Fn(&[Var]) -> Result<Vec<Var>> + Send + Sync + 'static,
        formula: impl Fn(&[Array]) -> Vec<Array> + 'static,
    ) -> Self {
        Self { inputs, op: Box::new(op), formula: Box::new(formula), sums_as_stored: false, loss: false }
    }
    /// For ops with one output.
    pub fn one(
        inputs: Vec<Input>,
        op: impl Fn(&[Var]) -> Result<Var> + Send + Sync + 'static,
        formula: impl Fn(&[Array]) -> Array + 'static,
    ) -> Self {
        Self::new(inputs, move |v| Ok(vec![op(v)?]), move |a| vec![formula(a)])
    }
    /// For products, whose kernels add in an order that follows strides: views then agree with copies within the
    /// tolerance, not in every bit.
    pub fn sums_as_stored(self) -> Self {
        Self { sums_as_stored: true, ..self }
    }
    /// The output is kept in f32 (f64 for f64), whatever the inputs' dtype.
    pub fn loss(self) -> Self {
        Self { loss: true, ..self }
    }
}

/// Draws sizes and values; the same numbers give the same draw.
pub struct Draw {
    pub dims: [usize; 4],
    state: u64,
}

impl Draw {
    fn next(&mut self) -> u64 {
        // splitmix64
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.state ^ (self.state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
    pub fn uniform(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
    pub fn input(&mut self, shape: &[usize], low: f64, high: f64) -> Input {
        let n: usize = shape.iter().product();
        Input { shape: shape.to_vec(), values: (0..n).map(|_| self.uniform(low, high)).collect() }
    }
    pub fn indices(&mut self, n: usize, below: usize) -> Vec<usize> {
        (0..n).map(|_| self.below(below)).collect()
    }
}

/// One row of the table.
pub struct Row {
    pub name: &'static str,
    /// Sizes that make work for several tasks: more than two times 16384 elements, or a long sum.
    pub large: [usize; 4],
    pub draw: fn(&mut Draw) -> Case,
}

/// How many times the bound of a naive implementation may be reached: the bound is of first order, and the op and
/// the formula may each err by it in f64.
const SLACK: f64 = 2.0;

pub fn check(row: Row) {
    // PROPTEST_CASES asks for more draws
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(10);
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    // small sizes, and one that is larger: around vector widths, and off them
    let small = prop_oneof![2 => Just(1usize), 3 => 2usize..8];
    let longer = prop::sample::select(vec![1usize, 8, 15, 16, 17, 31, 33, 64, 65, 100, 131]);
    let strategy = (prop::array::uniform4(small), 0usize..4, longer, any::<u64>());
    let outcome = runner.run(&strategy, |(mut dims, which, longer, seed)| {
        dims[which] = longer;
        check_draw(&row, dims, seed, 24).map_err(TestCaseError::fail)
    });
    if let Err(e) = outcome {
        panic!("{}: {e}", row.name);
    }
    // what is drawn beside the sizes (dimensions, labels, what is broadcast) differs from one to the next
    for seed in 0..if devices::light() { 1 } else { 3 } {
        if let Err(e) = check_draw(&row, row.large, seed, 4) {
            panic!("{}, large: {e}", row.name);
        }
    }
}

fn units(dtype: DType) -> Units {
    let (arithmetic, stored, tiny) = match dtype {
        DType::F64 => (2f64.powi(-53), 2f64.powi(-53), 0.0),
        DType::F32 => (2f64.powi(-24), 2f64.powi(-24), 2f64.powi(-150)),
        DType::BF16 => (2f64.powi(-24), 2f64.powi(-8), 2f64.powi(-134)),
        _ => (2f64.powi(-24), 2f64.powi(-11), 2f64.powi(-25)),
    };
    Units { arithmetic, stored, tiny }
}

/// Gradients of outputs, in [-1, 1), as that dtype holds them.
fn seed(dtype: DType, output: usize, element: usize) -> f64 {
    let h = (output as u64 * 7919 + element as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let x = (h >> 11) as f64 / (1u64 << 52) as f64 - 1.0;
    match dtype {
        DType::F32 => f64::from(x as f32),
        DType::BF16 => bf16::from_f64(x).to_f64(),
        DType::F16 => f16::from_f64(x).to_f64(),
        _ => x,
    }
}

struct Ran {
    outputs: Vec<Tensor>,
    grads: Vec<Tensor>,
}

impl Ran {
    fn bits(&self) -> Vec<Vec<u8>> {
        self.outputs.iter().chain(&self.grads).map(|t| t.to_le_bytes().unwrap()).collect()
    }
}

/// Record, and go back `times` times into the same gradients; seeds laid out by `lay`.
fn run(op: &Op, inputs: &[Tensor], times: usize, lay: impl Fn(&Tensor) -> Tensor) -> Result<Ran> {
    let vars: Vec<Var> = inputs.iter().map(|t| Var::parameter(t.clone())).collect();
    let mut grads = Gradients::default();
    let mut outputs = Vec::new();
    for _ in 0..times {
        let tape = ops::tape();
        outputs = tape.record(|| op(&vars))?;
        let mut seeds = Vec::new();
        for (i, y) in outputs.iter().enumerate() {
            let n = y.value().numel();
            let seed = Tensor::from_vec((0..n).map(|j| seed(y.dtype(), i, j)).collect(), y.shape())?;
            let seed = ops::cast(&seed.into(), y.dtype())?.value().to_device(y.value().device())?;
            seeds.push((y, lay(&seed)));
        }
        tape.backward_from(&seeds, &mut grads)?;
    }
    let missing = || felid::Error::Gradient { op: "test", detail: "an input got no gradient".into() };
    let grads = vars.iter().map(|v| grads.take(v).ok_or_else(missing)).collect::<Result<_>>()?;
    Ok(Ran { outputs: outputs.into_iter().map(Var::into_value).collect(), grads })
}

fn check_draw(row: &Row, dims: [usize; 4], seed_value: u64, probes: usize) -> std::result::Result<(), String> {
    let case = (row.draw)(&mut Draw { dims, state: seed_value });
    let f64s: Vec<Tensor> = case.inputs.iter().map(|i| Tensor::from_slice(&i.values, &i.shape).unwrap()).collect();
    let fail = |dtype: DType, what: &str, e: String| {
        let shapes: Vec<_> = f64s.iter().map(|t| t.shape().to_vec()).collect();
        format!("{dtype}, inputs {shapes:?}, {what}: {e}")
    };

    if devices::cpu() {
        let gradcheck = GradCheck { probes, ..GradCheck::default() };
        check_gradients(row.name, ops::add_assign, &f64s, gradcheck, &case.op)
            .map_err(|e| fail(DType::F64, "finite differences", e.to_string()))?;
    }

    for dtype in [DType::F64, DType::F32, DType::BF16, DType::F16] {
        let inputs: Vec<Tensor> = f64s.iter().map(|t| ops::cast(&t.clone().into(), dtype).unwrap().into_value()).collect();
        let truth = Truth::of(&case, dtype, &inputs);
        if devices::cpu() {
            check_on_cpu(&case, &truth, &inputs).map_err(|(what, e)| fail(dtype, &what, e))?;
        }
        if let Some(cuda) = devices::cuda().filter(|_| dtype != DType::F64) {
            check_on(cuda, &case, &truth, &inputs)
                .map(|(cases, share)| devices::report(row.name, dtype, cases, share))
                .map_err(|(what, e)| fail(dtype, &format!("{cuda}, {what}"), e))?;
        }
    }
    Ok(())
}

/// Where a check went wrong, and how.
type Wrong = (String, String);

/// What a formula gives for some inputs, and how much error is allowed.
struct Truth {
    dtype: DType,
    out_dtype: DType,
    inputs: Vec<Vec<usize>>,
    of: Evaluated,
}

impl Truth {
    fn of(case: &Case, dtype: DType, inputs: &[Tensor]) -> Self {
        let exact: Vec<_> = inputs.iter().map(|t| (t.shape().to_vec(), t.to_f64_vec().unwrap())).collect();
        let out_dtype = if case.loss && dtype != DType::F64 { DType::F32 } else { dtype };
        let of = evaluate(units(dtype), &exact, |i, j| seed(out_dtype, i, j), &case.formula);
        Self { dtype, out_dtype, inputs: exact.into_iter().map(|(shape, _)| shape).collect(), of }
    }
    /// The largest share of its bound that any element uses.
    fn compare(&self, ran: &Ran, times: f64) -> std::result::Result<f64, String> {
        if ran.outputs.len() != self.of.outputs.len() {
            return Err(format!("{} outputs", ran.outputs.len()));
        }
        let mut worst = 0f64;
        for (i, (y, want)) in ran.outputs.iter().zip(&self.of.outputs).enumerate() {
            let share = close(y, self.out_dtype, &self.of.shapes[i], want, units(self.out_dtype), 1.0)
                .map_err(|e| format!("output {i}: {e}"))?;
            worst = worst.max(share);
        }
        for (i, (g, want)) in ran.grads.iter().zip(&self.of.grads).enumerate() {
            let share = close(g, self.dtype, &self.inputs[i], want, units(self.dtype), times)
                .map_err(|e| format!("gradient {i}: {e}"))?;
            worst = worst.max(share);
        }
        Ok(worst)
    }
}

fn check_on_cpu(case: &Case, truth: &Truth, inputs: &[Tensor]) -> std::result::Result<(), Wrong> {
    let at = |what: &str| {
        let what = what.to_string();
        move |e: String| (what, e)
    };
    let ran = |times| run(&case.op, inputs, times, Tensor::clone).map_err(|e| at("run")(e.to_string()));
    let plain = ran(1)?;
    truth.compare(&plain, 1.0).map_err(at("formula"))?;
    truth.compare(&ran(2)?, 2.0).map_err(at("accumulated twice"))?;

    let (bits, op) = (plain.bits(), &case.op);
    for pool in pools() {
        let threaded = pool.install(|| run(op, inputs, 1, Tensor::clone).map(|r| r.bits()));
        if threaded.map_err(|e| at("threads")(e.to_string()))? != bits {
            return Err(at("threads")(format!("differs with {}", pool.current_num_threads())));
        }
    }
    for (name, lay) in LAYOUTS {
        let views: Vec<Tensor> = inputs.iter().map(lay).collect();
        // expanding repeats elements: compare with a copy of what came out
        let copies: Vec<Tensor> = views.iter().map(|t| t.copy().unwrap()).collect();
        let viewed = run(op, &views, 1, lay_same(lay, name)).map_err(|e| at(name)(e.to_string()))?;
        if case.sums_as_stored {
            if name != "expanded" {
                truth.compare(&viewed, 1.0).map_err(at(name))?;
            }
        } else {
            let copied = run(op, &copies, 1, Tensor::clone).map_err(|e| at(name)(e.to_string()))?;
            if viewed.bits() != copied.bits() {
                return Err(at(name)("differs from a contiguous copy".into()));
            }
        }
    }
    Ok(())
}

/// On another device: the number of comparisons and the largest share of its bound that any element used. Kernels choose
/// their path by alignment, so views agree with the formula, not with copies in every bit.
fn check_on(device: Device, case: &Case, truth: &Truth, inputs: &[Tensor]) -> std::result::Result<(usize, f64), Wrong> {
    let at = |what: &str| {
        let what = what.to_string();
        move |e: String| (what, e)
    };
    let inputs: Vec<Tensor> =
        inputs.iter().map(|t| t.to_device(device)).collect::<Result<_>>().map_err(|e| at("copy")(e.to_string()))?;
    let ran = |times| run(&case.op, &inputs, times, Tensor::clone).map_err(|e| at("run")(e.to_string()));
    let plain = ran(1)?;
    let mut worst = truth.compare(&plain, 1.0).map_err(at("formula"))?;
    if devices::light() {
        let (name, lay) = LAYOUTS[2];
        let views: Vec<Tensor> = inputs.iter().map(lay).collect();
        let viewed = run(&case.op, &views, 1, lay_same(lay, name)).map_err(|e| at(name)(e.to_string()))?;
        return Ok((2, worst.max(truth.compare(&viewed, 1.0).map_err(at(name))?)));
    }
    if ran(1)?.bits() != plain.bits() {
        return Err(at("again")("differs from one run to the next".into()));
    }
    worst = worst.max(truth.compare(&ran(2)?, 2.0).map_err(at("accumulated twice"))?);
    for (name, lay) in LAYOUTS {
        let views: Vec<Tensor> = inputs.iter().map(lay).collect();
        let viewed = run(&case.op, &views, 1, lay_same(lay, name)).map_err(|e| at(name)(e.to_string()))?;
        // expanding repeats elements: another truth
        let repeated = (name == "expanded").then(|| Truth::of(case, truth.dtype, &views));
        let share = repeated.as_ref().unwrap_or(truth).compare(&viewed, 1.0).map_err(at(name))?;
        worst = worst.max(share);
    }
    Ok((2 + LAYOUTS.len(), worst))
}

/// Seeds go through the same layout, save those that would change their elements.
fn lay_same(lay: fn(&Tensor) -> Tensor, name: &str) -> impl Fn(&Tensor) -> Tensor {
    let keep = name != "expanded";
    move |t| if keep { lay(t) } else { t.clone() }
}

fn pools() -> &'static [rayon::ThreadPool] {
    static POOLS: OnceLock<Vec<rayon::ThreadPool>> = OnceLock::new();
    let pool = |n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap();
    POOLS.get_or_init(|| [1, 3].map(pool).into())
}

/// The largest share of its bound that any element uses, where all stay within:
/// `|got - times * want| <= SLACK * times * (bound of the naive implementation)`, and one rounding for each further sum.
fn close(
    got: &Tensor,
    dtype: DType,
    shape: &[usize],
    want: &[Bounded],
    units: Units,
    times: f64,
) -> std::result::Result<f64, String> {
    let mut worst = 0f64;
    if got.shape() != shape || got.dtype() != dtype {
        return Err(format!("{:?} {}, expected {shape:?} {dtype}", got.shape(), got.dtype()));
    }
    for (i, (g, w)) in got.to_f64_vec().unwrap().into_iter().zip(want).enumerate() {
        let allowed = SLACK * times * w.kept(units);
        let error = (g - times * w.value).abs();
        if error > allowed || error.is_nan() {
            return Err(format!("element {i}: {g}, expected {}, error {error:.2e} over {allowed:.2e}", times * w.value));
        }
        if allowed > 0.0 {
            worst = worst.max(error / allowed);
        }
    }
    Ok(worst)
}

type Layout = (&'static str, fn(&Tensor) -> Tensor);

/// The same elements (one repeated, in the last) lying differently.
const LAYOUTS: [Layout; 5] = [
    ("permuted", |t| {
        let back: Vec<usize> = (0..t.shape().len()).rev().collect();
        t.permute(&back).unwrap().copy().unwrap().permute(&back).unwrap()
    }),
    ("leading dimensions permuted", |t| match t.shape().len() {
        0..=2 => t.clone(),
        r => t.transpose(r - 3, r - 2).unwrap().copy().unwrap().transpose(r - 3, r - 2).unwrap(),
    }),
    ("narrowed", |t| match t.shape().split_last() {
        None => t.clone(),
        Some((_, lead)) => {
            let dim = lead.len();
            let pad = |n: usize| Tensor::full(7.0, &[lead, &[n]].concat(), t.dtype(), t.device()).unwrap().into();
            let wide = ops::concat(&[&pad(3), &t.clone().into(), &pad(2)], dim).unwrap();
            wide.value().narrow(dim, 3, t.shape()[dim]).unwrap()
        }
    }),
    ("every other row", |t| match t.shape().split_last() {
        None => t.clone(),
        Some((last, lead)) => {
            let row = Var::constant(t.reshape(&[lead, &[1, *last]].concat()).unwrap());
            let both = ops::concat(&[&row, &row], lead.len()).unwrap();
            both.value().narrow(lead.len(), 1, 1).unwrap().reshape(t.shape()).unwrap()
        }
    }),
    ("expanded", |t| match t.shape().first() {
        None => t.clone(),
        Some(_) => t.narrow(0, 0, 1).unwrap().expand(t.shape()).unwrap(),
    }),
];
