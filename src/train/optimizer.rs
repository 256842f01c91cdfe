//! AdamW over a model's parameters, with the global norm clipped.

use crate::autograd::Gradients;
use crate::model::Cat;
use crate::ops::{self, AdamWSettings};
use crate::tensor::{DType, Device, Tensor};
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
        let params = model.params();
        let zeros = || params.iter().map(|p| Tensor::zeros(p.shape(), DType::F32, Device::Cpu)).collect::<Result<Vec<_>>>();
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
        let mut params = model.params_mut();
        let taken: Vec<Option<Tensor>> = params.iter().map(|p| grads.take(&p.var)).collect();
        let norm = ops::global_norm(taken.iter().flatten())?;
        if !norm.is_finite() {
            let detail = format!("the gradient of step {step} is not finite: lower the rate, or look at the data");
            return Err(Error::gradient("adamw", detail));
        }
        let scale = if clip > 0.0 && norm > clip { clip / norm } else { 1.0 };
        for (i, (p, g)) in params.iter_mut().zip(&taken).enumerate() {
            let Some(g) = g else { continue };
            // matrices decay; norm weights and biases do not
            let decay = if p.shape().len() > 1 { settings.weight_decay } else { 0.0 };
            let settings = AdamWSettings { weight_decay: decay, ..*settings };
            let (m, v) = (&mut self.m[i], &mut self.v[i]);
            match self.master.get_mut(i) {
                None => ops::adamw_step(p.value_mut(), g, m, v, step, &settings, scale)?,
                Some(master) => {
                    ops::adamw_step(master, &ops::cast_tensor(g, DType::F32)?, m, v, step, &settings, scale)?;
                    *p.value_mut() = ops::cast_tensor(master, p.dtype())?;
                }
            }
        }
        Ok(norm)
    }
}
