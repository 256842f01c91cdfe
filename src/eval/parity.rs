//! Parity: a model run against numbers computed elsewhere in float64 (the golden files).
//!
//! A golden file holds its own config and weights (`param.*`); a golden folder is a model folder with
//! `expect.safetensors` beside it. Metadata `cases` lists the cases; tensors `case.i.*` are their inputs and answers.

use crate::autograd::Gradients;
use crate::generate::{Request, generate};
use crate::model::formats::read_safetensors;
use crate::model::{Cat, FolderFormat, ForwardOptions, ModelConfig, load, rename};
use crate::ops;
use crate::tensor::{DType, Device, Tensor};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Errors that pass in f32, relative L2: of logits and the loss, and of each parameter's gradient.
pub const F32_BOUNDS: (f64, f64) = (2e-5, 1e-4);
/// In 16 bits, errors that pass as a multiple of what rounding the weights alone makes, all else in f32. An
/// implementation in that dtype rounds each product's inputs, its output and the residual stream besides: with some ten
/// roundings for one, in random directions, its error is about sqrt(10) times as large.
pub const ROUNDED_WEIGHTS_TIMES: f64 = 4.0;

/// What one case of a golden file asks.
#[derive(Clone, Debug, Deserialize)]
struct Case {
    #[serde(default)]
    chunk_size: Option<usize>,
}

/// How one case came out. `None` where the file does not ask.
#[derive(Clone, Debug, Serialize)]
pub struct CaseReport {
    /// Its number in the file, from 0.
    pub case: usize,
    /// B.
    pub batch: usize,
    /// N, tokens of a row.
    pub length: usize,
    /// C; `None` where the case leaves it to the model.
    pub chunk_size: Option<usize>,
    /// Relative L2 error of the logits.
    pub logits: f64,
    /// Relative error of the loss.
    pub loss: Option<f64>,
    /// The worst parameter's error, and its name.
    pub gradients: Option<(f64, String)>,
    /// Whether the greedy continuation is the same, token for token.
    pub generated_agree: Option<bool>,
    /// Bound of logits and loss.
    pub logits_bound: f64,
    /// Bound of that gradient.
    pub gradients_bound: f64,
    /// Whether everything is within its bound.
    pub pass: bool,
}

/// Run all cases of a golden file or folder, the model in `dtype` on `device`.
pub fn parity(path: &Path, dtype: DType, device: Device) -> Result<Vec<CaseReport>> {
    let golden = Golden::open(path)?;
    let model = golden.model(|t| ops::cast_tensor(t, dtype))?.to_device(device)?;
    let yardstick = match dtype {
        DType::BF16 | DType::F16 => Some(golden.model(|t| ops::cast_tensor(&ops::cast_tensor(t, dtype)?, DType::F32))?),
        _ => None,
    };
    (0..golden.cases.len()).map(|i| golden.report(i, &model, yardstick.as_ref())).collect()
}

/// A golden file or folder: weights, cases, and whose names it uses.
struct Golden {
    /// What errors name.
    path: PathBuf,
    config: ModelConfig,
    format: FolderFormat,
    params: BTreeMap<String, Tensor>,
    cases: Vec<Case>,
    tensors: BTreeMap<String, Tensor>,
}

/// Errors of one case, relative L2.
struct Errors {
    logits: f64,
    loss: Option<f64>,
    gradients: BTreeMap<String, f64>,
}

impl Golden {
    fn open(path: &Path) -> Result<Self> {
        let (at, loaded) = match path.is_dir() {
            true => (path.join("expect.safetensors"), Some(load(path, Some(DType::F32))?)),
            false => (path.to_path_buf(), None),
        };
        let file = read_safetensors(&at)?;
        let text = |key: &str| {
            let missing = || Error::format(&at, format!("no '{key}' in its metadata: not a golden file"));
            file.metadata.get(key).ok_or_else(missing)
        };
        let cases = serde_json::from_str(text("cases")?).map_err(|e| Error::format(&at, format!("cases: {e}")))?;
        let (config, format, params) = match loaded {
            Some(c) => {
                let params = c.model.params().into_iter().map(|p| (p.name, p.var.into_value())).collect();
                (c.model.config().clone(), c.format, params)
            }
            None => {
                let named = |(n, t): (&String, &Tensor)| Some((n.strip_prefix("param.")?.to_string(), t.clone()));
                let params = file.tensors.iter().filter_map(named).collect();
                (ModelConfig::from_json(text("config")?)?, FolderFormat::Native, params)
            }
        };
        Ok(Self { path: at, config, format, params, cases, tensors: file.tensors })
    }

    /// The model with every weight passed through `f`.
    fn model(&self, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Cat> {
        let params = self.params.iter().map(|(n, t)| Ok((n.clone(), f(t)?))).collect::<Result<_>>()?;
        Cat::from_tensors(self.config.clone(), params, &self.path)
    }
    fn find(&self, case: usize, name: &str) -> Option<&Tensor> {
        self.tensors.get(&format!("case.{case}.{name}"))
    }
    fn need(&self, case: usize, name: &str) -> Result<&Tensor> {
        self.find(case, name).ok_or_else(|| Error::format(&self.path, format!("no tensor case.{case}.{name}")))
    }

    fn errors(&self, i: usize, model: &Cat) -> Result<Errors> {
        let outcome = evaluate(model, self.need(i, "input_ids")?, self.find(i, "labels"), self.cases[i].chunk_size)?;
        let loss = match (self.find(i, "loss"), outcome.loss) {
            (Some(want), Some(got)) => Some((got - want.item()?).abs() / want.item()?.abs().max(f64::MIN_POSITIVE)),
            _ => None,
        };
        let got: BTreeMap<String, Tensor> = rename(model.config(), self.format, outcome.gradients)?.into_iter().collect();
        let prefix = format!("case.{i}.grad.");
        let mut gradients = BTreeMap::new();
        for (name, want) in self.tensors.iter().filter_map(|(n, t)| Some((n.strip_prefix(&prefix)?, t))) {
            let error = got.get(name).map_or(Ok(f64::INFINITY), |g| relative_l2(g, want))?;
            gradients.insert(name.to_string(), error);
        }
        Ok(Errors { logits: relative_l2(&outcome.logits, self.need(i, "logits")?)?, loss, gradients })
    }

    fn report(&self, i: usize, model: &Cat, yardstick: Option<&Cat>) -> Result<CaseReport> {
        let errors = self.errors(i, model)?;
        let (logits_bound, bounds): (f64, BTreeMap<String, f64>) = match yardstick {
            None => (F32_BOUNDS.0, errors.gradients.keys().map(|n| (n.clone(), F32_BOUNDS.1)).collect()),
            Some(y) => {
                let y = self.errors(i, y)?;
                let wide = |(n, e)| (n, ROUNDED_WEIGHTS_TIMES * e);
                (ROUNDED_WEIGHTS_TIMES * y.logits, y.gradients.into_iter().map(wide).collect())
            }
        };
        let bound = |name: &str| bounds.get(name).copied().unwrap_or(0.0);
        let worst = worst(&errors.gradients, bound);
        let (ids, chunk_size) = (self.need(i, "input_ids")?, self.cases[i].chunk_size);
        let generated_agree = match self.find(i, "generated") {
            None => None,
            Some(want) => {
                let max_new_tokens = want.shape().last().copied().unwrap_or(0);
                let like = Request { max_new_tokens, chunk_size, ..Default::default() };
                Some(generate(model, ids, &like)?.to_vec::<i64>()? == want.to_vec::<i64>()?)
            }
        };
        // in 16 bits near ties may fall either way, so tokens are shown but not judged
        let pass = errors.logits <= logits_bound
            && errors.loss.is_none_or(|e| e <= logits_bound)
            && worst.is_none_or(|(name, e)| *e <= bound(name))
            && (generated_agree != Some(false) || yardstick.is_some());
        Ok(CaseReport {
            case: i,
            batch: ids.dim(0),
            length: ids.last_dim(),
            chunk_size,
            logits: errors.logits,
            loss: errors.loss,
            gradients: worst.map(|(name, e)| (*e, name.clone())),
            generated_agree,
            logits_bound,
            gradients_bound: worst.map_or(F32_BOUNDS.1, |(name, _)| bound(name)),
            pass,
        })
    }
}

/// The error nearest to its bound, or furthest past it. One of 0 is within any bound, one of 0 included: where no
/// gradient flows, rounded weights make no error either.
fn worst(errors: &BTreeMap<String, f64>, bound: impl Fn(&str) -> f64) -> Option<(&String, &f64)> {
    let share = |(name, e): (&String, &f64)| if *e == 0.0 { 0.0 } else { e / bound(name) };
    errors.iter().max_by(|a, b| share(*a).total_cmp(&share(*b)))
}

/// Logits of some ids; with labels also the loss and all gradients.
pub struct Outcome {
    /// `[B, N, V]`.
    pub logits: Tensor,
    /// Mean cross-entropy in nats; `None` without labels.
    pub loss: Option<f64>,
    /// By native names; zeros where none has flowed.
    pub gradients: Vec<(String, Tensor)>,
}

/// Run the model on ids `[B, N]`, forward, and backward from the loss where labels `[B, N]` are given.
pub fn evaluate(model: &Cat, ids: &Tensor, labels: Option<&Tensor>, chunk_size: Option<usize>) -> Result<Outcome> {
    let options = ForwardOptions { chunk_size, ..Default::default() };
    let logits = crate::autograd::no_grad(|| model.logits(ids, options))?.into_value();
    let Some(labels) = labels else { return Ok(Outcome { logits, loss: None, gradients: vec![] }) };
    let (mut grads, tape) = (Gradients::default(), ops::tape());
    let loss = tape.record(|| model.loss(ids, labels, options))?;
    tape.backward(&loss, 1.0, &mut grads)?;
    let gradient = |p: crate::model::Param| {
        let g = grads.take(&p.var).map_or_else(|| Tensor::zeros(p.shape(), p.dtype(), p.value().device()), Ok)?;
        Ok((p.name, g))
    };
    let gradients = model.params().into_iter().map(gradient).collect::<Result<_>>()?;
    Ok(Outcome { logits, loss: Some(loss.value().item()?), gradients })
}

/// `|a - b| / |b|`, in f64; absolute where b is zero. Infinite where shapes differ.
pub fn relative_l2(a: &Tensor, b: &Tensor) -> Result<f64> {
    if a.shape() != b.shape() {
        return Ok(f64::INFINITY);
    }
    let (a, b) = (a.to_f64_vec()?, b.to_f64_vec()?);
    let norm = b.iter().map(|y| y * y).sum::<f64>().sqrt();
    let off = a.iter().zip(&b).map(|(x, y)| (x - y) * (x - y)).sum::<f64>().sqrt();
    let error = if norm > 0.0 { off / norm } else { off };
    Ok(if error.is_nan() { f64::INFINITY } else { error })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_of_zero_hides_no_other() {
        let all = |e: [(&str, f64); 3]| BTreeMap::from(e.map(|(n, e)| (n.to_string(), e)));
        let (errors, bounds) = (all([("a", 0.0), ("b", 0.2), ("c", 0.3)]), all([("a", 0.0), ("b", 0.1), ("c", 0.2)]));
        assert_eq!(worst(&errors, |n| bounds[n]).unwrap().0, "b");
        assert!(worst(&BTreeMap::new(), |_| 0.0).is_none());
    }
}
