//! Sampling on the CPU: rows in parallel.

use crate::Result;
use crate::ops::{Draw, LogProbs, Sampling};
use crate::tensor::{DType, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;
use std::cmp::Ordering;

pub(crate) fn sample(logits: &Tensor, limit: usize, rows: &[Draw]) -> Result<Vec<i64>> {
    let (v, dtype) = (logits.last_dim(), logits.dtype());
    let mut all = logits.to_f32_vec()?;
    let choose = |(row, draw): (&mut [f32], &Draw)| {
        let row = &mut row[..limit];
        penalize(row, draw, dtype);
        one(row, &draw.how, draw.uniform) as i64
    };
    Ok(all.par_chunks_exact_mut(v).zip(rows).map(choose).collect())
}

/// NaN as minus infinity.
fn clean(x: f32) -> f32 {
    if x.is_nan() { f32::NEG_INFINITY } else { x }
}

fn penalize(row: &mut [f32], draw: &Draw, dtype: DType) {
    let penalty = draw.how.repetition_penalty as f32;
    if penalty == 1.0 {
        return;
    }
    for (x, i) in row.iter_mut().zip(0..) {
        if draw.seen.get(i / 64).is_some_and(|word| word >> (i % 64) & 1 == 1) {
            let y = if *x > 0.0 { *x / penalty } else { *x * penalty };
            *x = match dtype {
                DType::BF16 => bf16::from_f32(y).to_f32(),
                DType::F16 => f16::from_f32(y).to_f32(),
                _ => y,
            };
        }
    }
}

fn one(logits: &[f32], s: &Sampling, u: f64) -> usize {
    let best = (0..logits.len()).fold(0, |best, i| if clean(logits[i]) > clean(logits[best]) { i } else { best });
    // one candidate, or logits that leave no choice (all minus infinity, or an infinite one)
    if s.temperature == 0.0 || s.top_k == 1 || !clean(logits[best]).is_finite() {
        return best;
    }
    let mut order: Vec<usize> = (0..logits.len()).collect();
    let likelier = |a: &usize, b: &usize| clean(logits[*b]).total_cmp(&clean(logits[*a])).then(a.cmp(b));
    if s.top_k > 0 && s.top_k < order.len() {
        order.select_nth_unstable_by(s.top_k - 1, likelier);
        order.truncate(s.top_k);
    }
    if s.top_p < 1.0 {
        order.sort_unstable_by(likelier);
    } else {
        order.sort_unstable();
    }
    let top = f64::from(clean(logits[best]));
    let weight = |&i: &usize| Some(((f64::from(clean(logits[i])) - top) / s.temperature).exp()).filter(|w| *w >= s.min_p);
    let mut weights: Vec<f64> = order.iter().map(|i| weight(i).unwrap_or(0.0)).collect();
    if s.top_p < 1.0 {
        let wanted = s.top_p * weights.iter().sum::<f64>();
        let mut sum = 0.0;
        let n = weights
            .iter()
            .take_while(|&&w| {
                let more = sum < wanted;
                sum += w;
                more
            })
            .count();
        weights.truncate(n.max(1));
    }
    let mut left = u * weights.iter().sum::<f64>();
    for (&i, w) in order.iter().zip(&weights) {
        left -= w;
        if left < 0.0 {
            return i;
        }
    }
    // rounding left a remainder: the last candidate with any weight
    order.iter().zip(&weights).rev().find(|(_, w)| **w > 0.0).map_or(best, |(&i, _)| i)
}

pub(crate) fn log_probs(logits: &Tensor, limit: usize, ids: &[i64], top: usize) -> Result<Vec<LogProbs>> {
    let (v, all) = (logits.last_dim(), logits.to_f32_vec()?);
    let of_row = |(row, &id): (&[f32], &i64)| {
        let row: Vec<f64> = row[..limit].iter().map(|&x| f64::from(clean(x))).collect();
        let most = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let norm = most + row.iter().map(|x| (x - most).exp()).sum::<f64>().ln();
        let mut order: Vec<usize> = (0..limit).collect();
        let likelier = |a: &usize, b: &usize| row[*b].partial_cmp(&row[*a]).unwrap_or(Ordering::Equal).then(a.cmp(b));
        if top < limit && top > 0 {
            order.select_nth_unstable_by(top - 1, likelier);
        }
        order.truncate(top);
        order.sort_unstable_by(likelier);
        let top = order.into_iter().map(|i| (i as i64, row[i] - norm)).collect();
        LogProbs { logprob: row[id as usize] - norm, top }
    };
    Ok(all.par_chunks_exact(v).zip(ids).map(of_row).collect())
}
