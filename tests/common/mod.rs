//! What several test files share: small random models of every kind, and comparisons.
#![allow(dead_code)]

pub mod naive;
pub mod rough;

use felid::model::{Cat, ChunkSizes, LayerType, ModelConfig, ModelType, TransformerConfig};
use felid::ops::cast_tensor;
use felid::random::{Philox, normal_at, subkey};
use felid::tensor::{DType, Tensor};
use std::path::{Path, PathBuf};

/// The kinds of model that are tested.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Dense,
    Fixed,
    Adaptive,
    /// Adaptive, any size from 1 up: the Hugging Face variant.
    AnySize,
    Layer,
    /// CAT layers between dense ones.
    Hybrid,
    AdaptiveLayer,
}

pub const KINDS: [Kind; 7] =
    [Kind::Dense, Kind::Fixed, Kind::Adaptive, Kind::AnySize, Kind::Layer, Kind::Hybrid, Kind::AdaptiveLayer];

fn pick<T: Copy>(draw: &mut Philox, from: &[T]) -> T {
    from[draw.below(from.len() as u64) as usize]
}
fn between(draw: &mut Philox, low: usize, high: usize) -> usize {
    low + draw.below((high - low + 1) as u64) as usize
}

/// A small transformer with every option drawn.
fn transformer(draw: &mut Philox) -> TransformerConfig {
    let heads = pick(draw, &[1, 2, 4]);
    let kv: Vec<usize> = [1usize, 2, 4].into_iter().filter(|&k| usize::is_multiple_of(heads, k)).collect();
    let (width, layers) = (pick(draw, &[2, 4, 6]), between(draw, 1, 3));
    TransformerConfig {
        n_local_heads: Some(pick(draw, &kv)),
        intermediate_size: Some(between(draw, 3, 17)),
        rope_base: pick(draw, &[50.0, 10_000.0]),
        qkv_bias: draw.below(3) == 0,
        qk_norm_eps: (draw.below(2) == 0).then_some(0.01),
        ..TransformerConfig::new(heads * width, heads, layers, draw.below(2) == 0)
    }
}

/// A small model of a kind, everything else drawn; about 20 tokens long. `kind` and `seed` say all.
pub fn config(kind: Kind, seed: u64) -> ModelConfig {
    let draw = &mut Philox::new(subkey(seed, kind as u64));
    let vocab = between(draw, 5, 30);
    let mut c = ModelConfig {
        padded_vocab_size: Some(vocab + between(draw, 0, 4)),
        ..ModelConfig::dense(vocab, between(draw, 12, 24), transformer(draw))
    };
    c.chunk_size = match kind {
        Kind::Dense => None,
        Kind::Adaptive | Kind::AdaptiveLayer => Some(pick(draw, &[2, 4, 8])),
        _ => Some(between(draw, 1, 7)),
    };
    match kind {
        Kind::Dense => {}
        Kind::Fixed | Kind::Adaptive | Kind::AnySize => {
            c.model_type = if kind == Kind::Fixed { ModelType::Cat } else { ModelType::CatAdaptive };
            c.compressor = Some(transformer(draw));
        }
        Kind::Layer | Kind::Hybrid | Kind::AdaptiveLayer => {
            c.model_type = ModelType::CatLayer;
            c.dim_fx = Some(64 * between(draw, 1, 2));
            c.adaptive_layers = kind == Kind::AdaptiveLayer;
        }
    }
    if kind == Kind::AnySize {
        c.chunk_sizes = ChunkSizes::Any;
    }
    if kind == Kind::Hybrid {
        c.decoder.n_layer = between(draw, 2, 4);
        let mut types: Vec<LayerType> =
            (0..c.decoder.n_layer).map(|_| pick(draw, &[LayerType::Dense, LayerType::Cat])).collect();
        (types[0], types[1]) =
            if draw.below(2) == 0 { (LayerType::Dense, LayerType::Cat) } else { (LayerType::Cat, LayerType::Dense) };
        c.layer_types = Some(types);
    }
    c.check().unwrap();
    c
}

/// A model with weights of which none is special: norms are not 1 and biases not 0.
pub fn model_of(config: ModelConfig, seed: u64) -> Cat {
    let mut model = Cat::new(config, seed).unwrap();
    for (i, p) in model.params_mut().into_iter().enumerate() {
        if p.shape().len() == 1 {
            let key = subkey(seed, i as u64);
            for (j, x) in p.value_mut().as_mut_slice::<f32>().unwrap().iter_mut().enumerate() {
                *x += 0.3 * normal_at(key, j as u64) as f32;
            }
        }
    }
    model
}

pub fn model(kind: Kind, seed: u64) -> Cat {
    model_of(config(kind, seed), seed)
}

/// The same model with its weights in another dtype.
pub fn cast(model: &Cat, dtype: DType) -> Cat {
    let mut out = model.clone();
    for p in out.params_mut() {
        *p.value_mut() = cast_tensor(p.value(), dtype).unwrap();
    }
    out
}

/// One of the chunk sizes that a model allows; `None` for dense ones.
pub fn chunk_size(c: &ModelConfig, choice: u64) -> Option<usize> {
    let allowed = c.allowed_chunk_sizes();
    (!allowed.is_empty()).then(|| allowed[choice as usize % allowed.len()])
}

/// Random ids `[b, n]`.
pub fn ids(c: &ModelConfig, b: usize, n: usize, seed: u64) -> Tensor {
    let mut draw = Philox::new(subkey(seed, 77));
    let ids: Vec<i64> = (0..b * n).map(|_| draw.below(c.vocab_size as u64) as i64).collect();
    Tensor::ids(&ids, &[b, n]).unwrap()
}

/// `|a - b| / |b|`.
pub fn relative(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    norm(&mut a.iter().zip(b).map(|(x, y)| x - y)) / norm(&mut b.iter().copied()).max(f64::MIN_POSITIVE)
}

/// The bytes of every parameter, by name.
pub fn bits(model: &Cat) -> Vec<(String, Vec<u8>)> {
    model.params().into_iter().map(|p| (p.name.clone(), p.value().to_le_bytes().unwrap())).collect()
}

pub fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/golden").join(name)
}
