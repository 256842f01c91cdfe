//! Rows picked by index: token embeddings, and selection along any dimension.

use crate::autograd::{Var, record_one};
use crate::tensor::{DType, Device, Tensor};
use crate::{Error, Result};

/// `y[.., :] = table[ids[..], :]`: ids int64 of any shape, table `[V, D]`, y `[.., D]`.
///
/// Backward: `dtable[v] = sum of dy over the positions whose id is v`, added in the order of positions. Errors on ids
/// outside `0..V`.
pub fn embedding(ids: &Tensor, table: &Var) -> Result<Var> {
    let t = table.value();
    if t.rank() != 2 {
        return Err(Error::shape("embedding", format!("table {:?} is not [vocabulary, width]", t.shape())));
    }
    let index = checked_ids("embedding", ids, t.dim(0))?;
    let shape: Vec<usize> = ids.shape().iter().copied().chain([t.dim(1)]).collect();
    gather("embedding", table, 0, index, &shape)
}

/// Elements `index[0], index[1], ..` along `dim`, in that order; an index may occur more than once.
///
/// Backward adds each slice of dy to the slice that it was read from, in order. Errors on an index past the dimension.
pub fn index_select(x: &Var, dim: usize, index: &[usize]) -> Result<Var> {
    let mut shape = x.shape().to_vec();
    let Some(n) = shape.get_mut(dim) else {
        return Err(Error::shape("index_select", format!("dimension {dim} of shape {:?}", x.shape())));
    };
    if let Some((at, i)) = index.iter().enumerate().find(|(_, i)| **i >= *n) {
        return Err(Error::index("index_select", format!("index {i} at position {at} is not below {n}")));
    }
    *n = index.len();
    gather("index_select", x, dim, index.to_vec(), &shape)
}

/// Slices `index` of x along `dim`, reshaped to `shape`.
fn gather(op: &'static str, x: &Var, dim: usize, index: Vec<usize>, shape: &[usize]) -> Result<Var> {
    let y = on_device!(x.value().device(), gather::gather(x.value(), dim, &index))?;
    let old = x.shape().to_vec();
    let mut gathered = old.clone();
    gathered[dim] = index.len();
    Ok(record_one(op, &[x], y.reshape(shape)?, move |flow| {
        let dy = flow.output()?.reshape(&gathered)?;
        let dtype = flow.gradient_dtype(0).unwrap_or(dy.dtype());
        let sum = flow.take_sum(0);
        if let Some(sum) = &sum {
            super::elementwise::check_sum(op, sum, &old, dtype, &dy)?;
        }
        let dx = on_device!(dy.device(), gather::scatter_add(&dy, dim, &index, &old, sum, dtype))?;
        flow.put(0, dx);
        Ok(())
    }))
}

/// Ids as indices into a table of `rows` rows.
fn checked_ids(op: &'static str, ids: &Tensor, rows: usize) -> Result<Vec<usize>> {
    if ids.dtype() != DType::I64 {
        return Err(Error::dtype(op, format!("ids must be i64, got {}", ids.dtype())));
    }
    // ids are checked here, so they are wanted in main memory
    let ids = ids.to_device(Device::Cpu)?.contiguous()?;
    let index = |(at, &id): (usize, &i64)| match usize::try_from(id) {
        Ok(i) if i < rows => Ok(i),
        _ => Err(Error::index(op, format!("id {id} at position {at} is outside the vocabulary of {rows}"))),
    };
    ids.as_slice::<i64>()?.iter().enumerate().map(index).collect()
}
