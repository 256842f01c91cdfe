//! AdamW on CUDA: all parameters in a few launches, their norm on the way, nothing waited for.

use crate::cuda::{Arg, Grid, kernels::adamw as kernel};
use crate::ops::adamw::{AdamWParam, AdamWSettings};
use crate::tensor::{DType, Device, Tensor};
use crate::{Error, Result};

/// Elements of one block: CHUNK in the kernel.
const CHUNK: usize = 16_384;
/// Words of one entry of the kernel's table.
const ENTRY: usize = 8;

/// Tensors of one dtype as the kernel's table of them.
struct Group {
    dtype: DType,
    table: Vec<i64>,
    chunks: usize,
}

impl Group {
    fn new(dtype: DType) -> Self {
        Self { dtype, table: Vec::new(), chunks: 0 }
    }
    /// Add n elements, none for n = 0. The addresses are those of param, gradient, m, v and master (0: none); `wide` says
    /// that the gradient is f32.
    fn add(&mut self, addresses: [u64; 5], n: usize, keep: f32, wide: bool) {
        if n == 0 {
            return;
        }
        let flags = u64::from(keep.to_bits()) | u64::from(wide) << 32;
        self.table.extend(addresses.map(|a| a as i64));
        self.table.extend([n as i64, self.chunks as i64, flags as i64]);
        self.chunks += n.div_ceil(CHUNK);
    }
    fn upload(&self, device: Device) -> Result<Uploaded> {
        let count = self.table.len() / ENTRY;
        let table = Tensor::from_slice(&self.table, &[count, ENTRY])?.to_device(device)?;
        Ok(Uploaded { dtype: self.dtype, table, count, chunks: self.chunks })
    }
}

/// A group whose table is on the device.
struct Uploaded {
    dtype: DType,
    table: Tensor,
    count: usize,
    chunks: usize,
}

impl Uploaded {
    fn variant(&self) -> crate::cuda::Variant {
        match self.dtype {
            DType::BF16 => "bf16",
            DType::F16 => "f16",
            _ => "float",
        }
        .into()
    }
    /// A sum of squares for each chunk, at an address.
    fn squares(&self, partial: u64) -> Result<()> {
        let args = [partial.into(), self.table.read()?, self.count.into()];
        let grid = Grid::new(self.chunks, 256);
        // SAFETY: the parameters are (partial, table, entries); the caller's partial has an element for each chunk, a block
        // each; the table's gradients are alive, as large as it says, and of the dtypes that it says.
        unsafe { self.table.gpu()?.launch(kernel::adamw_squares, self.variant(), grid, &args) }
    }
    /// The step, with gradients times `factor`, where `norm` is finite; both are one f32 on the device.
    fn step(&self, norm: &Tensor, factor: &Tensor, step: u64, h: &AdamWSettings) -> Result<()> {
        let t = step as f64;
        let (rate, root) = (h.lr / (1.0 - h.beta1.powf(t)), 1.0 / (1.0 - h.beta2.powf(t)).sqrt());
        let numbers = [h.beta1, 1.0 - h.beta1, h.beta2, 1.0 - h.beta2, rate, root, h.eps];
        let mut args: Vec<Arg> = vec![self.table.read()?, self.count.into(), norm.read()?, factor.read()?];
        args.extend(numbers.map(|x| Arg::from(x as f32)));
        let grid = Grid::new(self.chunks, 256);
        // SAFETY: the parameters are (table, entries, norm, factor, b1, 1 - b1, b2, 1 - b2, rate, root, eps); norm and factor
        // have one element; the table's tensors are alive, contiguous, as large as it says, of the dtypes that it says, and
        // those written have no other owner.
        unsafe { self.table.gpu()?.launch(kernel::adamw_update, self.variant(), grid, &args) }
    }
}

/// What a parameter keeps of itself beside the step: `1 - lr wd`.
fn keep(h: &AdamWSettings, weight_decay: f64) -> f32 {
    (1.0 - h.lr * weight_decay) as f32
}

/// The address of a tensor that may be written in place.
fn owned(t: &mut Tensor) -> Result<u64> {
    t.make_owner()?;
    t.pointer()
}

/// A step over all parameters, clipped: the norm of the gradients, a scalar on the device. Nothing changes where that is not
/// finite.
pub(crate) fn update(params: &mut [AdamWParam], count: u64, h: &AdamWSettings, clip: f64) -> Result<Tensor> {
    let Some(device) = params.first().map(|p| p.param.device()) else { return Ok(Tensor::scalar(0f32)) };
    let gradients: Vec<Tensor> = params.iter().map(|p| p.grad.contiguous()).collect::<Result<_>>()?;
    let mut groups = [DType::F32, DType::BF16, DType::F16].map(Group::new);
    for (p, gradient) in params.iter_mut().zip(&gradients) {
        let Some(group) = groups.iter_mut().find(|g| g.dtype == p.param.dtype()) else {
            return Err(Error::dtype("adamw", format!("cannot update {} on {device}", p.param.dtype())));
        };
        let (n, wide) = (p.param.numel(), gradient.dtype() == DType::F32);
        let master = p.master.as_deref_mut().map_or(Ok(0), owned)?;
        let addresses = [owned(p.param)?, gradient.pointer()?, owned(p.m)?, owned(p.v)?, master];
        group.add(addresses, n, keep(h, p.weight_decay), wide);
    }
    let groups: Vec<Uploaded> = groups.iter().filter(|g| g.chunks > 0).map(|g| g.upload(device)).collect::<Result<_>>()?;
    let chunks = groups.iter().map(|g| g.chunks).sum::<usize>();
    let partial = Tensor::empty(&[chunks], DType::F32, device)?;
    let mut at = partial.pointer()?;
    for group in &groups {
        group.squares(at)?;
        at += 4 * group.chunks as u64;
    }
    let mut norm = Tensor::empty(&[], DType::F32, device)?;
    let mut factor = Tensor::empty(&[], DType::F32, device)?;
    let args = [norm.write()?, factor.write()?, partial.read()?, chunks.into(), (clip as f32).into()];
    // SAFETY: the parameters are (norm, factor, partial, its elements, clip); norm and factor have one element.
    unsafe { partial.gpu()?.launch(kernel::adamw_norm, "float".into(), Grid::new(1, 1024), &args)? };
    for group in &groups {
        group.step(&norm, &factor, count, h)?;
    }
    Ok(norm)
}

/// A step on one parameter, whose gradient counts `grad_scale` times.
pub(crate) fn step(
    param: &mut Tensor,
    grad: &Tensor,
    m: &mut Tensor,
    v: &mut Tensor,
    step: u64,
    h: &AdamWSettings,
    grad_scale: f64,
) -> Result<()> {
    let grad = grad.contiguous()?;
    let mut group = Group::new(param.dtype());
    let addresses = [owned(param)?, grad.pointer()?, owned(m)?, owned(v)?, 0];
    group.add(addresses, param.numel(), keep(h, h.weight_decay), grad.dtype() == DType::F32);
    let factor = Tensor::scalar(grad_scale as f32).to_device(param.device())?;
    group.upload(param.device())?.step(&factor, &factor, step, h)
}

/// The sum of squares: f32 within a chunk, f64 over chunks, in order.
pub(crate) fn square_sum(x: &Tensor) -> Result<f64> {
    if !matches!(x.dtype(), DType::F32 | DType::BF16 | DType::F16) {
        return Err(Error::dtype("global_norm", format!("needs f32, bf16 or f16 on {}, got {}", x.device(), x.dtype())));
    }
    let x = x.contiguous()?;
    let mut group = Group::new(x.dtype());
    group.add([0, x.pointer()?, 0, 0, 0], x.numel(), 1.0, x.dtype() == DType::F32);
    let partial = Tensor::empty(&[group.chunks], DType::F32, x.device())?;
    group.upload(x.device())?.squares(partial.pointer()?)?;
    Ok(partial.to_vec::<f32>()?.into_iter().map(f64::from).sum())
}
