//! Whole models against numbers computed elsewhere in float64.

use felid::eval::parity::{evaluate, parity, relative_l2};
use felid::model::formats::{load_tensors, read_safetensors};
use felid::model::{Cat, FolderFormat, ModelConfig, TransformerConfig, load, save};
use felid::tensor::{DType, Device, Tensor};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/golden").join(name)
}

fn logits(model: &Cat, ids: &Tensor, chunk: Option<usize>) -> Vec<f32> {
    evaluate(model, ids, None, chunk).unwrap().logits.to_f32_vec().unwrap()
}

#[test]
fn every_golden_case_passes() {
    let files = ["transformer", "cat_fixed", "cat_adaptive", "cat_layer"].map(|n| format!("{n}.safetensors"));
    for name in files.iter().map(String::as_str).chain(["hf_cat"]) {
        let cases = parity(&golden(name), DType::F32, Device::Cpu).unwrap();
        assert!(cases.len() >= 2);
        for c in cases {
            assert!(c.pass, "{name}: {c:?}");
        }
    }
}

#[test]
fn sixteen_bits_stay_within_their_bounds() {
    for dtype in [DType::BF16, DType::F16] {
        for name in ["transformer.safetensors", "cat_fixed.safetensors", "cat_adaptive.safetensors", "hf_cat"] {
            for c in parity(&golden(name), dtype, Device::Cpu).unwrap() {
                assert!(c.pass, "{dtype} {name}: {c:?}");
            }
        }
    }
}

#[test]
fn a_state_dict_is_the_same_model() {
    let golden_file = read_safetensors(&golden("cat_adaptive.safetensors")).unwrap();
    let model = load(&golden("pt_cat_adaptive"), None).unwrap().model;
    for p in model.params() {
        let want = &golden_file.tensors[&format!("param.{}", p.name)];
        assert_eq!(p.value().to_vec::<f32>().unwrap(), want.to_vec::<f32>().unwrap(), "{}", p.name);
    }
    let ids = &golden_file.tensors["case.6.input_ids"];
    let got = evaluate(&model, ids, None, Some(8)).unwrap().logits;
    assert!(relative_l2(&got, &golden_file.tensors["case.6.logits"]).unwrap() < 2e-5);
}

#[test]
fn hugging_face_folders_go_both_ways() {
    let dir = tempfile::tempdir().unwrap();
    let original = load(&golden("hf_cat"), None).unwrap();
    assert_eq!(original.format, FolderFormat::HuggingFace);
    let ids = Tensor::ids(&(0..27).map(|i| i * 7 % 97).collect::<Vec<_>>(), &[1, 27]).unwrap();
    let (native, back) = (dir.path().join("native"), dir.path().join("hf"));
    save(&native, &original.model, FolderFormat::Native, original.chunk_step).unwrap();
    let loaded = load(&native, None).unwrap();
    save(&back, &loaded.model, FolderFormat::HuggingFace, original.chunk_step).unwrap();
    let again = load(&back, None).unwrap();
    for chunk in [1, 3, 5, 8] {
        let want = logits(&original.model, &ids, Some(chunk));
        assert_eq!(want, logits(&loaded.model, &ids, Some(chunk)));
        assert_eq!(want, logits(&again.model, &ids, Some(chunk)));
    }
    let (a, b) = (load_tensors(&golden("hf_cat")).unwrap(), load_tensors(&back).unwrap());
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
    for (name, t) in &a {
        assert_eq!(t.to_le_bytes().unwrap(), b[name].to_le_bytes().unwrap(), "{name}");
    }
}

#[test]
fn native_adaptive_models_become_hugging_face_ones() {
    let mut decoder = TransformerConfig::new(32, 4, 2, true);
    decoder.n_local_heads = Some(2);
    let config = ModelConfig {
        model_type: felid::model::ModelType::CatAdaptive,
        chunk_size: Some(8),
        compressor: Some(TransformerConfig::new(16, 2, 1, false)),
        ..ModelConfig::dense(100, 32, decoder)
    };
    let model = Cat::new(config.clone(), 3).unwrap();
    let dir = tempfile::tempdir().unwrap();
    save(dir.path(), &model, FolderFormat::HuggingFace, None).unwrap();
    let saved_as = || std::fs::read_to_string(dir.path().join("config.json")).unwrap();
    assert!(saved_as().contains(r#""torch_dtype": "float32""#));
    let hf = load(dir.path(), None).unwrap().model;
    let ids = Tensor::ids(&(0..21).collect::<Vec<_>>(), &[1, 21]).unwrap();
    for chunk in [1, 2, 4, 8] {
        assert_eq!(logits(&model, &ids, Some(chunk)), logits(&hf, &ids, Some(chunk)));
    }
    let narrow = load(dir.path(), Some(DType::BF16)).unwrap().model;
    save(dir.path(), &narrow, FolderFormat::HuggingFace, None).unwrap();
    assert!(saved_as().contains(r#""torch_dtype": "bfloat16""#));
    let with_norm = ModelConfig { compressor: Some(TransformerConfig::new(16, 2, 1, true)), ..config };
    let refused = save(dir.path(), &Cat::new(with_norm, 3).unwrap(), FolderFormat::HuggingFace, None).unwrap_err();
    assert!(refused.to_string().contains("QK-norm"), "{refused}");
}

#[test]
fn weights_that_do_not_fit_are_all_named() {
    let file = read_safetensors(&golden("cat_fixed.safetensors")).unwrap();
    let config = ModelConfig::from_json(&file.metadata["config"]).unwrap();
    let mut params: BTreeMap<String, Tensor> =
        file.tensors.iter().filter_map(|(n, t)| Some((n.strip_prefix("param.")?.to_string(), t.clone()))).collect();
    params.remove("dummy_fx.weight");
    params.remove("f.norm.weight");
    params.insert("stray.weight".into(), Tensor::scalar(1f32));
    params.insert("norm.weight".into(), Tensor::from_vec(vec![1f32; 3], &[3]).unwrap());
    let e = Cat::from_tensors(config, params, Path::new("here")).unwrap_err().to_string();
    for name in ["here", "dummy_fx.weight", "f.norm.weight", "stray.weight", "norm.weight is f32 [3]"] {
        assert!(e.contains(name), "{e}");
    }
    assert_eq!(e.lines().count(), 1);
}
