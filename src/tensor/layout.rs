//! Shape, strides and offset: how indices map to elements of a shared storage. Strides count elements.

use crate::{Error, Result};

/// A strided view: element `[i0, i1, ..]` lies at `offset + i0*strides[0] + i1*strides[1] + ..`.
/// A stride of 0 repeats one element (`expand`). No stride is negative.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    pub(crate) shape: Vec<usize>,
    pub(crate) strides: Vec<usize>,
    pub(crate) offset: usize,
}

/// The number of elements of a shape, or an error when it does not fit memory's address range. Sizes of 0 count as 1
/// against that range, since strides are products of the sizes behind them.
pub fn checked_numel(op: &'static str, shape: &[usize]) -> Result<usize> {
    shape
        .iter()
        .try_fold(1usize, |n, &d| n.checked_mul(d.max(1)))
        .filter(|&n| n <= isize::MAX as usize / 8)
        .map(|n| if shape.contains(&0) { 0 } else { n })
        .ok_or_else(|| Error::shape(op, format!("shape {shape:?} has too many elements")))
}

impl Layout {
    /// Row-major order without gaps, from offset 0.
    pub fn contiguous(shape: &[usize]) -> Self {
        let mut strides = vec![1; shape.len()];
        for i in (1..shape.len()).rev() {
            strides[i - 1] = strides[i] * shape[i].max(1);
        }
        Self { shape: shape.to_vec(), strides, offset: 0 }
    }
    /// Sizes of the dimensions.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }
    /// Elements from one index to the next, for each dimension.
    pub fn strides(&self) -> &[usize] {
        &self.strides
    }
    /// Where element `[0, 0, ..]` lies.
    pub fn offset(&self) -> usize {
        self.offset
    }
    /// Number of elements: the product of the shape.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }
    /// True when the elements lie in row-major order without gaps.
    pub fn is_contiguous(&self) -> bool {
        let mut expect = 1;
        for (&d, &s) in self.shape.iter().zip(&self.strides).rev() {
            if d != 1 && s != expect {
                return self.numel() == 0;
            }
            expect *= d;
        }
        true
    }
    /// One past the largest element index touched.
    pub fn end(&self) -> usize {
        if self.numel() == 0 {
            return self.offset;
        }
        self.offset + self.shape.iter().zip(&self.strides).map(|(&d, &s)| (d - 1) * s).sum::<usize>() + 1
    }
    /// Where row `i` of the last dimension begins, rows counted over all leading dimensions in row-major order.
    pub fn row_offset(&self, mut i: usize) -> usize {
        let mut at = self.offset;
        for d in (0..self.shape.len().saturating_sub(1)).rev() {
            at += (i % self.shape[d]) * self.strides[d];
            i /= self.shape[d];
        }
        at
    }

    /// The same elements in another shape, or `None` where that needs a copy.
    pub fn reshape(&self, shape: &[usize]) -> Option<Self> {
        if self.is_contiguous() {
            return Some(Self { offset: self.offset, ..Self::contiguous(shape) });
        }
        // Split the old dimensions into the longest runs that behave as one, and cut those anew.
        let mut strides = vec![0; shape.len()];
        let old: Vec<(usize, usize)> =
            self.shape.iter().copied().zip(self.strides.iter().copied()).filter(|&(d, _)| d != 1).collect();
        let (mut i, mut j) = (0, 0);
        while i < old.len() {
            let (mut n_old, mut i_end) = (old[i].0, i + 1);
            let (mut n_new, mut j_end) = (*shape.get(j)?, j + 1);
            while n_old != n_new {
                if n_old < n_new {
                    let (prev, next) = (old[i_end - 1], *old.get(i_end)?);
                    if prev.1 != next.0 * next.1 {
                        return None;
                    }
                    n_old *= next.0;
                    i_end += 1;
                } else {
                    n_new *= *shape.get(j_end)?;
                    j_end += 1;
                }
            }
            let mut s = old[i_end - 1].1;
            for k in (j..j_end).rev() {
                strides[k] = s;
                s *= shape[k];
            }
            (i, j) = (i_end, j_end);
        }
        Some(Self { shape: shape.to_vec(), strides, offset: self.offset })
    }
    /// Dimensions in another order: new dimension i is `dims[i]`. Panics where a dimension does not exist;
    /// [`super::Tensor::permute`] checks.
    pub fn permute(&self, dims: &[usize]) -> Self {
        Self {
            shape: dims.iter().map(|&d| self.shape[d]).collect(),
            strides: dims.iter().map(|&d| self.strides[d]).collect(),
            offset: self.offset,
        }
    }
    /// Elements `start..start+len` along `dim`, unchecked against the shape; [`super::Tensor::narrow`] checks.
    pub fn narrow(&self, dim: usize, start: usize, len: usize) -> Self {
        let mut l = self.clone();
        l.shape[dim] = len;
        // without elements there is nothing to point at, and past the end would be nowhere
        if l.numel() > 0 {
            l.offset += start * l.strides[dim];
        }
        l
    }
    /// Broadcast: leading dimensions are added, dimensions of size 1 repeated. `None` where shapes do not fit.
    pub fn expand(&self, shape: &[usize]) -> Option<Self> {
        let lead = shape.len().checked_sub(self.shape.len())?;
        let mut strides = vec![0; shape.len()];
        for (i, (&d, &s)) in self.shape.iter().zip(&self.strides).enumerate() {
            match shape[lead + i] {
                n if n == d => strides[lead + i] = s,
                _ if d == 1 => {}
                _ => return None,
            }
        }
        Some(Self { shape: shape.to_vec(), strides, offset: self.offset })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn addresses(l: &Layout) -> Vec<usize> {
        let w = l.shape.last().copied().unwrap_or(1);
        let s = l.strides.last().copied().unwrap_or(1);
        (0..l.numel() / w.max(1)).flat_map(|r| (0..w).map(move |c| (r, c))).map(|(r, c)| l.row_offset(r) + c * s).collect()
    }

    proptest! {
        #[test]
        fn reshape_keeps_the_elements(shape in prop::collection::vec(1usize..5, 1..5), swap in any::<(u8, u8)>(), cut in any::<u8>()) {
            let n = shape.len();
            let mut dims: Vec<usize> = (0..n).collect();
            dims.swap(swap.0 as usize % n, swap.1 as usize % n);
            let mut view = Layout::contiguous(&shape).permute(&dims);
            let d = cut as usize % n;
            view = view.narrow(d, view.shape[d] / 2, view.shape[d] - view.shape[d] / 2);
            let numel = view.numel();
            for a in 1..=numel {
                if numel.is_multiple_of(a) && let Some(r) = view.reshape(&[a, numel / a]) {
                    prop_assert_eq!(addresses(&r), addresses(&view));
                }
            }
            let flat = view.reshape(&[numel]);
            prop_assert_eq!(flat.is_some() && flat.as_ref().unwrap().strides[0] == 1 || numel == 1, view.is_contiguous());
        }
    }
}
