//! Device memory: counted, flat over many steps, and what happens when it runs out. Counts are of the whole process, so
//! these tests have one of their own and take turns.
#![cfg(feature = "cuda")]

#[path = "common/devices.rs"]
mod devices;
#[path = "common/small_run.rs"]
mod small_run;

use felid::Error;
use felid::cuda::gpu;
use felid::generate::{Decoding, Generator, GeneratorOptions, Request};
use felid::model::{Cat, ModelConfig};
use felid::ops;
use felid::tensor::{DType, Device, Tensor};
use felid::train::{TrainConfig, Trainer};
use small_run::small;
use std::sync::Mutex;

static TURN: Mutex<()> = Mutex::new(());

#[test]
fn memory_is_counted_and_stays_flat() {
    let _turn = TURN.lock();
    let Some(cuda) = devices::cuda() else { return };
    let Device::Cuda(n) = cuda else { return };
    let dir = tempfile::tempdir().unwrap();
    let config = TrainConfig { steps: 1100, ..small(dir.path(), "dtype = 'bf16'") };
    let mut t = Trainer::on(config, cuda).unwrap();
    let held = |t: &mut Trainer, steps: usize| {
        (0..steps).for_each(|_| drop(t.step().unwrap()));
        gpu(n).unwrap().synchronize().unwrap();
        gpu(n).unwrap().memory_stats()
    };
    let early = held(&mut t, 9);
    let late = held(&mut t, 999);
    let of = |s: &felid::cuda::CudaMemory, name: &str| s.by_category.iter().find(|(c, _)| *c == name).map_or(0, |(_, b)| *b);
    for kind in ["weights", "optimizer"] {
        assert!(of(&early, kind) > 0);
    }
    // flat: what is held after a step, and the most that one took, stay what they were once every chunk size has been seen
    assert_eq!((&early.by_category, early.peak), (&late.by_category, late.peak));
    assert!(late.reserved <= early.reserved + (64 << 20), "{early:?} {late:?}");
}

#[test]
fn running_out_is_an_error_and_leaves_the_process_usable() {
    let _turn = TURN.lock();
    let Some(cuda) = devices::cuda() else { return };
    let Device::Cuda(n) = cuda else { return };
    let total = gpu(n).unwrap().total_memory;
    let held = Tensor::zeros(&[1 << 20], DType::F32, cuda).unwrap();
    let e = Tensor::zeros(&[total / 4, 2], DType::F32, cuda).unwrap_err();
    assert!(matches!(e, Error::OutOfMemory { .. }), "{e}");
    let text = e.to_string();
    assert!(text.contains("GiB") && text.contains("holds") && !text.contains('\n'), "{text}");
    assert_eq!(ops::sum_all(&held.into()).unwrap().value().item().unwrap(), 0.0);
    assert!(Tensor::zeros(&[4], DType::F64, cuda).is_err());
}

/// What runs of captured steps take they give back, and a batch takes no more the next time.
#[test]
fn generation_gives_its_memory_back() {
    let _turn = TURN.lock();
    let Some(cuda) = devices::cuda() else { return };
    let m = Cat::new(ModelConfig::preset("nano").unwrap(), 1).unwrap().to_device(cuda).unwrap();
    let held = |decoding| {
        let options = GeneratorOptions { decoding, ..Default::default() };
        let requests = (2..5).map(|n| Request::new(vec![7; n], 40)).collect();
        Generator::new(&m).with_options(options).run(requests).unwrap();
        cuda.memory_stats().current
    };
    let single = held(Decoding::Single);
    assert_eq!([held(Decoding::Runs), held(Decoding::Graphs), held(Decoding::Graphs)], [single; 3]);
}
