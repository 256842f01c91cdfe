//! The Hugging Face variant of the adaptive CAT (spec section 6): its config and its names, both ways.

use super::config::{ChunkSizes, ModelConfig, ModelType, TransformerConfig, swiglu_width};
use super::param::{Parts, misfit};
use crate::ops::concat_tensors;
use crate::tensor::{DType, Tensor};
use crate::{Error, Result};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// QK-norm's eps there, whatever `norm_eps` says.
const QK_NORM_EPS: f64 = 1e-5;
/// Position in the round of training chunk sizes, kept among the weights.
pub(super) const STEP_NAME: &str = "model._train_chunk_size_step";

/// True for the config of a Hugging Face CAT folder.
pub(super) fn is_hf(config: &Map<String, Value>) -> bool {
    config.get("model_type").and_then(Value::as_str) == Some("cat") && config.contains_key("hidden_size")
}

/// The native form of a Hugging Face config.
pub(super) fn config_from_hf(c: &Map<String, Value>) -> Result<ModelConfig> {
    let bad = |key: &str, want: &str| {
        Error::config(format!("{key}: expected {want}, found {}", c.get(key).unwrap_or(&Value::Null)))
    };
    let present = |key: &str| c.get(key).filter(|v| !v.is_null());
    let size_or = |key: &str, default: usize| match present(key) {
        None => Ok(default),
        Some(v) => v.as_u64().map(|n| n as usize).ok_or_else(|| bad(key, "a whole number")),
    };
    let size = |key: &str| present(key).ok_or_else(|| bad(key, "a whole number")).and_then(|_| size_or(key, 0));
    let number_or =
        |key: &str, default: f64| present(key).map_or(Ok(default), |v| v.as_f64().ok_or_else(|| bad(key, "a number")));
    let flag = |key: &str| present(key).map_or(Ok(false), |v| v.as_bool().ok_or_else(|| bad(key, "true or false")));

    let (d, layers, heads) = (size("hidden_size")?, size("num_hidden_layers")?, size("num_heads")?);
    if size_or("dim_fx", d)? != d {
        return Err(bad("dim_fx", "hidden_size"));
    }
    if let Some(act) = present("hidden_act").filter(|a| !matches!(a.as_str(), Some("swish" | "silu"))) {
        return Err(Error::config(format!("hidden_act {act} is not supported: only swish")));
    }
    let ratio = number_or("hidden_ratio", 4.0)?;
    let transformer = |dim: usize, n_layer: usize, n_head: usize, kv: Option<usize>, qk_norm: bool| -> Result<_> {
        Ok(TransformerConfig {
            n_local_heads: kv,
            intermediate_size: Some(size_or("intermediate_size", swiglu_width(dim, ratio))?),
            rope_base: number_or("rope_theta", 10_000.0)?,
            norm_eps: number_or("norm_eps", 1e-6)?,
            qk_norm_eps: qk_norm.then_some(QK_NORM_EPS),
            qkv_bias: flag("qkv_bias")?,
            ..TransformerConfig::new(dim, n_head, n_layer, qk_norm)
        })
    };
    let kv = present("num_kv_heads").map(|_| size("num_kv_heads")).transpose()?;
    let vocab = size("vocab_size")?;
    let config = ModelConfig {
        model_type: ModelType::CatAdaptive,
        padded_vocab_size: Some(vocab),
        chunk_size: Some(size("max_chunk_size")?),
        chunk_sizes: ChunkSizes::Any,
        compressor: Some(transformer(
            size_or("compressor_hidden_size", d / 2)?,
            size_or("compressor_num_layers", (layers / 4).max(1))?,
            size_or("compressor_num_heads", (heads / 2).max(1))?,
            None,
            false,
        )?),
        ..ModelConfig::dense(vocab, size("max_position_embeddings")?, transformer(d, layers, heads, kv, flag("qk_norm")?)?)
    };
    config.check()?;
    Ok(config)
}

/// The Hugging Face form of a native config; an error says which feature that form cannot express.
/// `dtype` is that of the weights.
pub(super) fn config_to_hf(c: &ModelConfig, dtype: DType) -> Result<Value> {
    let refuse = |why: &str| Err(Error::config(format!("the Hugging Face form cannot express this model: {why}")));
    let (ModelType::CatAdaptive, Some(f), Some(chunk)) = (c.model_type, &c.compressor, c.chunk_size) else {
        return refuse("it is not an adaptive CAT");
    };
    let d = &c.decoder;
    if f.use_qk_norm {
        return refuse("its compressor has QK-norm (there only the decoder has it)");
    }
    if d.use_qk_norm && d.qk_norm_eps.unwrap_or(d.norm_eps) != QK_NORM_EPS {
        return refuse("its QK-norm has an eps other than 1e-5");
    }
    if f.qkv_bias != d.qkv_bias || f.norm_eps != d.norm_eps || f.rope_base != d.rope_base {
        return refuse("compressor and decoder differ in biases, norm_eps or rope_base");
    }
    if f.kv_heads() != f.n_head {
        return refuse("its compressor has grouped queries");
    }
    let by_ratio = d.ffn_width() == swiglu_width(d.dim, 4.0) && f.ffn_width() == swiglu_width(f.dim, 4.0);
    if !by_ratio && d.ffn_width() != f.ffn_width() {
        return refuse("the widths of SwiGLU follow neither hidden_ratio 4 nor one intermediate_size");
    }
    Ok(json!({
        "architectures": ["CATForCausalLM"],
        "model_type": "cat",
        "hidden_size": d.dim,
        "num_hidden_layers": d.n_layer,
        "num_heads": d.n_head,
        "num_kv_heads": d.n_local_heads,
        "max_chunk_size": chunk,
        "dim_fx": d.dim,
        "compressor_hidden_size": f.dim,
        "compressor_num_layers": f.n_layer,
        "compressor_num_heads": f.n_head,
        "qkv_bias": d.qkv_bias,
        "qk_norm": d.use_qk_norm,
        "rope_theta": d.rope_base,
        "max_position_embeddings": c.block_size,
        "hidden_ratio": 4,
        "intermediate_size": if by_ratio { Value::Null } else { json!(d.ffn_width()) },
        "hidden_act": "swish",
        "norm_eps": d.norm_eps,
        "vocab_size": c.vocab_rows(),
        "tie_word_embeddings": false,
        "torch_dtype": match dtype {
            DType::BF16 => "bfloat16",
            DType::F16 => "float16",
            DType::F64 => "float64",
            _ => "float32",
        },
    }))
}

/// What a native parameter is called there: one name, or three for the joint q/k/v projection.
pub(super) fn hf_names(native: &str) -> Vec<String> {
    let (root, rest) = match native.strip_prefix("f.") {
        Some(rest) => ("model.compressor.", rest),
        None => ("model.", native),
    };
    let in_compressor = native.starts_with("f.");
    let Some((layer, part)) = rest.strip_prefix("layers.").and_then(|r| r.split_once('.')) else {
        let name = match (in_compressor, rest) {
            (true, "adaptive_token.weight") => "adaptive_tokens.weight",
            (false, "wte.weight") => "embeddings.weight",
            (false, "seperator.weight") => "separator.weight",
            (false, "dummy_fx.weight") => "adaptive_token.weight",
            (false, "output.weight") => return vec!["lm_head.weight".into()],
            (_, other) => other,
        };
        return vec![format!("{root}{name}")];
    };
    // the compressor's attention has no level of its own
    let attn = if in_compressor { "" } else { "attn." };
    let at = |name: String| format!("{root}layers.{layer}.{name}");
    let (module, field) = part.rsplit_once('.').unwrap_or((part, ""));
    match module {
        "attention_norm" => vec![at(format!("attn_norm.{field}"))],
        "ffn_norm" => vec![at(format!("mlp_norm.{field}"))],
        "attention.wqkv" => ["q", "k", "v"].map(|p| at(format!("{attn}{p}_proj.{field}"))).into(),
        "attention.wo" => vec![at(format!("{attn}o_proj.{field}"))],
        "attention.q_norm" => vec![at(format!("{attn}q_norm.{field}"))],
        "attention.k_norm" => vec![at(format!("{attn}k_norm.{field}"))],
        "feed_forward.fc_1" => vec![at(format!("mlp.gate_proj.{field}"))],
        "feed_forward.fc_2" => vec![at(format!("mlp.up_proj.{field}"))],
        "feed_forward.proj" => vec![at(format!("mlp.down_proj.{field}"))],
        other => vec![at(format!("{other}.{field}"))],
    }
}

/// All native names that a model of this config has.
fn native_names(c: &ModelConfig) -> Vec<String> {
    let mut names: Vec<String> = ["wte", "seperator", "dummy_fx", "norm", "output"].map(|n| format!("{n}.weight")).into();
    names.extend(["wte", "pos_tokens", "adaptive_token", "norm", "proj_fx"].map(|n| format!("f.{n}.weight")));
    let mut layers = |prefix: &str, t: &TransformerConfig| {
        for i in 0..t.n_layer {
            let mut parts = vec!["attention_norm.weight", "ffn_norm.weight", "attention.wqkv.weight", "attention.wo.weight"];
            parts.extend(["feed_forward.fc_1.weight", "feed_forward.fc_2.weight", "feed_forward.proj.weight"]);
            parts.extend(t.qkv_bias.then_some("attention.wqkv.bias"));
            parts.extend(
                t.use_qk_norm.then_some(["attention.q_norm.weight", "attention.k_norm.weight"]).into_iter().flatten(),
            );
            names.extend(parts.iter().map(|p| format!("{prefix}layers.{i}.{p}")));
        }
    };
    layers("", &c.decoder);
    if let Some(f) = &c.compressor {
        layers("f.", f);
    }
    names
}

/// Tensors of a Hugging Face folder under native names.
pub(super) struct FromHf {
    /// Names that no parameter has pass unchanged.
    pub tensors: BTreeMap<String, Tensor>,
    /// Joint projections whose parts do not make them.
    pub refused: Vec<Parts>,
    /// Position in the round of chunk sizes, if it is there.
    pub chunk_step: Option<i64>,
}

/// Tensors by Hugging Face names, floats of one dtype, -> by native names.
pub(super) fn tensors_from_hf(c: &ModelConfig, mut tensors: BTreeMap<String, Tensor>, tied: bool) -> Result<FromHf> {
    let chunk_step = tensors.remove(STEP_NAME).and_then(|t| t.to_vec::<i64>().ok()).and_then(|v| v.first().copied());
    if tied
        && !tensors.contains_key("lm_head.weight")
        && let Some(shared) = tensors.get("model.embeddings.weight").cloned()
    {
        tensors.insert("lm_head.weight".into(), shared);
    }
    let (mut out, mut refused) = (BTreeMap::new(), Vec::new());
    for native in native_names(c) {
        let names = hf_names(&native);
        if let [name] = &names[..] {
            out.extend(tensors.remove(name).map(|t| (native, t)));
            continue;
        }
        let (part, rows) = joint_rows(c, &native)?;
        let mut wrong = Parts { native, missing: vec![], mismatched: vec![] };
        let mut found = Vec::with_capacity(3);
        for (name, n) in names.into_iter().zip(rows) {
            let shape = if name.ends_with(".bias") { vec![n] } else { vec![n, part.dim] };
            match tensors.remove(&name) {
                Some(t) if t.shape() == shape && t.dtype().is_float() => found.push(t),
                Some(t) => wrong.mismatched.push(misfit(&name, &t, &shape)),
                None => wrong.missing.push(name),
            }
        }
        match found.len() {
            3 => drop(out.insert(wrong.native, concat_tensors(&found.iter().collect::<Vec<_>>(), 0)?)),
            _ => refused.push(wrong),
        }
    }
    out.append(&mut tensors);
    Ok(FromHf { tensors: out, refused, chunk_step })
}

/// The transformer that a joint q/k/v projection is of, and the rows of its three parts.
fn joint_rows<'c>(c: &'c ModelConfig, native: &str) -> Result<(&'c TransformerConfig, [usize; 3])> {
    let part = if native.starts_with("f.") { c.compressor.as_ref() } else { Some(&c.decoder) };
    let part = part.ok_or_else(|| Error::config("a compressor's parameter in a model without one"))?;
    let (q, kv) = (part.n_head * part.head_dim(), part.kv_heads() * part.head_dim());
    Ok((part, [q, kv, kv]))
}

/// Tensors by native names -> by Hugging Face names (values or gradients alike).
pub(super) fn tensors_to_hf(c: &ModelConfig, tensors: Vec<(String, Tensor)>) -> Result<Vec<(String, Tensor)>> {
    let mut out = Vec::with_capacity(tensors.len());
    for (native, t) in tensors {
        let names = hf_names(&native);
        if names.len() == 1 {
            let t = if is_size_table(&native) { table_to_hf(c, &t)? } else { t };
            out.extend(names.into_iter().map(|n| (n, t.clone())));
        } else {
            out.extend(names.into_iter().zip(t.split(0, &joint_rows(c, &native)?.1)?));
        }
    }
    Ok(out)
}

fn is_size_table(native: &str) -> bool {
    matches!(native, "dummy_fx.weight" | "f.adaptive_token.weight")
}

/// Tables of log2 rows become tables indexed by C. Sizes between powers of two, which this model never had, take the
/// row of the next smaller power; row 0 is never read.
fn table_to_hf(c: &ModelConfig, t: &Tensor) -> Result<Tensor> {
    let Some(max) = c.chunk_size.filter(|_| c.chunk_sizes == ChunkSizes::PowersOfTwo) else { return Ok(t.clone()) };
    let rows: Vec<Tensor> = (0..=max).map(|size| t.narrow(0, size.max(1).ilog2() as usize, 1)).collect::<Result<_>>()?;
    concat_tensors(&rows.iter().collect::<Vec<_>>(), 0)
}
