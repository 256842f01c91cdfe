//! `felid bench kernels`: each op at the sizes of a training step, against the bytes or operations that it cannot avoid.

use super::machine::{random_tensor, time};
use super::{Machine, Spread};
use crate::autograd::{Gradients, Var, no_grad};
use crate::model::CacheFormat;
use crate::ops::{self, AdamWParam, AdamWSettings};
use crate::random;
use crate::tensor::{DType, Device, Tensor};
use crate::{Error, Result};
use serde::Serialize;

/// What to measure: the sizes that rows of the table are made of.
#[derive(Clone, Debug, Serialize)]
pub struct KernelsBench {
    /// R, rows.
    pub rows: usize,
    /// D, width of the residual stream.
    pub dim: usize,
    /// M, width of SwiGLU.
    pub ffn: usize,
    /// V, vocabulary.
    pub vocab: usize,
    /// d, width of a head.
    pub head_dim: usize,
    /// Parameters of the AdamW row.
    pub params: usize,
    /// Element type.
    pub dtype: DType,
    /// Measured runs, after some that are not.
    pub runs: usize,
    /// Only ops whose names contain this.
    pub only: Option<String>,
}

/// One op.
#[derive(Clone, Debug, Serialize)]
pub struct KernelRow {
    /// Its name, and the sizes.
    pub op: String,
    /// Time of a forward pass.
    pub forward: Spread,
    /// Time of forward and backward; `None` for what has no backward.
    pub forward_backward: Option<Spread>,
    /// Bytes that must move: forward, both.
    pub bytes: [f64; 2],
    /// Operations of matrix products: forward, both; 0 where bytes are what counts.
    pub flops: [f64; 2],
    /// Share of the measured ceiling (copy rate or matrix-product rate): forward, both.
    pub share_of_ceiling: [f64; 2],
}

/// All of it.
#[derive(Clone, Debug, Serialize)]
pub struct KernelsReport {
    /// Where.
    pub machine: Machine,
    /// What.
    pub settings: KernelsBench,
    /// The results.
    pub rows: Vec<KernelRow>,
    /// A peer's command, and what it printed in the same call.
    pub peer: Option<(String, String)>,
}

type Op<Y> = Box<dyn Fn(&[Var]) -> Result<Y>>;

/// A row of the table: name, shapes of the inputs, the op, bytes (forward, both) and operations (forward, both).
struct Row {
    op: String,
    shapes: Vec<Vec<usize>>,
    run: Op<Vec<Var>>,
    bytes: [usize; 2],
    flops: [usize; 2],
}

/// Measure every op of the table on random inputs.
pub fn bench_kernels(s: KernelsBench, device: Device, peer: Option<(String, String)>) -> Result<KernelsReport> {
    if s.runs == 0 || [s.rows, s.dim, s.ffn, s.vocab, s.head_dim, s.params].contains(&0) {
        return Err(Error::Usage("sizes and runs must be at least 1".into()));
    }
    let machine = Machine::measure(device, s.dtype)?;
    let wanted = |name: &str| s.only.as_deref().is_none_or(|o| name.contains(o));
    let mut rows = Vec::new();
    for row in table(&s)?.into_iter().filter(|r| wanted(&r.op)) {
        rows.push(measure(&s, &machine, device, row)?);
    }
    if wanted("adamw") {
        rows.push(adamw(&s, &machine, device)?);
    }
    for (batch, keys) in [(320, 145), (320, 275), (1, 145), (1, 275), (1, 4096)] {
        for format in [CacheFormat::Plain, CacheFormat::Int8] {
            let op = cached_attention_name(format);
            if wanted(op) {
                rows.push(cached_attention(&s, &machine, device, (batch, keys, format))?);
            }
        }
    }
    Ok(KernelsReport { machine, settings: s, rows, peer })
}

fn table(s: &KernelsBench) -> Result<Vec<Row>> {
    let (r, d, m, v, e) = (s.rows, s.dim, s.ffn, s.vocab, s.dtype.size());
    let row = |op: &str, shapes: &[&[usize]], bytes: [usize; 2], flops: [usize; 2], run: Op<Var>| Row {
        op: op.into(),
        shapes: shapes.iter().map(|s| s.to_vec()).collect(),
        run: Box::new(move |x| Ok(vec![run(x)?])),
        bytes,
        flops,
    };
    let ids = |n: usize, below: usize, key: u64| {
        let ids = (0..n as u64).map(|i| random::below_at(key, i, below as u64) as i64).collect::<Vec<_>>();
        Tensor::ids(&ids, &[n])
    };
    let (wide, gates) = (r * d * e, r * m * e);
    let loss_rows = 8192.min(r);
    let head_rows = 32_768.min(r);
    let (tokens, labels, targets) = (ids(r, v, 1)?, ids(loss_rows, v, 2)?, ids(head_rows, v, 3)?);
    let (heads, width) = (d / s.head_dim.min(d), s.head_dim.min(d));
    let positions: Vec<usize> = (0..r).map(|i| i % 18).collect();
    let table = ops::RopeTable::new(&positions, width, 1e4)?;
    let (fused, joint) = (table.clone(), r * heads * width * e);
    let kept: Vec<usize> = (0..r).filter(|i| i % 18 != 0).collect();
    let linear = |name: &str, i: usize, o: usize| {
        let bytes = (r * i + o * i + r * o) * e;
        let flops = 2 * r * i * o;
        let run: Op<Var> = Box::new(|x| ops::linear(&x[0], &x[1], None));
        row(
            &format!("linear {name} [{r}, {i}] x [{o}, {i}]"),
            &[&[r, i], &[o, i]],
            [bytes, 3 * bytes],
            [flops, 3 * flops],
            run,
        )
    };
    Ok(vec![
        row("rms_norm", &[&[r, d], &[d]], [2 * wide, 5 * wide], [0; 2], Box::new(|x| ops::rms_norm(&x[0], &x[1], 1e-5))),
        row(
            "add_rms_norm",
            &[&[r, d], &[r, d], &[d]],
            [4 * wide, 7 * wide],
            [0; 2],
            Box::new(|x| Ok(ops::add_rms_norm(&x[0], &x[1], &x[2], 1e-5)?.0)),
        ),
        row(
            "rms_norm of heads",
            &[&[r, heads, width], &[width]],
            [2 * wide, 5 * wide],
            [0; 2],
            Box::new(|x| ops::rms_norm(&x[0], &x[1], 1e-5)),
        ),
        row(
            "rope",
            &[&[r, heads, width]],
            [2 * wide, 4 * wide],
            [0; 2],
            Box::new(move |x| ops::rope(&ops::transpose(&x[0], 0, 1)?, &table)),
        ),
        Row {
            op: "qk_norm_rope of a fused projection".into(),
            shapes: vec![vec![1, r, 3 * heads * width], vec![width], vec![width]],
            // forward reads and writes q and k; backward reads them once more, all gradients, and writes as many
            bytes: [4 * joint, 12 * joint],
            flops: [0; 2],
            run: Box::new(move |x| {
                let norm = ops::QkNorm { q: &x[1], k: &x[2], eps: 1e-5 };
                ops::qk_norm_rope(&x[0], heads, heads, Some(norm), &fused).map(Vec::from)
            }),
        },
        row("swiglu", &[&[r, m], &[r, m]], [3 * gates, 8 * gates], [0; 2], Box::new(|x| ops::swiglu(&x[0], &x[1]))),
        row(
            "embedding",
            &[&[v, d]],
            [2 * wide, 3 * wide + v * d * e],
            [0; 2],
            Box::new(move |x| ops::embedding(&tokens, &x[0])),
        ),
        row("index_select", &[&[r, d]], [2 * wide, 4 * wide], [0; 2], Box::new(move |x| ops::index_select(&x[0], 0, &kept))),
        row(
            "interpolate the projection",
            &[&[d, 16 * d]],
            [(16 * d + 8 * d) * d * e, 2 * (16 * d + 8 * d) * d * e],
            [0; 2],
            Box::new(move |x| ops::interpolate(&x[0], 1, 8 * d)),
        ),
        row(
            &format!("cross_entropy of {loss_rows} rows"),
            &[&[loss_rows, v]],
            [loss_rows * v * e, 3 * loss_rows * v * e],
            [0; 2],
            Box::new(move |x| ops::cross_entropy(&x[0], &labels, -100)),
        ),
        row(
            &format!("linear_cross_entropy of {head_rows} rows"),
            &[&[head_rows, d], &[v, d]],
            [0; 2],
            [2 * head_rows * d * v, 6 * head_rows * d * v],
            Box::new(move |x| ops::linear_cross_entropy(&x[0], &x[1], &targets, -100)),
        ),
        linear("wqkv", d, 3 * d),
        linear("wo", d, d),
        linear("fc_1", d, m),
        linear("proj", m, d),
    ])
}

fn measure(s: &KernelsBench, machine: &Machine, device: Device, row: Row) -> Result<KernelRow> {
    let bytes: usize = row.shapes.iter().map(|x| x.iter().product::<usize>() * s.dtype.size()).sum();
    let sets = ((256usize << 20) / bytes.max(1) + 1).clamp(2, 4);
    let inputs = (0..sets as u64)
        .map(|i| {
            let one = |(j, shape): (usize, &Vec<usize>)| {
                random_tensor(shape, s.dtype, device, 1000 + 10 * i + j as u64).map(Var::parameter)
            };
            row.shapes.iter().enumerate().map(one).collect()
        })
        .collect::<Result<Vec<Vec<Var>>>>()?;
    let forward = no_grad(|| time(device, 3, s.runs, |i| (row.run)(&inputs[i % sets]).map(drop)))?;
    let seeds = no_grad(|| (row.run)(&inputs[0]))?.iter().map(|y| seed(y.value())).collect::<Result<Vec<_>>>()?;
    let both = |i: usize| {
        let (tape, mut grads) = (ops::tape(), Gradients::default());
        let y = tape.record(|| (row.run)(&inputs[i % sets]))?;
        tape.backward_from(&y.iter().zip(seeds.iter().cloned()).collect::<Vec<_>>(), &mut grads)
    };
    let forward_backward = time(device, 3, s.runs, both)?;
    let share = |spread: &Spread, i: usize| {
        let floor = (row.flops[i] as f64 / machine.matmul_flops_per_s).max(row.bytes[i] as f64 / machine.copy_bytes_per_s);
        1e3 * floor / spread.median_ms
    };
    Ok(KernelRow {
        share_of_ceiling: [share(&forward, 0), share(&forward_backward, 1)],
        op: row.op,
        forward,
        forward_backward: Some(forward_backward),
        bytes: row.bytes.map(|n| n as f64),
        flops: row.flops.map(|n| n as f64),
    })
}

/// A gradient for y, in y's order in memory: 1 for a scalar.
fn seed(y: &Tensor) -> Result<Tensor> {
    if y.rank() == 0 {
        return Tensor::full(1.0, &[], y.dtype(), y.device());
    }
    let mut order: Vec<usize> = (0..y.rank()).collect();
    order.sort_by_key(|&d| std::cmp::Reverse(y.layout().strides()[d]));
    let shape: Vec<usize> = order.iter().map(|&d| y.dim(d)).collect();
    let mut inverse = order.clone();
    order.iter().enumerate().for_each(|(i, &d)| inverse[d] = i);
    random_tensor(&shape, y.dtype(), y.device(), 999)?.permute(&inverse)
}

/// A step over sixteen f32 parameters, gradient norm and clip included: 8 words read or written for each of them (the
/// gradient twice).
fn adamw(s: &KernelsBench, machine: &Machine, device: Device) -> Result<KernelRow> {
    let n = (s.params / 16).max(1);
    let make = |key: u64| (0..16).map(|i| random_tensor(&[n], DType::F32, device, key + i)).collect::<Result<Vec<_>>>();
    let (mut p, g, mut m) = (make(1)?, make(20)?, make(40)?);
    let mut v = (0..16).map(|_| Tensor::zeros(&[n], DType::F32, device)).collect::<Result<Vec<_>>>()?;
    let h = AdamWSettings { lr: 1e-4, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };
    let forward = time(device, 3, s.runs, |i| {
        let mut all: Vec<AdamWParam> = p
            .iter_mut()
            .zip(&g)
            .zip(m.iter_mut().zip(&mut v))
            .map(|((param, grad), (m, v))| AdamWParam { param, grad, m, v, master: None, weight_decay: 0.1 })
            .collect();
        ops::adamw(&mut all, i as u64 + 1, &h, 1.0).map(drop)
    })?;
    let bytes = (16 * n * 4 * 8) as f64;
    let share = 1e3 * bytes / machine.copy_bytes_per_s / forward.median_ms;
    Ok(KernelRow {
        op: format!("adamw of {} f32 parameters, with norm and clip", 16 * n),
        forward,
        forward_backward: None,
        bytes: [bytes, bytes],
        flops: [0.0; 2],
        share_of_ceiling: [share, share],
    })
}

fn cached_attention_name(format: CacheFormat) -> &'static str {
    match format {
        CacheFormat::Plain => "cached_attention",
        CacheFormat::Int8 => "cached_attention_int8",
    }
}

/// A step of decoding: a row each of `batch` texts against its `keys` in a cache, which is read once. Calls go through a
/// cache too large for an L2.
fn cached_attention(
    s: &KernelsBench,
    machine: &Machine,
    device: Device,
    (batch, keys, format): (usize, usize, CacheFormat),
) -> Result<KernelRow> {
    let (heads, d, batch) = (s.dim / s.head_dim.min(s.dim), s.head_dim.min(s.dim), batch.min(s.rows));
    // bytes of a new row, and of one that is kept
    let (new, row, all) = (heads * d * s.dtype.size(), format.row_bytes(heads, d, s.dtype), batch * keys);
    let sets = (128usize << 20) / (2 * all * row) + 1;
    let q = random_tensor(&[batch, heads, 1, d], s.dtype, device, 1)?;
    let [k, v] = [
        random_tensor(&[heads, sets * all, d], s.dtype, device, 2)?,
        random_tensor(&[heads, sets * all, d], s.dtype, device, 3)?,
    ];
    let seen = |set: usize| (0..batch).map(|r| set * all + r * keys..set * all + (r + 1) * keys).collect();
    let rows = (0..sets).map(|set| ops::CacheRows::new(seen(set))).collect::<Result<Vec<_>>>()?;
    let scale = (d as f64).powf(-0.5);
    let run: Box<dyn Fn(usize) -> Result<()>> = match format {
        CacheFormat::Plain => Box::new(move |i| ops::cached_attention(&q, &k, &v, &rows[i % sets], scale).map(drop)),
        CacheFormat::Int8 => {
            let shape = [heads, sets * all, d];
            let [mut k8, mut v8] = [ops::Int8Rows::zeros(shape, device)?, ops::Int8Rows::zeros(shape, device)?];
            let places = ops::CacheRows::new((0..sets * all).map(|i| i..i + 1).collect())?;
            let [k, v] = [k.reshape(&[1, heads, sets * all, d])?, v.reshape(&[1, heads, sets * all, d])?];
            ops::write_int8_rows([&mut k8, &mut v8], [&k, &v], &places)?;
            Box::new(move |i| ops::cached_attention_int8(&q, &k8, &v8, &rows[i % sets], scale).map(drop))
        }
    };
    (0..sets).try_for_each(&run)?; // places go to the device once
    let forward = time(device, 3, s.runs, run)?;
    let bytes = (2 * (row * all + new * batch)) as f64;
    let share = 1e3 * bytes / machine.copy_bytes_per_s / forward.median_ms;
    Ok(KernelRow {
        op: format!("{} of {batch} rows to {keys} keys each", cached_attention_name(format)),
        forward,
        forward_backward: None,
        bytes: [bytes, bytes],
        flops: [0.0; 2],
        share_of_ceiling: [share, share],
    })
}
