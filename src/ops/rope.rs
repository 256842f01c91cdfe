//! Rotary position embedding, rotate-half (spec section 1).
//!
//! For the first n elements of each head, in halves x1, x2, at position p: `y1 = x1 cos - x2 sin`,
//! `y2 = x2 cos + x1 sin`, with angles `p * base^(-2i/n)`, i < n/2. Elements past n pass unchanged.
//! Backward is the rotation by the negative angles.

use crate::autograd::{Var, record_one};
use crate::tensor::Tensor;
use crate::{Error, Result};
use std::sync::Arc;
#[cfg(feature = "cuda")]
use std::sync::Mutex;

/// Cosines and sines for a sequence of positions. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct RopeTable(Arc<Table>);

#[derive(Debug)]
struct Table {
    /// The row of each sequence element: positions repeat in every block, so the rows of distinct ones stay in cache.
    rows: Vec<usize>,
    /// Elements of a head that turn.
    n: usize,
    /// `[distinct positions, n]`, a row holding n/2 cosines and then n/2 sines, in each accumulator type.
    f32: Tensor,
    f64: Tensor,
    /// Copies on devices, each made when first asked for: `rows` and `f32`.
    #[cfg(feature = "cuda")]
    copies: Mutex<Vec<[Tensor; 2]>>,
    /// The table that `f32` was taken from, whose copies serve this one too.
    #[cfg(feature = "cuda")]
    whole: Option<RopeTable>,
}

impl RopeTable {
    /// For elements at `positions` (L of them), turning the first `n` elements of a head, `n` even.
    pub fn new(positions: &[usize], n: usize, base: f64) -> Result<Self> {
        if !n.is_multiple_of(2) {
            return Err(Error::shape("rope", format!("{n} elements do not pair up: rope_n_elem must be even")));
        }
        if !(base > 0.0 && base.is_finite()) {
            return Err(Error::config(format!("rope base {base} must be positive")));
        }
        let mut distinct = positions.to_vec();
        distinct.sort_unstable();
        distinct.dedup();
        let angle = |p: usize, i: usize| p as f64 * base.powf(-2.0 * i as f64 / n as f64);
        let table: Vec<f64> = distinct
            .iter()
            .flat_map(|&p| {
                let cos = (0..n / 2).map(move |i| angle(p, i).cos());
                cos.chain((0..n / 2).map(move |i| angle(p, i).sin()))
            })
            .collect();
        let shape = [distinct.len(), n];
        let rows = positions.iter().map(|&p| distinct.partition_point(|&q| q < p)).collect();
        let narrow = table.iter().map(|&x| x as f32).collect();
        Ok(Self(Arc::new(Table {
            rows,
            n,
            f32: Tensor::from_vec::<f32>(narrow, &shape)?,
            f64: Tensor::from_vec(table, &shape)?,
            #[cfg(feature = "cuda")]
            copies: Mutex::default(),
            #[cfg(feature = "cuda")]
            whole: None,
        })))
    }
    /// For elements at some of this table's own: element i is this one's element `elements[i]`. No angle is computed.
    pub fn select(&self, elements: &[usize]) -> Result<Self> {
        let row = |&e: &usize| self.0.rows.get(e).copied();
        let rows = elements.iter().map(row).collect::<Option<Vec<_>>>().ok_or_else(|| {
            Error::index("rope", format!("positions {elements:?} are not all in a table of {}", self.len()))
        })?;
        Ok(Self(Arc::new(Table {
            rows,
            n: self.0.n,
            f32: self.0.f32.clone(),
            f64: self.0.f64.clone(),
            #[cfg(feature = "cuda")]
            copies: Mutex::default(),
            #[cfg(feature = "cuda")]
            whole: Some(self.clone()),
        })))
    }
    /// For as many elements as `index` has, at positions that a device knows alone: element i is this table's element
    /// `index[i]`, i64 `[L]` on a device, which the caller knows to be one. No other device may be asked.
    #[cfg(feature = "cuda")]
    pub(crate) fn select_at(&self, index: Tensor) -> Result<Self> {
        let [_, table] = self.on(index.device())?;
        Ok(Self(Arc::new(Table {
            rows: vec![0; index.numel()],
            n: self.0.n,
            f32: self.0.f32.clone(),
            f64: self.0.f64.clone(),
            copies: Mutex::new(vec![[index, table]]),
            whole: Some(self.clone()),
        })))
    }
    /// The number of positions, L.
    pub fn len(&self) -> usize {
        self.0.rows.len()
    }
    /// True for no positions.
    pub fn is_empty(&self) -> bool {
        self.0.rows.is_empty()
    }
    /// True if it is this very table.
    #[cfg(feature = "cuda")]
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
    /// The row of the table for each position.
    pub(crate) fn rows(&self) -> &[usize] {
        &self.0.rows
    }
    /// The number of elements that turn.
    pub(crate) fn width(&self) -> usize {
        self.0.n
    }
    /// `[distinct positions, n]` in the type that `dtype` accumulates in.
    pub(crate) fn table(&self, dtype: crate::tensor::DType) -> &Tensor {
        if dtype == crate::tensor::DType::F64 { &self.0.f64 } else { &self.0.f32 }
    }
    /// On a device, uploaded once: the row of the table for each position, i64 `[L]`, and the table in f32.
    #[cfg(feature = "cuda")]
    pub(crate) fn on(&self, device: crate::tensor::Device) -> Result<[Tensor; 2]> {
        let mut copies = self.0.copies.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(copy) = copies.iter().find(|c| c[0].device() == device) {
            return Ok(copy.clone());
        }
        let rows: Vec<i64> = self.0.rows.iter().map(|&r| r as i64).collect();
        // they stay longer than the work that asks first
        let copy = crate::cuda::outside(|| -> Result<_> {
            let table = match &self.0.whole {
                Some(whole) => whole.on(device)?[1].clone(),
                None => self.0.f32.to_device(device)?,
            };
            Ok([Tensor::ids(&rows, &[rows.len()])?.to_device(device)?, table])
        })?;
        copies.push(copy.clone());
        Ok(copy)
    }
}

/// Turn x `[.., L, d]` by the angles of `table` (L positions, n <= d). y has x's shape and its order in memory: heads
/// that are a permuted view stay one, so that their way back to rows needs no copy.
pub fn rope(x: &Var, table: &RopeTable) -> Result<Var> {
    let xv = x.value();
    let r = xv.rank();
    if r < 2 || xv.dim(r - 2) != table.len() || xv.last_dim() < table.width() {
        let (len, n) = (table.len(), table.width());
        return Err(Error::shape("rope", format!("x {:?} does not fit a table of {len} positions, {n} wide", xv.shape())));
    }
    let y = rotate(xv, table, false)?;
    let table = table.clone();
    Ok(record_one("rope", &[x], y, move |flow| {
        let dy = flow.output()?;
        flow.give(0, rotate(&dy, &table, true)?)
    }))
}

fn rotate(x: &Tensor, table: &RopeTable, back: bool) -> Result<Tensor> {
    on_device!(x.device(), rope::rotate(x, table, back))
}
