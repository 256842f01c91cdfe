//! The CUDA device that tests run on beside the CPU, where there is one, and the report of what ran there.
#![allow(dead_code)]

use felid::tensor::{DType, Device};
use std::sync::OnceLock;

/// A CUDA device to test on; none where there is none, or where FELID_TEST_DEVICE=cpu. Says once why tests are skipped.
pub fn cuda() -> Option<Device> {
    static FOUND: OnceLock<Option<Device>> = OnceLock::new();
    *FOUND.get_or_init(|| {
        if std::env::var("FELID_TEST_DEVICE").is_ok_and(|d| d == "cpu") {
            return None;
        }
        match Device::Cuda(0).check() {
            Ok(()) => Some(Device::Cuda(0)),
            Err(e) => {
                assert!(cpu(), "FELID_TEST_DEVICE=cuda, but {e}");
                eprintln!("tests on CUDA are skipped: {e}");
                None
            }
        }
    })
}

/// True where tests shall run on the CPU too: FELID_TEST_DEVICE=cuda leaves that out.
pub fn cpu() -> bool {
    !std::env::var("FELID_TEST_DEVICE").is_ok_and(|d| d == "cuda")
}

/// True where FELID_TEST_LIGHT=1 asks for few comparisons of each op on CUDA: for compute-sanitizer, under which a launch
/// takes a hundred times as long. Every kernel is still run, forward and backward, off and on its tiles.
pub fn light() -> bool {
    std::env::var("FELID_TEST_LIGHT").is_ok_and(|v| v == "1")
}

/// Note that `cases` comparisons of an op in a dtype ran on CUDA, the worst using `share` of its error bound. Written to
/// `FELID_REPORT/<test program>.json`, if that is set.
pub fn report(op: &str, dtype: DType, cases: usize, share: f64) {
    #[cfg(feature = "cuda")]
    written::note(op, dtype, cases, share);
    let _ = (op, dtype, cases, share);
}

#[cfg(feature = "cuda")]
mod written {
    use super::*;
    use serde_json::{Map, Value, json};
    use std::sync::Mutex;

    static OPS: Mutex<Option<Map<String, Value>>> = Mutex::new(None);

    pub fn note(op: &str, dtype: DType, cases: usize, share: f64) {
        let Some(dir) = std::env::var_os("FELID_REPORT") else { return };
        let mut ops = OPS.lock().unwrap();
        let ops = ops.get_or_insert_default();
        let entry = ops.entry(op).or_insert(json!({})).as_object_mut().unwrap();
        let old = entry.get(&dtype.to_string());
        let of = |key: &str| old.and_then(|o| o[key].as_f64()).unwrap_or(0.0);
        let (cases, share) = (cases + of("cases") as usize, share.max(of("worst_share_of_bound")));
        entry.insert(dtype.to_string(), json!({ "cases": cases, "worst_share_of_bound": share }));
        let suite = env!("CARGO_CRATE_NAME");
        let gpu = felid::cuda::gpu(0).unwrap();
        let whole = json!({
            "suite": suite,
            "gpu": gpu.name,
            "compute_capability": format!("{}.{}", gpu.capability.0, gpu.capability.1),
            "driver_cuda_version": gpu.driver_version().unwrap(),
            "felid": env!("CARGO_PKG_VERSION"),
            "ops": ops,
        });
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(std::path::Path::new(&dir).join(format!("{suite}.json")), format!("{whole:#}\n")).unwrap();
    }
}
