//! Sampling on the CPU: rows in parallel.

use crate::Result;
use crate::ops::Sampling;
use crate::tensor::Tensor;
use rayon::prelude::*;

pub(crate) fn sample(logits: &Tensor, limit: usize, s: &Sampling, uniforms: &[f64]) -> Result<Vec<i64>> {
    let v = logits.last_dim();
    let all = logits.to_f32_vec()?;
    Ok(all.par_chunks_exact(v).zip(uniforms).map(|(row, &u)| one(&row[..limit], s, u) as i64).collect())
}

fn one(logits: &[f32], s: &Sampling, u: f64) -> usize {
    let clean = |x: f32| if x.is_nan() { f32::NEG_INFINITY } else { x };
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
    let mut weights: Vec<f64> = order.iter().map(|&i| ((f64::from(clean(logits[i])) - top) / s.temperature).exp()).collect();
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
