//! A linear map with what stands around it in a decoder block: the norm before, the gate or the residual add behind. Has no
//! gradient.
//!
//! `n = x`, or with a norm `n = rms_norm(x)`; then `y = n W^T + bias + residual`, or with a gate `y = silu(n W^T) * (n U^T)`.

use super::elementwise::{same_device, same_dtype};
use super::matmul::gemm;
use super::swiglu::gated;
use super::{add, linear, linear_pair, rms_norm};
use crate::autograd::{Var, no_grad};
use crate::tensor::Tensor;
use crate::{Error, Result};

const OP: &str = "fused_linear";

/// What is done to the rows of x, `[.., I]`.
#[derive(Clone, Debug)]
pub struct FusedLinear<'a> {
    /// RMSNorm first: its weight `[I]`, and eps.
    pub norm: Option<(&'a Tensor, f64)>,
    /// W, `[O, I]`.
    pub weight: &'a Tensor,
    /// U, `[O, I]`: SwiGLU, with W for the gate. Then there is neither bias nor residual.
    pub up: Option<&'a Tensor>,
    /// `[O]`.
    pub bias: Option<&'a Tensor>,
    /// `[.., O]`, contiguous; the result takes its memory where nobody else holds it.
    pub residual: Option<Tensor>,
    /// The weights have been there since before some kernel that did not begin early, and that is before all that began early since:
    /// a CUDA kernel may begin to read them while those are under way.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub(crate) settled: bool,
}

impl<'a> FusedLinear<'a> {
    /// `x W^T` so far.
    pub fn new(weight: &'a Tensor) -> Self {
        Self { norm: None, weight, up: None, bias: None, residual: None, settled: false }
    }
    /// With RMSNorm before it.
    pub fn after_norm(self, weight: &'a Tensor, eps: f64) -> Self {
        Self { norm: Some((weight, eps)), ..self }
    }
    /// With a bias.
    pub fn bias(self, bias: Option<&'a Tensor>) -> Self {
        Self { bias, ..self }
    }
    /// As the gate of SwiGLU.
    pub fn gate_of(self, up: &'a Tensor) -> Self {
        Self { up: Some(up), ..self }
    }
    /// Added to what is there.
    pub fn onto(self, residual: Tensor) -> Self {
        Self { residual: Some(residual), ..self }
    }
    pub(crate) fn settled(self) -> Self {
        Self { settled: true, ..self }
    }

    /// The shape of the result.
    fn check(&self, x: &Tensor) -> Result<Vec<usize>> {
        let w = self.weight;
        let wrong = |detail: String| Err(Error::shape(OP, detail));
        if x.rank() == 0 || w.rank() != 2 || w.dim(1) != x.last_dim() {
            return wrong(format!("x {:?} does not fit weight {:?} [out, in]", x.shape(), w.shape()));
        }
        let mut shape = x.shape().to_vec();
        shape[x.rank() - 1] = w.dim(0);
        let beside = [
            (self.norm.map(|n| n.0), "norm", &[w.dim(1)][..]),
            (self.up, "up", w.shape()),
            (self.bias, "bias", &[w.dim(0)]),
            (self.residual.as_ref(), "residual", &shape),
        ];
        let mut all = vec![x, w];
        for (t, name, want) in beside {
            let Some(t) = t else { continue };
            if t.shape() != want {
                return wrong(format!("{name} {:?} should be {want:?}", t.shape()));
            }
            all.push(t);
        }
        if self.up.is_some() && (self.bias.is_some() || self.residual.is_some()) {
            return wrong("a gated product takes neither bias nor residual".into());
        }
        same_dtype(OP, &all)?;
        same_device(OP, &all)?;
        if !x.dtype().is_float() {
            return Err(Error::dtype(OP, format!("needs a float dtype, got {}", x.dtype())));
        }
        Ok(shape)
    }
}

/// The formula above; x `[.., I]` of any strides, result `[.., O]`.
///
/// On CUDA a few rows (eight) are one kernel, which reads the weights once and rounds once, at the end, and whose result for a
/// row is the same in every bit whatever rows are beside it. A gated product of some 300 rows is, on Hopper, a kernel after the
/// norm's, which rounds once too. Otherwise these are the ops one after the other.
pub fn fused_linear(x: &Tensor, map: FusedLinear) -> Result<Tensor> {
    let shape = map.check(x)?;
    let rows = shape[..shape.len() - 1].iter().product();
    let x = x.reshape(&[rows, map.weight.dim(1)])?;
    let FusedLinear { weight, residual, .. } = map;
    // moved, not shared: the result may take its memory
    let residual = residual.map(|r| r.reshape(&[rows, weight.dim(0)])).transpose()?;
    let map = FusedLinear { residual, ..map };
    #[cfg(feature = "cuda")]
    if let crate::tensor::Device::Cuda(_) = x.device()
        && let Some(y) = in_one(&x, &map)?
    {
        let weights = map.weight.numel() * if map.up.is_some() { 2 } else { 1 };
        crate::profile::moved((weights + x.numel() + y.numel()) * y.dtype().size());
        return y.reshape(&shape);
    }
    by_ops(&x, map)?.reshape(&shape)
}

/// The product and what follows it as one kernel, for x `[R, I]`; `None` where none takes it, or none is worth it.
#[cfg(feature = "cuda")]
fn in_one(x: &Tensor, map: &FusedLinear) -> Result<Option<Tensor>> {
    use super::cuda::{few_rows, gated_rows};
    let residual = map.residual.as_ref();
    {
        let _op = crate::profile::enter("few_rows :: product");
        if let Some(y) = few_rows::product(x, map.norm, (map.weight, map.up), map.bias, residual, map.settled)? {
            return Ok(Some(y));
        }
    }
    if !gated_rows::takes(x, map)? {
        return Ok(None);
    }
    let n = normed(x, map)?;
    let _op = crate::profile::enter("gated_rows :: product");
    gated_rows::product(&n, map)
}

/// n.
fn normed(x: &Tensor, map: &FusedLinear) -> Result<Tensor> {
    let Some((w, eps)) = map.norm else { return Ok(x.clone()) };
    no_grad(|| Ok(rms_norm(&Var::constant(x.clone()), &Var::constant(w.clone()), eps)?.into_value()))
}

/// The ops one after the other, for x `[R, I]`.
fn by_ops(x: &Tensor, map: FusedLinear) -> Result<Tensor> {
    let n = Var::constant(normed(x, &map)?);
    let FusedLinear { weight, up, bias, residual, .. } = map;
    no_grad(|| {
        let constant = |t: &Tensor| Var::constant(t.clone());
        let weight = constant(weight);
        if let Some(up) = up {
            let [gate, up] = linear_pair(&n, [&weight, &constant(up)])?;
            drop(n);
            return gated(gate.into_value(), up.value());
        }
        let start = match (residual, bias) {
            (Some(r), Some(b)) => Some(add(&Var::constant(r), &constant(b))?.into_value()),
            (Some(r), None) => Some(r),
            (None, _) => return Ok(linear(&n, &weight, bias.map(constant).as_ref())?.into_value()),
        };
        gemm(n.value(), &weight.value().transpose(0, 1)?, start, weight.dtype())
    })
}

#[cfg(all(test, feature = "cuda"))]
mod tests {
    use super::*;
    use crate::ops::cast_tensor;
    use crate::random::fill_normal;
    use crate::tensor::DType;

    /// Results cannot show whether a kernel of its own is taken at all: this does, and that weights read early are the same.
    #[test]
    fn kernels_of_their_own_are_taken() {
        let Some(cuda) = crate::devices::cuda() else { return };
        let mut key = 0;
        let mut normal = |shape: &[usize], dtype: DType| {
            let mut all = vec![0.0; shape.iter().product()];
            key += 1;
            fill_normal(&mut all, key, 1.0 / 16.0);
            cast_tensor(&Tensor::from_vec(all, shape).unwrap(), dtype).unwrap().to_device(cuda).unwrap()
        };
        let gpu = crate::cuda::gpu(0).unwrap();
        let hopper = gpu.capability == (9, 0) && gpu.multiprocessors == 132;
        let (i, o) = (2048, 5632);
        for dtype in [DType::BF16, DType::F16, DType::F32] {
            let (norm, w, u) = (normal(&[i], dtype), normal(&[o, i], dtype), normal(&[o, i], dtype));
            for rows in [1, 2, 8, 9, 256, 257, 320, 321] {
                let x = normal(&[rows, i], dtype);
                let gated = |settled| FusedLinear { settled, ..FusedLinear::new(&w).after_norm(&norm, 1e-5).gate_of(&u) };
                let many = (257..=320).contains(&rows) && hopper && dtype != DType::F32;
                let early = in_one(&x, &gated(true)).unwrap();
                assert_eq!(early.is_some(), rows <= 8 || many, "{rows} gated rows of {dtype}");
                let late = in_one(&x, &gated(false)).unwrap();
                let bits = |y: Option<Tensor>| y.map(|y| y.to_f32_vec().unwrap());
                assert_eq!(bits(early), bits(late), "{rows} gated rows of {dtype}");
                let plain = FusedLinear::new(&w).onto(normal(&[rows, o], dtype)).settled();
                assert_eq!(in_one(&x, &plain).unwrap().is_some(), rows <= 8, "{rows} rows of {dtype}");
            }
        }
    }
}
