//! What a tensor is: shape, strided layout, dtype, device, storage. No mathematics.
//!
//! A [`Tensor`] is a cheap handle: cloning, reshaping and slicing share storage. Elements are written only through
//! `&mut Tensor`, which copies first when the storage is shared (copy on write), so a tensor behaves as a value.

#[cfg(feature = "cuda")]
mod cuda;
mod dtype;
mod layout;
mod storage;

#[cfg(feature = "cuda")]
pub(crate) use cuda::read_or_null;
pub use dtype::{DType, Element, Float, Real};
pub use layout::{Layout, checked_numel};
pub(crate) use storage::check_memory;
#[cfg(not(feature = "cuda"))]
pub(crate) use storage::no_backend;
pub use storage::{Device, MemoryStats, memory_stats};

use crate::{Error, Result};
use std::sync::Arc;
use storage::{CpuBuffer, Storage};

/// An n-dimensional strided array over shared storage.
#[derive(Clone)]
pub struct Tensor {
    layout: Layout,
    dtype: DType,
    storage: Arc<Storage>,
}

/// Run a block with a float dtype as a type: `with_float!(dtype, "op", T => f::<T>())`.
#[macro_export]
#[doc(hidden)]
macro_rules! with_float {
    ($dtype:expr, $op:expr, $t:ident => $body:expr) => {
        match $dtype {
            $crate::tensor::DType::F32 => {
                type $t = f32;
                $body
            }
            $crate::tensor::DType::BF16 => {
                type $t = half::bf16;
                $body
            }
            $crate::tensor::DType::F16 => {
                type $t = half::f16;
                $body
            }
            $crate::tensor::DType::F64 => {
                type $t = f64;
                $body
            }
            other => Err($crate::Error::dtype($op, format!("needs a float dtype, got {other}"))),
        }
    };
}

/// Like `with_float!`, for every dtype.
#[macro_export]
#[doc(hidden)]
macro_rules! with_element {
    ($dtype:expr, $op:expr, $t:ident => $body:expr) => {
        match $dtype {
            $crate::tensor::DType::I64 => {
                type $t = i64;
                $body
            }
            $crate::tensor::DType::I8 => {
                type $t = i8;
                $body
            }
            other => $crate::with_float!(other, $op, $t => $body),
        }
    };
}

impl Tensor {
    // ---- making ----

    /// A tensor of `data` in row-major order. Errors when the length is not the product of `shape`.
    pub fn from_vec<T: Element>(data: Vec<T>, shape: &[usize]) -> Result<Self> {
        Self::from_slice(&data, shape)
    }
    /// A copy of `data` in row-major order. Errors when the length is not the product of `shape`.
    pub fn from_slice<T: Element>(data: &[T], shape: &[usize]) -> Result<Self> {
        let n = checked_numel("from_slice", shape)?;
        if data.len() != n {
            return Err(Error::shape("from_slice", format!("{} elements do not fill shape {shape:?}", data.len())));
        }
        let mut buffer = CpuBuffer::unspecified(T::DTYPE, n);
        buffer.as_mut_slice::<T>().copy_from_slice(data);
        Ok(Self::over(buffer, T::DTYPE, shape))
    }
    /// A copy of little-endian bytes, as files hold them; they need no alignment.
    pub fn from_bytes(bytes: &[u8], dtype: DType, shape: &[usize]) -> Result<Self> {
        let n = checked_numel("from_bytes", shape)?;
        if bytes.len() != n * dtype.size() {
            let need = n * dtype.size();
            return Err(Error::shape(
                "from_bytes",
                format!("{} bytes, shape {shape:?} of {dtype} needs {need}", bytes.len()),
            ));
        }
        let mut buffer = CpuBuffer::unspecified(dtype, n);
        buffer.as_mut_slice::<u8>().copy_from_slice(bytes);
        Ok(Self::over(buffer, dtype, shape))
    }
    /// One element, shape `[]`.
    pub fn scalar<T: Element>(value: T) -> Self {
        let mut buffer = CpuBuffer::unspecified(T::DTYPE, 1);
        buffer.as_mut_slice::<T>()[0] = value;
        Self::over(buffer, T::DTYPE, &[])
    }
    /// Token ids, int64.
    pub fn ids(data: &[i64], shape: &[usize]) -> Result<Self> {
        Self::from_slice(data, shape)
    }
    /// Every element 0. Errors where there is not enough memory.
    pub fn zeros(shape: &[usize], dtype: DType, device: Device) -> Result<Self> {
        let n = checked_numel("zeros", shape)?;
        match device {
            Device::Cpu => match CpuBuffer::zeroed(dtype, n) {
                Some(buffer) => Ok(Self::over(buffer, dtype, shape)),
                None => Err(storage::no_memory(&format!("a tensor of shape {shape:?}"), n as u128 * dtype.size() as u128)),
            },
            #[cfg(feature = "cuda")]
            Device::Cuda(ordinal) => cuda::zeros(shape, n, dtype, ordinal),
            #[cfg(not(feature = "cuda"))]
            Device::Cuda(_) => Err(no_backend(device)),
        }
    }
    /// Every element `value`, without memory for each: one element, repeated by strides of 0.
    pub fn full(value: f64, shape: &[usize], dtype: DType, device: Device) -> Result<Self> {
        checked_numel("full", shape)?;
        let one = with_float!(dtype, "full", T => Ok(Self::scalar(T::from_acc(<T as Float>::Acc::of(value)))))?;
        one.to_device(device)?.expand(shape)
    }
    /// An output to be written whole: its elements are unspecified until then.
    pub(crate) fn unspecified(shape: &[usize], dtype: DType) -> Self {
        let n = shape.iter().product();
        Self::over(CpuBuffer::unspecified(dtype, n), dtype, shape)
    }
    /// As [`Tensor::unspecified`], on any device.
    #[cfg(feature = "cuda")]
    pub(crate) fn empty(shape: &[usize], dtype: DType, device: Device) -> Result<Self> {
        checked_numel("empty", shape)?;
        match device {
            Device::Cpu => Ok(Self::unspecified(shape, dtype)),
            Device::Cuda(ordinal) => cuda::empty(shape, dtype, ordinal),
        }
    }
    /// This tensor on another device, contiguous there; itself where it is there already.
    pub fn to_device(&self, device: Device) -> Result<Self> {
        if self.device() == device {
            return Ok(self.clone());
        }
        let host = match self.device() {
            Device::Cpu => self.contiguous()?,
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => cuda::download(&self.contiguous()?)?,
            #[cfg(not(feature = "cuda"))]
            Device::Cuda(_) => return Err(no_backend(device)),
        };
        match device {
            Device::Cpu => Ok(host),
            #[cfg(feature = "cuda")]
            Device::Cuda(ordinal) => cuda::upload(&host, ordinal),
            #[cfg(not(feature = "cuda"))]
            Device::Cuda(_) => Err(no_backend(device)),
        }
    }
    fn over(buffer: CpuBuffer, dtype: DType, shape: &[usize]) -> Self {
        Self { layout: Layout::contiguous(shape), dtype, storage: Arc::new(Storage::Cpu(buffer)) }
    }

    // ---- asking ----

    /// Sizes of the dimensions; empty for a scalar.
    pub fn shape(&self) -> &[usize] {
        &self.layout.shape
    }
    /// Where the elements lie in the storage.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }
    /// What one element is.
    pub fn dtype(&self) -> DType {
        self.dtype
    }
    /// Where the storage is.
    pub fn device(&self) -> Device {
        self.storage.device()
    }
    /// Number of dimensions.
    pub fn rank(&self) -> usize {
        self.layout.shape.len()
    }
    /// Number of elements; 1 for a scalar.
    pub fn numel(&self) -> usize {
        self.layout.numel()
    }
    /// True when the elements lie in row-major order without gaps.
    pub fn is_contiguous(&self) -> bool {
        self.layout.is_contiguous()
    }
    /// Size of dimension `d`, which must exist.
    pub(crate) fn dim(&self, d: usize) -> usize {
        self.layout.shape[d]
    }
    /// Size of the last dimension; 1 for a scalar.
    pub(crate) fn last_dim(&self) -> usize {
        self.layout.shape.last().copied().unwrap_or(1)
    }
    /// True when each run along the last dimension lies without gaps (other dimensions may have any stride).
    pub(crate) fn has_dense_rows(&self) -> bool {
        self.last_dim() <= 1 || self.layout.strides.last() == Some(&1)
    }

    // ---- reading and writing ----

    /// All elements of the storage; `layout()` says which are this tensor's. Errors on another dtype.
    pub(crate) fn storage_slice<T: Element>(&self) -> Result<&[T]> {
        if T::DTYPE != self.dtype {
            return Err(Error::dtype("storage_slice", format!("tensor is {}, asked for {}", self.dtype, T::DTYPE)));
        }
        match &*self.storage {
            Storage::Cpu(b) => Ok(b.as_slice()),
            #[cfg(feature = "cuda")]
            Storage::Cuda(_) => Err(storage::elsewhere(self.device())),
        }
    }
    /// The elements in row-major order, where they lie so; errors on strided views (see [`Tensor::contiguous`]).
    pub fn as_slice<T: Element>(&self) -> Result<&[T]> {
        if !self.is_contiguous() {
            return Err(Error::shape(
                "as_slice",
                format!("a view with strides {:?}: call contiguous() first", self.layout.strides),
            ));
        }
        let (at, n) = (self.layout.offset, self.numel());
        Ok(&self.storage_slice::<T>()?[at..at + n])
    }
    /// The elements in row-major order, for writing. Copies first if the storage is shared or strided.
    pub fn as_mut_slice<T: Element>(&mut self) -> Result<&mut [T]> {
        if T::DTYPE != self.dtype {
            return Err(Error::dtype("as_mut_slice", format!("tensor is {}, asked for {}", self.dtype, T::DTYPE)));
        }
        self.make_owner()?;
        let (at, n) = (self.layout.offset, self.numel());
        #[cfg(feature = "cuda")]
        let device = self.device();
        match Arc::get_mut(&mut self.storage) {
            Some(Storage::Cpu(b)) => Ok(&mut b.as_mut_slice::<T>()[at..at + n]),
            #[cfg(feature = "cuda")]
            Some(Storage::Cuda(_)) => Err(storage::elsewhere(device)),
            None => Err(Error::shape("as_mut_slice", "storage is still shared after a copy")),
        }
    }
    /// Copy first if the storage is shared or the elements are strided: afterwards this tensor may be written.
    pub(crate) fn make_owner(&mut self) -> Result<()> {
        if !self.is_owner() {
            *self = self.copy()?;
        }
        Ok(())
    }
    /// True when the elements lie without gaps in storage that no other tensor has a share in.
    pub(crate) fn is_owner(&self) -> bool {
        self.is_contiguous() && Arc::strong_count(&self.storage) == 1
    }
    /// The elements in row-major order, in main memory.
    fn on_host(&self) -> Result<Self> {
        self.to_device(Device::Cpu)?.contiguous()
    }
    /// The elements in row-major order as a vector of the tensor's own element type.
    pub fn to_vec<T: Element>(&self) -> Result<Vec<T>> {
        Ok(self.on_host()?.as_slice::<T>()?.to_vec())
    }
    /// The elements in row-major order as f32, whatever float dtype they have.
    pub fn to_f32_vec(&self) -> Result<Vec<f32>> {
        let c = self.on_host()?;
        with_float!(self.dtype, "to_f32_vec", T => Ok(c.as_slice::<T>()?.iter().map(|x| x.to_acc().f64() as f32).collect()))
    }
    /// The elements in row-major order as f64, whatever float dtype they have.
    pub fn to_f64_vec(&self) -> Result<Vec<f64>> {
        let c = self.on_host()?;
        with_float!(self.dtype, "to_f64_vec", T => Ok(c.as_slice::<T>()?.iter().map(|x| x.to_acc().f64()).collect()))
    }
    /// The one element of a float scalar (any shape with one element).
    pub fn item(&self) -> Result<f64> {
        match self.to_f64_vec()?[..] {
            [x] => Ok(x),
            _ => Err(Error::shape("item", format!("needs one element, shape is {:?}", self.shape()))),
        }
    }
    /// The elements' little-endian bytes in row-major order, as files hold them.
    pub fn to_le_bytes(&self) -> Result<Vec<u8>> {
        let c = self.on_host()?;
        with_element!(self.dtype, "to_le_bytes", T => Ok(bytemuck::cast_slice(c.as_slice::<T>()?).to_vec()))
    }

    // ---- views: no element moves ----

    fn view(&self, layout: Layout) -> Self {
        Self { layout, dtype: self.dtype, storage: self.storage.clone() }
    }
    /// Another shape with as many elements. Zero-copy where strides allow, else a copy.
    pub fn reshape(&self, shape: &[usize]) -> Result<Self> {
        if checked_numel("reshape", shape)? != self.numel() {
            return Err(Error::shape(
                "reshape",
                format!("{:?} has {} elements, {shape:?} has not", self.shape(), self.numel()),
            ));
        }
        match self.layout.reshape(shape) {
            Some(l) => Ok(self.view(l)),
            None => self.copy()?.reshape(shape),
        }
    }
    /// Dimensions in another order: output dimension i is input dimension `dims[i]`.
    pub fn permute(&self, dims: &[usize]) -> Result<Self> {
        let mut seen = vec![false; self.rank()];
        let fits =
            dims.len() == self.rank() && dims.iter().all(|&d| seen.get_mut(d).is_some_and(|s| !std::mem::replace(s, true)));
        if !fits {
            return Err(Error::shape("permute", format!("{dims:?} is no order of the dimensions of {:?}", self.shape())));
        }
        Ok(self.view(self.layout.permute(dims)))
    }
    /// Swap two dimensions.
    pub fn transpose(&self, a: usize, b: usize) -> Result<Self> {
        let mut dims: Vec<usize> = (0..self.rank()).collect();
        if a >= dims.len() || b >= dims.len() {
            return Err(Error::shape("transpose", format!("dimensions {a}, {b} of shape {:?}", self.shape())));
        }
        dims.swap(a, b);
        self.permute(&dims)
    }
    /// Elements `start..start+len` along `dim`.
    pub fn narrow(&self, dim: usize, start: usize, len: usize) -> Result<Self> {
        match self.shape().get(dim) {
            Some(&n) if start.checked_add(len).is_some_and(|end| end <= n) => {
                Ok(self.view(self.layout.narrow(dim, start, len)))
            }
            _ => Err(Error::shape(
                "narrow",
                format!("{start}..{start}+{len} along dimension {dim} of shape {:?}", self.shape()),
            )),
        }
    }
    /// Broadcast to `shape`: leading dimensions are added, dimensions of size 1 repeated.
    pub fn expand(&self, shape: &[usize]) -> Result<Self> {
        checked_numel("expand", shape)?;
        match self.layout.expand(shape) {
            Some(l) => Ok(self.view(l)),
            None => Err(Error::shape("expand", format!("{:?} does not broadcast to {shape:?}", self.shape()))),
        }
    }
    /// Pieces of the given sizes along `dim`; the sizes must add up.
    pub fn split(&self, dim: usize, sizes: &[usize]) -> Result<Vec<Self>> {
        let total = sizes.iter().try_fold(0usize, |sum, &n| sum.checked_add(n));
        if total.is_none() || self.shape().get(dim).copied() != total {
            return Err(Error::shape("split", format!("sizes {sizes:?} along dimension {dim} of shape {:?}", self.shape())));
        }
        let mut at = 0;
        sizes
            .iter()
            .map(|&n| {
                at += n;
                self.narrow(dim, at - n, n)
            })
            .collect()
    }

    // ---- copies ----

    /// This tensor if its elements lie in row-major order without gaps, else a copy that does.
    pub fn contiguous(&self) -> Result<Self> {
        if self.is_contiguous() { Ok(self.clone()) } else { self.copy() }
    }
    /// This tensor if its rows (runs along the last dimension) are dense, else a contiguous copy.
    pub(crate) fn dense_rows(&self) -> Result<Self> {
        if self.has_dense_rows() { Ok(self.clone()) } else { self.copy() }
    }
    /// A contiguous copy with storage of its own.
    pub fn copy(&self) -> Result<Self> {
        #[cfg(feature = "cuda")]
        if let Storage::Cuda(_) = &*self.storage {
            return cuda::copy(self);
        }
        with_element!(self.dtype, "copy", T => {
            let src = self.storage_slice::<T>()?;
            let mut buffer = CpuBuffer::unspecified(self.dtype, self.numel());
            copy_strided(src, &self.layout, buffer.as_mut_slice::<T>());
            Ok(Self::over(buffer, self.dtype, self.shape()))
        })
    }
}

/// Write the elements of a view in row-major order.
fn copy_strided<T: Element>(src: &[T], l: &Layout, dst: &mut [T]) {
    use rayon::prelude::*;
    if dst.is_empty() {
        return;
    }
    if l.is_contiguous() {
        return dst.copy_from_slice(&src[l.offset..l.offset + dst.len()]);
    }
    let (w, s) = (l.shape[l.shape.len() - 1], l.strides[l.strides.len() - 1]);
    let rows_per_task = (16384 / w).max(1);
    dst.par_chunks_mut(rows_per_task * w).enumerate().for_each(|(task, out)| {
        for (r, row) in out.chunks_exact_mut(w).enumerate() {
            let at = l.row_offset(task * rows_per_task + r);
            if s == 1 {
                row.copy_from_slice(&src[at..at + w]);
            } else {
                for (i, x) in row.iter_mut().enumerate() {
                    *x = src[at + i * s];
                }
            }
        }
    });
}

impl std::fmt::Debug for Tensor {
    /// Shape, dtype and the first few elements.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tensor({:?}, {}, {}", self.shape(), self.dtype, self.device())?;
        let n = self.numel().min(6);
        let head = self.reshape(&[self.numel()]).and_then(|t| t.narrow(0, 0, n));
        let more = if self.numel() > n { ", .." } else { "" };
        match (self.dtype, head) {
            (DType::I64, Ok(h)) => write!(f, ", {:?}{more})", h.to_vec::<i64>().unwrap_or_default()),
            (DType::I8, Ok(h)) => write!(f, ", {:?}{more})", h.to_vec::<i8>().unwrap_or_default()),
            (_, Ok(h)) => write!(f, ", {:?}{more})", h.to_f32_vec().unwrap_or_default()),
            _ => write!(f, ")"),
        }
    }
}
