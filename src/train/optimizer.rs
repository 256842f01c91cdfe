//! AdamW over a model's parameters, with the global norm clipped.

use crate::autograd::Gradients;
use crate::memory::{Category, counted_as};
use crate::model::{Cat, Param};
use crate::ops::{self, AdamWParam, AdamWSettings};
use crate::tensor::{DType, Tensor};
use crate::{Error, Result};

/// First and second moments, and f32 masters where parameters are 16 bits wide, in the order of `Cat::params_mut`.
#[derive(Debug)]
pub struct Optimizer {
    pub(super) m: Vec<Tensor>,
    pub(super) v: Vec<Tensor>,
    /// Empty for f32 parameters, which are their own masters.
    pub(super) master: Vec<Tensor>,
}

impl Optimizer {
    /// Moments of zero for each parameter, and masters where they are needed.
    pub fn new(model: &Cat) -> Result<Self> {
        counted_as(Category::Optimizer, || Self::zeroed(model))
    }
    fn zeroed(model: &Cat) -> Result<Self> {
        let params = model.params();
        let zeros = || {
            let like = |p: &Param| Tensor::zeros(p.shape(), DType::F32, p.value().device());
            params.iter().map(like).collect::<Result<Vec<_>>>()
        };
        let wide = params.iter().all(|p| matches!(p.dtype(), DType::F32 | DType::F64));
        let master = match wide {
            true => vec![],
            false => params.iter().map(|p| ops::cast_tensor(p.value(), DType::F32)).collect::<Result<_>>()?,
        };
        Ok(Self { m: zeros()?, v: zeros()?, master })
    }

    /// One step (counted from 1) with these gradients, which are consumed. Returns the global norm before clipping.
    ///
    /// A norm that is not finite changes nothing: the step is refused with an error.
    pub fn step(
        &mut self,
        model: &mut Cat,
        grads: &mut Gradients,
        step: u64,
        settings: &AdamWSettings,
        clip: f64,
    ) -> Result<f64> {
        accepted(step, self.submit(model, grads, step, settings, clip)?.item()?)
    }
    /// As [`Optimizer::step`] without waiting for it: the norm as a scalar on the device.
    pub(crate) fn submit(
        &mut self,
        model: &mut Cat,
        grads: &mut Gradients,
        step: u64,
        settings: &AdamWSettings,
        clip: f64,
    ) -> Result<Tensor> {
        let mut params = model.params_mut();
        let taken: Vec<Option<Tensor>> = params.iter().map(|p| grads.take(&p.var)).collect();
        let mut masters = self.master.iter_mut().map(Some).chain(std::iter::repeat_with(|| None));
        let mut all = Vec::with_capacity(params.len());
        for ((p, grad), (m, v)) in params.iter_mut().zip(&taken).zip(self.m.iter_mut().zip(&mut self.v)) {
            let master = masters.next().flatten();
            let Some(grad) = grad else { continue };
            // matrices decay; norm weights and biases do not
            let weight_decay = if p.shape().len() > 1 { settings.weight_decay } else { 0.0 };
            all.push(AdamWParam { param: p.value_mut(), grad, m, v, master, weight_decay });
        }
        ops::adamw(&mut all, step, settings, clip)
    }
}

/// The norm of a step; an error if it is one that refused the step.
pub(super) fn accepted(step: u64, norm: f64) -> Result<f64> {
    if norm.is_finite() {
        return Ok(norm);
    }
    let detail = format!("the gradient of step {step} is not finite: lower the rate, or look at the data");
    Err(Error::gradient("adamw", detail))
}
