//! Training: resuming, threads, memory, refusals.

use felid::tensor::{Device, Tensor, memory_stats};
use felid::train::{TrainConfig, Trainer};
use std::path::Path;

fn config(out: &Path, more: &str) -> TrainConfig {
    let text = out.join("text.txt");
    std::fs::create_dir_all(out).unwrap();
    std::fs::write(&text, "It is a truth universally acknowledged, that a cat in possession of a good chair. ".repeat(30))
        .unwrap();
    let toml = format!(
        "data = {text:?}\nout = {out:?}\nsteps = 6\nwarmup = 2\nbatch_size = 2\nseq_len = 32\n{more}\n\
         [model]\nmodel_type = \"cat_adaptive\"\nvocab_size = 256\nblock_size = 32\nchunk_size = 8\n\
         [model.decoder]\ndim = 32\nn_layer = 2\nn_head = 2\nuse_qk_norm = true\n\
         [model.compressor]\ndim = 16\nn_layer = 1\nn_head = 1\n"
    );
    let table = TrainConfig::parse_table(&toml, Path::new("test")).unwrap();
    TrainConfig::from_table(table, Path::new("test"), "nano").unwrap()
}

fn weights(t: &Trainer) -> Vec<Vec<f32>> {
    t.model.params().iter().map(|p| p.value().to_f32_vec().unwrap()).collect()
}

fn run(mut t: Trainer, steps: u64) -> Trainer {
    for _ in 0..steps {
        t.step().unwrap();
    }
    t
}

/// Straight on, and with a stop in the middle: the same bits, moments included.
#[test]
fn resuming_is_bit_identical() {
    for more in
        ["grad_accum = 2", "dtype = \"bf16\"", "task = \"mqar\"\nmqar = { vocab_size = 64, pairs = 4 }", "recompute = true"]
    {
        let dir = tempfile::tempdir().unwrap();
        let c = config(dir.path(), more);
        let straight = run(Trainer::new(c.clone()).unwrap(), 6);
        run(Trainer::new(c.clone()).unwrap(), 3).save().unwrap();
        let resumed = run(Trainer::resume(&c.out, Ok).unwrap(), 3);
        assert_eq!(resumed.steps_done(), 6);
        assert_eq!(weights(&straight), weights(&resumed), "{more}");
        let state = c.out.join("training_state.safetensors");
        straight.save().unwrap();
        let a = std::fs::read(&state).unwrap();
        resumed.save().unwrap();
        assert!(a == std::fs::read(&state).unwrap(), "{more}: moments differ");
    }
}

#[test]
fn threads_do_not_matter() {
    let dir = tempfile::tempdir().unwrap();
    let with = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| weights(&run(Trainer::new(config(dir.path(), "")).unwrap(), 4)))
    };
    assert_eq!(with(1), with(3));
}

#[test]
fn it_learns_and_memory_stays_flat() {
    let dir = tempfile::tempdir().unwrap();
    let mut t = Trainer::new(config(dir.path(), "lr = 5e-3")).unwrap();
    let first = t.step().unwrap().loss;
    t = run(t, 14);
    let before = t.evaluate(8).unwrap().len();
    let held = memory_stats().current;
    t = run(t, 30);
    let last = t.step().unwrap().loss;
    assert!(last < first - 1.0, "{first} -> {last}");
    assert_eq!(before, 2, "one quality for each of C 4 and 8");
    // other tests of this process hold tensors too; what one step needs is far below this
    assert!(memory_stats().current < held + (64 << 20));
}

/// The loss is read when the step is under way already: that must not cost the weights.
#[test]
fn a_loss_that_is_not_finite_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    for more in ["", "dtype = 'bf16'", "grad_accum = 2"] {
        let mut t = run(Trainer::new(config(dir.path(), more)).unwrap(), 1);
        let output = t.model.params_mut().pop().unwrap();
        let shape = output.shape().to_vec();
        let huge = Tensor::full(1e38, &shape, output.dtype(), Device::Cpu).unwrap().contiguous().unwrap();
        let sane = std::mem::replace(output.value_mut(), huge);
        let before = weights(&t);
        let e = t.step().unwrap_err().to_string();
        assert!(e.contains("the loss of step 2"), "{e}");
        assert_eq!((weights(&t), t.steps_done()), (before, 1));
        *t.model.params_mut().pop().unwrap().value_mut() = sane;
        let loss = t.step().unwrap().loss;
        let undisturbed = run(Trainer::new(config(dir.path(), more)).unwrap(), 1).step().unwrap().loss;
        assert_eq!(loss, undisturbed, "moments, and the place in the data, are as they were");
    }
}

#[test]
fn bad_settings_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    let parse = |text: &str| {
        TrainConfig::from_table(TrainConfig::parse_table(text, Path::new("t.toml"))?, Path::new("t.toml"), "nano")
    };
    for (text, part) in
        [("stepz = 3", "stepz"), ("steps = \"many\"", "steps"), ("steps = ", "t.toml"), ("preset = \"huge\"", "huge")]
    {
        let e = parse(text).unwrap_err().to_string();
        assert!(e.contains(part) && e.lines().count() == 1, "{e}");
    }
    for more in ["chunk_sizes = [3]", "seq_len = 33", "lr = -1.0", "batch_size = 0", "clip = nan", "beta1 = 1.0"] {
        // seq_len is given twice where it is what is tried: TOML itself refuses that
        let base = config(dir.path(), "");
        let table = TrainConfig::parse_table(more, Path::new("test")).unwrap();
        let c = base.with(table, Path::new("test")).unwrap();
        assert!(Trainer::new(c).is_err(), "{more}");
    }
    let recall = config(dir.path(), "task = \"mqar\"\nmqar = { vocab_size = 8192, pairs = 4 }");
    let e = Trainer::new(recall).err().unwrap().to_string();
    assert!(e.contains("mqar.vocab_size") && e.contains("8192"), "{e}");
}

#[test]
fn a_damaged_state_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let c = config(dir.path(), "");
    assert!(Trainer::resume(&c.out, Ok).is_err());
    run(Trainer::new(c.clone()).unwrap(), 1).save().unwrap();
    let state = c.out.join("training_state.safetensors");
    let bytes = std::fs::read(&state).unwrap();
    std::fs::write(&state, &bytes[..bytes.len() / 2]).unwrap();
    let e = Trainer::resume(&c.out, Ok).err().unwrap().to_string();
    assert!(e.contains("training_state"), "{e}");
}

/// The file that spells out the default run says what the code does.
#[test]
fn the_example_is_the_default_run() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/nano.toml");
    let table = TrainConfig::parse_table(&std::fs::read_to_string(&path).unwrap(), &path).unwrap();
    let (spelled, default) = (TrainConfig::from_table(table, &path, "nano").unwrap(), TrainConfig::preset("nano").unwrap());
    assert_eq!(spelled.model_config(256).unwrap(), default.model_config(256).unwrap());
    let model = default.model_config(256).unwrap();
    assert_eq!(spelled.round(&model), default.round(&model));
    assert_eq!(TrainConfig { model: None, chunk_sizes: vec![], ..spelled }, default);
}
