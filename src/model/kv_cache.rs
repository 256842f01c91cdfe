//! The compressed cache of spec section 5: per layer, the keys and values of one slot a past chunk, and of the current
//! block's rows. At most K + C + 2 rows instead of N.

use crate::ops;
use crate::tensor::Tensor;
use crate::{Error, Result};

/// Keys and values of one attention, `[B, Hkv, rows, d]` each: slots first, then the current block's local rows.
///
/// A new slot ends the block: local rows are dropped and the slot takes the place of the first of them, so that what is
/// kept always lies in one run, in the order that causal attention wants.
#[derive(Clone, Debug)]
pub struct KvCache {
    k: Tensor,
    v: Tensor,
    slots: usize,
    len: usize,
}

impl KvCache {
    /// Room for `rows` rows, in the dtype and on the device of `like`.
    pub fn new(batch: usize, kv_heads: usize, rows: usize, head_dim: usize, like: &Tensor) -> Result<Self> {
        let zeros = || Tensor::zeros(&[batch, kv_heads, rows, head_dim], like.dtype(), like.device());
        Ok(Self { k: zeros()?, v: zeros()?, slots: 0, len: 0 })
    }
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
    /// Bytes held, rows not yet filled included.
    pub fn bytes(&self) -> usize {
        (self.k.numel() + self.v.numel()) * self.k.dtype().size()
    }
    /// Append rows `[B, Hkv, n, d]`, the first `new_slots` of them slots; returns views of all kept keys and values.
    pub fn append(&mut self, k: &Tensor, v: &Tensor, new_slots: usize) -> Result<(Tensor, Tensor)> {
        if new_slots > 0 {
            self.len = self.slots;
        }
        let end = self.len + k.dim(2);
        if end > self.k.dim(2) {
            return Err(Error::shape("kv_cache", format!("{end} rows do not fit the {} made room for", self.k.dim(2))));
        }
        ops::write_rows(&mut self.k, k, self.len)?;
        ops::write_rows(&mut self.v, v, self.len)?;
        self.len = end;
        self.slots += new_slots;
        Ok((self.k.narrow(2, 0, end)?, self.v.narrow(2, 0, end)?))
    }
}

/// What a CAT layer keeps: its rows, and the inputs of the chunk that is not full yet, `[B, n, dim]`.
#[derive(Clone, Debug)]
pub struct CatLayerCache {
    pub kv: KvCache,
    pub pending: Option<Tensor>,
}

/// The cache of one block.
#[derive(Clone, Debug)]
pub enum LayerCache {
    Kv(KvCache),
    Cat(CatLayerCache),
}

impl LayerCache {
    pub(super) fn kv(&mut self) -> Option<&mut KvCache> {
        match self {
            Self::Kv(kv) => Some(kv),
            Self::Cat(_) => None,
        }
    }
    pub(super) fn cat(&mut self) -> Option<&mut CatLayerCache> {
        match self {
            Self::Cat(c) => Some(c),
            Self::Kv(_) => None,
        }
    }
    pub fn bytes(&self) -> usize {
        match self {
            Self::Kv(kv) => kv.bytes(),
            Self::Cat(c) => c.kv.bytes() + c.pending.as_ref().map_or(0, |p| p.numel() * p.dtype().size()),
        }
    }
}
