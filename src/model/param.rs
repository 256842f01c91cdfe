//! Named parameters, and the builder that makes them: drawn at random, or taken from a checkpoint's tensors.

use super::formats::listed;
use crate::autograd::Var;
use crate::random;
use crate::tensor::{DType, Device, Tensor};
use crate::{Error, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::{Deref, DerefMut};
use std::path::Path;

/// A parameter and its name in the native `state_dict`, such as `layers.0.attention.wqkv.weight`.
#[derive(Clone, Debug)]
pub struct Param {
    pub name: String,
    pub var: Var,
}

impl Deref for Param {
    type Target = Var;
    fn deref(&self) -> &Var {
        &self.var
    }
}
impl DerefMut for Param {
    fn deref_mut(&mut self) -> &mut Var {
        &mut self.var
    }
}

/// How a parameter begins (spec section 1, Initialisation).
#[derive(Clone, Copy, Debug)]
pub enum Init {
    Zeros,
    Ones,
    /// Normal(0, std).
    Normal(f64),
}

enum Source {
    /// Nothing: parameters are placeholders, their elements are counted.
    Count(u128),
    Random {
        seed: u64,
    },
    Tensors(BTreeMap<String, Tensor>),
}

/// What is wrong with the parts that a parameter is made of in a checkpoint.
pub(super) struct Parts {
    pub native: String,
    pub missing: Vec<String>,
    pub mismatched: Vec<String>,
}

/// Why a tensor of a checkpoint does not fit.
pub(super) fn misfit(name: &str, t: &Tensor, shape: &[usize]) -> String {
    format!("{name} is {} {:?}, config says {shape:?}", t.dtype(), t.shape())
}

/// Hands out the parameters of a model by name, and keeps account of names that do not fit.
pub struct Builder {
    source: Source,
    prefix: String,
    missing: Vec<String>,
    mismatched: Vec<String>,
    /// Parameters whose parts in the file do not make them; what is wrong is noted already.
    refused: BTreeSet<String>,
    /// How error messages call a parameter.
    display: fn(&str) -> String,
}

impl Builder {
    /// Makes placeholders, to learn how many elements the parameters of a config have before taking memory for them.
    pub fn count() -> Self {
        Self::new(Source::Count(0))
    }
    /// The elements of all parameters asked of [`Builder::count`].
    pub fn elements(&self) -> u128 {
        if let Source::Count(n) = self.source { n } else { 0 }
    }
    /// Parameters drawn at random. Each depends on the seed and its own name only.
    pub fn random(seed: u64) -> Self {
        Self::new(Source::Random { seed })
    }
    /// Parameters taken from a checkpoint.
    pub fn tensors(tensors: BTreeMap<String, Tensor>) -> Self {
        Self::new(Source::Tensors(tensors))
    }
    fn new(source: Source) -> Self {
        let refused = BTreeSet::new();
        Self { source, prefix: String::new(), missing: vec![], mismatched: vec![], refused, display: str::to_string }
    }
    /// Errors call parameters by `display(native name)`.
    pub fn naming(self, display: fn(&str) -> String) -> Self {
        Self { display, ..self }
    }
    /// A parameter that the checkpoint holds in parts, some of them missing or of another shape.
    pub(super) fn refuse(&mut self, parts: Parts) {
        self.refused.insert(parts.native);
        self.missing.extend(parts.missing);
        self.mismatched.extend(parts.mismatched);
    }
    /// Run `f` with `name.` put before every name.
    pub fn at<T>(&mut self, name: impl std::fmt::Display, f: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        let len = self.prefix.len();
        self.prefix.push_str(&format!("{name}."));
        let r = f(self);
        self.prefix.truncate(len);
        r
    }
    /// The parameter `prefix.name` of the given shape.
    pub fn param(&mut self, name: &str, shape: &[usize], init: Init) -> Result<Param> {
        let name = format!("{}{name}", self.prefix);
        let value = match &mut self.source {
            Source::Count(n) => {
                *n = n.saturating_add(shape.iter().fold(1, |n, &d| n.saturating_mul(d as u128)));
                placeholder()?
            }
            Source::Random { seed } => draw(*seed, &name, shape, init)?,
            Source::Tensors(tensors) => match tensors.remove(&name) {
                Some(t) if t.shape() == shape && t.dtype().is_float() => t,
                other => {
                    match other {
                        _ if self.refused.contains(&name) => {}
                        Some(t) => self.mismatched.push(misfit(&(self.display)(&name), &t, shape)),
                        None => self.missing.push((self.display)(&name)),
                    }
                    // `finish` fails before anyone computes with it
                    placeholder()?
                }
            },
        };
        Ok(Param { name, var: Var::parameter(value) })
    }
    /// Errors if names were missing, of another shape, or left over: all of them at once.
    pub fn finish(self, path: &Path) -> Result<()> {
        let extra: Vec<String> = match self.source {
            Source::Tensors(t) => t.into_keys().collect(),
            Source::Random { .. } | Source::Count(_) => vec![],
        };
        let kinds = [("missing", self.missing), ("not in this model", extra), ("of another shape", self.mismatched)];
        let wrong: Vec<String> = kinds
            .iter()
            .filter(|(_, n)| !n.is_empty())
            .map(|(what, names)| format!("{what}: {}", listed(names.iter().map(String::as_str))))
            .collect();
        if wrong.is_empty() { Ok(()) } else { Err(Error::weights(path, wrong.join("; "))) }
    }
}

fn placeholder() -> Result<Tensor> {
    Tensor::zeros(&[0], DType::F32, Device::Cpu)
}

fn draw(seed: u64, name: &str, shape: &[usize], init: Init) -> Result<Tensor> {
    let mut t = Tensor::zeros(shape, DType::F32, Device::Cpu)?;
    match init {
        Init::Zeros => {}
        Init::Ones => t.as_mut_slice::<f32>()?.fill(1.0),
        Init::Normal(std) => random::fill_normal(t.as_mut_slice()?, random::subkey(seed, name_hash(name)), std),
    }
    Ok(t)
}

/// FNV-1a, 64 bits: a number for a name, the same everywhere.
fn name_hash(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3))
}
