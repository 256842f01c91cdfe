//! `felid train`.

use super::{Compute, interrupts, parse_dtype, print};
use clap::Args;
use felid::data::Tokenizer;
use felid::eval::Quality;
use felid::generate::{Generator, Request};
use felid::model::formats::write_atomically;
use felid::ops::Sampling;
use felid::tensor::{DType, Device};
use felid::train::{StepReport, Task, TrainConfig, Trainer};
use felid::{Error, Result};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;
use std::fs::File;
use std::io::{ErrorKind, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

/// Train a model. Without arguments: the preset `nano` on data/shakespeare.txt, then samples at two chunk sizes.
///
/// Settings come from the preset, then the TOML file, then flags. The resolved ones are saved beside the checkpoint.
#[derive(Args)]
pub struct Train {
    /// TOML file of settings
    config: Option<PathBuf>,
    /// nano, cpu-small, paper-31m, paper-92m, paper-1b or paper-dense [default: nano]
    #[arg(long)]
    preset: Option<String>,
    /// text: the next token of --data; mqar: associative recall, reports answer accuracy
    #[arg(long, value_parser = ["text", "mqar"])]
    task: Option<String>,
    /// Text file, .bin shard or folder of shards
    #[arg(long)]
    data: Option<PathBuf>,
    /// tokenizer.json or a folder with one [default: bytes]
    #[arg(long)]
    tokenizer: Option<PathBuf>,
    /// Folder to write [default: runs/PRESET]
    #[arg(long)]
    out: Option<PathBuf>,
    #[arg(long)]
    steps: Option<i64>,
    #[arg(long)]
    batch_size: Option<i64>,
    #[arg(long)]
    seq_len: Option<i64>,
    #[arg(long)]
    grad_accum: Option<i64>,
    #[arg(long)]
    lr: Option<f64>,
    #[arg(long)]
    min_lr: Option<f64>,
    #[arg(long)]
    warmup: Option<i64>,
    #[arg(long)]
    weight_decay: Option<f64>,
    /// Largest gradient norm; 0 for no clipping
    #[arg(long)]
    clip: Option<f64>,
    /// Chunk sizes taken in turn, such as 4,8,16
    #[arg(long, value_delimiter = ',')]
    chunk_sizes: Option<Vec<i64>>,
    #[arg(long)]
    eval_every: Option<i64>,
    #[arg(long)]
    save_every: Option<i64>,
    #[arg(long)]
    seed: Option<i64>,
    /// Compute activations again in backward: less memory, more time
    #[arg(long)]
    recompute: bool,
    #[arg(long, value_parser = parse_dtype)]
    dtype: Option<DType>,
    /// Any setting of the TOML file, such as --set model.decoder.dim=96
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Continue the run in --out from its last checkpoint
    #[arg(long, conflicts_with = "overwrite")]
    resume: bool,
    /// Start anew where --out holds a run
    #[arg(long)]
    overwrite: bool,
    #[command(flatten)]
    compute: Compute,
}

impl Train {
    /// Everything given by file and flags, as one table.
    fn given(&self) -> Result<toml::Table> {
        let mut t = match &self.config {
            Some(path) => {
                let text = std::fs::read_to_string(path).map_err(|source| Error::Io {
                    action: "read",
                    path: path.clone(),
                    source,
                })?;
                TrainConfig::parse_table(&text, path)?
            }
            None => toml::Table::new(),
        };
        let path = |p: &PathBuf| toml::Value::from(p.to_string_lossy().into_owned());
        let flags: [(&str, Option<toml::Value>); 20] = [
            ("preset", self.preset.clone().map(Into::into)),
            ("task", self.task.clone().map(Into::into)),
            ("data", self.data.as_ref().map(path)),
            ("tokenizer", self.tokenizer.as_ref().map(path)),
            ("out", self.out.as_ref().map(path)),
            ("steps", self.steps.map(Into::into)),
            ("batch_size", self.batch_size.map(Into::into)),
            ("seq_len", self.seq_len.map(Into::into)),
            ("grad_accum", self.grad_accum.map(Into::into)),
            ("lr", self.lr.map(Into::into)),
            ("min_lr", self.min_lr.map(Into::into)),
            ("warmup", self.warmup.map(Into::into)),
            ("weight_decay", self.weight_decay.map(Into::into)),
            ("clip", self.clip.map(Into::into)),
            ("chunk_sizes", self.chunk_sizes.clone().map(Into::into)),
            ("eval_every", self.eval_every.map(Into::into)),
            ("save_every", self.save_every.map(Into::into)),
            ("seed", self.seed.map(Into::into)),
            ("recompute", self.recompute.then_some(true.into())),
            ("dtype", self.dtype.map(|d| d.to_string().into())),
        ];
        for (key, value) in flags {
            if let Some(value) = value {
                t.insert(key.into(), value);
            }
        }
        for setting in &self.set {
            let table = TrainConfig::parse_table(setting, Path::new("--set"))
                .or_else(|_| {
                    // a bare word is a string
                    let (key, value) = setting.split_once('=').unwrap_or((setting, ""));
                    TrainConfig::parse_table(&format!("{key} = {:?}", value.trim()), Path::new("--set"))
                })
                .map_err(|e| Error::Usage(e.to_string()))?;
            merge(&mut t, table);
        }
        Ok(t)
    }

    fn open(&self, device: Device) -> Result<Trainer> {
        let (given, source) = (self.given()?, self.config.clone().unwrap_or_else(|| "flags".into()));
        if self.resume {
            let out = TrainConfig::from_table(given.clone(), &source, "nano")?.out;
            return Trainer::resume_on(&out, device, |saved| {
                let mut changed = saved.with(given, &source)?;
                changed.out = out.clone();
                Ok(changed)
            });
        }
        let config = TrainConfig::from_table(given, &source, "nano")?;
        if let Some(file) = ["config.json", "tokenizer.json"].iter().find(|f| config.out.join(f).exists())
            && !self.overwrite
        {
            let out = config.out.display();
            return Err(Error::Usage(format!(
                "{out} holds a run already ({file}): add --resume or --overwrite, or choose another --out"
            )));
        }
        Trainer::on(config, device)
    }

    pub fn run(self) -> Result<()> {
        let device = self.compute.set()?;
        let mut trainer = self.open(device)?;
        let (steps, model) = (trainer.config.steps, trainer.model.config());
        print::note(&format!(
            "{:?}, {} parameters in {}, {}; {} x {} tokens a micro-batch, chunk sizes {:?}; step {} of {steps}; writing {}",
            model.model_type,
            trainer.model.numel(),
            trainer.config.dtype,
            match device {
                Device::Cpu => format!("{} threads", rayon::current_num_threads()),
                other => other.to_string(),
            },
            trainer.config.batch_size,
            trainer.config.seq_len,
            trainer.config.round(model).into_iter().flatten().collect::<Vec<_>>(),
            trainer.steps_done(),
            trainer.config.out.display(),
        ));
        let stop = interrupts();
        let mut log = Log::open(&trainer.config.out, trainer.steps_done())?;
        let start = Instant::now();
        let progress = Progress::new(steps, trainer.steps_done());
        while trainer.steps_done() < steps {
            let report = trainer.step()?;
            progress.step(&report);
            log.write(&json!({ "kind": "step", "time_s": start.elapsed().as_secs_f64(), "report": report }))?;
            let (done, c) = (report.step, &trainer.config);
            if stop.load(Relaxed) {
                break;
            }
            let due = |every: u64| every > 0 && done.is_multiple_of(every) && done < steps;
            if due(c.eval_every) {
                let found = trainer.evaluate(c.eval_windows)?;
                log.quality(done, &found)?;
                progress.say(&format!("step {done}: {}", summary(&trainer, &found)));
            }
            if due(c.save_every) {
                trainer.save()?;
            }
        }
        progress.finish();
        trainer.save()?;
        if stop.load(Relaxed) {
            let (done, out) = (trainer.steps_done(), trainer.config.out.display());
            return Err(Error::Interrupted(format!("step {done} is saved in {out}: --resume goes on")));
        }
        let found = trainer.evaluate(trainer.config.final_eval_windows)?;
        log.quality(trainer.steps_done(), &found)?;
        print::note(&format!(
            "step {steps}, held out: {} ({:.0} s)",
            summary(&trainer, &found),
            start.elapsed().as_secs_f64()
        ));
        if trainer.config.task == Task::Text {
            samples(&trainer)?;
        }
        Ok(())
    }
}

fn merge(old: &mut toml::Table, new: toml::Table) {
    for (key, value) in new {
        match (old.get_mut(&key), value) {
            (Some(toml::Value::Table(old)), toml::Value::Table(new)) => merge(old, new),
            (_, value) => drop(old.insert(key, value)),
        }
    }
}

fn summary(trainer: &Trainer, found: &[(Option<usize>, Quality)]) -> String {
    let unit = match (&trainer.tokenizer, trainer.config.task) {
        (Tokenizer::Bytes, Task::Text) => "nats/byte",
        _ => "nats/token",
    };
    let one = |(chunk, q): &(Option<usize>, Quality)| {
        let at = chunk.map_or(String::new(), |c| format!("C {c} "));
        match trainer.config.task {
            Task::Text => format!("{at}{:.3}", q.loss),
            Task::Mqar => format!("{at}{:.3} ({:.1}% right)", q.loss, 100.0 * q.accuracy),
        }
    };
    format!("{} {unit}", found.iter().map(one).collect::<Vec<_>>().join(", "))
}

/// A sample at the smallest and the largest chunk size, continuing the start of the held-out text.
fn samples(trainer: &Trainer) -> Result<()> {
    let (model, c) = (&trainer.model, &trainer.config);
    let Some(prompt) = trainer.held_out_prompt()? else { return Ok(()) };
    let mut sizes: Vec<Option<usize>> = c.round(model.config());
    sizes.sort_unstable();
    sizes.dedup();
    let picked: Vec<Option<usize>> = match sizes[..] {
        [] => vec![],
        [one] => vec![one],
        [first, .., last] => vec![first, last],
    };
    for chunk_size in picked {
        let request = Request {
            chunk_size,
            sampling: Sampling { temperature: 0.8, ..Default::default() },
            seed: c.seed,
            ..Request::new(prompt.clone(), model.config().block_size.min(c.seq_len) + 1 - prompt.len())
        };
        let at = chunk_size.map_or(String::new(), |c| format!(", chunk size {c}"));
        print::line(&format!("\n--- sample{at} (the first {} tokens are the prompt)", prompt.len()))?;
        print::text(&trainer.tokenizer.decode(&prompt)?)?;
        let generator = Generator::new(model).with_tokenizer(trainer.tokenizer.clone());
        for event in generator.start(vec![request])? {
            print::text(&event?.text)?;
        }
        print::line("")?;
    }
    Ok(())
}

/// `log.jsonl`: a line a step and a line a validation. Resuming drops the lines of steps that were lost.
struct Log {
    file: File,
    path: PathBuf,
}

impl Log {
    fn open(dir: &Path, steps_done: u64) -> Result<Self> {
        let path = dir.join("log.jsonl");
        let io = |action: &'static str| {
            let path = path.clone();
            move |source| Error::Io { action, path, source }
        };
        std::fs::create_dir_all(dir).map_err(io("create the folder of"))?;
        let old = match std::fs::read(&path) {
            Ok(old) if steps_done > 0 => old,
            Err(e) if steps_done > 0 && e.kind() != ErrorKind::NotFound => return Err(io("read")(e)),
            _ => Vec::new(),
        };
        let old = String::from_utf8_lossy(&old);
        let step_of = |line: &str| {
            let v: serde_json::Value = serde_json::from_str(line).ok()?;
            v["report"]["step"].as_u64().or(v["step"].as_u64())
        };
        let kept: String =
            old.lines().filter(|l| step_of(l).is_some_and(|s| s <= steps_done)).map(|l| format!("{l}\n")).collect();
        // whole or not at all: the lines of an earlier run are not lost to an ill-timed end of this one
        write_atomically(&path, |w| w.write_all(kept.as_bytes()).map_err(io("write")))?;
        let file = File::options().append(true).open(&path).map_err(io("open"))?;
        Ok(Self { file, path })
    }
    fn write(&mut self, value: &serde_json::Value) -> Result<()> {
        let path = self.path.clone();
        // one write, so that an end at any time leaves whole lines
        self.file.write_all(format!("{value}\n").as_bytes()).map_err(|source| Error::Io { action: "write", path, source })
    }
    fn quality(&mut self, step: u64, found: &[(Option<usize>, Quality)]) -> Result<()> {
        for (chunk_size, quality) in found {
            self.write(&json!({ "kind": "validation", "step": step, "chunk_size": chunk_size, "quality": quality }))?;
        }
        Ok(())
    }
}

/// A bar on a terminal; elsewhere a line now and then.
struct Progress {
    bar: ProgressBar,
    terminal: bool,
}

impl Progress {
    fn new(steps: u64, done: u64) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let bar = ProgressBar::with_draw_target(
            Some(steps),
            if terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() },
        );
        if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg} [{elapsed} < {eta}]") {
            bar.set_style(style);
        }
        bar.set_position(done);
        Self { bar, terminal }
    }
    fn step(&self, r: &StepReport) {
        let text = format!("loss {:.3}, norm {:.2}, {:.1}K tokens/s", r.loss, r.grad_norm, r.tokens_per_s / 1e3);
        if self.terminal {
            self.bar.set_message(text);
            self.bar.set_position(r.step);
        } else if r.step.is_multiple_of(100) {
            print::note(&format!("step {}: {text}", r.step));
        }
    }
    fn say(&self, text: &str) {
        if self.terminal { self.bar.suspend(|| print::note(text)) } else { print::note(text) }
    }
    fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
