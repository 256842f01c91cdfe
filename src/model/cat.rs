//! The one model: dense, fixed CAT, adaptive CAT, CAT as a layer and hybrids are configurations of it.

use super::cache::plan_of;
use super::compressor::Compressor;
use super::config::{ModelConfig, ModelType};
use super::layers::{Pass, Stack, linear_init};
use super::param::{Builder, Param};
use super::plan::ChunkPlan;
use crate::autograd::Var;
use crate::memory::{Category, counted_as};
use crate::ops::{self, Mask, RopeTable, concat, expand, narrow, reshape};
use crate::tensor::{DType, Device, Tensor, check_memory};
use crate::{Error, Result};
use std::collections::BTreeMap;
use std::path::Path;

/// Labels with this value are not counted in the loss.
pub const IGNORE_INDEX: i64 = -100;

/// How to run a forward pass.
#[derive(Clone, Copy, Debug, Default)]
pub struct ForwardOptions {
    /// C; the model's (largest) if not given.
    pub chunk_size: Option<usize>,
    /// Save only block boundaries, and compute blocks again in backward: less memory, a third more work.
    pub recompute: bool,
}

/// A language model over token ids. Cloning shares parameters until one side writes.
#[derive(Clone, Debug)]
pub struct Cat {
    config: ModelConfig,
    pub(super) chunks: Option<Chunks>,
    pub(super) wte: Param,
    pub(super) decoder: Stack,
    pub(super) output: Param,
}

/// What a CAT has beside a dense model (sections 2 and 3).
#[derive(Clone, Debug)]
pub(super) struct Chunks {
    pub(super) f: Compressor,
    dummy_fx: Param,
    separator: Option<Param>,
}

impl Cat {
    /// A model with random weights (spec section 1), the same for the same seed. Errors where there is not enough memory
    /// for them.
    pub fn new(config: ModelConfig, seed: u64) -> Result<Self> {
        let source = Path::new("random weights");
        let mut count = Builder::count();
        Self::with(config.clone(), &mut count)?;
        check_memory("this model (f32 weights)", count.elements() * DType::F32.size() as u128)?;
        Self::build(config, Builder::random(seed), source)
    }
    /// A model with the given weights by native names. Errors name every missing, extra or misshapen tensor at once;
    /// `path` is what they name as the source.
    pub fn from_tensors(config: ModelConfig, tensors: BTreeMap<String, Tensor>, path: &Path) -> Result<Self> {
        Self::build(config, Builder::tensors(tensors), path)
    }
    pub(super) fn build(config: ModelConfig, mut builder: Builder, path: &Path) -> Result<Self> {
        let model = Self::with(config, &mut builder)?;
        builder.finish(path)?;
        Ok(model)
    }
    fn with(config: ModelConfig, b: &mut Builder) -> Result<Self> {
        config.check()?;
        let (d, v) = (config.decoder.dim, config.vocab_rows());
        let init = linear_init(d);
        let adaptive = config.model_type == ModelType::CatAdaptive;
        let chunks = match config.model_type {
            ModelType::Cat | ModelType::CatAdaptive => Some(Chunks {
                f: b.at("f", |b| Compressor::new(b, &config))?,
                dummy_fx: b.param("dummy_fx.weight", &[config.table_rows(), d], init)?,
                // the checkpoints' spelling
                separator: adaptive.then(|| b.param("seperator.weight", &[1, d], init)).transpose()?,
            }),
            _ => None,
        };
        Ok(Self {
            chunks,
            wte: b.param("wte.weight", &[v, d], init)?,
            decoder: Stack::new(b, &config.decoder, Some(&config))?,
            output: b.param("output.weight", &[v, d], init)?,
            config,
        })
    }

    /// What the model is.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }
    /// All parameters, in a fixed order.
    pub fn params_mut(&mut self) -> Vec<&mut Param> {
        let mut out = Vec::new();
        if let Some(c) = &mut self.chunks {
            c.f.collect(&mut out);
            out.push(&mut c.dummy_fx);
            out.extend(&mut c.separator);
        }
        out.push(&mut self.wte);
        self.decoder.collect(&mut out);
        out.push(&mut self.output);
        out
    }
    /// Handles to all parameters, in the order of [`Cat::params_mut`].
    pub fn params(&self) -> Vec<Param> {
        let mut shared = self.clone();
        shared.params_mut().into_iter().map(|p| p.clone()).collect()
    }
    /// This model with its parameters on another device (itself where they are there already).
    pub fn to_device(mut self, device: Device) -> Result<Self> {
        counted_as(Category::Weights, || {
            for p in self.params_mut() {
                *p.value_mut() = p.value().to_device(device)?;
            }
            Ok(self)
        })
    }
    /// Where the parameters are.
    pub fn device(&self) -> Device {
        self.output.value().device()
    }
    /// Number of parameters.
    pub fn numel(&self) -> usize {
        self.params().iter().map(|p| p.value().numel()).sum()
    }

    // ---- whole sequences ----

    /// Logits over V for each position: ids `[B, N]` -> `[B, N, V]`. Row t predicts token t+1.
    pub fn logits(&self, ids: &Tensor, options: ForwardOptions) -> Result<Var> {
        ops::linear(&self.hidden(ids, options)?, &self.output, None)
    }
    /// Mean cross-entropy, in nats: ids and labels `[B, N]` -> a scalar. Labels are the next tokens already;
    /// [`IGNORE_INDEX`] is not counted. Never holds all logits.
    pub fn loss(&self, ids: &Tensor, labels: &Tensor, options: ForwardOptions) -> Result<Var> {
        if labels.shape() != ids.shape() {
            return Err(Error::shape("loss", format!("labels {:?} do not fit ids {:?}", labels.shape(), ids.shape())));
        }
        ops::linear_cross_entropy(&self.hidden(ids, options)?, &self.output, labels, IGNORE_INDEX)
    }
    /// The decoder's normed output, ids `[B, N]` -> `[B, N, D]`.
    pub fn hidden(&self, ids: &Tensor, options: ForwardOptions) -> Result<Var> {
        let (_, n) = self.check_ids(ids)?;
        let chunk = self.config.resolve_chunk_size(options.chunk_size)?;
        let (x, mut pass) = match plan_of(&self.config, chunk, n) {
            Some(plan) if self.chunks.is_some() => {
                let tokens = ops::embedding(ids, &self.wte)?;
                let slots = self.slots(ids, plan.full_chunks(), chunk, options.recompute)?;
                let x = ops::assemble_blocks(&slots, self.separator(), &tokens, chunk)?;
                let mut pass = Pass::new(self.rope(&plan.positions())?, plan.mask());
                pass.keep = Some(plan.outputs());
                (x, pass)
            }
            plan => (ops::embedding(ids, &self.wte)?, self.token_pass(plan, n)?),
        };
        pass.recompute = options.recompute;
        self.decoder.forward(x, &pass)
    }

    /// A pass over plain tokens at positions `0..n` (dense models and `cat_layer` ones).
    fn token_pass(&self, layer_plan: Option<ChunkPlan>, n: usize) -> Result<Pass> {
        let positions: Vec<usize> = (0..n).collect();
        let mut pass = Pass::new(self.rope(&positions)?, Mask::Causal);
        pass.layer_plan = match layer_plan {
            Some(plan) => Some((plan, self.rope(&plan.positions())?)),
            None => None,
        };
        Ok(pass)
    }
    pub(super) fn rope(&self, positions: &[usize]) -> Result<RopeTable> {
        RopeTable::new(positions, self.config.decoder.head_dim(), self.config.decoder.rope_base)
    }
    pub(super) fn separator(&self) -> Option<&Var> {
        self.chunks.as_ref().and_then(|c| c.separator.as_deref())
    }
    /// dummy_fx and the representations of the first `k` chunks: `[B, k+1, D]`.
    pub(super) fn slots(&self, ids: &Tensor, k: usize, chunk: usize, recompute: bool) -> Result<Var> {
        let row = self.config.table_row(chunk);
        let fx = match &self.chunks {
            Some(c) if k > 0 => Some(c.f.forward(&ids.narrow(1, 0, k * chunk)?, chunk, row, recompute)?),
            _ => None,
        };
        self.slots_of(ids.dim(0), chunk, fx)
    }
    /// dummy_fx before the representations `[B, k, D]` of chunks, if there are any.
    pub(super) fn slots_of(&self, b: usize, chunk: usize, fx: Option<Var>) -> Result<Var> {
        let Some(c) = &self.chunks else { return Err(Error::config("a dense model has no chunks")) };
        let d = self.config.decoder.dim;
        let dummy = reshape(&narrow(&c.dummy_fx, 0, self.config.table_row(chunk), 1)?, &[1, 1, d])?;
        let dummy = expand(&dummy, &[b, 1, d])?;
        fx.map_or(Ok(dummy.clone()), |fx| concat(&[&dummy, &fx], 1))
    }
    /// (B, N) of ids, checked: rank 2, int64, not empty, N within block_size.
    fn check_ids(&self, ids: &Tensor) -> Result<(usize, usize)> {
        let &[b, n] = ids.shape() else {
            return Err(Error::shape("model", format!("ids must be [batch, tokens], got {:?}", ids.shape())));
        };
        if b == 0 || n == 0 {
            return Err(Error::empty("the input", "give at least one token"));
        }
        if n > self.config.block_size {
            return Err(Error::Length { len: n, block_size: self.config.block_size });
        }
        Ok((b, n))
    }
}
