//! Scaled dot-product attention under a structured mask.

use super::elementwise::same_dtype;
use crate::autograd::{Var, record_one};
use crate::tensor::Tensor;
use crate::{Error, Result, profile};

/// Which keys a query may attend, as a rule on positions; no mask tensor exists anywhere.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mask {
    /// Position i attends `j <= i`. With fewer queries than keys the queries are the last positions (decoding with a
    /// cache): query i sits at position `i + Lk - Lq`.
    Causal,
    /// Every query attends every key.
    Bidirectional,
    /// The CAT decoder: position i attends j when `j <= i` and (`j % stride == 0` or `j / stride == i / stride`). Each
    /// block of `stride` rows opens with a slot (a chunk representation) that all later rows see; its other rows are
    /// seen inside the block only. Needs as many queries as keys, and a stride of at least 1.
    Cat {
        /// S: rows from one slot to the next.
        stride: usize,
    },
}

impl Mask {
    /// The definition: may position `i` attend position `j`?
    pub fn allows(self, i: usize, j: usize) -> bool {
        match self {
            Self::Causal => j <= i,
            Self::Bidirectional => true,
            Self::Cat { stride } => {
                let s = stride.max(1);
                j <= i && (j.is_multiple_of(s) || j / s == i / s)
            }
        }
    }

    /// The number of allowed pairs between the last `lq` positions as queries and `lk` positions as keys, in closed
    /// form: 4 d flops each forward, 10 d backward.
    pub fn pairs(self, lq: usize, lk: usize) -> usize {
        match self {
            Self::Bidirectional => lq * lk,
            Self::Causal => {
                let lq = lq.min(lk);
                lq * (lk - lq) + lq * (lq + 1) / 2
            }
            Self::Cat { stride } => {
                // row t of block c sees slots 0..=c and t rows of its own
                let upto = |l: usize| {
                    let s = stride.max(1);
                    let (blocks, rest) = (l / s, l % s);
                    let whole = s * (blocks * (blocks + 1) / 2) + blocks * (s * (s - 1) / 2);
                    whole + rest * (blocks + 1) + rest * rest.saturating_sub(1) / 2
                };
                upto(lk) - upto(lk - lq.min(lk))
            }
        }
    }
}

/// `softmax(scale q k^T, masked) v`: q `[B, H, Lq, d]`, k and v `[B, Hkv, Lk, d]`, result `[B, H, Lq, d]`.
///
/// H is a multiple of Hkv; query head h reads key head `h / (H/Hkv)`. Views of any strides are read where they lie
/// (a last dimension with gaps is copied first). The result, like the gradients of q, k and v, lies in memory as
/// `[B, L, H, d]`, so transposing and joining the heads afterwards moves nothing. Arithmetic runs in f32 (f64 for f64)
/// and rounds once. Keys that are masked for a query must still be finite.
///
/// With P the probabilities, O the result and G its gradient, backward is, row by row, `delta = sum(G O)`,
/// `dV = P^T G`, `dS = P (G V^T - delta)`, `dQ = scale dS K`, `dK = scale dS^T Q`. It keeps q, k, v, O and one
/// log-sum-exp a row, and computes P again.
pub fn attention(q: &Var, k: &Var, v: &Var, mask: Mask, scale: f64) -> Result<Var> {
    let (qv, kv, vv) = (q.value(), k.value(), v.value());
    check(qv, kv, vv, mask)?;
    let (qv, kv, vv) = (qv.dense_rows()?, kv.dense_rows()?, vv.dense_rows()?);
    let (y, lse) = on_device!(qv.device(), attention::forward(&qv, &kv, &vv, mask, scale))?;
    let products = (qv.numel() / qv.dim(2).max(1)) as f64 * mask.pairs(qv.dim(2), kv.dim(2)) as f64;
    profile::computed(4.0 * products);
    let (y_saved, saved) = (y.clone(), [q.save_as(qv), k.save_as(kv), v.save_as(vv)]);
    Ok(record_one("attention", &[q, k, v], y, move |flow| {
        let dy = flow.output()?.dense_rows()?;
        let [q, k, v] = saved.map(|s| s.take()?.dense_rows());
        let (q, k, v) = (q?, k?, v?);
        same_dtype("attention", &[&q, &dy])?;
        let grads = on_device!(dy.device(), attention::backward(&q, &k, &v, &y_saved, &lse, &dy, mask, scale))?;
        profile::computed(10.0 * products);
        for (i, grad) in grads.into_iter().enumerate() {
            flow.give(i, grad)?;
        }
        Ok(())
    }))
}

fn check(q: &Tensor, k: &Tensor, v: &Tensor, mask: Mask) -> Result<()> {
    let fail = |detail: String| Err(Error::shape("attention", detail));
    let (qs, ks) = (q.shape(), k.shape());
    same_dtype("attention", &[q, k, v])?;
    if !q.dtype().is_float() {
        return Err(Error::dtype("attention", format!("needs a float dtype, got {}", q.dtype())));
    }
    if qs.len() != 4 || ks.len() != 4 || ks != v.shape() || qs[0] != ks[0] || qs[3] != ks[3] {
        return fail(format!("q {qs:?}, k {ks:?}, v {:?}: give q [B, H, Lq, d] and k, v [B, Hkv, Lk, d]", v.shape()));
    }
    if (ks[1] == 0 && qs[1] != 0) || (ks[1] != 0 && qs[1] % ks[1] != 0) {
        return fail(format!("{} query heads cannot share {} key heads evenly: use a multiple", qs[1], ks[1]));
    }
    let (lq, lk) = (qs[2], ks[2]);
    match mask {
        Mask::Causal if lq > lk => fail(format!("causal mask needs at least as many keys as queries, got {lk} for {lq}")),
        Mask::Cat { stride: 0 } => fail("cat mask needs a stride of at least 1".into()),
        Mask::Cat { .. } if lq != lk => fail(format!("cat mask needs as many keys as queries, got {lk} for {lq}")),
        Mask::Bidirectional if lk == 0 && lq > 0 => {
            fail(format!("{lq} queries have no key to attend: give at least one key"))
        }
        _ => Ok(()),
    }
}
