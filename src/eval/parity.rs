//! Parity: a model run against numbers computed elsewhere in float64 (the golden files).
//!
//! A golden file holds its own config and weights (`param.*`); a golden folder is a model folder with
//! `expect.safetensors` beside it. Metadata `cases` lists the cases; tensors `case.i.*` are their inputs and answers.

use crate::autograd::Gradients;
use crate::generate::{GenerateOptions, generate};
use crate::model::formats::read_safetensors;
use crate::model::{Cat, FolderFormat, ForwardOptions, ModelConfig, load, rename};
use crate::ops;
use crate::tensor::{DType, Tensor};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// Errors that pass, relative L2.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Bounds {
    /// Of logits, and of the loss.
    pub logits: f64,
    /// Of each parameter's gradient.
    pub gradients: f64,
    /// Whether greedy tokens must agree: in 16 bits near ties may fall either way.
    pub tokens: bool,
}

impl Bounds {
    /// The bounds of a dtype. For 16-bit dtypes: a value passes some 4 roundings of unit roundoff u a block and layer,
    /// 60 in all for the golden models, in random directions: about 8 u; twice that through backward.
    pub fn of(dtype: DType) -> Self {
        let half = |u: f64| Self { logits: 8.0 * u, gradients: 16.0 * u, tokens: false };
        match dtype {
            DType::BF16 => half(2f64.powi(-9)),
            DType::F16 => half(2f64.powi(-11)),
            _ => Self { logits: 2e-5, gradients: 1e-4, tokens: true },
        }
    }
}

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
    /// Whether everything is within [`Bounds`].
    pub pass: bool,
}

/// Run all cases of a golden file or folder, the model in `dtype`.
pub fn parity(path: &Path, dtype: DType) -> Result<Vec<CaseReport>> {
    let (model, format, expect) = open(path, dtype)?;
    let at = if path.is_dir() { path.join("expect.safetensors") } else { path.to_path_buf() };
    let text =
        expect.metadata.get("cases").ok_or_else(|| Error::format(&at, "no 'cases' in its metadata: not a golden file"))?;
    let cases: Vec<Case> = serde_json::from_str(text).map_err(|e| Error::format(&at, format!("cases: {e}")))?;
    let run = |(i, case)| run_case(&model, format, &expect.tensors, i, case, Bounds::of(dtype), &at);
    cases.into_iter().enumerate().map(run).collect()
}

fn open(path: &Path, dtype: DType) -> Result<(Cat, FolderFormat, crate::model::formats::TensorFile)> {
    if path.is_dir() {
        let checkpoint = load(path, Some(dtype))?;
        return Ok((checkpoint.model, checkpoint.format, read_safetensors(&path.join("expect.safetensors"))?));
    }
    let file = read_safetensors(path)?;
    let config =
        file.metadata.get("config").ok_or_else(|| Error::format(path, "no 'config' in its metadata: not a golden file"))?;
    let config = ModelConfig::from_json(config)?;
    let params = file.tensors.iter().filter_map(|(n, t)| Some((n.strip_prefix("param.")?.to_string(), t)));
    let params = params.map(|(n, t)| Ok((n, ops::cast_tensor(t, dtype)?))).collect::<Result<BTreeMap<_, _>>>()?;
    Ok((Cat::from_tensors(config, params, path)?, FolderFormat::Native, file))
}

fn run_case(
    model: &Cat,
    format: FolderFormat,
    tensors: &BTreeMap<String, Tensor>,
    i: usize,
    case: Case,
    bounds: Bounds,
    path: &Path,
) -> Result<CaseReport> {
    let find = |name: &str| tensors.get(&format!("case.{i}.{name}"));
    let need = |name: &str| find(name).ok_or_else(|| Error::format(path, format!("no tensor case.{i}.{name}")));
    let (ids, chunk_size) = (need("input_ids")?, case.chunk_size);
    let (expected_logits, labels) = (need("logits")?, find("labels"));
    let outcome = evaluate(model, ids, labels, chunk_size)?;
    let logits = relative_l2(&outcome.logits, expected_logits)?;
    let loss = match (find("loss"), outcome.loss) {
        (Some(want), Some(got)) => Some((got - want.item()?).abs() / want.item()?.abs().max(f64::MIN_POSITIVE)),
        _ => None,
    };
    let prefix = format!("case.{i}.grad.");
    let mut gradients: Option<(f64, String)> = None;
    let got: BTreeMap<String, Tensor> = rename(model.config(), format, outcome.gradients)?.into_iter().collect();
    for (name, want) in tensors.iter().filter_map(|(n, t)| Some((n.strip_prefix(&prefix)?, t))) {
        let error = match got.get(name) {
            Some(g) => relative_l2(g, want)?,
            None => f64::INFINITY,
        };
        if gradients.as_ref().is_none_or(|(worst, _)| error > *worst) {
            gradients = Some((error, name.to_string()));
        }
    }
    let generated_agree = match find("generated") {
        None => None,
        Some(want) => {
            let options = GenerateOptions {
                max_new_tokens: want.shape().last().copied().unwrap_or(0),
                chunk_size,
                ..Default::default()
            };
            Some(generate(model, ids, options)?.to_vec::<i64>()? == want.to_vec::<i64>()?)
        }
    };
    let pass = logits <= bounds.logits
        && loss.is_none_or(|e| e <= bounds.logits)
        && gradients.as_ref().is_none_or(|(e, _)| *e <= bounds.gradients)
        && (generated_agree != Some(false) || !bounds.tokens);
    let (batch, length) = (ids.dim(0), ids.last_dim());
    Ok(CaseReport { case: i, batch, length, chunk_size, logits, loss, gradients, generated_agree, pass })
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
