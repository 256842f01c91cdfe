//! Weight files: what is written is read back, what PyTorch wrote is read right, and no file, however broken, makes
//! reading panic or ask for more memory than it can need.

use felid::Error;
use felid::model::formats::*;
use felid::tensor::{DType, Device, Tensor};
use half::{bf16, f16};
use proptest::prelude::*;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

// ---- memory: the largest piece that a thread asks for ----

struct Watched;
thread_local! {
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

fn note(bytes: usize) {
    LARGEST.with(|l| l.set(l.get().max(bytes)));
}

// SAFETY: every call goes to the system's allocator as it came; what is noted first is a thread-local number, which
// neither allocates nor has a destructor.
unsafe impl GlobalAlloc for Watched {
    // SAFETY: the obligations are those of `System`, which does it.
    unsafe fn alloc(&self, l: Layout) -> *mut u8 {
        note(l.size());
        // SAFETY: as the caller of this promises.
        unsafe { System.alloc(l) }
    }
    // SAFETY: the obligations are those of `System`, which does it.
    unsafe fn alloc_zeroed(&self, l: Layout) -> *mut u8 {
        note(l.size());
        // SAFETY: as the caller of this promises.
        unsafe { System.alloc_zeroed(l) }
    }
    // SAFETY: the obligations are those of `System`, which does it.
    unsafe fn dealloc(&self, p: *mut u8, l: Layout) {
        // SAFETY: as the caller of this promises.
        unsafe { System.dealloc(p, l) }
    }
    // SAFETY: the obligations are those of `System`, which does it.
    unsafe fn realloc(&self, p: *mut u8, l: Layout, size: usize) -> *mut u8 {
        note(size);
        // SAFETY: as the caller of this promises.
        unsafe { System.realloc(p, l, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Watched = Watched;

/// Load bytes as a file of this name: it must return, with any result, and ask for no piece of memory out of
/// proportion to the file (tables have a few kilobytes at least).
fn survives(path: &Path, bytes: &[u8]) -> felid::Result<TensorFile> {
    fs::write(path, bytes).unwrap();
    LARGEST.with(|l| l.set(0));
    let result = load(path);
    let largest = LARGEST.with(Cell::get);
    assert!(largest <= 16 * bytes.len() + 16_384, "{largest} bytes at once for a file of {}", bytes.len());
    if let Err(e) = &result {
        let text = e.to_string();
        assert!(!text.contains('\n') && text.contains(&path.display().to_string()), "{text}");
    }
    result
}

// ---- helpers ----

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}
fn tensor(dtype: DType, shape: &[usize], seed: u64) -> Tensor {
    let n: usize = shape.iter().product();
    let bits = |i: usize| (seed ^ i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let bytes: Vec<u8> = (0..n).flat_map(|i| bits(i).to_le_bytes()[..dtype.size()].to_vec()).collect();
    Tensor::from_bytes(&bytes, dtype, shape).unwrap()
}
fn assert_same(a: &Tensor, b: &Tensor, name: &str) {
    assert_eq!((a.dtype(), a.shape()), (b.dtype(), b.shape()), "{name}");
    assert!(a.to_le_bytes().unwrap() == b.to_le_bytes().unwrap(), "{name}: other bits");
}
fn assert_same_all(got: &BTreeMap<String, Tensor>, want: &BTreeMap<String, Tensor>) {
    assert_eq!(got.keys().collect::<Vec<_>>(), want.keys().collect::<Vec<_>>());
    for (name, t) in want {
        assert_same(&got[name], t, name);
    }
}
fn borrowed(tensors: &BTreeMap<String, Tensor>) -> Vec<(&str, &Tensor)> {
    tensors.iter().map(|(n, t)| (n.as_str(), t)).collect()
}
fn files(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
fn none() -> BTreeMap<String, String> {
    BTreeMap::new()
}
/// A small file with every dtype, a scalar and an empty tensor.
fn small() -> BTreeMap<String, Tensor> {
    let dtypes = [DType::F32, DType::F64, DType::BF16, DType::F16, DType::I64];
    let mut all: BTreeMap<_, _> = dtypes.iter().map(|d| (d.to_string(), tensor(*d, &[2, 3], 1))).collect();
    all.insert("scalar".into(), Tensor::scalar(1.5f32));
    all.insert("empty".into(), Tensor::zeros(&[0, 3], DType::F32, Device::Cpu).unwrap());
    all
}
fn message<T>(r: felid::Result<T>) -> String {
    r.map(|_| ()).unwrap_err().to_string()
}

// ---- round trips ----

fn some_tensors() -> impl Strategy<Value = BTreeMap<String, Tensor>> {
    let dtype = prop::sample::select(vec![DType::F32, DType::F64, DType::BF16, DType::F16, DType::I64]);
    let one =
        (dtype, prop::collection::vec(0usize..5, 0..4), any::<u64>()).prop_map(|(d, shape, seed)| tensor(d, &shape, seed));
    prop::collection::btree_map(any::<String>().prop_filter("reserved", |n| n != "__metadata__"), one, 0..8)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_is_written_is_read_back(tensors in some_tensors(), metadata in prop::collection::btree_map(any::<String>(), any::<String>(), 0..3)) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.safetensors");
        write_safetensors(&path, &borrowed(&tensors), &metadata).unwrap();
        let read = read_safetensors(&path).unwrap();
        assert_same_all(&read.tensors, &tensors);
        prop_assert_eq!(&read.metadata, &metadata);

        // The format's own library agrees, and finds every tensor aligned to its elements.
        let bytes = fs::read(&path).unwrap();
        let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        prop_assert_eq!(theirs.len(), tensors.len());
        for (name, t) in &tensors {
            let view = theirs.tensor(name).unwrap();
            prop_assert_eq!(view.shape(), t.shape());
            prop_assert_eq!(view.data(), &t.to_le_bytes().unwrap()[..]);
            let at = view.data().as_ptr() as usize - bytes.as_ptr() as usize;
            prop_assert!(at.is_multiple_of(t.dtype().size()));
        }
        // Writing is a function of what is written.
        write_safetensors(&path, &borrowed(&tensors), &metadata).unwrap();
        prop_assert_eq!(fs::read(&path).unwrap(), bytes);
    }

    #[test]
    fn shards_are_read_back(tensors in some_tensors(), max in 0usize..200) {
        let dir = tempfile::tempdir().unwrap();
        save_sharded(dir.path(), &borrowed(&tensors), &BTreeMap::from([("k".into(), "v".into())]), max).unwrap();
        let read = load(dir.path()).unwrap();
        assert_same_all(&read.tensors, &tensors);
        prop_assert_eq!(read.metadata.get("k").map(String::as_str), Some("v"));
        prop_assert_eq!(dir.path().join(WEIGHTS).exists(), !dir.path().join(INDEX).exists());
    }

    #[test]
    fn flipped_bytes_of_safetensors_are_survived(flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        flip("t.safetensors", &flips, &small_bytes());
    }

    #[test]
    fn flipped_bytes_of_pytorch_files_are_survived(
        which in prop::sample::select(vec!["strided", "dtypes", "nested", "protocol_4"]),
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        flip("t.pt", &flips, &fs::read(fixture(&format!("pt/{which}.pt"))).unwrap());
    }
}

fn small_bytes() -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s.safetensors");
    write_safetensors(&path, &borrowed(&small()), &BTreeMap::from([("format".into(), "pt".into())])).unwrap();
    fs::read(path).unwrap()
}

fn flip(name: &str, flips: &[(prop::sample::Index, u8)], good: &[u8]) {
    let dir = tempfile::tempdir().unwrap();
    let mut bytes = good.to_vec();
    for (at, value) in flips {
        let at = at.index(bytes.len());
        bytes[at] = *value;
    }
    survives(&dir.path().join(name), &bytes).ok();
}

#[test]
fn strided_views_are_written_in_row_major_order() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.safetensors");
    let t = Tensor::from_vec((0..6).map(|i| i as f32).collect(), &[2, 3]).unwrap();
    let (turned, one) = (t.transpose(0, 1).unwrap(), Tensor::full(2.0, &[3, 2], DType::BF16, Device::Cpu).unwrap());
    write_safetensors(&path, &[("turned", &turned), ("one", &one)], &none()).unwrap();
    let read = load_tensors(&path).unwrap();
    assert_eq!(read["turned"].to_f32_vec().unwrap(), [0., 3., 1., 4., 2., 5.]);
    assert_eq!(read["one"].to_vec::<bf16>().unwrap(), [bf16::from_f32(2.0); 6]);
}

#[test]
fn names_cannot_be_written_twice() {
    let dir = tempfile::tempdir().unwrap();
    let t = Tensor::scalar(1f32);
    let path = dir.path().join("t.safetensors");
    assert!(message(write_safetensors(&path, &[("a", &t), ("a", &t)], &none())).contains("'a'"));
    assert!(message(write_safetensors(&path, &[("__metadata__", &t)], &none())).contains("__metadata__"));
    assert!(message(save_sharded(dir.path(), &[("a", &t), ("a", &t)], &none(), 4)).contains("'a'"));
    assert!(load(dir.path()).is_err());
}

// ---- PyTorch ----

#[test]
fn golden_state_dict_equals_golden_parameters() {
    let got = load_tensors(&fixture("golden/pt_cat_adaptive")).unwrap();
    let golden = load_tensors(&fixture("golden/cat_adaptive.safetensors")).unwrap();
    let want = golden.into_iter().filter_map(|(n, t)| Some((n.strip_prefix("param.")?.to_string(), t))).collect();
    assert_same_all(&got, &want);
}

#[test]
fn pytorch_dtypes() {
    let read = load_tensors(&fixture("pt/dtypes.pt")).unwrap();
    assert_eq!(read.len(), 17);
    assert_eq!(read["float32"].to_vec::<f32>().unwrap(), [0., 1., 2., 3., 4., 5.]);
    assert_eq!(read["float64"].to_vec::<f64>().unwrap(), [0., 1., 2., 3., 4., 5.]);
    assert_eq!(read["float16"].to_vec::<f16>().unwrap(), [0., 1., 2., 3., 4., 5.].map(f16::from_f32));
    assert_eq!(read["bfloat16"].to_vec::<bf16>().unwrap(), [0., 1., 2., 3., 4., 5.].map(bf16::from_f32));
    for int in ["int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64"] {
        assert_eq!(read[int].shape(), [2, 3], "{int}");
        assert_eq!(read[int].to_vec::<i64>().unwrap(), [0, 1, 2, 3, 4, 5], "{int}");
    }
    assert_eq!(read["negative"].to_vec::<i64>().unwrap(), [0, -1, -2]);
    assert_eq!(read["bool"].to_vec::<i64>().unwrap(), [1, 0, 1]);
    assert_eq!((read["scalar"].shape(), read["scalar"].item().unwrap()), (&[][..], 2.5));
    assert_eq!(read["empty"].shape(), [0, 3]);
    assert_eq!(read["parameter"].to_vec::<f32>().unwrap(), [0., 1., 2., 3.]);
}

#[test]
fn pytorch_views() {
    let read = load_tensors(&fixture("pt/strided.pt")).unwrap();
    let base = Tensor::from_vec((0..24).map(|i| i as f32).collect(), &[4, 6]).unwrap();
    assert_same(&read["base"], &base, "base");
    assert_same(&read["tied"], &base, "tied");
    assert_same(&read["transposed"], &base.transpose(0, 1).unwrap(), "transposed");
    assert_same(&read["slice"], &base.narrow(0, 1, 2).unwrap().narrow(1, 2, 4).unwrap(), "slice");
    assert_eq!(read["every_other"].to_f32_vec().unwrap(), (0..24).step_by(2).map(|i| i as f32).collect::<Vec<_>>());
    assert_eq!(read["expanded"].to_f32_vec().unwrap(), [0., 1., 2., 0., 1., 2.]);
    assert!(read.values().all(Tensor::is_contiguous));
}

#[test]
fn pytorch_wrappers_prefixes_and_protocols() {
    let nested = load_tensors(&fixture("pt/nested.pt")).unwrap();
    assert_eq!(nested.keys().collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(nested["a"].to_vec::<f32>().unwrap(), [0., 1.]);
    assert_eq!(nested["b"].to_vec::<bf16>().unwrap(), [0., 1.].map(bf16::from_f32));
    for protocol in 2..=5 {
        let read = load_tensors(&fixture(&format!("pt/protocol_{protocol}.pt"))).unwrap();
        assert_eq!(read["weight"].to_vec::<f32>().unwrap(), [0., 1., 2., 3., 4., 5.], "protocol {protocol}");
        assert_eq!(read["bias"].to_vec::<f32>().unwrap(), [0., 1.], "protocol {protocol}");
    }
}

#[test]
fn pytorch_files_that_are_no_state_dicts() {
    let legacy = message(load(&fixture("pt/legacy.pt")));
    assert!(legacy.contains("old format") && legacy.contains("torch.save"), "{legacy}");
    let module = message(load(&fixture("pt/whole_module.pt")));
    assert!(module.contains("'torch.nn.modules.linear.Linear'") && module.contains("nothing was executed"), "{module}");
}

// ---- broken files ----

#[test]
fn files_cut_short_anywhere_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    let pt = fs::read(fixture("pt/strided.pt")).unwrap();
    for (name, bytes) in [("t.safetensors", small_bytes()), ("t.pt", pt)] {
        let path = dir.path().join(name);
        assert!(survives(&path, &bytes).is_ok());
        for n in 0..bytes.len() {
            assert!(survives(&path, &bytes[..n]).is_err(), "{name}: {n} of {} bytes", bytes.len());
        }
        assert!(survives(&path, &[&bytes[..], b"x"].concat()).is_err(), "{name}: a byte too many");
    }
}

#[test]
fn every_single_byte_can_be_wrong() {
    let dir = tempfile::tempdir().unwrap();
    for (name, good) in [("t.safetensors", small_bytes()), ("t.pt", fs::read(fixture("pt/strided.pt")).unwrap())] {
        let path = dir.path().join(name);
        for at in 0..good.len() {
            let mut bytes = good.clone();
            bytes[at] = [0, 0xff, good[at] ^ 1][at % 3];
            survives(&path, &bytes).ok();
        }
    }
}

#[test]
fn safetensors_that_lie_about_their_lengths() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.safetensors");
    for length in [u64::MAX, 1 << 62, 99_999_999, 0] {
        assert!(survives(&path, &[&length.to_le_bytes()[..], b"{}"].concat()).is_err(), "{length}");
    }
    for shape in ["[1099511627776]", "[0,4611686018427387904,4611686018427387904]", "[18446744073709551615]"] {
        for end in ["0", "4398046511104", "18446744073709551615"] {
            let header = format!(r#"{{"t":{{"dtype":"F32","shape":{shape},"data_offsets":[0,{end}]}}}}"#);
            let file = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat();
            let error = message(survives(&path, &file));
            assert!(error.contains("'t'"), "{error}");
        }
    }
}

// ---- folders ----

#[test]
fn a_folder_is_searched_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let error = message(load(dir.path()));
    for name in [WEIGHTS, INDEX, "state_dict.pt", "pytorch_model.bin"] {
        assert!(error.contains(name), "{error}");
    }
    let pt = fixture("pt/protocol_2.pt");
    fs::copy(&pt, dir.path().join("pytorch_model.bin")).unwrap();
    assert!(load_tensors(dir.path()).unwrap().contains_key("weight"));
    fs::copy(fixture("pt/nested.pt"), dir.path().join("state_dict.pt")).unwrap();
    assert!(load_tensors(dir.path()).unwrap().contains_key("a"));
    write_safetensors(&dir.path().join(WEIGHTS), &[("s", &Tensor::scalar(1f32))], &none()).unwrap();
    assert!(load_tensors(dir.path()).unwrap().contains_key("s"));
    // A single file of another name is known by its content.
    fs::copy(&pt, dir.path().join("weights")).unwrap();
    assert!(load_tensors(&dir.path().join("weights")).unwrap().contains_key("weight"));
    assert!(matches!(load(&dir.path().join("none")), Err(Error::Io { .. })));
}

#[test]
fn an_index_leads_nowhere_else() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, outside) = (dir.path().join("model"), dir.path().join("secret.safetensors"));
    fs::create_dir(&folder).unwrap();
    write_safetensors(&outside, &[("a", &Tensor::scalar(1f32))], &none()).unwrap();
    let index = |name: &str| {
        let json = serde_json::json!({ "weight_map": { "a": name } }).to_string();
        survives(&folder.join(INDEX), json.as_bytes())
    };
    let absolute = outside.display().to_string();
    for name in ["../secret.safetensors", &absolute, "./../secret.safetensors", "..", ".", "", "a/b", "a\\b", "a\0b"] {
        assert!(message(index(name)).contains("plain file name"), "{name:?}");
    }
    assert!(message(index("gone.safetensors")).contains("gone.safetensors"));
    fs::copy(&outside, folder.join("here.safetensors")).unwrap();
    assert!(index("here.safetensors").is_ok());
    for broken in ["", "{}", "[]", r#"{"weight_map":{"a":"here.safetensors","a":"b"}}"#, r#"{"weight_map":{"a":1}}"#] {
        assert!(message(survives(&folder.join(INDEX), broken.as_bytes())).contains("broken index"), "{broken}");
    }
}

#[test]
fn everything_missing_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let t = Tensor::scalar(1f32);
    let names = ["a", "b", "c", "d"];
    save_sharded(dir.path(), &names.map(|n| (n, &t)), &none(), 4).unwrap();
    let shard = |i: usize| format!("model-{i:05}-of-00004.safetensors");
    write_safetensors(&dir.path().join(shard(1)), &[("x", &t)], &none()).unwrap();
    write_safetensors(&dir.path().join(shard(4)), &[("y", &t)], &none()).unwrap();
    let lacking = message(load(dir.path()));
    assert!(lacking.contains("lack these tensors: a, d"), "{lacking}");
    fs::remove_file(dir.path().join(shard(2))).unwrap();
    fs::remove_file(dir.path().join(shard(3))).unwrap();
    let missing = message(load(dir.path()));
    assert!(missing.contains(&shard(2)) && missing.contains(&shard(3)) && !missing.contains(&shard(1)), "{missing}");
}

#[test]
fn saving_again_replaces_and_cleans_up() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), "{}").unwrap();
    let save = |value: f32, n: usize, max: usize| {
        let t = Tensor::from_vec(vec![value; 4], &[4]).unwrap();
        let names: Vec<String> = (0..n).map(|i| format!("t{i}")).collect();
        let tensors: Vec<_> = names.iter().map(|n| (n.as_str(), &t)).collect();
        save_sharded(dir.path(), &tensors, &none(), max).unwrap();
        let read = load_tensors(dir.path()).unwrap();
        assert_eq!(read.len(), n);
        assert!(read.values().all(|r| r.to_f32_vec().unwrap() == [value; 4]));
        files(dir.path())
    };
    let sharded = |n: usize, suffix: &str| -> Vec<String> {
        let shards = (1..=n).map(|i| format!("model-{i:05}-of-{n:05}{suffix}.safetensors"));
        ["config.json".to_string()].into_iter().chain(shards).chain([INDEX.to_string()]).collect()
    };
    assert_eq!(save(1.0, 3, 1000), ["config.json", WEIGHTS]);
    assert_eq!(save(2.0, 3, 16), sharded(3, ""));
    // The same number of shards: files in use are left alone until the index turns.
    assert_eq!(save(3.0, 3, 16), sharded(3, ".1"));
    assert_eq!(save(4.0, 3, 16), sharded(3, ""));
    assert_eq!(save(5.0, 4, 32), sharded(2, ""));
    assert_eq!(save(6.0, 1, 0), ["config.json", WEIGHTS]);
}
