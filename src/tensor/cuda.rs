//! Tensors in device memory: making them, moving them, and what kernels need to know of them.

use super::storage::{self, Storage};
use super::{DType, Device, Layout, Tensor};
use crate::cuda::{Arg, CudaBuffer, Gpu, Variant, View, copy_strided, gpu};
use crate::{Error, Result};
use std::sync::Arc;

fn over(buffer: CudaBuffer, dtype: DType, shape: &[usize]) -> Tensor {
    Tensor { layout: Layout::contiguous(shape), dtype, storage: Arc::new(Storage::Cuda(buffer)) }
}

/// Kernels exist for these element types, by their names in C++.
fn element(dtype: DType) -> Result<&'static str> {
    match dtype {
        DType::F32 => Ok("float"),
        DType::BF16 => Ok("bf16"),
        DType::F16 => Ok("f16"),
        DType::I64 => Ok("i64"),
        DType::I8 => Ok("i8"),
        DType::F64 => Err(Error::dtype("cuda", "f64 exists on the CPU only: cast to f32, bf16 or f16")),
    }
}

pub(super) fn zeros(shape: &[usize], n: usize, dtype: DType, ordinal: usize) -> Result<Tensor> {
    element(dtype)?;
    Ok(over(CudaBuffer::zeroed(gpu(ordinal)?, n * dtype.size())?, dtype, shape))
}

pub(super) fn empty(shape: &[usize], dtype: DType, ordinal: usize) -> Result<Tensor> {
    element(dtype)?;
    let n: usize = shape.iter().product();
    Ok(over(CudaBuffer::new(gpu(ordinal)?, n * dtype.size())?, dtype, shape))
}

/// From main memory, contiguous there.
pub(super) fn upload(host: &Tensor, ordinal: usize) -> Result<Tensor> {
    element(host.dtype)?;
    let Storage::Cpu(buffer) = &*host.storage else { return Err(storage::elsewhere(host.device())) };
    let (at, bytes) = (host.layout.offset * host.dtype.size(), host.numel() * host.dtype.size());
    let bytes = &buffer.as_slice::<u8>()[at..at + bytes];
    Ok(over(CudaBuffer::from_host(gpu(ordinal)?, bytes)?, host.dtype, host.shape()))
}

/// To main memory, from a contiguous tensor.
pub(super) fn download(t: &Tensor) -> Result<Tensor> {
    let Storage::Cuda(buffer) = &*t.storage else { return Ok(t.clone()) };
    let mut host = Tensor::unspecified(t.shape(), t.dtype);
    let Some(Storage::Cpu(to)) = Arc::get_mut(&mut host.storage) else { return Err(storage::elsewhere(t.device())) };
    buffer.download(t.layout.offset * t.dtype.size(), to.as_mut_slice::<u8>())?;
    Ok(host)
}

pub(super) fn copy(t: &Tensor) -> Result<Tensor> {
    let (gpu, from) = (t.gpu()?, t.pointer()?);
    let buffer = copy_strided(gpu, from, element(t.dtype)?, t.dtype.size(), t.shape(), t.layout.strides())?;
    Ok(over(buffer, t.dtype, t.shape()))
}

impl Tensor {
    fn cuda_buffer(&self) -> Result<&CudaBuffer> {
        match &*self.storage {
            Storage::Cuda(buffer) => Ok(buffer),
            Storage::Cpu(_) => {
                let detail = "the elements are in main memory: call to_device first".into();
                Err(Error::Device { device: Device::Cpu.to_string(), detail })
            }
        }
    }
    /// The device that the elements are on.
    pub(crate) fn gpu(&self) -> Result<&'static Gpu> {
        Ok(self.cuda_buffer()?.gpu())
    }
    /// Overwrite the first elements of the storage, in place and whoever shares it, after the work submitted before.
    pub(crate) fn overwrite(&mut self, elements: &[i64]) -> Result<()> {
        self.cuda_buffer()?.upload(bytemuck::cast_slice(elements))
    }
    /// The address of element `[0, 0, ..]`.
    pub(crate) fn pointer(&self) -> Result<u64> {
        Ok(self.cuda_buffer()?.pointer() + (self.layout.offset * self.dtype.size()) as u64)
    }
    /// As a kernel's argument, to be read.
    pub(crate) fn read(&self) -> Result<Arg> {
        Ok(self.pointer()?.into())
    }
    /// As a kernel's argument, to be written. Copies first if the storage is shared or strided, so that no other tensor
    /// changes.
    pub(crate) fn write(&mut self) -> Result<Arg> {
        self.make_owner()?;
        self.read()
    }
    /// What a kernel over this tensor is compiled as.
    pub(crate) fn variant(&self) -> Result<Variant> {
        element(self.dtype).map(Variant::from)
    }
    /// Every element, as kernels find them by number.
    pub(crate) fn elements(&self, op: &'static str) -> Result<View> {
        View::new(op, self.shape(), self.layout.strides())
    }
    /// The rows (runs along the last dimension), as kernels find their first elements by number.
    pub(crate) fn rows(&self, op: &'static str) -> Result<View> {
        let lead = self.rank().saturating_sub(1);
        View::new(op, &self.shape()[..lead], &self.layout.strides()[..lead])
    }
}

/// A pointer argument that may be absent.
pub(crate) fn read_or_null(t: Option<&Tensor>) -> Result<Arg> {
    t.map_or(Ok(Arg::from(0u64)), Tensor::read)
}
