//! Sampling on CUDA: a block a row; the ids come back in one copy.

use super::rows::float_variant;
use crate::Result;
use crate::cuda::{Grid, kernels::sample as kernel};
use crate::ops::{Draw, LogProbs, Sampling};
use crate::tensor::{DType, Device, Tensor};

/// Threads of a block.
const THREADS: usize = 1024;

/// Sums of `limit` weights up to this stay below 2^62.
fn scale(limit: usize) -> f64 {
    (1u64 << (62 - limit.next_power_of_two().trailing_zeros())) as f64
}

/// No tensor on a device holds f64: words travel as integers.
fn upload(words: Vec<u64>, shape: &[usize], device: Device) -> Result<Tensor> {
    Tensor::from_vec(words.into_iter().map(|w| w as i64).collect(), shape)?.to_device(device)
}

pub(crate) fn sample(logits: &Tensor, limit: usize, rows: &[Draw]) -> Result<Vec<i64>> {
    let greedy = rows.iter().all(|r| is_greedy(&r.how));
    let how = upload(rows.iter().flat_map(|r| words(&r.how, r.uniform)).collect(), &[rows.len(), 5], logits.device())?;
    sample_at(&penalized(logits, limit, rows)?, limit, &how, greedy)?.to_vec()
}

/// True where a row's token is the likeliest whatever number is drawn.
pub(crate) fn is_greedy(how: &Sampling) -> bool {
    how.temperature == 0.0 || how.top_k == 1
}
/// A row's settings as the kernel takes them (`How`).
pub(crate) fn words(how: &Sampling, uniform: f64) -> [u64; 5] {
    let [temperature, top_p, min_p, uniform] = [how.temperature, how.top_p, how.min_p, uniform].map(f64::to_bits);
    [temperature, top_p, min_p, uniform, how.top_k as u64]
}

/// As [`sample`], without a penalty and by settings on the device, [`words`] a row; the ids stay there.
pub(crate) fn sample_at(logits: &Tensor, limit: usize, how: &Tensor, greedy: bool) -> Result<Tensor> {
    let variant = float_variant("sample", logits)?;
    let logits = logits.dense_rows()?;
    let (b, device) = (logits.dim(0), logits.device());
    let mut ids = Tensor::empty(&[b], DType::I64, device)?;
    let stride = logits.layout().strides()[0];
    let gpu = logits.gpu()?;
    if greedy {
        let args = [ids.write()?, logits.read()?, stride.into(), limit.into()];
        // SAFETY: the parameters are (ids, logits, stride, limit); rows of logits are dense and hold at least `limit` elements,
        // ids is new and has a row each.
        unsafe { gpu.launch(kernel::sample_greedy, variant, Grid::new(b, THREADS).early(true), &args)? };
        return Ok(ids);
    }
    let mut weights = Tensor::empty(&[b, limit], DType::I64, device)?;
    let args = [
        ids.write()?,
        weights.write()?,
        logits.read()?,
        stride.into(),
        limit.into(),
        how.read()?,
        scale(limit).to_bits().into(),
    ];
    // SAFETY: the parameters are (ids, weights, logits, stride, limit, how, scale), scale as f64; rows of logits are dense and
    // hold at least `limit` elements, ids, weights and how are new and have a row each.
    unsafe { gpu.launch(kernel::sample, variant, Grid::new(b, THREADS).early(true), &args)? };
    Ok(ids)
}

/// Logits after the repetition penalty: a copy, where a row has one.
fn penalized(logits: &Tensor, limit: usize, rows: &[Draw]) -> Result<Tensor> {
    let penalty = |r: &Draw| r.how.repetition_penalty as f32;
    let some: Vec<(usize, &Draw)> =
        rows.iter().enumerate().filter(|(_, r)| penalty(r) != 1.0 && !r.seen.is_empty()).collect();
    if some.is_empty() {
        return Ok(logits.clone());
    }
    let (mut y, device, words) = (logits.copy()?, logits.device(), limit.div_ceil(64));
    // the row, the penalty, and the bits
    let list = |&(b, r): &(usize, &Draw)| {
        let bits = (0..words).map(|w| r.seen.get(w).copied().unwrap_or(0));
        [b as u64, penalty(r).to_bits().into()].into_iter().chain(bits).collect::<Vec<u64>>()
    };
    let lists = upload(some.iter().flat_map(list).collect(), &[some.len(), words + 2], device)?;
    let args = [y.write()?, y.last_dim().into(), limit.into(), lists.read()?, (words + 2).into()];
    // SAFETY: the parameters are (logits, stride, limit, lists, words of a list); y is contiguous and its own, each list names
    // one of its rows, another than the others, and has a bit for each of `limit` elements.
    unsafe { y.gpu()?.launch(kernel::penalize, y.variant()?, Grid::new(some.len(), THREADS), &args)? };
    Ok(y)
}

pub(crate) fn log_probs(logits: &Tensor, limit: usize, ids: &[i64], top: usize) -> Result<Vec<LogProbs>> {
    let variant = float_variant("log_probs", logits)?;
    let logits = logits.dense_rows()?;
    let (b, device) = (logits.dim(0), logits.device());
    let mut out = Tensor::empty(&[b, 1 + 2 * top], DType::I64, device)?;
    let ids = Tensor::ids(ids, &[b])?.to_device(device)?;
    let stride = logits.layout().strides()[0].into();
    let args = [out.write()?, logits.read()?, stride, limit.into(), ids.read()?, top.into(), scale(limit).to_bits().into()];
    // SAFETY: the parameters are (out, logits, stride, limit, ids, top, scale), scale as f64; rows of logits are dense and hold
    // at least `limit` elements, ids are below it; out is new and holds 1 + 2 top words a row.
    unsafe { logits.gpu()?.launch(kernel::log_probs, variant, Grid::new(b, THREADS), &args)? };
    let real = |word: i64| f64::from_bits(word as u64);
    let of_row =
        |w: &[i64]| LogProbs { logprob: real(w[0]), top: w[1..].chunks_exact(2).map(|p| (p[0], real(p[1]))).collect() };
    Ok(out.to_vec::<i64>()?.chunks_exact(1 + 2 * top).map(of_row).collect())
}
