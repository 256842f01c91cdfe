//! The command as users and scripts see it: output, errors, exit codes.

use felid::model::formats::{read_safetensors, write_safetensors};
use felid::model::{Cat, FolderFormat, ModelConfig, TransformerConfig, save};
use felid::tensor::Tensor;
use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

fn felid(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_felid")).args(args).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Exit code and the one line of the error.
fn fails(args: &[&str], code: i32, parts: &[&str]) {
    let out = felid(args);
    let err = text(&out.stderr);
    assert_eq!(out.status.code(), Some(code), "{args:?}: {err}");
    assert!(parts.iter().all(|p| err.contains(p)), "{args:?}: {err}");
    assert!(!err.contains("panicked"), "{args:?}: {err}");
    if code == 1 {
        assert_eq!(err.lines().filter(|l| l.starts_with("felid: ")).count(), 1, "{args:?}: {err}");
    }
}

/// A tiny run in `dir/run`, in 4 steps.
fn train(dir: &Path, more: &[&str]) -> Output {
    let toml = dir.join("tiny.toml");
    let corpus = dir.join("text.txt");
    std::fs::write(&corpus, "Whoever has a cat has company; whoever has two has a quarrel. ".repeat(60)).unwrap();
    let settings = format!(
        "data = {corpus:?}\nout = {:?}\nsteps = 4\nbatch_size = 2\nseq_len = 32\neval_windows = 2\nfinal_eval_windows = 2\n\
         [model]\nmodel_type = \"cat_adaptive\"\nvocab_size = 256\nblock_size = 64\nchunk_size = 8\n\
         [model.decoder]\ndim = 32\nn_layer = 1\nn_head = 2\n[model.compressor]\ndim = 16\nn_layer = 1\nn_head = 1\n",
        dir.join("run")
    );
    std::fs::write(&toml, settings).unwrap();
    let mut args = vec!["train", toml.to_str().unwrap()];
    args.extend(more);
    felid(&args)
}

#[test]
fn train_generate_logits_convert() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let out = train(dir.path(), &[]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    assert!(text(&out.stderr).contains("held out: C 4 "), "{}", text(&out.stderr));
    assert!(text(&out.stdout).contains("sample, chunk size 8"));
    let log = std::fs::read_to_string(path("run/log.jsonl")).unwrap();
    assert_eq!(log.lines().filter(|l| l.contains("\"kind\":\"step\"")).count(), 4);
    fails(&["train", &path("tiny.toml")], 2, &["--resume", "--overwrite"]);

    let run = path("run");
    let base = ["generate", "--model", &run, "--prompt", "cats are ", "--max-new-tokens", "12", "--seed", "7"];
    let with = |more: &[&str]| felid(&[&base[..], more].concat());
    let (a, b) = (with(&["--chunk-size", "4"]), with(&["--chunk-size", "4"]));
    assert!(a.status.success(), "{}", text(&a.stderr));
    assert_eq!(a.stdout, b.stdout);
    assert!(text(&a.stderr).contains("tokens/s"));
    let json: serde_json::Value = serde_json::from_slice(&with(&["--json", "--temperature", "0"]).stdout).unwrap();
    assert_eq!((json["tokens"].as_array().unwrap().len(), json["prompt_tokens"].as_u64()), (12, Some(9)));
    fails(&["generate", "--model", &run, "--prompt", "x", "--chunk-size", "3"], 1, &["chunk size 3", "1, 2, 4, 8"]);
    fails(&["generate", "--model", &run, "--prompt", ""], 1, &["prompt is empty"]);
    fails(&["generate", "--model", &run, "--prompt", "x", "--max-new-tokens", "65"], 1, &["block_size of 64"]);
    fails(&["generate", "--model", &run, "--prompt", "x", "--temperature", "nan"], 2, &["temperature"]);
    fails(&["generate", "--model", &run], 2, &["--prompt"]);

    // many prompts at once give what each gives alone, whatever a line changes
    let prompts = [
        r#"{"prompt": "cats are ", "seed": 7, "chunk_size": 4}"#,
        "",
        r#"{"prompt": "whoever has", "max_new_tokens": 30, "chunk_size": "8,2@9", "temperature": 0, "logprobs": 2}"#,
        r#"{"prompt": "x", "stop": ["e", "a"], "repetition_penalty": 1.2, "top_k": 20, "min_p": 0.01, "stop_token": [32, "33"]}"#,
    ];
    std::fs::write(path("prompts.jsonl"), prompts.join("\n")).unwrap();
    let batch =
        ["generate", "--model", &run, "--prompts", &path("prompts.jsonl"), "--max-new-tokens", "12", "--max-batch", "2"];
    let out = felid(&batch);
    assert!(out.status.success(), "{}", text(&out.stderr));
    assert!(text(&out.stderr).contains("3 prompts, 2 at once"), "{}", text(&out.stderr));
    let lines = text(&out.stdout).lines().map(|l| serde_json::from_str(l).unwrap()).collect::<Vec<serde_json::Value>>();
    let row = |n: u64| lines.iter().find(|l| l["row"] == n).unwrap();
    assert_eq!((lines.len(), row(0)["text"].as_str().unwrap()), (3, text(&a.stdout).strip_suffix('\n').unwrap()));
    assert_eq!(row(1)["tokens"].as_array().unwrap().len(), 30);
    assert_eq!(row(1)["logprobs"][29]["top"][0][0], row(1)["tokens"][29]);
    let alone =
        ["--prompt", "whoever has", "--max-new-tokens", "30", "--chunk-size", "8,2@9", "--temperature", "0", "--json"];
    let alone = felid(&[&["generate", "--model", &run][..], &alone].concat());
    let alone: serde_json::Value = serde_json::from_slice(&alone.stdout).unwrap();
    assert_eq!((&alone["text"], &alone["finish"]), (&row(1)["text"], &"length".into()));
    assert!(!row(2)["text"].as_str().unwrap().contains(['e', 'a', ' ']));
    let plan = felid(&[&batch[..], &["--dry-run", "--json"]].concat());
    let plan: serde_json::Value = serde_json::from_slice(&plan.stdout).unwrap();
    assert!(plan["batch"] == 2 && plan["cache_bytes"].as_u64() > Some(1000), "{plan}");
    assert!(text(&with(&["--dry-run"]).stdout).contains(" bytes"));
    // in 8 bits: the same plan, smaller; and what it costs
    let int8 = felid(&[&batch[..], &["--dry-run", "--json", "--cache", "int8"]].concat());
    let int8: serde_json::Value = serde_json::from_slice(&int8.stdout).unwrap();
    assert!(int8["cache_bytes"].as_u64() < plan["cache_bytes"].as_u64(), "{int8} {plan}");
    assert!(with(&["--cache", "int8"]).status.success());
    fails(&[&base[..], &["--cache", "fp8"]].concat(), 2, &["--cache", "use plain or int8"]);
    fails(&["bench", "generate", "--cache", "fp8"], 2, &["use plain or int8"]);
    let cost = ["bench", "cache", "--model", &run, "--data", &path("text.txt"), "--windows", "2"];
    let out = felid(&[&cost[..], &["--json"]].concat());
    let rows: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap_or_else(|_| panic!("{}", text(&out.stderr)));
    let rows = rows.as_array().unwrap();
    assert_eq!(rows.iter().map(|r| r["chunk_size"].as_u64().unwrap()).collect::<Vec<_>>(), [4, 8]);
    assert!(rows.iter().all(|r| r["int8"]["tokens"] == r["plain"]["tokens"] && r["int8"]["loss"].as_f64() > Some(0.0)));
    assert!(text(&felid(&cost).stdout).contains("same choice"));
    fails(&[&cost[..], &["--chunk-sizes", "3"]].concat(), 1, &["chunk size 3"]);
    fails(&[&cost[..], &["--seq-len", "65"]].concat(), 1, &["block_size"]);
    fails(&[&cost[..], &["--windows", "0"]].concat(), 2, &["windows"]);
    for (line, code, parts) in [
        (r#"{"prompt": "x", "chunk_size": 3}"#, 1, ["request 1", "chunk size 3"]),
        (r#"{"prompt": ""}"#, 1, ["request 1", "prompt is empty"]),
        (r#"{"prompt": "x", "stop_token": ["<|none|>"]}"#, 2, ["request 1", "unknown stop token '<|none|>'"]),
        (r#"{"prompt": "x", "stop_token": [true]}"#, 1, ["line 2", "a stop token is an id"]),
        (r#"{"prompt": "x", "stop_token": [256]}"#, 1, ["request 1", "256"]),
        (r#"{"prompt": "x", "chunk_size": [4]}"#, 1, ["line 2", "use a chunk size"]),
        (r#"{"prompt": "x", "max_new_tokens": 65}"#, 1, ["request 1", "block_size of 64"]),
        (r#"{"prompt": "x", "temperature": 0, "top_p": 0.5}"#, 2, ["request 1", "contradicts"]),
        (r#"{"prompt": "x", "tempreature": 0}"#, 1, ["line 2", "tempreature"]),
    ] {
        std::fs::write(path("bad.jsonl"), format!("{}\n{line}\n", prompts[0])).unwrap();
        fails(&["generate", "--model", &run, "--prompts", &path("bad.jsonl")], code, &parts);
    }
    std::fs::write(path("bad.jsonl"), [prompts[0].as_bytes(), b"\n\n{\"prompt\": \"\xff\"}"].concat()).unwrap();
    fails(&["generate", "--model", &run, "--prompts", &path("bad.jsonl")], 1, &["line 3", "utf-8"]);
    // a row that asks for nothing is answered too
    std::fs::write(path("none.jsonl"), "{\"prompt\": \"x\", \"max_new_tokens\": 0}\n{\"prompt\": \"x\"}").unwrap();
    let out = felid(&["generate", "--model", &run, "--prompts", &path("none.jsonl"), "--max-new-tokens", "2"]);
    let lines = text(&out.stdout).lines().map(|l| serde_json::from_str(l).unwrap()).collect::<Vec<serde_json::Value>>();
    let none = lines.iter().find(|l| l["row"] == 0).unwrap();
    assert_eq!((lines.len(), &none["tokens"], &none["finish"]), (2, &serde_json::json!([]), &serde_json::Value::Null));
    fails(&["generate", "--model", &run, "--prompts", &path("prompts.jsonl"), "--prompt", "x"], 2, &["--prompt"]);
    let refused = ["generate", "--model", &run, "--prompt", "x", "--echo", "--max-new-tokens", "99"];
    fails(&refused, 1, &["block_size of 64"]);
    assert!(felid(&refused).stdout.is_empty());
    fails(&["generate", "--model", &run, "--prompt", "x", "--temperature", "0", "--top-k", "4"], 2, &["contradicts"]);
    fails(&["generate", "--model", &run, "--prompt", "x", "--chunk-size", "4@9"], 2, &["16,4@100"]);
    fails(&["generate", "--model", &run, "--prompt", "x", "--stop-token", "300"], 1, &["stop token 300"]);

    let ids = Tensor::ids(&(0..20).map(|i| i * 11 % 256).collect::<Vec<_>>(), &[2, 10]).unwrap();
    let (input, output) = (path("in.safetensors"), path("out.safetensors"));
    write_safetensors(Path::new(&input), &[("input_ids", &ids), ("labels", &ids)], &BTreeMap::new()).unwrap();
    let args =
        ["logits", "--model", &run, "--input", &input, "--out", &output, "--grads", "--generate", "3", "--chunk-size", "2"];
    let out = felid(&args);
    assert!(out.status.success(), "{}", text(&out.stderr));
    let file = read_safetensors(Path::new(&output)).unwrap().tensors;
    assert_eq!(file["logits"].shape(), [2, 10, 256]);
    assert_eq!(file["generated"].shape(), [2, 3]);
    assert!(file.contains_key("loss") && file.contains_key("grad.f.proj_fx.weight"));

    let bad = Tensor::ids(&[0, 300], &[1, 2]).unwrap();
    let refused = path("refused.safetensors");
    write_safetensors(Path::new(&input), &[("input_ids", &bad)], &BTreeMap::new()).unwrap();
    fails(&["logits", "--model", &run, "--input", &input, "--out", &refused], 1, &["300"]);
    assert!(!Path::new(&refused).exists());

    let native = path("native");
    std::fs::write(path("run/generation_config.json"), "{}").unwrap();
    assert!(felid(&["convert", &run, &native, "--to", "native"]).status.success());
    assert_eq!(std::fs::read(path("native/generation_config.json")).unwrap(), b"{}");
    fails(&["convert", &run, &native, "--to", "native"], 2, &["--overwrite"]);
    assert!(felid(&["convert", &native, &path("hf"), "--to", "hf"]).status.success());

    // a log that cannot be read is not thrown away
    std::fs::remove_file(path("run/log.jsonl")).unwrap();
    std::fs::create_dir(path("run/log.jsonl")).unwrap();
    fails(&["train", &path("tiny.toml"), "--resume"], 1, &["cannot read", "log.jsonl"]);
}

#[test]
fn ctrl_c_saves_and_resume_goes_on_to_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let other = tempfile::tempdir().unwrap();
    let steps = ["--steps", "400", "--eval-every", "0", "--save-every", "0"];
    let straight = train(other.path(), &steps);
    assert!(straight.status.success(), "{}", text(&straight.stderr));
    train(dir.path(), &["--steps", "1"]); // writes the settings
    let toml = dir.path().join("tiny.toml");
    let child = Command::new(env!("CARGO_BIN_EXE_felid"))
        .args([&["train", toml.to_str().unwrap(), "--overwrite"], &steps[..]].concat())
        .stderr(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let log = dir.path().join("run/log.jsonl");
    let (start, steps_logged) = (Instant::now(), || std::fs::read_to_string(&log).unwrap_or_default().lines().count());
    std::thread::sleep(Duration::from_millis(100));
    while steps_logged() < 5 && start.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let out = child.wait_with_output().unwrap();
    assert_eq!(out.status.code(), Some(130), "{}", text(&out.stderr));
    assert!(text(&out.stderr).contains("--resume"));
    let resumed = felid(&[&["train", toml.to_str().unwrap(), "--resume"], &steps[..]].concat());
    assert!(resumed.status.success(), "{}", text(&resumed.stderr));
    let read = |d: &Path| std::fs::read(d.join("run/model.safetensors")).unwrap();
    assert!(read(dir.path()) == read(other.path()));
    let steps: Vec<u64> = std::fs::read_to_string(&log)
        .unwrap()
        .lines()
        .filter_map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap()["report"]["step"].as_u64())
        .collect();
    assert_eq!(steps, (1..=400).collect::<Vec<_>>());
}

#[test]
fn parity_tells_by_its_exit_code() {
    let golden = |n: &str| format!("{}/tests/fixtures/golden/{n}", env!("CARGO_MANIFEST_DIR"));
    let out = felid(&["parity", &golden("cat_fixed.safetensors"), &golden("hf_cat")]);
    assert!(out.status.success() && text(&out.stdout).contains("agree"), "{}", text(&out.stdout));
    let json = felid(&["parity", "--json", &golden("transformer.safetensors")]);
    let v: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(v[0]["cases"][0]["pass"], true);
    // a golden file whose expected logits are off by a little
    let dir = tempfile::tempdir().unwrap();
    let mut file = read_safetensors(Path::new(&golden("transformer.safetensors"))).unwrap();
    for x in file.tensors.get_mut("case.0.logits").unwrap().as_mut_slice::<f32>().unwrap() {
        *x *= 1.0001;
    }
    let off = dir.path().join("off.safetensors");
    let all: Vec<(&str, &Tensor)> = file.tensors.iter().map(|(n, t)| (n.as_str(), t)).collect();
    write_safetensors(&off, &all, &file.metadata).unwrap();
    fails(&["parity", off.to_str().unwrap()], 1, &["1 golden cases are out of bounds"]);
}

#[test]
fn tokenize_writes_shards_and_a_tokenizer() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    std::fs::write(
        path("a.txt"),
        "the cat sat on the mat, and the dog sat on the cat; whoever watches them laughs, and writes it down. ".repeat(50),
    )
    .unwrap();
    let out = felid(&["tokenize", &path("a.txt"), "--out", &path("tokens"), "--train-bpe", "280", "--json"]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    let v: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(v["vocab_size"], 280);
    assert!(Path::new(&path("tokens/tokenizer.json")).exists());
    fails(&["tokenize", &path("a.txt"), "--out", &path("tokens")], 2, &["tokens"]);
    // shards bring their tokenizer: training on them needs no flag
    let (data, run) = (path("tokens"), path("run"));
    let small = ["--set", "model.decoder.dim=24", "--set", "model.decoder.n_layer=1", "--set", "model.vocab_size=280"];
    let how = ["--steps", "1", "--batch-size", "2", "--seq-len", "16", "--set", "final_eval_windows=1"];
    let out = felid(&[&["train", "--data", &data, "--out", &run][..], &how, &small].concat());
    assert!(out.status.success(), "{}", text(&out.stderr));
    assert!(Path::new(&path("run/tokenizer.json")).exists());
    std::fs::write(path("empty.txt"), "").unwrap();
    fails(&["tokenize", &path("empty.txt"), "--out", &path("none")], 1, &["empty"]);
}

#[test]
fn bad_folders_and_flags() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    fails(&["generate", "--model", &path("nowhere"), "--prompt", "x"], 1, &["config.json"]);
    std::fs::create_dir(path("m")).unwrap();
    std::fs::write(path("m/config.json"), "{").unwrap();
    fails(&["generate", "--model", &path("m"), "--prompt", "x"], 1, &["config.json"]);
    let config = |layers: &str| {
        format!(
            "{{\"model_type\": \"transformer\", \"vocab_size\": 256, \"block_size\": 32, \
             \"decoder\": {{\"dim\": 32, \"n_layer\": {layers}, \"n_head\": 2}}}}"
        )
    };
    for layers in ["0", "1000000000000", "2"] {
        std::fs::write(path("m/config.json"), config(layers)).unwrap();
        fails(&["generate", "--model", &path("m"), "--prompt", "x"], 1, &["felid: "]);
    }
    std::fs::write(path("empty.txt"), "").unwrap();
    fails(&["train", "--data", &path("empty.txt"), "--out", &path("r")], 1, &["empty"]);
    std::fs::write(path("short.txt"), "too short").unwrap();
    fails(&["train", "--data", &path("short.txt"), "--out", &path("r"), "--steps", "1"], 1, &["felid: "]);
    fails(&["train", "--threads", "0"], 2, &["threads"]);
    fails(&["bench", "train", "--preset", "nano", "--batch-size", "99999999999"], 2, &["99999999999 x 128", "too large"]);
    fails(&["bench", "attention", "--chunk-sizes", "4,0"], 2, &["chunk sizes", "at least 1"]);
    fails(&["bench", "attention", "--seq-len", "99999999999", "--batch-size", "99999999999"], 2, &["too large"]);
    fails(&["bench", "generate", "--preset", "nano", "--chunk-sizes", "16,3"], 1, &["chunk size 3"]);
    fails(&["bench", "generate", "--preset", "nano", "--batch-size", "99999999999999999"], 2, &["too many"]);
    let cost = ["bench", "cost", "--presets", "nano", "--seq-len", "64", "--tokens", "64", "--chunk-sizes", "16,3"];
    fails(&cost, 1, &["chunk size 3"]);
    fails(&["train", "--device", "cuda"], 1, &["--device cpu"]);
    fails(&["train", "--no-such-flag"], 2, &[]);
    fails(&["train", "--set", "nothing_known=1", "--out", &path("r")], 1, &["nothing_known"]);
}

#[test]
fn bytes_for_a_larger_vocabulary_are_remarked_on() {
    let dir = tempfile::tempdir().unwrap();
    let note = |vocab| {
        let decoder = TransformerConfig { intermediate_size: Some(8), ..TransformerConfig::new(8, 2, 1, false) };
        let model = Cat::new(ModelConfig::dense(vocab, 16, decoder), 0).unwrap();
        save(dir.path(), &model, FolderFormat::Native, None).unwrap();
        let out = felid(&["generate", "--model", dir.path().to_str().unwrap(), "--prompt", "x", "--max-new-tokens", "2"]);
        assert!(out.status.success());
        text(&out.stderr).contains("no tokenizer.json")
    };
    assert!(note(300) && !note(256));
}

#[test]
fn a_profile_accounts_for_the_step() {
    let run = |more: &[&str]| {
        let common = ["bench", "train", "--preset", "nano", "--chunk-sizes", "8", "--steps", "1", "--profile"];
        let out = felid(&[&common[..], more].concat());
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    };
    let report: serde_json::Value = serde_json::from_str(&run(&["--json"])).unwrap();
    let profile = &report["rows"][0]["profile"];
    let ops = profile["ops"].as_array().unwrap();
    let sum = |key: &str| ops.iter().map(|op| op[key].as_f64().unwrap()).sum::<f64>();
    let (total, busy) = (profile["total_ms"].as_f64().unwrap(), profile["busy_ms"].as_f64().unwrap());
    assert!(busy <= total && (sum("ms") - busy).abs() < 1e-6 * busy && (sum("share") - 1.0).abs() < 1e-6);
    let calls = |name: &str| ops.iter().find(|op| op["op"] == name).map_or(0, |op| op["calls"].as_u64().unwrap());
    // four layers in the decoder and one in the compressor: a norm before each half, and one after each stack
    assert_eq!((calls("rms_norm::forward"), calls("rms_norm::backward"), calls("swiglu::backward")), (12, 12, 5));
    // a step on the CPU saves all
    assert_eq!((calls("rms_norm::forward (again)"), calls("swiglu::forward (again)")), (0, 0));
    let table = run(&[]);
    assert!(table.contains("one step at C 8") && table.contains("matmul::gemm"), "{table}");
}

#[test]
fn help_doctor_and_start_up() {
    for command in ["train", "generate", "logits", "parity", "convert", "tokenize", "bench", "doctor"] {
        assert!(felid(&[command, "--help"]).status.success(), "{command}");
    }
    let report: serde_json::Value = serde_json::from_slice(&felid(&["doctor", "--json"]).stdout).unwrap();
    assert!(report["threads"].as_u64().unwrap() >= 1 && report["cuda"]["libraries"].is_array());
    let time = || {
        let start = Instant::now();
        assert!(felid(&["--version"]).status.success());
        start.elapsed()
    };
    let best = (0..10).map(|_| time()).min().unwrap();
    assert!(best < Duration::from_millis(50), "start-up took {best:?}");
}
