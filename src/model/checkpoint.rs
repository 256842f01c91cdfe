//! Model folders: `config.json`, weights, tokenizer; native and Hugging Face (spec section 6).

use super::formats::{load_tensors, save_sharded, write_atomically};
use super::hf;
use super::param::Builder;
use super::{Cat, ModelConfig};
use crate::tensor::{DType, Tensor};
use crate::{Error, Result};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::Path;

/// Whose names and config a folder uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FolderFormat {
    /// The names and config of spec section 6: `model_type` is `transformer`, `cat`, `cat_adaptive` or `cat_layer`.
    #[default]
    Native,
    /// Those of the Hugging Face variant: `model_type` is `cat`, and there is a `hidden_size`.
    HuggingFace,
}

/// A model read from a folder, and what else the folder told.
#[derive(Debug)]
pub struct Checkpoint {
    /// The model, its weights in the dtype that was asked for.
    pub model: Cat,
    /// What the folder was; names of gradients are to follow it.
    pub format: FolderFormat,
    /// Position in the round of training chunk sizes, where the folder holds it.
    pub chunk_step: Option<i64>,
}

/// Shards of a saved model are at most this long.
const MAX_SHARD_BYTES: usize = 5 << 30;

/// Read `dir/config.json`: the model's configuration in native form, and the format it was in.
pub fn load_config(dir: &Path) -> Result<(ModelConfig, FolderFormat)> {
    let (config, format, _) = read_config(dir)?;
    Ok((config, format))
}

fn read_config(dir: &Path) -> Result<(ModelConfig, FolderFormat, bool)> {
    let path = dir.join("config.json");
    let text = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
    let map: Map<String, Value> =
        serde_json::from_str(&text).map_err(|e| Error::format(&path, format!("not a JSON object: {e}")))?;
    let within = |e: Error| match e {
        Error::Config(detail) => Error::format(&path, detail),
        other => other,
    };
    if hf::is_hf(&map) {
        let tied = map.get("tie_word_embeddings").and_then(Value::as_bool).unwrap_or(false);
        return Ok((hf::config_from_hf(&map).map_err(within)?, FolderFormat::HuggingFace, tied));
    }
    Ok((ModelConfig::from_json(&text).map_err(within)?, FolderFormat::Native, false))
}

/// Read a model folder of either format, weights as `dtype` (or as stored).
pub fn load(dir: &Path, dtype: Option<DType>) -> Result<Checkpoint> {
    let (config, format, tied) = read_config(dir)?;
    let mut tensors = load_tensors(dir)?;
    let dtype = match dtype {
        Some(d) => Some(d),
        None => mixed_float(&tensors),
    };
    if let Some(d) = dtype {
        for t in tensors.values_mut().filter(|t| t.dtype().is_float()) {
            *t = crate::ops::cast_tensor(t, d)?;
        }
    }
    let (builder, chunk_step) = match format {
        FolderFormat::Native => (Builder::tensors(tensors), None),
        FolderFormat::HuggingFace => {
            let from = hf::tensors_from_hf(&config, tensors, tied)?;
            let mut b = Builder::tensors(from.tensors).naming(|native| hf::hf_names(native).join(", "));
            from.refused.into_iter().for_each(|parts| b.refuse(parts));
            (b, from.chunk_step)
        }
    };
    Ok(Checkpoint { model: Cat::build(config, builder, dir)?, format, chunk_step })
}

/// f32 if float tensors of several dtypes are mixed (norms in f32 beside bf16 weights): ops want one.
fn mixed_float(tensors: &BTreeMap<String, Tensor>) -> Option<DType> {
    let mut floats = tensors.values().map(Tensor::dtype).filter(|d| d.is_float());
    let first = floats.next()?;
    floats.any(|d| d != first).then_some(DType::F32)
}

/// Write a model folder: complete new weights appear under their names before anything old goes.
pub fn save(dir: &Path, model: &Cat, format: FolderFormat, chunk_step: Option<i64>) -> Result<()> {
    let values: Vec<(String, Tensor)> = model.params().into_iter().map(|p| (p.name, p.var.into_value())).collect();
    let config = match format {
        FolderFormat::Native => serde_json::to_value(model.config()).map_err(|e| Error::config(e.to_string()))?,
        FolderFormat::HuggingFace => {
            hf::config_to_hf(model.config(), values.first().map_or(DType::F32, |(_, t)| t.dtype()))?
        }
    };
    let mut tensors = rename(model.config(), format, values)?;
    if format == FolderFormat::HuggingFace {
        tensors.push((hf::STEP_NAME.into(), Tensor::scalar(chunk_step.unwrap_or(0))));
    }
    std::fs::create_dir_all(dir).map_err(Error::io("create folder", dir))?;
    let borrowed: Vec<(&str, &Tensor)> = tensors.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    save_sharded(dir, &borrowed, &metadata, MAX_SHARD_BYTES)?;
    write_json(&dir.join("config.json"), &config)
}

/// Named tensors of a model (weights, gradients) under the names of a folder format.
pub fn rename(config: &ModelConfig, format: FolderFormat, tensors: Vec<(String, Tensor)>) -> Result<Vec<(String, Tensor)>> {
    match format {
        FolderFormat::Native => Ok(tensors),
        FolderFormat::HuggingFace => hf::tensors_to_hf(config, tensors),
    }
}

/// Write JSON, readable, atomically.
pub fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(|e| Error::format(path, e.to_string()))?;
    write_atomically(path, |w| writeln!(w, "{text}").map_err(Error::io("write", path)))
}
