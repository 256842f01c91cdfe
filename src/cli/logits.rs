//! `felid logits`.

use super::{Compute, parse_dtype};
use clap::Args;
use felid::eval::parity::evaluate;
use felid::generate::{Request, generate};
use felid::model::formats::{read_safetensors, write_safetensors};
use felid::model::{load, rename};
use felid::ops::cast_tensor;
use felid::tensor::{DType, Tensor};
use felid::{Error, Result};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Run a model on ids. Reads `input_ids` int64 [B, N] (and `labels` likewise, -100 ignored); writes `logits` f32
/// [B, N, V], with labels also `loss`, with --grads every `grad.<name>`, with --generate `generated` int64 [B, n].
#[derive(Args)]
pub struct Logits {
    /// Model folder (native or Hugging Face)
    #[arg(long)]
    model: PathBuf,
    /// Safetensors file with the ids
    #[arg(long)]
    input: PathBuf,
    /// Safetensors file to write
    #[arg(long)]
    out: PathBuf,
    /// [default: the model's largest]
    #[arg(long)]
    chunk_size: Option<usize>,
    /// Also write gradients of the loss, by the folder's own names
    #[arg(long)]
    grads: bool,
    /// Also continue each row greedily by this many tokens
    #[arg(long, value_name = "N")]
    generate: Option<usize>,
    /// Weights' dtype [default: as stored]
    #[arg(long, value_parser = parse_dtype)]
    dtype: Option<DType>,
    #[command(flatten)]
    compute: Compute,
}

impl Logits {
    pub fn run(self) -> Result<()> {
        let device = self.compute.set()?;
        let input = read_safetensors(&self.input)?.tensors;
        let bad = |detail: &str| Error::Format { path: self.input.clone(), detail: detail.into() };
        let ids = input.get("input_ids").ok_or_else(|| bad("no tensor input_ids: it needs int64 [B, N]"))?;
        let labels = input.get("labels");
        for (name, t) in [("input_ids", Some(ids)), ("labels", labels)] {
            if t.is_some_and(|t| t.dtype() != DType::I64 || t.rank() != 2) {
                return Err(bad(&format!("{name} must be int64 [B, N]")));
            }
        }
        if self.grads && labels.is_none() {
            return Err(bad("--grads needs a tensor labels: gradients are those of the loss"));
        }
        let checkpoint = load(&self.model, self.dtype)?;
        let model = checkpoint.model.to_device(device)?;
        let outcome = evaluate(&model, ids, labels, self.chunk_size)?;
        let wide = |t: &Tensor| cast_tensor(t, DType::F32);
        let mut out: Vec<(String, Tensor)> = vec![("logits".into(), wide(&outcome.logits)?)];
        out.extend(outcome.loss.map(|l| ("loss".into(), Tensor::scalar(l as f32))));
        if self.grads {
            for (name, g) in rename(model.config(), checkpoint.format, outcome.gradients)? {
                out.push((format!("grad.{name}"), wide(&g)?));
            }
        }
        if let Some(max_new_tokens) = self.generate {
            let like = Request { max_new_tokens, chunk_size: self.chunk_size, ..Default::default() };
            out.push(("generated".into(), generate(&model, ids, &like)?));
        }
        let borrowed: Vec<(&str, &Tensor)> = out.iter().map(|(n, t)| (n.as_str(), t)).collect();
        write_safetensors(&self.out, &borrowed, &BTreeMap::new())
    }
}
